"""The known recipes: those registered from above, those of installed packages, and one from a file."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Literal, NamedTuple

from streamconv.dtypes import DType
from streamconv.errors import UsageError, about
from streamconv.options.spelling import either
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import Kinds, kinds, occurs, shape_of
from streamconv.plans.recipe import Recipe
from streamconv.plans.recipe_file import read_recipe
from streamconv.readers.checkpoint import Component
from streamconv.storage.location import Location, locate
from streamconv.writers.formats import FORMATS
from streamconv.writers.layout import Wrapping

GROUP = "streamconv.recipes"
"""The entry point group: each names a `Recipe`, or a list of them."""

_SUFFIXES = (".toml", ".py")


class Heads(NamedTuple):
    """What is known of the heads of language models."""

    has_head: Callable[[Config], bool]
    """Whether the class that a config names has one."""
    head_of: Callable[[str, Config], str | None]
    """What the head is called that is an embedding, by the name of that; None where it is not known."""


RECIPES: dict[str, Recipe] = {}
"""Recipes that are registered, by name, in the order in which they came."""

LOADERS: dict[str, Callable[[], Iterable[Recipe]]] = {}
"""What gives recipes that are made when the first is wanted, by the package that has them; they are listed first."""

LAYERS: dict[str, Callable[[], Mapping[str, tuple[str, ...]]]] = {}
"""What gives, by model type, what one of stands in the names of every such model, where no table has them: whole words, with
`#` for a number; after `!`, what stands in none. By the package that has it."""

KEPT: dict[str, Callable[[Config, DType], Iterable[str]]] = {}
"""What says which tensors a model's own library keeps in F32 where all others are of a narrower dtype: regular expressions
of which one is found in their names. By the package that has it."""


HEADS: dict[str, Callable[[], Heads]] = {}
"""What knows the heads that files leave out because they are the embedding. By the package that has it."""


def register(*recipes: Recipe) -> None:
    """Make recipes known, by their name; they are listed in the order in which they come.

    Raises:
        UsageError: a formula of one uses a name that there is not.
    """
    for recipe in recipes:
        with about(f"recipe {recipe.name}"):
            recipe.check()
    RECIPES.update({recipe.name: recipe for recipe in recipes})


def all_recipes() -> Mapping[str, Recipe]:
    """Every recipe by name; those of installed packages come after the registered and replace none.

    Raises:
        UsageError: a package's entry point is not a recipe.
    """
    own = {recipe.name: recipe for load in LOADERS.values() for recipe in load()} | RECIPES
    return own | {name: recipe for name, recipe in _installed().items() if name not in own}


@cache
def _installed() -> Mapping[str, Recipe]:
    found: dict[str, Recipe] = {}
    for point in entry_points(group=GROUP):
        loaded = point.load()
        for recipe in loaded if isinstance(loaded, list | tuple) else [loaded]:
            if not isinstance(recipe, Recipe):
                raise UsageError(f"entry point '{point.value}' of {GROUP} is not a recipe")
            with about(f"recipe {recipe.name} of '{point.value}'"):
                recipe.check()
            found.setdefault(recipe.name, recipe)
    return found


def architectures() -> frozenset[str]:
    """Every name that `--to-arch` may take."""
    sides = (side for recipe in all_recipes().values() for side in (recipe.source, recipe.target))
    return frozenset({"hf", *(side.name for side in sides if side)})


def named(name: str) -> Recipe:
    """The recipe of this name, or in this file.

    Raises:
        UsageError: there is none.
    """
    path = locate(name)
    if path.suffix in _SUFFIXES:
        return _from_file(path)
    known = all_recipes()
    name = next((recipe.name for recipe in known.values() if name in recipe.aliases), name)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`streamconv recipes` lists them"
        raise UsageError(f"there is no recipe '{name}'", hint=hint)
    return known[name]


def found(component: Component, to_arch: str | None, like: Config | None = None) -> tuple[Recipe, bool]:
    """The recipe for a component, and whether it is read backwards.

    For the target architecture `hf` or None, the component must lead to one target only. Of several recipes, those
    that lead to what the config `like` is of are taken, and those that do not refuse the component's own config.

    Raises:
        UsageError: there is none, or several.
    """
    ways = _ways(component)
    if to_arch in (None, "hf"):
        fitting = [way for way in ways if not way[1] and not way[0].keeps_lora]
    else:
        fitting = [way for way in ways if way[2] == to_arch]
    if like is not None:
        fitting = [way for way in fitting if _leads_to(*way[:2], like)] or fitting
    targets = sorted({end for _, _, end in ways if end})
    # Names of tensors are better evidence than a config, and more names than fewer.
    clearest = max((len(recipe.found_by) for recipe, backwards, _ in fitting if not backwards), default=0)
    candidates = [
        (recipe, backwards)
        for recipe, backwards, _ in fitting
        if not clearest or (not backwards and len(recipe.found_by) == clearest)
    ]
    if len(candidates) > 1:
        candidates = [way for way in candidates if not _refuses(*way, component.config or {})] or candidates
    if len(candidates) == 1:
        return candidates[0]
    said = (component.config or {}).get("model_type")
    what = f"a checkpoint with model_type '{said}'" if said else "this checkpoint, which has no config"
    if not candidates:
        to = f" to '{to_arch}'" if to_arch else " to Hugging Face's names" if targets else ""
        raise UsageError(f"there is no recipe{to} for {what}", hint=_instead(ways, targets, to_arch))
    names = ", ".join(recipe.name for recipe, _ in candidates)
    raise UsageError(
        f"there are several recipes for {what}: {names}",
        hint=f"choose with --to-arch ({', '.join(targets)}) or --recipe"
        if targets
        else "choose with --recipe",
    )


def _instead(ways: Sequence[_Way], targets: Sequence[str], to_arch: str | None) -> str:
    """What to ask for where no recipe leads to `to_arch`: what was meant, or else all that there is."""
    nameless = [recipe for recipe, back, end in ways if not (back or end)]
    unnamed = sorted({recipe.name for recipe in nameless})
    meant = [
        recipe.name
        for recipe in nameless
        if to_arch and any(name.endswith(f"-{to_arch}") for name in (recipe.name, *recipe.aliases))
    ]
    if meant:
        return f"it is --recipe {either(meant)}"
    if to_arch and (near := get_close_matches(to_arch, targets, n=1)):
        return f"did you mean --to-arch {near[0]}?"
    offers = [f"--recipe {either(unnamed)}"] if unnamed else []
    if targets:
        formats = "".join(
            f"; for files of {form.to_arch}, --to {name}"
            for name, form in FORMATS.items()
            if form.to_arch in targets and not to_arch
        )
        offers.append(f"recipes to {', '.join(targets)} (--to-arch){formats}")
    if offers:
        return f"from here, there are {' and '.join(reversed(offers))}"
    return "name one with --recipe; `streamconv recipes` lists them"


def becomes(component: Component) -> tuple[str, ...]:
    """What `--to-arch` can make of a component, in alphabetical order."""
    config = component.config or {}
    ways = _ways(component)
    return tuple(sorted({end for recipe, back, end in ways if end and not _refuses(recipe, back, config)}))


def becomes_by_name(component: Component) -> set[str]:
    """What `--to-arch` may make of a component whose config is not there, by the kinds of its names."""
    names = {shape_of(name) for name in component.tensors}
    ways = [
        (begin, end)
        for recipe in all_recipes().values()
        for begin, end in ((recipe.source, recipe.target), (recipe.target, recipe.source))
        if not (begin is recipe.target and recipe.one_way) and not (recipe.named_only or recipe.keeps_lora)
    ]
    return {
        end.name
        for begin, end in ways
        if begin is not None and end is not None and names <= {line.name.shape for line in begin.lines}
    }


def foreign(component: Component) -> str | None:
    """Whose names a component has, in words, where transformers and diffusers do not load those; else None."""
    ways = _ways(component)
    sources = (recipe.source for recipe, backwards, _ in ways if not backwards)
    return next((side.title for side in sources if side is not None and _is_foreign(side)), None)


def _is_foreign(side: Architecture) -> bool:
    """Whether a naming is of a program that has no class of transformers' or diffusers' kind."""
    others = [form.to_arch for form in FORMATS.values() if form.to_arch]
    return not side.classes or side.name.startswith(tuple(others))


_Way = tuple[Recipe, bool, str]


def _ways(component: Component) -> list[_Way]:
    """Every recipe for a component, whether it is read backwards, and the name of what it leads to."""
    names = kinds(component.tensors)
    forwards = (
        recipe
        for recipe in all_recipes().values()
        if not recipe.named_only and _is_source(recipe, component.config, names)
    )
    return [
        *((recipe, False, _name(recipe.target)) for recipe in forwards),
        *((recipe, True, _name(recipe.source)) for recipe in backwards(component)),
    ]


def _leads_to(recipe: Recipe, backwards: bool, config: Config) -> bool:
    end = recipe.source if backwards else recipe.target
    return end is not None and end.is_of(config)


def _refuses(recipe: Recipe, backwards: bool, config: Config) -> bool:
    """Whether a recipe refuses a config, as far as that says what it is asked."""
    refusals = recipe.refuses_back if backwards else recipe.refuses
    return bool(config) and any(formula.evaluate(refusal.when, config) for refusal in refusals)


def backwards(component: Component) -> list[Recipe]:
    """The recipes that lead from a component when they are read backwards."""
    return [
        recipe for recipe in all_recipes().values() if not recipe.one_way and is_target(recipe, component)
    ]


def leading(component: Component, name: str) -> list[Recipe]:
    """The recipes that lead to the naming `name` when they are read backwards.

    From one of several components, those that convert the others with it, where there are such.
    """
    ways = [each for each in backwards(component) if each.source is not None and each.source.name == name]
    names = {way.name for way in ways}
    whole = [
        each
        for each in all_recipes().values()
        if each.parts and names.intersection(part.name for part in (each, *each.parts))
    ]
    return whole if component.directory and whole else ways


def keeps_lora(recipe: Recipe | Literal["auto"] | None, to_arch: str | None) -> bool:
    """Whether what is wanted is the LoRA that lies unmerged in the source."""
    if isinstance(recipe, Recipe):
        return recipe.keeps_lora
    return any(known.keeps_lora and _name(known.target) == to_arch for known in all_recipes().values())


def architectures_of(config: Config) -> list[Architecture]:
    """Every naming of the architecture that a config is of, among those that some recipe knows."""
    sides = (side for recipe in all_recipes().values() for side in (recipe.target, recipe.source))
    return [side for side in sides if side is not None and side.is_of(config)]


def architecture_of(config: Config, names: Iterable[str] = ()) -> Architecture | None:
    """The architecture that a config is of, among those that some recipe knows.

    Of several namings, the one that knows the most of `names` is taken.
    """
    kinds = {shape_of(name) for name in names}
    return max(
        architectures_of(config),
        key=lambda side: len(kinds & {line.name.shape for line in side.lines}),
        default=None,
    )


def wrapping_of(config: Config) -> Callable[[Config], Wrapping] | None:
    """What gives what is around a model of a config, where it is what some recipe starts from and says this of."""
    known = all_recipes().values()
    return next(
        (each.wrap_back for each in known if each.wrap_back and each.source and each.source.is_of(config)),
        None,
    )


def layers_of(config: Config) -> tuple[str, ...]:
    """What one of stands in the names of every model of a config's type (see `LAYERS`); nothing where it is not known."""
    found = (load().get(str(config.get("model_type"))) for load in LAYERS.values())
    return next(filter(None, found), ())


