"""A recipe, which way it is read, and the configs of both ends."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from streamconv.errors import CheckpointError, Problem, UsageError, a
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.findings import Findings
from streamconv.plans.patterns import Pattern
from streamconv.plans.plan import Targets
from streamconv.plans.recipe import ConfigMap, Recipe, Rule
from streamconv.plans.table import Declared, Sizes

# A size that costs nothing, whatever there is.
_ALWAYS = 1 << 16
_ALWAYS_ALONG_AXES = 1 << 24  # contexts of ten million positions, which no stored axis shows


@dataclass(frozen=True)
class Direction:
    """A recipe, which way it is read, and the configs of both ends.

    Attributes:
        from_config: of what is converted, or None.
        to_config: of what it becomes, or None.
        sizes: of the recipe's source side, whichever way it is read: the programs are about them.
    """

    recipe: Recipe
    reverse: bool
    from_config: Config | None
    to_config: dict[str, Any] | None
    sizes: Sizes

    @property
    def begin(self) -> Architecture | None:
        """The architecture that is converted."""
        return self.recipe.target if self.reverse else self.recipe.source

    @property
    def end(self) -> Architecture | None:
        """The architecture that it is converted to."""
        return self.recipe.source if self.reverse else self.recipe.target

    @property
    def configs(self) -> tuple[Config, Config] | None:
        """The configs of both ends in one naming, as far as the recipe translates; None where it does not."""
        (there, back) = (self.recipe.config, self.recipe.config_back)[:: -1 if self.reverse else 1]
        if self.from_config is None or self.to_config is None:
            return None
        with suppress(UsageError):
            if there is not None:
                return _made(there, self.from_config, self.begin), self.to_config
            told = self.to_config if back is None else _made(back, self.to_config, self.end)
            return self.from_config, told
        return None

    def patterns(self, rule: Rule) -> Mapping[str, Pattern]:
        """The side of a rule that is matched."""
        return self._bound(rule.targets if self.reverse else rule.sources)

    def results(self, rule: Rule) -> Mapping[str, Pattern]:
        """The side of a rule that is made."""
        return self._bound(rule.sources if self.reverse else rule.targets)

    def _bound(self, patterns: Mapping[str, Pattern]) -> Mapping[str, Pattern]:
        return {key: pattern.bound(self.sizes) for key, pattern in patterns.items()}

    @cached_property
    def begin_tensors(self) -> Mapping[str, Declared]:
        """What the table of the converted architecture has, by name; empty without a table.

        Raises:
            UsageError: the config lacks something that it takes.
        """
        return self._declared(self.begin, self.from_config, own=not self.reverse)

    @cached_property
    def end_tensors(self) -> Mapping[str, Declared]:
        """The same of the architecture that it is converted to."""
        return self._declared(self.end, self.to_config, own=self.reverse)

    def _declared(
        self, architecture: Architecture | None, config: Config | None, *, own: bool
    ) -> Mapping[str, Declared]:
        """An end's table; `own`: the end is the recipe's source side, which `sizes` are of."""
        if architecture is None or (config is None and not own):
            return {}
        return architecture.tensors(self.sizes if own else architecture.sizes_of(config or {}))


def direct(
    recipe: Recipe,
    tensors: Targets,
    config: Config | None,
    target: Config | None,
    findings: Findings,
    *,
    reverse: bool,
) -> Direction:
    """Which way a recipe is read, with both configs and the sizes.

    The target's config is `target` where there is one, and else what the recipe makes of the source's `config`.

    Raises:
        UsageError: the recipe has no such direction, or lacks a config, or refuses it.
    """
    given, before = config, len(findings.notes)
    config = _measured(recipe, tensors, config, target, findings, reverse=reverse)
    if reverse and recipe.one_way:
        raise UsageError(f"recipe {recipe.name} has no way back: {recipe.one_way}")
    left = recipe.target if reverse else recipe.source
    sized = recipe.source is not None or recipe.sizes
    unsized = given is None and target is None and sized and not _suffices(recipe, config)
    if unsized and (renames := _renames(recipe, tensors, reverse=reverse)):
        findings.notes[before:] = (
            f"there is no config: recipe {recipe.name} renames what is there, and does not know what is missing; "
            "--config FILE or --like DIR tells",
        )
        return Direction(renames, reverse, None, None, {})
    if config is None and sized and not (reverse and target is not None):
        what = left.title if left else "the source"
        raise UsageError(
            f"recipe {recipe.name} needs the config of {what}, and there is none beside the weights",
            hint="name it with --config FILE, or a model that has it with --like DIR",
        )
    _require_taken(recipe, tensors, config, reverse=reverse)
    made = dict(target) if target is not None else None
    if made is None and config is not None:
        made = _config_made(recipe, tensors, config, reverse=reverse)
    return Direction(recipe, reverse, config, made, _sizes(recipe, (made if reverse else config) or {}))


def _require_taken(recipe: Recipe, tensors: Targets, config: Config | None, *, reverse: bool) -> None:
    """Refuse a config that is of what the recipe makes, or that the recipe refuses.

    Raises:
        UsageError: it is one.
    """
    left, right = (recipe.target, recipe.source) if reverse else (recipe.source, recipe.target)
    if config is not None and right and left and right.is_of(config) and not left.is_of(config):
        named = _is_named(recipe, tensors, after=reverse) and not _is_named(
            recipe, tensors, after=not reverse
        )
        raise UsageError(
            f"by its config, the source is {a(right.title)} already, not {a(left.title)}",
            hint="by its names it is not: a config of what it becomes is named with --like DIR, not with --config"
            if named
            else "without a recipe it is written as it is",
        )
    for refusal in recipe.refuses_back if reverse else recipe.refuses:
        if formula.evaluate(refusal.when, config or {}):
            raise UsageError(f"recipe {recipe.name} cannot do it: {refusal.reason}", hint=refusal.hint)


def _config_made(recipe: Recipe, tensors: Targets, config: Config, *, reverse: bool) -> dict[str, Any]:
    """The target's config as the recipe makes it of the source's.

    Raises:
        UsageError: the recipe does not make it this way, or the source's is of no model with these tensors.
    """
    left, right = (recipe.target, recipe.source) if reverse else (recipe.source, recipe.target)
    make = recipe.config_back if reverse else recipe.config
    if make is None and reverse and recipe.config is not None:
        what = right.title if right else "the target"
        raise UsageError(
            f"recipe {recipe.name} does not know how to make the config of {what}",
            hint="take it from the original model with --like DIR",
        )
    if left is not None:
        _require_sane(left, config, tensors)
    return _made(make, config, left) if make else dict(config)


def _sizes(recipe: Recipe, config: Config) -> Sizes:
    """The sizes that programs are about, by the config of the recipe's source side.

    Raises:
        UsageError: the config lacks one.
    """
    if recipe.source is not None:
        return recipe.source.sizes_of(config)
    sizes: dict[str, Any] = {}
    for name, text in recipe.sizes.items():
        sizes[name] = formula.evaluate(text, {**config, **sizes})
        if sizes[name] is None:
            raise UsageError(f"the config has no {text}, which is the {name} of recipe {recipe.name}")
    return sizes


def _is_named(recipe: Recipe, tensors: Targets, *, after: bool) -> bool:
    """Whether every tensor has a name that the recipe starts from, or that it leads to: `after`."""
    sides = [side for rule in recipe.rules for side in (rule.targets if after else rule.sources).values()]
    return all(any(side.match(name) is not None for side in sides) for name in tensors)


def _require_sane(side: Architecture, config: Config, tensors: Targets) -> None:
    """Refuse a config whose sizes no model with these tensors has, before lists of those lengths are made.

    Raises:
        UsageError: one of them is far beyond every tensor that there is.
    """
    with suppress(UsageError):  # what is missing is said elsewhere
        sizes = side.sizes_of(config)
        longest = max((size for _, each in tensors.values() for size in each.spec.shape), default=0)
        kinds = (
            (
                (line.dimensions for line in side.lines),
                max(16 * longest, _ALWAYS_ALONG_AXES),
                f"no axis has over {longest:,}",
            ),
            (side.counts.values(), max(16 * len(tensors), _ALWAYS), f"there are {len(tensors):,} tensors"),
        )
        beyond = [
            Problem(f"by the config, {name} is {sizes[name]:,}, and {what} of the source")
            for texts, most, what in kinds
            for name in sorted(set().union(*map(formula.names_in, texts)))
            if type(sizes.get(name)) is int and sizes[name] > most
        ]
        if beyond:
            raise CheckpointError(
                f"the config is not that of these tensors: {beyond[0].message}",
                hint="take the right one with --config FILE or --like DIR",
                problems=beyond if beyond[1:] else (),
            )


def _suffices(recipe: Recipe, config: Config | None) -> bool:
    """Whether a config, which may have been taken from names and shapes, has all sizes of a recipe."""
    with suppress(UsageError):
        return config is not None and (recipe.source is None or bool(recipe.source.sizes_of(config)))
    return False


def _renames(recipe: Recipe, tensors: Targets, *, reverse: bool) -> Recipe | None:
    """A recipe without its tables, which needs no config, where it only renames these tensors; else None."""
    if recipe.config or recipe.config_back or (recipe.refuses_back if reverse else recipe.refuses):
        return None
    rules = [
        replace(rule, when="")
        for rule in recipe.rules
        if isinstance(rule.source, str) and isinstance(rule.target, str) and not (rule.program or rule.equals)
        if "[" not in rule.source + rule.target
    ]
    sides = [Pattern(str(rule.target if reverse else rule.source)) for rule in rules]
    if not all(any(side.match(name) is not None for side in sides) for name in tensors):
        return None
    return Recipe(recipe.name, recipe.title, None, None, tuple(rules), one_way=recipe.one_way)


def _measured(
    recipe: Recipe, tensors: Targets, config: Config | None, target: Config | None, findings: Findings,
    *, reverse: bool,
) -> Config | None:  # fmt: skip
    """The config that the tensors are read with: what files leave out, names and shapes may say."""
    if config is None and target is not None and (recipe.config_back if reverse else recipe.config) is None:
        return target  # both sides have the same
    if (
        config is None
        and target is not None
        and recipe.config_of is None
        and not reverse
        and recipe.config_back
    ):
        findings.notes.append("the source's config is made from that of --like")
        return _made(recipe.config_back, target, recipe.target)
    whole = None if reverse else _completed(recipe, config, target)
    if whole is not None:
        findings.notes.append("what the source's config lacks is made from that of --like")
        return whole
    if recipe.config_of is None or (config and (config.get("model_type") or config.get("_class_name"))):
        return config
    measured = recipe.config_of({name: tensor.spec.shape for name, (_, tensor) in tensors.items()})
    if not measured:
        return config
    shown = ", ".join(f"{key} {value}" for key, value in measured.items() if key not in (config or {}))
    findings.notes.append(f"from names and shapes, because no config says it: {shown}")
    return {**measured, **(config or {})}


def _completed(recipe: Recipe, config: Config | None, target: Config | None) -> Config | None:
    """A source's config with what it lacks from the target's, where the recipe refuses it without; else None."""
    if config is None or target is None or recipe.config_back is None or not _is_refused(recipe, config):
        return None
    with suppress(UsageError):  # it is refused for what it is then
        said = {key: value for key, value in config.items() if value is not None}
        whole = {**_made(recipe.config_back, target, recipe.target), **said}
        return None if _is_refused(recipe, whole) else whole
    return None


def _is_refused(recipe: Recipe, config: Config) -> bool:
    return any(formula.evaluate(refusal.when, config) for refusal in recipe.refuses)


def _made(make: ConfigMap, config: Config, architecture: Architecture | None) -> dict[str, Any]:
    """The target's config; whatever a strange one lacks or has of another kind is one clear error."""
    try:
        return make(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        what = architecture.title if architecture else "such a model"
        detail = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"the config is not that of {what}: {detail}") from error
