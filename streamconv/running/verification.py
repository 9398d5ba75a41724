"""Verification: compare every byte of a destination with the plan, and open it with the libraries that own the
formats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streamconv import shard
from streamconv.engines import chosen
from streamconv.errors import CheckpointError, ConversionError, Problem
from streamconv.execution import patches
from streamconv.execution.execute import CheckItem, Item, Settings, WorkItem
from streamconv.execution.memory import Budget, crowds_page_cache
from streamconv.plans import Plan
from streamconv.plans.plan import OutputFile
from streamconv.running.destination import Destination, check_fits, destination_at, places, unfinished
from streamconv.running.items import batches, check_items, problem, work_items
from streamconv.running.progress import ProgressCallback, Tracker, nbytes
from streamconv.storage.files import Files
from streamconv.storage.location import Location, locate
from streamconv.tensor import Extent, Stored
from streamconv.writers.formats import FORMATS
from streamconv.writers.layout import FileLayout


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_plan` found.

    Attributes:
        destination: the directory, or the file.
        tensors: how many were compared.
        bytes_compared: of tensor data, in the destination.
        seconds: it took.
        problems: everything that is wrong; empty where the destination is as planned.
        recorded: the options of the plan that the destination's own record chose, as the command line has them.
    """

    destination: Location
    tensors: int
    bytes_compared: int
    seconds: float
    problems: tuple[Problem, ...]
    recorded: tuple[str, ...] = ()


def verify_plan(
    plan: Plan,
    target: str | Path | Location | Destination,
    budget: Budget,
    progress: ProgressCallback | None = None,
    engine: str | None = None,
) -> Verification:
    """Compare every byte of a destination with the plan. Changes nothing.

    A file that is missing, has another size or another header is one problem, and its tensors are not
    compared; of a tensor that differs, the first differing element is reported. What the plan relies on is
    checked again.

    Raises:
        UsageError: there is no such engine.
    """
    began = time.monotonic()
    destination = destination_at(target)
    check_fits(plan, destination)
    standing = unfinished(destination)
    problems = [standing] if standing else []
    names: list[list[str]] = [[] for _ in plan.outputs]
    for tensor in plan.tensors:
        names[tensor.file].append(tensor.spec.name)
    sound: list[str | None] = []
    for output, held in zip(plan.outputs, names, strict=True):
        place = destination / output.path
        found = list(_file_problems(output, held, place))
        problems += found or _checksum_problems(output.layout, place.place)
        sound.append(None if found else place.place)
    problems += _other_problems(plan, destination)

    pieces = work_items(plan, sound)
    checks = check_items(plan, len(pieces))
    items: list[Item] = [*pieces, *checks]
    tracker = Tracker(items, {}, began, progress)
    reported: set[tuple[str, str | None]] = set()
    settings = Settings(budget.arena, forget=crowds_page_cache(2 * tracker.total))
    work = batches([*checks, *map(_comparison, pieces)])
    workers = min(budget.workers, max(len(work), 1))
    workforce = chosen(engine, workers, tracker.total, places(plan, destination))
    with workforce.run(work, settings, workers) as results:
        for receipts in results:
            for receipt in receipts:
                item = items[receipt.index]
                where = item.path if isinstance(item, WorkItem) else item.meaning
                if receipt.difference and (where, item.name) not in reported:
                    reported.add((where, item.name))
                    problems.append(problem(item, receipt.difference))
            tracker.add(receipts)
    compared = len({piece.name for piece in pieces})
    return Verification(
        destination.place, compared, nbytes(pieces), time.monotonic() - began, tuple(problems)
    )


def _comparison(piece: WorkItem) -> CheckItem:
    """The check that a file holds what was to be written there."""
    spec = piece.expression.spec
    held = Stored(spec, (Extent(piece.path, piece.offset, spec.nbytes),))
    return CheckItem(piece.index, "", piece.expression, held, piece.start, piece.stop)


def _file_problems(output: OutputFile, names: list[str], place: Location) -> Iterator[Problem]:
    """What is wrong with one weight file that holds these tensors, apart from their bytes."""
    if not place.is_file():
        yield Problem("the file is missing", file=str(place))
        return
    size = place.state().size
    if size != output.layout.size:
        yield Problem(f"{size} bytes, expected {output.layout.size}", file=str(place))
        return
    try:
        with Files() as files:
            patched = {at for patch in output.layout.patches for at in range(patch.offset, patch.offset + 4)}
            for literal in output.layout.literals:
                found = bytearray(len(literal.data))
                files.read_into(place.place, memoryview(found), literal.offset)
                if found != literal.data and any(
                    a != b and literal.offset + at not in patched
                    for at, (a, b) in enumerate(zip(found, literal.data, strict=True))
                ):
                    yield Problem(
                        f"header bytes differ from the plan, from byte {literal.offset} on", file=str(place)
                    )
    except ConversionError as error:
        yield from error.problems
    path = place.local()
    opinions = {form.suffix: form.opinion for form in FORMATS.values() if form.opinion}
    if path is not None and (opinion := opinions.get(place.suffix)):
        yield from opinion(path, sorted(names))


def _checksum_problems(layout: FileLayout, path: str) -> list[Problem]:
    """The checksums stored in a file that do not match its bytes."""
    wrong = []
    with Files() as files:
        for offset, data in patches.computed(layout, path, files):
            found = bytearray(len(data))
            files.read_into(path, memoryview(found), offset)
            if found != data:
                wrong.append(Problem(f"the checksum at byte {offset} is wrong", file=path))
    return wrong


def _other_problems(plan: Plan, destination: Destination) -> Iterator[Problem]:
    """What is wrong besides the weights: indexes and side files that differ, weights that do not belong."""
    for text in plan.texts:
        place, content = destination / text.path, text.content.encode()
        try:
            same = place.read(len(content)) == content
        except CheckpointError:
            same = False
        if not same:
            yield Problem("missing, or not what was planned", file=str(place))
    for side in plan.side_files:
        place = destination / side.path
        if not place.is_file() or not _equal(locate(side.source), place):
            yield Problem(f"missing, or not equal to {side.source}", file=str(place))
    if destination.file:
        return  # what is beside it is not ours
    planned = {output.path for output in plan.outputs} | {text.path for text in plan.texts}
    directories = {str(Path(name).parent) for name in planned}
    for directory in sorted(directories):
        folder = destination / directory
        for place in folder.entries() if folder.is_directory() else ():
            if (
                place.relative_to(destination.directory) not in planned
                and shard.parse_weight_name(place.name) is not None
            ):
                yield Problem(
                    "weights that are not part of the conversion",
                    file=str(place),
                    hint="a loader may take them for part of the model; remove them",
                )


def _equal(left: Location, right: Location) -> bool:
    with left.open() as a, right.open() as b:
        return a.size == b.size and all(
            a.read(at, 1 << 20) == b.read(at, 1 << 20) for at in range(0, a.size, 1 << 20)
        )
