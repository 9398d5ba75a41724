"""What becomes of one component's tensors, from what the source calls them to what the target holds.

1. `select`: which take part, and under which names.
2. `apply_recipe`: what they become, as expressions; without a recipe, themselves.
3. `finish`: in which dtypes, and which of them are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from streamconv.errors import Problem, StreamconvError, UsageError
from streamconv.plans import registry
from streamconv.plans.application import Applied, apply_recipe
from streamconv.plans.architecture import Config
from streamconv.plans.edits import Selected, Targets, finish, select
from streamconv.plans.lora import merge
from streamconv.plans.patterns import Pattern
from streamconv.plans.plan import Check, Dropped
from streamconv.plans.proofs import proofs
from streamconv.plans.recipe import Files, Recipe
from streamconv.plans.vocabulary import Vocabulary, resize, used_ids
from streamconv.plans.wanted import Wanted
from streamconv.plans.wrappers import unwrap
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.writers import Wrapping


@dataclass(slots=True)
class Transformed:
    """A component's targets, and all that the plan has to say of them.

    Attributes:
        component: what is transformed, with the directory and the stem that the output gets.
        targets: target name -> (source names with their component, expression).
        shared: target name -> the earlier target name whose bytes it shares, kept or dropped.
        config: the target's config; None where there is none.
        files: what becomes of side files, relative to the component.
        wrapping: what a torch file of it holds around the tensors; None: nothing.
        dropped, checks, notes: for the plan.
        problems: all that is wrong; where there are any, the rest is not to be used.
    """

    component: Component
    targets: Targets = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    config: Config | None = None
    files: Files = field(default_factory=Files)
    wrapping: Wrapping | None = None
    dropped: list[Dropped] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def transform(
    checkpoint: Checkpoint, component: Component, wanted: Wanted, used: set[Pattern]
) -> Transformed:
    """Everything that is done to a component's tensors. Problems are returned, not raised.

    Args:
        checkpoint: the component's.
        component: what to transform.
        wanted: how.
        used: every pattern of the edits that matched something is added here.
    """
    made = Transformed(component)
    if component.kind == "optimizer":
        wanted = replace(wanted, recipe=None, to_arch=None, config=None, like=None, lora=None, vocabulary=None,
                         edits=replace(wanted.edits, dtype=None))  # fmt: skip
    if wanted.config is not None and len(checkpoint.models) == 1:
        component = replace(component, config=wanted.config)
    if component.config is None:
        component = replace(component, config=registry.config_from(checkpoint.metadata))
    if wanted.lora is not None:
        try:
            merged = merge(component.tensors, wanted.lora, wide=_is_wide(wanted))
        except StreamconvError as error:
            made.problems += error.problems
            return made
        component = replace(component, tensors=merged.tensors)
        made.notes.append(merged.note)
    selected = select(component, wanted.edits, used)
    made.dropped += selected.dropped
    made.problems += selected.problems
    try:
        applied = _applied(checkpoint, replace(component, tensors=selected.tensors), selected, wanted, made)
    except StreamconvError as error:
        made.problems += error.problems
        return made
    made.config, made.files, made.wrapping = applied.config, applied.files, applied.wrapping
    made.dropped += applied.dropped
    made.checks += applied.checks
    made.notes += applied.notes
    made.problems += applied.problems
    if applied.problems:
        return made
    targets = applied.targets
    if wanted.vocabulary is not None:
        try:
            targets = _resized(checkpoint, component, applied, wanted.vocabulary, made)
        except StreamconvError as error:
            made.problems += error.problems
            return made
    finished = finish(targets, component.directory, wanted.edits, used)
    made.targets, made.shared = finished.targets, finished.shared
    made.dropped += finished.dropped
    made.checks += proofs(finished.targets)
    made.notes += finished.notes
    made.problems += finished.problems
    return made


def _resized(
    checkpoint: Checkpoint, component: Component, applied: Applied, wanted: Vocabulary, made: Transformed
) -> Targets:
    """The targets with another number of rows, which the config then says too."""
    architecture = registry.architecture_of(applied.config, applied.targets) if applied.config else None
    if architecture is None or applied.config is None:
        raise UsageError(
            "the architecture is not known, and so not which tensors have a row for each token",
            hint="`streamconv recipes` lists those that are known",
        )
    tokenizer = applied.files.texts.get("tokenizer.json")
    if tokenizer is None and "tokenizer.json" in _side_names(checkpoint, component):
        tokenizer = (checkpoint.directory / component.directory / "tokenizer.json").read_text(
            encoding="utf-8"
        )
    resized = resize(applied.targets, applied.config, architecture, wanted, used_ids(tokenizer))
    if resized is None:
        made.notes.append("the vocabulary has as many rows as are wanted")
        return applied.targets
    made.config = resized.config
    made.notes.append(resized.note)
    return resized.targets


def _is_wide(wanted: Wanted) -> bool:
    """Whether floating-point tensors are to be written in F32 or more."""
    return wanted.edits.dtype is not None and wanted.edits.dtype.bits >= 32


def _applied(
    checkpoint: Checkpoint, component: Component, selected: Selected, wanted: Wanted, made: Transformed
) -> Applied:
    """What the wanted recipe makes of a component."""
    chosen = _recipe(checkpoint, component, wanted)
    if chosen is None:
        others = (_recipe(checkpoint, each, wanted) for each in checkpoint.models)
        alone = next((recipe for recipe, _ in filter(None, others) if recipe.alone), None)
        if alone is not None:
            reason = f"no part of what {alone.name} makes"
            return Applied(
                {}, None, dropped=tuple(Dropped(name, reason) for name in selected.sources.values())
            )
        return _unchanged(component, selected)
    recipe, reverse = chosen
    if recipe.stem:
        made.component = replace(made.component, directory="", stem=recipe.stem)
    made.notes.append(f"recipe {recipe.name}{', backwards' if reverse else ''}: {recipe.title}")
    return apply_recipe(
        component,
        selected.sources,
        recipe,
        reverse=reverse,
        around=(checkpoint.directory / component.directory, _side_names(checkpoint, component)),
        target_config=_like(wanted.like, component),
        allow_unmatched=wanted.allow_unmatched,
        ranks=wanted.ranks,
    )


def _recipe(checkpoint: Checkpoint, component: Component, wanted: Wanted) -> tuple[Recipe, bool] | None:
    """The recipe for a component, and whether it is read backwards; None where it stays what it is."""
    if isinstance(wanted.recipe, Recipe):
        if len(checkpoint.models) == 1 and not wanted.recipe.parts:
            return wanted.recipe, wanted.reverse
        fits = registry.is_target if wanted.reverse else registry.is_source
        candidates = (wanted.recipe, *wanted.recipe.parts)
        found = next((recipe for recipe in candidates if fits(recipe, component)), None)
        if found is None and len(checkpoint.models) == 1:
            found = wanted.recipe
        return (found, wanted.reverse) if found else None
    if wanted.recipe is None and wanted.to_arch is None:
        return None
    try:
        return registry.found(component, wanted.to_arch)
    except UsageError:
        if len(checkpoint.models) == 1:
            raise
        return None


def _unchanged(component: Component, selected: Selected) -> Applied:
    """A component without a recipe: its tensors as they are, out of their wrappers."""
    unwrapped = unwrap(component.tensors, ())
    targets = {
        name: ((selected.sources[source],), component.tensors[source])
        for source, name in unwrapped.names.items()
    }
    return Applied(targets, component.config, notes=unwrapped.notes)


def _like(like: Checkpoint | None, component: Component) -> Config | None:
    """The config of the same component in another checkpoint."""
    if like is None:
        return None
    return next((each.config for each in like.components if each.directory == component.directory), None)


def _side_names(checkpoint: Checkpoint, component: Component) -> tuple[str, ...]:
    """The side files of a component, relative to it."""
    prefix = f"{component.directory}/" if component.directory else ""
    return tuple(name[len(prefix) :] for name in checkpoint.side_files if name.startswith(prefix))
