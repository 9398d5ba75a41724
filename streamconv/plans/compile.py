"""From a checkpoint's headers and what is wanted of it to a checked plan. Reads no tensor data.

    1. `apply_edits` on each component: what its targets are, as expressions.
    2. The writer's `check` on each target: can the format hold it.
    3. `shard.pack`: which target goes into which file; the writer's `layout`: where in it.
    4. Configs that no longer tell the truth are rewritten; all other side files are copied.

Problems of every step are collected and raised together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from streamconv import shard
from streamconv.checkpoint import Checkpoint, Component
from streamconv.dtypes import DType
from streamconv.errors import PlanError, Problem, UsageError
from streamconv.ops import Expression, leaves
from streamconv.plans.edits import Edited, Edits, apply_edits, unused
from streamconv.plans.patterns import Pattern
from streamconv.plans.plan import Dropped, OutputFile, Plan, PlannedTensor, SideFile, SourceFile, TextFile
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
        side_files: whether configs, tokenizers and the like come along.
        arguments: the options all this was made from, kept in the plan.
    """

    to: str = "safetensors"
    max_shard: int = 5 * 1000**3
    edits: Edits = field(default_factory=Edits)
    side_files: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Output:
    """What is collected for the plan, component by component."""

    tensors: list[PlannedTensor] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
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
        edited = apply_edits(component, wanted.edits, used)
        output.dropped += edited.dropped
        output.notes += edited.notes
        output.problems += edited.problems
        _place(component, edited, wanted, output)
    output.problems += unused(wanted.edits, used, list(checkpoint))
    if checkpoint.ignored:
        names = [ignored.path for ignored in checkpoint.ignored]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        output.notes.append(f"not taken along: {', '.join(names[:_LISTED])}{more}")
    if not output.tensors and not output.problems:
        output.problems.append(Problem("no tensor is left to write", hint="see --only and --drop"))
    if output.problems:
        raise PlanError("the plan does not check; nothing was written", problems=output.problems)
    if wanted.side_files:
        output.texts += _changed_configs(checkpoint, wanted.edits.dtype, output.notes)
    return Plan(
        source=str(checkpoint.path),
        source_format=checkpoint.format,
        target_format=wanted.to,
        files=_source_files(checkpoint, output.tensors),
        tensors=tuple(output.tensors),
        outputs=tuple(output.files),
        texts=tuple(sorted(output.texts, key=_written_last)),
        side_files=_side_files(checkpoint, output) if wanted.side_files else (),
        dropped=tuple(output.dropped),
        notes=tuple(output.notes),
        arguments=wanted.arguments,
    )


def _place(component: Component, edited: Edited, wanted: Wanted, output: _Output) -> None:
    """Decide file and offset of every target of a component."""
    writer = WRITERS[wanted.to]
    specs = {name: expression.spec for name, (_, expression) in edited.targets.items()}
    bad = [problem for spec in specs.values() if (problem := writer.check(spec))]
    output.problems += bad
    if bad or edited.problems or not specs:
        return
    # Names that share their bytes have the first one's name as their storage.
    storages = {first: first for first in edited.shared.values()} | dict(edited.shared)
    entries = [shard.entry_of(spec, storages.get(name)) for name, spec in specs.items()]
    shards = shard.pack(entries, wanted.max_shard)
    naming = Naming(component.stem, component.variant, _FORMATS[wanted.to])
    gone = {name: kept for name, kept in edited.shared.items() if name not in specs}
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
        output.tensors += _planned(layout, edited.targets, len(output.files))
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
    made = {text.path for text in output.texts} | {file.path for file in output.files}
    found = []
    for name in sorted(checkpoint.side_files):
        if name not in made:
            path = checkpoint.directory / name
            state = path.stat()
            found.append(SideFile(os.fspath(path), name, state.st_size, state.st_mtime_ns))
    return tuple(found)


def _changed_configs(checkpoint: Checkpoint, dtype: DType | None, notes: list[str]) -> list[TextFile]:
    """Configs whose stated dtype is not the weights' any more."""
    if dtype is None or dtype.torch_name is None:
        return []
    changed = []
    for component in checkpoint.components:
        name = f"{component.directory}/config.json" if component.directory else "config.json"
        if component.config is None or name not in checkpoint.side_files:
            continue
        config = _with_dtype(component.config, dtype.torch_name)
        if config != component.config:
            text = orjson.dumps(config, option=orjson.OPT_INDENT_2).decode() + "\n"
            changed.append(TextFile(name, text))
            notes.append(f"{name}: its dtype becomes {dtype.torch_name}")
    return changed


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
