"""Verification: compare a destination with the plan, byte by byte, or with its own record, which needs no source; and
open it with the libraries that own the formats.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from streamconv import shard
from streamconv.engines import chosen
from streamconv.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    Problem,
    StreamconvError,
    UsageError,
)
from streamconv.execution import patches
from streamconv.execution.execute import CheckItem, ChecksumItem, Item, Settings, WorkItem
from streamconv.execution.memory import Budget, ahead, crowds_page_cache
from streamconv.options.fields import from_record, spelled
from streamconv.options.records import PlanOptions
from streamconv.plans import Plan
from streamconv.plans.plan import OutputFile, known_states, trial_of
from streamconv.readers import run_files
from streamconv.readers.files import is_weights, open_file, suffixes
from streamconv.running import contents, record
from streamconv.running.contents import Crcs, RecordedFile
from streamconv.running.destination import (
    OWN,
    RECORD,
    Destination,
    check_fits,
    output_names,
    places,
    unfinished,
    written_at,
)
from streamconv.running.items import batches, check_items, problem, work_items
from streamconv.running.progress import ProgressCallback, Tracker, nbytes
from streamconv.storage.files import Files
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import scheme
from streamconv.storage.roles import State
from streamconv.tensor import Checksum, Extent, Stored
from streamconv.writers.formats import FORMATS

_TOP = PurePosixPath()


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A tensor of which nothing is on record, and how many bytes it has."""

    file: str
    tensor: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_plan` or `verify_record` found.

    Attributes:
        destination: the directory, or the file.
        against: what it was compared with: its plan, made again from the source, or its own record.
        headers: whether no tensor was read, as asked.
        tensors: how many were compared.
        files: how many files without tensors were compared.
        bytes_compared: of tensor data, in the destination.
        seconds: it took.
        problems: everything that is wrong; empty where the destination is as planned.
        recorded: the options of the plan that the destination's own record chose, as the command line has them.
        unchecked: tensors that could not be compared, because the record has no checksum of them.
        unlisted: files that are there besides, of which nothing is known; no weights are among them.
        trial: the option that took a few layers only; None where all were.
    """

    destination: Location
    against: Literal["plan", "record"]
    headers: bool
    tensors: int
    files: int
    bytes_compared: int
    seconds: float
    problems: tuple[Problem, ...]
    recorded: tuple[str, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    unlisted: tuple[str, ...] = ()
    trial: str | None = None

    @property
    def whole(self) -> bool:
        """Whether everything that was asked for was compared, and nothing is wrong."""
        return not (self.problems or self.unchecked)


def verify_plan(
    plan: Plan,
    target: str | Path | Location | Destination,
    budget: Budget,
    progress: ProgressCallback | None = None,
    engine: str | None = None,
    *,
    headers: bool = False,
) -> Verification:
    """Compare every byte of a destination with the plan, or with `headers` all but the tensors. Changes nothing.

    A file that is missing, has another size or another header is one problem, and its tensors are not
    compared; of a tensor that differs, the first differing element is reported. What the plan relies on is
    checked again.

    Raises:
        UsageError: there is no such engine.
    """
    began = time.monotonic()
    destination = written_at(target)
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
        problems += found
        sound.append(None if found else place.place)
    problems += _other_problems(plan, destination)
    strays, unlisted = _besides([output.path for output in plan.outputs], output_names(plan), destination)
    pieces: list[WorkItem] = []
    if not headers:
        pieces = work_items(plan, sound)
        checks = check_items(plan, len(pieces))
        sums = [
            ChecksumItem(index, checksum)
            for index, checksum in enumerate(_patched(plan, sound), len(pieces) + len(checks))
        ]
        work: list[Item] = [*checks, *map(_comparison, pieces), *sums]
        items: list[Item] = [*pieces, *checks, *sums]
        problems += _carried_out(
            items, work, places(plan, destination), budget, progress, engine, began, known_states(plan)
        )
    if (problems or strays) and (other := _other_options(plan, destination)):
        problems.insert(0, other)
    return Verification(
        destination.place,
        "plan",
        headers,
        len(plan.tensors) if headers else len({(piece.path, piece.name) for piece in pieces}),
        len(plan.texts) + len(plan.side_files),
        nbytes(pieces),
        time.monotonic() - began,
        (*problems, *strays),
        unlisted=unlisted,
        trial=plan.trial,
    )


def verify_record(
    target: str | Path | Location | Destination,
    budget: Budget,
    progress: ProgressCallback | None = None,
    engine: str | None = None,
    *,
    headers: bool = False,
) -> Verification:
    """Compare a destination with the record that its conversion left there. Needs no source, changes nothing.

    Every file is compared: its size, what its headers say of its tensors, and the digest of its bytes. A tensor
    without a digest is compared with the CRC-32 that the file has of it, or goes to `unchecked`. With `headers`, no
    tensor is read.

    Raises:
        UsageError: there is no record, or no such engine.
        DestinationError: the record is damaged.
    """
    began = time.monotonic()
    destination = written_at(target)
    place = destination.own / RECORD
    document = record.read(destination)
    if document is None:
        standing = unfinished(destination)
        raise UsageError(
            standing.message if standing else "there is no record of a conversion to verify it with",
            file=str(destination),
            hint=standing.hint if standing else "give the source, too: streamconv verify SRC DST",
        )
    held = contents.read(document, place)
    problems: list[Problem] = []
    items: list[ChecksumItem] = []
    unchecked: list[Unchecked] = []
    tensors = size = 0
    for file in held:
        there = destination / file.path
        found = list(_size_problems(there, file.size) or (_read_again(file, there) if file.tensors else ()))
        problems += found
        if not there.is_file() or there.state().size != file.size:
            continue
        known: list[tuple[str | None, Checksum]] = [_besides_tensors(file, there.place)]
        if not headers:
            bare, crcs = file.bare
            known += _of_tensors(file, crcs, there.place)
            unchecked += (Unchecked(str(there), tensor.spec.name, tensor.spec.nbytes) for tensor in bare)
            size += sum(tensor.spec.nbytes for tensor in file.tensors) - sum(
                tensor.spec.nbytes for tensor in bare
            )
        tensors += len(file.tensors)
        items += (ChecksumItem(at, checksum, name) for at, (name, checksum) in enumerate(known, len(items)))
    strays, unlisted = _besides(
        [file.path for file in held if file.tensors], [file.path for file in held], destination
    )
    reached = [destination.place.place]
    problems += _carried_out(items, items, reached, budget, progress, engine, began, {})
    return Verification(
        destination.place,
        "record",
        headers,
        tensors - len(unchecked),
        sum(not file.tensors for file in held),
        size,
        time.monotonic() - began,
        (*problems, *strays),
        unchecked=tuple(unchecked),
        unlisted=unlisted,
        trial=trial_of(document["arguments"]),
    )


def _carried_out(
    items: Sequence[Item],
    work: Sequence[Item],
    reached: Sequence[str],
    budget: Budget,
    progress: ProgressCallback | None,
    engine: str | None,
    began: float,
    known: Mapping[str, State],
) -> list[Problem]:
    """The problems that work finds, one for each tensor of a file; `items` are what it is to progress and messages."""
    tracker = Tracker(items, {}, began, progress)
    problems: dict[tuple[str | None, str | None], Problem] = {}
    distant = any(scheme(place) for place in reached)
    settings = Settings(
        budget.arena,
        forget=crowds_page_cache(2 * tracker.total),
        known=known,
        ahead=ahead(budget.arena) if distant else 0,
    )
    parcels = batches(work)
    workers = min(budget.workers, max(len(parcels), 1))
    workforce = chosen(engine, workers, tracker.total, reached)
    with workforce.run(parcels, settings, workers) as results:
        for receipts in results:
            for receipt in receipts:
                if receipt.difference:
                    found = problem(items[receipt.index], receipt.difference)
                    problems.setdefault((found.file or found.message, found.tensor), found)
            tracker.add(receipts)
    return list(problems.values())


def _comparison(piece: WorkItem) -> CheckItem:
    """The check that a file holds what was to be written there."""
    spec = piece.expression.spec
    held = Stored(spec, (Extent(piece.path, piece.offset, spec.nbytes),))
    return CheckItem(piece.index, "", piece.expression, held, piece.start, piece.stop)


def _size_problems(place: Location, expected: int) -> list[Problem]:
    """What is wrong with a file before it is opened."""
    if not place.is_file():
        return [Problem("the file is missing", file=str(place))]
    size = place.state().size
    return [] if size == expected else [Problem(f"{size:,} bytes, expected {expected:,}", file=str(place))]


def _file_problems(output: OutputFile, names: list[str], place: Location) -> Iterator[Problem]:
    """What is wrong with one weight file that holds these tensors, apart from their bytes."""
    wrong = _size_problems(place, output.layout.size)
    if wrong:
        yield from wrong
        return
    try:
        with Files() as files:
            patched = {at for patch in output.layout.patches for at in range(patch.offset, patch.offset + 4)}
            for literal in output.layout.literals:
                found = bytearray(len(literal.data))
                files.read_into(place.place, memoryview(found), literal.offset)
                first = next(
                    (
                        at
                        for at, (a, b) in enumerate(zip(found, literal.data, strict=True), literal.offset)
                        if a != b and at not in patched
                    ),
                    None,
                )
                if first is not None:
                    yield Problem(
                        f"header bytes differ from the plan, from byte {first:,} on", file=str(place)
                    )
    except ConversionError as error:
        yield from error.problems
    yield from _opinion(place, names)


def _opinion(place: Location, names: Iterable[str]) -> Iterator[Problem]:
    """What the library that owns the format says of a file that holds these tensors."""
    path = place.local()
    opinions = {form.suffix: form.opinion for form in FORMATS.values() if form.opinion}
    if path is not None and (opinion := opinions.get(place.suffix)):
        yield from opinion(path, sorted(names))


def _patched(plan: Plan, paths: Sequence[str | None]) -> Iterator[Checksum]:
    """The checksums that are stored in the files of a plan, as those have them."""
    with Files() as files:
        for output, path in zip(plan.outputs, paths, strict=True):
            said: set[tuple[int, int, str]] = set()
            for patch in output.layout.patches if path else ():
                value = bytearray(4)
                files.read_into(path or "", memoryview(value), patch.offset)
                said.add((patch.start, patch.length, patches.text(patch, value)))
            for start, length, value_text in sorted(said):
                yield Checksum(
                    (Extent(path or "", start, length),), value_text, "so it is written in the file"
                )


def _read_again(file: RecordedFile, place: Location) -> Iterator[Problem]:
    """Where the headers of a weight file and the record of its tensors differ."""
    try:
        found = open_file(place)
    except StreamconvError as error:
        yield from (problem.at(file=str(place)) for problem in error.problems)
        return
    recorded = {tensor.spec.name: tensor for tensor in file.tensors}
    # What is around the tensors may put a prefix before their names.
    any_name = next(iter(recorded))
    ends = (name for name in found.tensors if name.endswith(any_name))
    prefix = min(ends, key=len, default=any_name).removesuffix(any_name)
    recorded = {prefix + name: tensor for name, tensor in recorded.items()}
    for name, tensor in recorded.items():
        expression = found.tensors.get(name)
        if expression is None:
            if name not in found.metadata:
                yield Problem("it is on record, and not in the file", file=str(place), tensor=name)
            continue
        spec = (
            expression.spec
            if len(tensor.at) == 1
            else replace(expression.spec, shape=(expression.spec.numel,))
        )
        if (spec.dtype, spec.shape) != (tensor.spec.dtype, tensor.spec.shape):
            yield Problem(
                f"it is {spec.dtype} {list(spec.shape)}, on record {tensor.spec.dtype} {list(tensor.spec.shape)}",
                file=str(place),
                tensor=name,
            )
    for name in found.tensors.keys() - recorded.keys():
        yield Problem("it is in the file, and not on record", file=str(place), tensor=name)
    yield from _opinion(place, recorded)


def _besides_tensors(file: RecordedFile, path: str) -> tuple[None, Checksum]:
    """What is on record of the bytes of a file that are no tensor's."""
    runs = tuple(Extent(path, *run) for run in file.rest) or (Extent(path, 0, 0),)
    what = "what is in it besides tensors" if file.tensors else "it"
    return None, Checksum(runs, file.digest, f"{what} changed since it was written", "xxh3-128")


def _of_tensors(file: RecordedFile, crcs: Crcs, path: str) -> Iterator[tuple[str | None, Checksum]]:
    """What is on record of the bytes of tensors, and of which; no tensor is named where it may be one of several."""
    changed = "bytes {:,} to {:,} of the file changed since they were written"
    for tensor in file.tensors:
        for start, length, digest in tensor.parts:
            meaning = changed.format(start, start + length)
            yield tensor.spec.name, Checksum((Extent(path, start, length),), digest, meaning, "xxh3-128")
    owners = {run: tensor.spec.name for tensor in file.tensors for run in tensor.at}
    for start, length, crc in crcs:
        meaning = changed.format(start, start + length)
        yield owners.get((start, length)), Checksum((Extent(path, start, length),), crc, meaning)


def _other_problems(plan: Plan, destination: Destination) -> Iterator[Problem]:
    """What is wrong with the other files: indexes and side files that differ."""
    for text in plan.texts:
        place, content = destination / text.path, text.content.encode()
        if not place.is_file():
            yield Problem("the file is missing", file=str(place))
            continue
        try:
            same = place.read(len(content)) == content
        except CheckpointError:
            same = False
        if not same:
            yield Problem("it is not what was planned", file=str(place))
    for side in plan.side_files:
        place = destination / side.path
        if not place.is_file():
            yield Problem("the file is missing", file=str(place))
        elif not _equal(locate(side.source), place):
            yield Problem(f"it is not equal to {side.source}", file=str(place))


def _other_options(plan: Plan, destination: Destination) -> Problem | None:
    """The problem of a plan that was made with other options than those on record; None where they are the same."""
    try:
        if record.read(destination) is None:
            return Problem(
                "there is no record of its conversion here, so that it was compared with what the options given now make",
                file=str(destination),
                hint="give those that it was converted with",
            )
        was = record.arguments(destination)
        now = from_record(PlanOptions, record.grounded(record.told(plan.arguments, destination), destination))
    except StreamconvError:
        return None
    before, after = (spelled(PlanOptions, each) for each in (was, now))
    there = " ".join(word for word in before if word not in after) or "none of these"
    here = " ".join(word for word in after if word not in before) or "none of these"
    if not was or there == here:
        return None
    return Problem(
        f"the conversion on record was made with other options: {there}; here are given: {here}",
        file=str(destination.own / RECORD),
        hint="without options of the plan, verify takes those on record",
    )


def _on_record(directory: Location) -> Mapping[str, Location]:
    """What conversions into a directory, or into those around it, have on record: place of a file -> of the record."""
    found: dict[str, Location] = {}
    for around in (directory, directory.parent, directory.parent.parent):
        try:
            document = record.read(Destination(around)) or {}
        except (DestinationError, OSError):
            continue
        for path in document.get("files", ()):
            found.setdefault(str(around / path), around / OWN / RECORD)
    return found


def _besides(
    weights: Iterable[str], names: Iterable[str], destination: Destination
) -> tuple[list[Problem], tuple[str, ...]]:
    """Weights in a destination that are no part of the conversion, and what else there is.

    Args:
        weights: the weight files of the conversion.
        names: all of its files.
        destination: where they are.
    """
    if destination.file:
        return [], ()  # what is beside it is not ours
    known = set(names)
    inside = {PurePosixPath(name).parent for name in weights} | {_TOP}
    # Components and ranks lie side by side; a model in a directory below is one of its own.
    around = {directory.parent for directory in inside - {_TOP}}
    strays: list[Problem] = []
    others: list[str] = []
    recorded: Mapping[str, Location] | None = None
    for place in _files_below(destination.place):
        name = place.relative_to(destination.place)
        directory = PurePosixPath(name).parent
        if name in known:
            continue
        if (directory in inside or directory.parent in around) and _is_weights(place):
            recorded = _on_record(destination.place) if recorded is None else recorded
            owner = recorded.get(str(place))
            hint = (
                f"keep them: they are part of the one that {owner} records"
                if owner is not None
                else "a loader may take them for part of the model; move them elsewhere"
            )
            strays.append(Problem("weights that are not part of the conversion", file=str(place), hint=hint))
        else:
            others.append(name)
    return strays, tuple(others)


def _files_below(directory: Location) -> Iterator[Location]:
    """Every file in a directory and below; what begins with a dot is not a model's, and links may lead in circles."""
    for entry in directory.entries() if directory.is_directory() else ():
        if entry.name.startswith("."):
            continue
        if not entry.is_directory():
            yield entry
        elif not entry.is_link():
            yield from _files_below(entry)


def _is_weights(place: Location) -> bool:
    """Whether a loader may take a file for weights, by its name, or by its suffix and its first bytes."""
    if shard.parse_weight_name(place.name) is not None:
        return True
    if place.suffix not in suffixes() or run_files.what_it_is(place.name) or not place.is_file():
        return False
    try:
        return is_weights(place)
    except (StreamconvError, OSError):
        return False


def _equal(left: Location, right: Location) -> bool:
    with left.open() as a, right.open() as b:
        return a.size == b.size and all(
            a.read(at, 1 << 20) == b.read(at, 1 << 20) for at in range(0, a.size, 1 << 20)
        )
