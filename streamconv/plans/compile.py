"""From a checkpoint's headers and what is wanted of it to a checked plan. Reads no tensor data.

    1. `transform` each component: what its targets are, as expressions.
    2. `place` them: into which files, at which offsets.
    3. `companions`: the files around the weights.

Problems of every step are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamconv.errors import PlanError, Problem, UsageError, listed
from streamconv.ops import leaves
from streamconv.plans.companions import companions, side_files
from streamconv.plans.edits import unused
from streamconv.plans.likeness import adopted, compare, complete
from streamconv.plans.patterns import Pattern
from streamconv.plans.placement import place
from streamconv.plans.plan import (
    Check,
    Dropped,
    OutputFile,
    Plan,
    PlannedTensor,
    SourceFile,
    TextFile,
)
from streamconv.plans.transform import transform
from streamconv.plans.wanted import Wanted
from streamconv.readers.checkpoint import Checkpoint
from streamconv.writers import WRITERS

# Files that a note names before it counts the rest.


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
    if wanted.like is not None and wanted.recipe is None and wanted.to_arch is None:
        checkpoint = adopted(checkpoint, wanted.like)
    tensors: list[PlannedTensor] = []
    files: list[OutputFile] = []
    texts: list[TextFile] = []
    left_out: list[str] = []
    checks: list[Check] = []
    dropped: list[Dropped] = []
    notes = list(checkpoint.notes)
    problems: list[Problem] = []
    directories: set[str] = set()
    used: set[Pattern] = set()
    apart: set[str] = set()
    for component in checkpoint.components:
        made = transform(checkpoint, component, wanted, used)
        checks += made.checks
        dropped += made.dropped
        notes += made.notes
        problems += made.problems
        if made.problems or not made.targets:
            continue
        directories.add(made.component.directory)
        placed = place(made.component, made, wanted, len(files))
        tensors += placed.tensors
        files += placed.files
        apart |= {file.path for file in placed.files if component.kind == "optimizer"}
        texts += placed.index
        problems += placed.problems
        if wanted.side_files:
            around = companions(checkpoint, component, made, wanted.edits.dtype)
            texts += around.texts
            left_out += around.left_out
            notes += around.notes
    if wanted.side_files:
        texts += (TextFile(path, content) for path, content in checkpoint.texts.items())
    problems += unused(wanted.edits, used, list(checkpoint))
    if wanted.like is not None and not problems:
        rest = complete(wanted.like, directories, wanted, len(files))
        for placed in rest.placed:
            tensors += placed.tensors
            files += placed.files
            texts += placed.index
            problems += placed.problems
        notes += (*rest.notes, *compare(wanted.like, tensors, files, apart))
    if checkpoint.ignored:
        notes.append(f"not taken along: {listed(ignored.path for ignored in checkpoint.ignored)}")
    if not tensors and not problems:
        problems.append(Problem("no tensor is left to write", hint="see --only and --drop"))
    if problems:
        raise PlanError("the plan does not check; nothing was written", problems=problems)
    taken = {text.path for text in texts} | {file.path for file in files} | set(left_out)
    copied = side_files(checkpoint, taken) if wanted.side_files else ()
    if wanted.like is not None and wanted.side_files:
        copied += side_files(wanted.like, taken | {file.path for file in copied})
    return Plan(
        source=str(checkpoint.path),
        source_format=checkpoint.format,
        target_format=wanted.to,
        files=_source_files(checkpoint, tensors),
        tensors=tuple(tensors),
        outputs=tuple(files),
        texts=tuple(sorted(texts, key=_written_last)),
        side_files=copied,
        checks=tuple(checks),
        dropped=tuple(dropped),
        notes=tuple(notes),
        arguments=wanted.arguments,
    )


def _source_files(checkpoint: Checkpoint, tensors: Sequence[PlannedTensor]) -> tuple[SourceFile, ...]:
    paths = dict.fromkeys(checkpoint.files)
    for tensor in tensors:
        for leaf in leaves(tensor.expression):
            paths.update(dict.fromkeys(extent.file for extent in leaf.extents))
    states = ((path, Path(path).stat()) for path in paths)
    return tuple(SourceFile(path, state.st_size, state.st_mtime_ns) for path, state in states)


def _written_last(text: TextFile) -> tuple[bool, str]:
    return (text.path.endswith(".json") and ".index." in text.path, text.path)
