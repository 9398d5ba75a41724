"""Running a plan. The order of calls, all in the coordinating process but the third:

1. `standing.prepare`: check that there is room and nothing in the way, and find work to resume.
2. `_create`: every output file, as NAME.partial, at full size, with the bytes known beforehand.
3. `_carry_out`: an engine runs batches of items and gives receipts; each goes to the journal. Checks of what the plan
   relies on come first, then the bytes of the output.
4. `Finisher`: once all checks are done, a file whose items are done gets its patches, is synced, and gets its
   name. If a check fails, no file gets one.
5. `_write_others`: side files are copied; then indexes, whose presence means that the conversion is whole.
6. `record.write`: conversion.json stays, all other files of the run are removed.

With `delete_source`, `freeing` says in which steps the work is done, and the finisher deletes what a step has freed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from streamconv.engines import Batch, Engine, chosen
from streamconv.errors import CheckpointError, ConversionError, DestinationError, Problem, listed
from streamconv.execution import memory
from streamconv.execution.execute import Item, Receipt, Settings, WorkItem
from streamconv.execution.memory import Budget
from streamconv.execution.node import node
from streamconv.plans import Plan
from streamconv.plans.plan import SideFile, changed, known_states
from streamconv.running import apart, clearing, contents, deleted, destination, freeing, record, standing
from streamconv.running.destination import Destination
from streamconv.running.finisher import Finisher
from streamconv.running.freeing import Step
from streamconv.running.items import batches, check_items, checksum_items, computed, problem, work_items
from streamconv.running.journal import Journal
from streamconv.running.progress import ProgressCallback, Tracker
from streamconv.running.record import Figure, Loss
from streamconv.storage import writing
from streamconv.storage.files import Copy, Files
from streamconv.storage.location import Location
from streamconv.storage.roles import State


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished run.

    Attributes:
        destination: the directory, or the file.
        plan: what was run.
        finished_before: nothing was done, because the same conversion was there, complete.
        bytes_written: tensor bytes that this run put in place.
        bytes_resumed: tensor bytes that an earlier, interrupted run had put in place.
        bytes_copied: how many of both were copied by the kernel.
        seconds: this run took.
        peak_memory: bytes, all processes, file-mapped pages apart.
        losses: tensors in which a cast lost values.
        deleted: source files that this run has deleted.
        rounding: tensors of codes that were made, and how far these are from what they are of.
    """

    destination: Location
    plan: Plan
    finished_before: bool = False
    bytes_written: int = 0
    bytes_resumed: int = 0
    bytes_copied: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    losses: tuple[Loss, ...] = ()
    deleted: tuple[str, ...] = ()
    rounding: tuple[Figure, ...] = ()

    @property
    def record(self) -> Location:
        """Its `conversion.json`."""
        return destination.destination_at(self.destination).own / destination.RECORD

    @property
    def has_checksums(self) -> bool:
        """Whether its record has a checksum of every tensor, so that it can be verified without the source."""
        document = record.read(destination.destination_at(self.destination)) or {}
        return not any(file.bare[0] for file in contents.read(document, self.record))


