"""From a checkpoint's headers and what is wanted of it to a checked plan. Reads no tensor data.

    1. `select`: which tensors of each component take part, under which names.
    2. `apply_recipe`: what they become, as expressions; without a recipe, themselves.
    3. `finish`: in which dtypes; then the writer's `check` on each target: can the format hold it.
    4. `shard.pack`: which target goes into which file; the writer's `layout`: where in it.
    5. Configs that no longer tell the truth are rewritten; all other side files are copied.

Problems of every step are collected and raised together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from streamconv import shard
from streamconv.checkpoint import Checkpoint, Component
from streamconv.dtypes import DType
from streamconv.errors import PlanError, Problem, StreamconvError, UsageError
from streamconv.ops import Expression, Node, leaves
from streamconv.plans import registry
from streamconv.plans.application import Applied, apply_recipe
from streamconv.plans.edits import Edits, Finished, Selected, finish, select, unused
from streamconv.plans.patterns import Pattern
from streamconv.plans.plan import (
    Check,
    Dropped,
    OutputFile,
    Plan,
    PlannedTensor,
    SideFile,
    SourceFile,
    TextFile,
)
from streamconv.plans.recipe import Recipe
from streamconv.plans.wrappers import unwrap
from streamconv.shard import Naming
from streamconv.writers import WRITERS, FileLayout, Target

_FORMATS: dict[str, shard.Format] = {"safetensors": "safetensors", "torch": "torch"}

# Files that a note names before it counts the rest.
_LISTED = 5

# Keys under which configs of transformers 4 and 5 say what dtype the weights have.
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a conversion is to produce.

    Attributes:
        to: the target format, a key of `writers.WRITERS`.
        max_shard: the most bytes of tensors in one file.
        edits: what is done to names and dtypes.
        recipe: what is done to the architecture, or None; `auto` finds it by the config and the names.
        to_arch: the architecture to find a recipe for, or None.
        reverse: whether `recipe` is read backwards.
        config: of the source, instead of its own.
        like: a checkpoint whose config the target has.
        allow_unmatched: whether tensors that the recipe does not know are left out.
        side_files: whether configs, tokenizers and the like come along.
        arguments: the options all this was made from, kept in the plan.
    """

    to: str = "safetensors"
    max_shard: int = 5 * 1000**3
    edits: Edits = field(default_factory=Edits)
    recipe: Recipe | Literal["auto"] | None = None
    to_arch: str | None = None
    reverse: bool = False
    config: Mapping[str, Any] | None = None
    like: Checkpoint | None = None
    allow_unmatched: bool = False
    side_files: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Output:
    """What is collected for the plan, component by component."""

    tensors: list[PlannedTensor] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def compile_plan(checkpoint: Checkpoint, wanted: Wanted) -> Plan:
    """Compile and check a plan.

    Raises:
        UsageError: `wanted.to` is not a format that can be written.
        PlanError: all that is wrong.
    """
    if wanted.to not in WRITERS:
        raise UsageError(
            f"'{wanted.to}' is not a format that can be written", hint=f"known: {', '.join(WRITERS)}"
        )
    output = _Output(notes=list(checkpoint.notes))
    used: set[Pattern] = set()
    for component in checkpoint.components:
        selected = select(component, wanted.edits, used)
        output.dropped += selected.dropped
        output.problems += selected.problems
        applied = _applied(checkpoint, component, selected, wanted, output)
        if applied is None:
            continue
        finished = finish(applied.targets, component.directory, wanted.edits, used)
        output.dropped += finished.dropped
        output.notes += finished.notes
        output.problems += finished.problems
        output.checks += (*applied.checks, *_proofs(finished.targets))
        _place(component, finished, wanted, output)
        if wanted.side_files:
            _write_files(checkpoint, component, applied, wanted.edits.dtype, output)
    output.problems += unused(wanted.edits, used, list(checkpoint))
    if checkpoint.ignored:
        names = [ignored.path for ignored in checkpoint.ignored]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        output.notes.append(f"not taken along: {', '.join(names[:_LISTED])}{more}")
    if not output.tensors and not output.problems:
        output.problems.append(Problem("no tensor is left to write", hint="see --only and --drop"))
    if output.problems:
        raise PlanError("the plan does not check; nothing was written", problems=output.problems)
    return Plan(
        source=str(checkpoint.path),
        source_format=checkpoint.format,
        target_format=wanted.to,
        files=_source_files(checkpoint, output.tensors),
        tensors=tuple(output.tensors),
        outputs=tuple(output.files),
        texts=tuple(sorted(output.texts, key=_written_last)),
        side_files=_side_files(checkpoint, output) if wanted.side_files else (),
        checks=tuple(output.checks),
        dropped=tuple(output.dropped),
        notes=tuple(output.notes),
        arguments=wanted.arguments,
    )


