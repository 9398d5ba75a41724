"""One component through wrappers, edits and a recipe, to targets and the files around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import Problem, StreamconvError, UsageError
from streamconv.ops import Expression
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.diagnosis import unmatched
from streamconv.plans.mapping import Direction, begin_names, map_tensors
from streamconv.plans.plan import Check, Dropped
from streamconv.plans.recipe import ConfigMap, Files, Recipe, Surroundings
from streamconv.plans.wrappers import unwrap
from streamconv.readers.checkpoint import Component
from streamconv.writers import Wrapping


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a component.

    Attributes:
        targets: target name -> (source names with their component, expression).
        config: the target's config; None where there is none.
        files: what becomes of its side files; paths are relative to the component.
        wrapping: what a torch file of it holds around the tensors; None: nothing.
        dropped, checks, notes, problems: for the plan.
    """

    targets: Mapping[str, tuple[tuple[str, ...], Expression]]
    config: Config | None
    files: Files = field(default_factory=Files)
    dropped: tuple[Dropped, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    wrapping: Wrapping | None = None


def apply_recipe(
    component: Component,
    sources: Mapping[str, str],
    recipe: Recipe,
    *,
    reverse: bool,
    around: tuple[Path, tuple[str, ...]],
    target_config: Config | None = None,
    allow_unmatched: bool = False,
    ranks: int = 1,
) -> Applied:
    """Apply a recipe to one component.

    Args:
        component: its tensors have the names that edits gave them.
        sources: those names -> the names in the source.
        recipe: what to apply.
        reverse: read it backwards.
        around: the component's directory, and its side files relative to that.
        target_config: what the target's config is to be, instead of what the recipe makes.
        allow_unmatched: drop what no rule wants.
        ranks: how many model-parallel ranks the output is for.

    Raises:
        UsageError: the recipe has no such direction, or lacks a config, or refuses it.
    """
    config, notes = _config_of(recipe, component, target_config, reverse=reverse)
    direction = _direction(recipe, config, target_config, reverse)
    unwrapped = unwrap(component.tensors, begin_names(direction))
    tensors = {name: component.tensors[source] for source, name in unwrapped.names.items()}
    origin = {name: sources[source] for source, name in unwrapped.names.items()}
    mapped = map_tensors(tensors, direction)
    dropped = [
        Dropped(sources[each.name], each.reason) for each in unwrapped.dropped if each.name in sources
    ] + [Dropped(origin[each.name], each.reason) for each in mapped.dropped]
    problems = list(mapped.problems)
    if allow_unmatched:
        dropped += (
            Dropped(origin[name], "no rule matches it (--allow-unmatched)") for name in mapped.leftover
        )
    else:
        patterns = (pattern.text for rule in recipe.rules for pattern in direction.patterns(rule).values())
        problems += unmatched(mapped.leftover, tensors, patterns)
    named = {
        name: (tuple(origin[source] for source in sources), expression)
        for name, (sources, expression) in mapped.targets.items()
    }
    files = Files()
    notes += [*unwrapped.notes, *_remarks(recipe, direction)]
    if not problems and direction.to_config is not None:
        make = recipe.files_back if reverse else recipe.files
        surroundings = Surroundings(*around, config or {}, direction.to_config, direction.sizes)
        try:
            files = make(surroundings)
        except StreamconvError as error:
            problems += error.problems
    wrap = recipe.wrap_back if reverse else recipe.wrap
    return Applied(
        named,
        direction.to_config,
        files,
        tuple(dropped),
        tuple(mapped.checks),
        (*notes, *files.notes),
        tuple(problems),
        wrap({**direction.to_config, "model_parallel_size": ranks})
        if wrap and direction.to_config is not None and not problems
        else None,
    )


def _config_of(
    recipe: Recipe, component: Component, target: Config | None, *, reverse: bool
) -> tuple[Config | None, list[str]]:
    """The config that a component is read with, and what to say of where it is from."""
    config = component.config
    if config is None and target is not None and (recipe.config_back if reverse else recipe.config) is None:
        return target, []  # both sides have the same
    if recipe.config_of is None or (config and config.get("model_type")):
        return config, []
    measured = recipe.config_of({name: tensor.spec.shape for name, tensor in component.tensors.items()})
    if not measured:
        return config, []
    shown = ", ".join(f"{key} {value}" for key, value in measured.items() if key not in (config or {}))
    return {**measured, **(config or {})}, [f"from names and shapes, for no config says it: {shown}"]


def _direction(recipe: Recipe, config: Config | None, target: Config | None, reverse: bool) -> Direction:
    """Both configs and the sizes.

    Raises:
        UsageError: what is missing or refused.
    """
    if reverse and recipe.one_way:
        raise UsageError(f"recipe {recipe.name} has no way back: {recipe.one_way}")
    left, right = (recipe.target, recipe.source) if reverse else (recipe.source, recipe.target)
    sized = recipe.source is not None or recipe.sizes
    if config is None and sized and not (reverse and target is not None):
        what = left.title if left else "the source"
        raise UsageError(
            f"recipe {recipe.name} needs the config of {what}, and there is none beside the weights",
            hint="name it with --config FILE",
        )
    if config is not None and right and left and right.is_of(config) and not left.is_of(config):
        raise UsageError(
            f"by its config, the source is a {right.title} already, not a {left.title}",
            hint="without a recipe it is written as it is",
        )
    for refusal in recipe.refuses_back if reverse else recipe.refuses:
        if formula.evaluate(refusal.when, config or {}):
            raise UsageError(f"recipe {recipe.name} cannot do it: {refusal.reason}", hint=refusal.hint)
    make = recipe.config_back if reverse else recipe.config
    made: dict[str, Any] | None = dict(target) if target is not None else None
    if made is None and config is not None:
        if make is None and reverse and recipe.config is not None:
            what = right.title if right else "the target"
            raise UsageError(
                f"recipe {recipe.name} does not know how to make the config of {what}",
                hint="take it from the original model with --like DIR",
            )
        made = _made(make, config, left) if make else dict(config)
    own = made if reverse else config
    sizes: dict[str, Any] = {}
    if recipe.source is not None:
        sizes = recipe.source.sizes_of(own or {})
    else:
        for name, text in recipe.sizes.items():
            sizes[name] = formula.evaluate(text, {**(own or {}), **sizes})
    return Direction(recipe, reverse, config, made, sizes)


def _made(make: ConfigMap, config: Config, architecture: Architecture | None) -> dict[str, Any]:
    """The target's config; whatever a strange one lacks or has of another kind is one clear error."""
    try:
        return make(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        what = architecture.title if architecture else "such a model"
        detail = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"the config is not that of {what}: {detail}") from error


def _remarks(recipe: Recipe, direction: Direction) -> list[str]:
    if direction.reverse:
        return []
    config = direction.from_config or {}
    return [remark.text for remark in recipe.remarks if formula.evaluate(remark.when, config)]