def run(
    plan: Plan,
    target: str | Path | Location | Destination,
    *,
    budget: Budget,
    engine: str | None = None,
    checksum: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    delete_source: bool = False,
    allow_loss: bool = False,
    progress: ProgressCallback | None = None,
) -> Conversion:
    """Run a checked plan into a directory, or a file of its own, resuming what an earlier run of it left.

    `engine` is a name in `engines.ENGINES`, or None to choose by the amount of work. With `checksum`, what only storage
    sees is hashed, too. For `overwrite` and `restart` see `RunningOptions`, for `delete_source` and `allow_loss`
    `running.freeing`; nobody is asked here.

    Raises:
        UsageError: there is no such engine.
        DestinationError: the destination holds something else.
        PlanError: there is not enough room.
        ConversionError: the run failed; what it finished is kept.
    """
    began = time.monotonic()
    place = destination.destination_at(target)
    places = destination.places(plan, place)
    chosen(engine, 1, 0, places)
    gone = deleted.freed(place)
    _check(plan, place, gone)
    if delete_source:
        freeing.require_deletable(plan, gone, allow_loss=allow_loss)
    deleted.require_whole(plan, place, gone)
    checksum = (
        checksum or delete_source or bool(gone)
    )  # what was made of deleted files is verified by nothing else
    finals = [place / output.path for output in plan.outputs]
    partials = [writing.partial(final).place for final in finals]
    pieces = work_items(plan, partials)
    items: list[Item] = [*pieces, *check_items(plan, len(pieces))]
    if checksum:
        items += checksum_items(plan, len(items))
    with destination.locked(place), deleted.locked(plan) if delete_source else nullcontext():
        # Another run may have ended in between.
        if deleted.freed(place) != gone:
            raise DestinationError(
                "another run has deleted files of the source meanwhile",
                file=str(place),
                hint="give the command again",
            )
        deleted.require_whole(plan, place, gone)
        done = standing.prepare(
            plan,
            place,
            items,
            overwrite=overwrite,
            restart=restart,
            checksum=checksum,
            delete_source=delete_source,
        )
        if done is None:
            return Conversion(place.place, plan, finished_before=True)
        if delete_source:
            deleted.mark(plan, place, freeing.to_be_freed(plan))
        with Journal(place.own / destination.JOURNAL) as journal:
            done = _create(plan, place, finals, pieces, done, journal, gone, reserve=not delete_source)
            steps = freeing.steps(plan, items, done, gone) if delete_source else []
            tracker = Tracker(items, done, began, progress)
            resumed = sum(receipt.nbytes for receipt in done.values())
            left = computed(item for item in items if item.index not in done)
            who = chosen(engine, budget.workers, left, places)
            forget = memory.crowds_page_cache(2 * sum(output.layout.size for output in plan.outputs))
            # Where nobody can say which node wrote a byte, each writer syncs its own.
            sync = not who.shares_page_cache or node() is None
            known = known_states(plan)
            settings = Settings(
                budget.arena,
                checksum,
                forget,
                sync,
                releasing=delete_source,
                known=known,
                ahead=memory.ahead(budget.arena) if known else 0,
            )
            finisher = Finisher(plan, place, finals, journal, items, done, steps, gone, forget=forget)
            _carry_out(items, finals, who, settings, budget.workers, finisher, tracker, steps)
        _write_others(plan, place)
        result = Conversion(
            place.place,
            plan,
            bytes_written=sum(piece.stop - piece.start for piece in pieces) - resumed,
            bytes_resumed=resumed,
            bytes_copied=sum(receipt.nbytes for receipt in done.values() if receipt.copied),
            seconds=time.monotonic() - began,
            peak_memory=tracker.peak_memory(),
            losses=record.losses(pieces, done),
            deleted=tuple(sorted(finisher.gone - gone)),
            rounding=record.figures(pieces, done),
        )
        document = record.record(plan, place, pieces, partials, done, checksum=checksum)
        record.write(place, document)
        clearing.forget_run(place)
        return result


def _check(plan: Plan, place: Destination, gone: Collection[str]) -> None:
    """Refuse a destination that the plan does not fit, or that is not apart from the source, and a changed source."""
    destination.check_fits(plan, place)
    apart.check_apart(plan.source, place)
    apart.check_sources_apart(plan, place)
    problems = changed((*(file for file in plan.files if file.path not in gone), *plan.side_files))
    if problems:
        hint = "put it back as it was: the rest of it is deleted" if gone else "make the plan again"
        raise CheckpointError("the source changed", hint=hint, problems=problems)