def _applied(
    checkpoint: Checkpoint, component: Component, selected: Selected, wanted: Wanted, output: _Output
) -> Applied | None:
    """What a component becomes; what is wrong with that goes to `output`. None where nothing can be said."""
    if wanted.config is not None and len(checkpoint.components) == 1:
        component = replace(component, config=wanted.config)
    component = replace(component, tensors=selected.tensors)
    try:
        chosen = _recipe(checkpoint, component, wanted)
        if chosen is None:
            applied = _unchanged(component, selected)
        else:
            recipe, reverse = chosen
            output.notes.append(f"recipe {recipe.name}{', backwards' if reverse else ''}: {recipe.title}")
            applied = apply_recipe(
                component,
                selected.sources,
                recipe,
                reverse=reverse,
                around=(checkpoint.directory / component.directory, _side_names(checkpoint, component)),
                target_config=_like(wanted.like, component),
                allow_unmatched=wanted.allow_unmatched,
            )
    except StreamconvError as error:
        output.problems += error.problems
        return None
    output.dropped += applied.dropped
    output.notes += applied.notes
    output.problems += applied.problems
    return None if applied.problems else applied


def _recipe(checkpoint: Checkpoint, component: Component, wanted: Wanted) -> tuple[Recipe, bool] | None:
    """The recipe for a component, and whether it is read backwards; None where it stays what it is."""
    if isinstance(wanted.recipe, Recipe):
        fits = len(checkpoint.components) == 1 or registry.is_source(wanted.recipe, component)
        return (wanted.recipe, wanted.reverse) if fits else None
    if wanted.recipe is None and wanted.to_arch is None:
        return None
    try:
        return registry.found(component, wanted.to_arch)
    except UsageError:
        if len(checkpoint.components) == 1:
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


def _like(like: Checkpoint | None, component: Component) -> Mapping[str, Any] | None:
    """The config of the same component in another checkpoint."""
    if like is None:
        return None
    return next((each.config for each in like.components if each.directory == component.directory), None)


def _side_names(checkpoint: Checkpoint, component: Component) -> tuple[str, ...]:
    """The side files of a component, relative to it."""
    prefix = f"{component.directory}/" if component.directory else ""
    return tuple(name[len(prefix) :] for name in checkpoint.side_files if name.startswith(prefix))


def _proofs(targets: Mapping[str, tuple[tuple[str, ...], Expression]]) -> list[Check]:
    """What the operations in expressions need proven, each once."""
    found: list[Check] = []
    seen: set[int] = set()

    def visit(target: str, expression: Expression) -> None:
        if not isinstance(expression, Node) or id(expression.operands) in seen:
            return
        if expression.operands:
            seen.add(id(expression.operands))
        for left, right in expression.op.checks(expression.operands):
            names = " and ".join(f"'{side.spec.name}'" for side in (left, right) if leaves(side))
            found.append(Check(f"{names} must be equal to make '{target}'", left, right))
        for operand in expression.operands:
            visit(target, operand)

    for target, (_, expression) in targets.items():
        visit(target, expression)
    return found