def has_head(config: Config) -> bool:
    """Whether a config is that of a language model with a head (see `HEADS`)."""
    return any(load().has_head(config) for load in HEADS.values())


def head_of(embedding: str, config: Config) -> str | None:
    """What the head is called that files leave out because it is this embedding; None where it is not known."""
    return next(filter(None, (load().head_of(embedding, config) for load in HEADS.values())), None)


def kept(config: Config, dtype: DType) -> Callable[[str], object] | None:
    """What tells the names of tensors that stay in F32 though a model is cast to `dtype`; None where none does."""
    patterns = {pattern for find in KEPT.values() for pattern in find(config, dtype)}
    return re.compile("|".join(sorted(patterns))).search if patterns else None


def dequantising(names: Collection[str]) -> list[str]:
    """The names of the recipes that make plain a quantised checkpoint with these names."""
    known = kinds(names)
    return [
        recipe.name for recipe in all_recipes().values() if recipe.found_by_any and _all_occur(recipe, known)
    ]


def is_source(recipe: Recipe, component: Component) -> bool:
    """Whether a component is what a recipe starts from."""
    return _is_source(recipe, component.config, kinds(component.tensors))


def _is_source(recipe: Recipe, config: Config | None, names: Kinds) -> bool:
    if recipe.source is not None and config is not None:
        if recipe.source.is_of(config):
            return _all_occur(recipe, names)
        if config.get("model_type"):
            return False
    return bool(recipe.found_by or recipe.found_by_any) and _all_occur(recipe, names)


def _all_occur(recipe: Recipe, names: Kinds) -> bool:
    one = not recipe.found_by_any or any(occurs(text, names) for text in recipe.found_by_any)
    return one and all(occurs(text, names) for text in recipe.found_by)


def is_target(recipe: Recipe, component: Component) -> bool:
    """Whether a component is what a recipe leads to."""
    target = recipe.target
    return target is not None and component.config is not None and target.is_of(component.config)


def _name(architecture: Architecture | None) -> str:
    return architecture.name if architecture else ""


def _from_file(path: Location) -> Recipe:
    if not path.is_file():
        raise UsageError("there is no such recipe", file=str(path))
    if path.suffix == ".toml":
        return read_recipe(path)
    made = runpy.run_path(str(path)).get("RECIPE")
    if not isinstance(made, Recipe):
        raise UsageError(
            "it defines no RECIPE", file=str(path), hint="RECIPE = Recipe(...), see CONTRIBUTING"
        )
    with about(str(path)):
        made.check()
    return made