def _create(
    plan: Plan,
    place: Destination,
    finals: Sequence[Location],
    pieces: Sequence[WorkItem],
    done: Mapping[int, Receipt],
    journal: Journal,
    gone: Collection[str],
    *,
    reserve: bool,
) -> dict[int, Receipt]:
    """Create the output files that are missing; returns the receipts whose bytes are in place.

    Raises:
        DestinationError: one is missing that was made of deleted files.
    """
    ranges: dict[str, tuple[int, int]] = {}
    for piece in pieces:
        ranges[piece.path] = ranges.get(piece.path, (piece.index, 0))[0], piece.index + 1
    unfinished = {piece.path for piece in pieces if piece.index not in done}
    files = [
        (writing.partial(final), final, output.layout)
        for output, final in zip(plan.outputs, finals, strict=True)
    ]
    whole = {
        final
        for partial, final, layout in files
        if _size(final) == layout.size and partial.place not in unfinished
    }
    growing = [each for each in files if each[1] not in whole]
    apart.check_no_source(plan, [partial for partial, _, _ in growing], place)
    if gone:
        deleted.require_kept(pieces, done, gone)
        for partial, final, layout in growing:
            if _size(partial) is None and _size(final) == layout.size:
                writing.rename(final, partial)  # it holds what cannot be made again
    lost = {partial.place for partial, _, layout in growing if _size(partial) != layout.size}
    # Before they are there again: a run that found them would believe what was said of those that are gone.
    again = [ranges[path] for path in sorted(lost & ranges.keys())]
    forgotten = {at for first, stop in again for at in range(first, stop)}
    kept = {at: receipt for at, receipt in done.items() if at not in forgotten}
    deleted.require_kept(pieces, kept, gone)
    journal.lost([(first, stop) for first, stop in again if any(at in done for at in range(first, stop))])
    with Files() as opened:
        for partial, final, layout in growing:
            writing.remove(final)
            if partial.place in lost:
                writing.create(partial, layout.size, reserve=reserve)
            # Again for a file that is there: the run that made it may have ended right after.
            for literal in layout.literals:
                opened.write(partial.place, literal.data, literal.offset)
    # Names, too, before anything is said of what has them; the run that gave some may have failed at just that.
    for directory in _directories(plan, place):
        writing.make_directory(directory)
        writing.sync(directory)
    return kept


def _directories(plan: Plan, place: Destination) -> list[Location]:
    """Where a plan writes, each after what it lies in."""
    parents = {parent for name in destination.output_names(plan) for parent in PurePosixPath(name).parents}
    return [place / parent for parent in sorted(parents)]


def _carry_out(
    items: Sequence[Item],
    finals: Sequence[Location],
    engine: Engine,
    settings: Settings,
    workers: int,
    finisher: Finisher,
    tracker: Tracker,
    steps: Sequence[Step],
) -> None:
    """Have an engine do what is left of the work, and finish files as their items are done.

    Raises:
        ConversionError: a check failed, or the work did.
    """
    left = [item for item in items if item.index not in tracker.done]
    work = batches(left)
    handed_out = _in_steps(left, steps, finisher) if steps else work
    with finisher, engine.run(handed_out, settings, min(workers, max(len(work), 1))) as results:
        for receipts in results:
            for receipt in receipts:
                if receipt.difference:
                    raise _failed(problem(items[receipt.index], receipt.difference), finals)
            finisher.add(receipts)
            tracker.add(receipts)


def _in_steps(left: Sequence[Item], steps: Sequence[Step], finisher: Finisher) -> Iterator[Batch]:
    """Batches of what is left, of each step once the files of the one before it are gone; empty ones until they are."""
    by_index = {item.index: item for item in left}
    yield from batches([item for item in left if not isinstance(item, WorkItem)])
    for number, step in enumerate(steps):
        yield from batches([by_index[index] for index in step.items if index in by_index])
        while step.files and not finisher.has_freed(number):
            yield []


def _write_others(plan: Plan, place: Destination) -> None:
    """The files without tensors: indexes after side files, and last what marks a conversion as whole."""
    _copy_side_files(place, [side for side in plan.side_files if not side.is_marker])
    for text in plan.texts:
        writing.write_whole(place / text.path, text.content.encode())
    _copy_side_files(place, [side for side in plan.side_files if side.is_marker])


def _copy_side_files(place: Destination, side_files: Sequence[SideFile]) -> None:
    buffer = memoryview(bytearray(1 << 20))
    with Files({side.source: State("file", side.size, side.identity) for side in side_files}) as files:
        for side in side_files:
            problems = changed([side])
            if problems:
                raise ConversionError(
                    "the source changed", hint="start over with --restart", problems=problems
                )
            final = place / side.path
            partial = writing.partial(final)
            writing.create(partial, side.size)
            files.copy(Copy(side.source, 0, partial.place, 0, side.size), buffer)
            writing.sync(partial)
            writing.publish(final)


def _failed(found: Problem, finals: Sequence[Location]) -> ConversionError:
    """The error for a check that failed. Only an earlier run can have finished files by then."""
    whole = [final.name for final in finals if final.exists()]
    kept = f"an earlier run had finished {listed(whole)}, remove them" if whole else "nothing was finished"
    return ConversionError(found.message, file=found.file, tensor=found.tensor, hint=f"{found.hint}; {kept}")


def _size(place: Location) -> int | None:
    """Bytes of a file; None where there is none."""
    return place.state().size if place.is_file() else None