def _place(component: Component, finished: Finished, wanted: Wanted, output: _Output) -> None:
    """Decide file and offset of every target of a component."""
    writer = WRITERS[wanted.to]
    specs = {name: expression.spec for name, (_, expression) in finished.targets.items()}
    bad = [problem for spec in specs.values() if (problem := writer.check(spec))]
    output.problems += bad
    if bad or finished.problems or not specs:
        return
    # Names that share their bytes have the first one's name as their storage.
    storages = {first: first for first in finished.shared.values()} | dict(finished.shared)
    entries = [shard.entry_of(spec, storages.get(name)) for name, spec in specs.items()]
    shards = shard.pack(entries, wanted.max_shard)
    naming = Naming(component.stem, component.variant, _FORMATS[wanted.to])
    gone = {name: kept for name, kept in finished.shared.items() if name not in specs}
    prefix = f"{component.directory}/" if component.directory else ""

    for number, names in enumerate(shards, 1):
        file_name = shard.shard_name(naming, number, len(shards))
        metadata = gone if len(shards) == 1 else {}
        targets = [Target(specs[name], storages.get(name)) for name in names]
        try:
            layout = writer.layout(targets, metadata, file_name)
        except PlanError as error:
            output.problems += error.problems
            continue
        output.tensors += _planned(layout, finished.targets, len(output.files))
        output.files.append(OutputFile(prefix + file_name, layout))
    if len(shards) > 1:
        text = shard.index_json(shard.weight_map(naming, shards), shard.total_size(entries), gone)
        output.texts.append(TextFile(prefix + shard.index_name(naming), text.decode()))


def _planned(
    layout: FileLayout, targets: Mapping[str, tuple[tuple[str, ...], Expression]], file: int
) -> list[PlannedTensor]:
    planned = []
    for place in layout.placements:
        sources, expression = targets[place.name]
        planned.append(PlannedTensor(sources, expression, file, place.offset))
    return planned


def _source_files(checkpoint: Checkpoint, tensors: Sequence[PlannedTensor]) -> tuple[SourceFile, ...]:
    paths = dict.fromkeys(checkpoint.files)
    for tensor in tensors:
        for leaf in leaves(tensor.expression):
            paths.update(dict.fromkeys(extent.file for extent in leaf.extents))
    states = ((path, Path(path).stat()) for path in paths)
    return tuple(SourceFile(path, state.st_size, state.st_mtime_ns) for path, state in states)


def _side_files(checkpoint: Checkpoint, output: _Output) -> tuple[SideFile, ...]:
    made = {text.path for text in output.texts} | {file.path for file in output.files} | set(output.left_out)
    found = []
    for name in sorted(checkpoint.side_files):
        if name not in made:
            path = checkpoint.directory / name
            state = path.stat()
            found.append(SideFile(os.fspath(path), name, state.st_size, state.st_mtime_ns))
    return tuple(found)


def _write_files(
    checkpoint: Checkpoint, component: Component, applied: Applied, dtype: DType | None, output: _Output
) -> None:
    """The files around a component that a recipe or a dtype changes."""
    prefix = f"{component.directory}/" if component.directory else ""
    output.texts += (TextFile(prefix + name, text) for name, text in applied.files.texts.items())
    output.left_out |= {prefix + name: reason for name, reason in applied.files.left_out.items()}
    if applied.files.left_out:
        listed = ", ".join(f"{prefix}{name} ({reason})" for name, reason in applied.files.left_out.items())
        output.notes.append(f"not taken along: {listed}")
    name = f"{prefix}config.json"
    config = applied.config
    if config is None or (config == component.config and name not in checkpoint.side_files):
        return
    if dtype is not None and dtype.torch_name is not None:
        changed = _with_dtype(config, dtype.torch_name)
        if changed != config:
            output.notes.append(f"{name}: its dtype becomes {dtype.torch_name}")
        config = changed
    if config != component.config:
        text = orjson.dumps(config, option=orjson.OPT_INDENT_2).decode() + "\n"
        output.texts.append(TextFile(name, text))


def _with_dtype(config: Any, torch_name: str) -> Any:
    """A config with every dtype that it states, also for its parts, replaced."""
    if not isinstance(config, Mapping):
        return config
    return {
        key: torch_name if key in _DTYPE_KEYS and isinstance(value, str) else _with_dtype(value, torch_name)
        for key, value in config.items()
    }


def _written_last(text: TextFile) -> tuple[bool, str]:
    return (text.path.endswith(".json") and ".index." in text.path, text.path)
