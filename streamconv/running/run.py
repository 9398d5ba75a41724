"""Running a plan. The order of calls, all in the coordinating process but the third:

1. `destination.prepare`: is there room, is anything in the way, is there work to go on with.
2. `_create`: every output file, as NAME.partial, at full size, with the bytes known beforehand.
3. An engine runs batches of work items and gives receipts; each goes to the journal.
4. `Finisher`: a file whose items are all done gets its patches, is synced, and gets its name.
5. Side files are copied; then indexes, whose presence means that the conversion is whole.
6. `destination.finish`: conversion.json stays, all else of the run goes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streamconv import __version__
from streamconv.engines import ENGINES, Batch
from streamconv.errors import CheckpointError, ConversionError, UsageError
from streamconv.execution import memory
from streamconv.execution.execute import PART, Receipt, Settings, Worker, WorkItem
from streamconv.execution.memory import Budget, PeakMeter
from streamconv.plans import Plan, fingerprint
from streamconv.plans.plan import SideFile, changed
from streamconv.running import destination as places
from streamconv.running.finisher import Finisher
from streamconv.running.journal import Journal
from streamconv.storage import files as storage

# Items are handed out in batches of about this many bytes, so that a hundred thousand small tensors
# do not cost a message each; and of at most so many items, so that a batch is a moment's work.
_BATCH_BYTES = 64 << 20
_BATCH_ITEMS = 1024

# Seconds between looks at memory and words on progress.
_TELL_EVERY = 0.25

# Below this much work, starting processes takes longer than they save.
WORTH_PROCESSES = 256 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run; given to progress callbacks several times a second at most.

    Attributes:
        bytes_done, bytes_total: of tensor data, work of earlier runs included.
        bytes_resumed: how much of `bytes_done` an earlier run did.
        file: the output file that is being filled.
        seconds: since this run began.
        peak_memory: bytes, all processes, file-mapped pages apart.
    """

    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    file: str
    seconds: float
    peak_memory: int


@dataclass(frozen=True, slots=True)
class Loss:
    """What a cast lost in one tensor, in elements."""

    name: str
    overflowed: int
    flushed: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished run.

    Attributes:
        destination: the directory.
        plan: what was run.
        finished_before: nothing was done, because the same conversion stood there complete.
        bytes_written: tensor bytes that this run put in place.
        bytes_resumed: tensor bytes that an earlier, interrupted run had put in place.
        bytes_copied: how many of all of them only the kernel saw.
        seconds: this run took.
        peak_memory: bytes, all processes, file-mapped pages apart.
        losses: tensors in which a cast lost values.
    """

    destination: Path
    plan: Plan
    finished_before: bool = False
    bytes_written: int = 0
    bytes_resumed: int = 0
    bytes_copied: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    losses: tuple[Loss, ...] = ()


ProgressCallback = Callable[[Progress], None]


def work_items(plan: Plan, paths: Sequence[str]) -> list[WorkItem]:
    """Every item of a plan in the order of the output's bytes; an item's index is its position.

    Args:
        plan: what to do.
        paths: for each of the plan's outputs, the file that its items belong in.
    """
    items: list[WorkItem] = []
    for tensor in sorted(plan.written(), key=lambda tensor: (tensor.file, tensor.offset)):
        nbytes = tensor.spec.nbytes
        for start in range(0, nbytes, PART):
            items.append(
                WorkItem(
                    index=len(items),
                    name=tensor.spec.name,
                    expression=tensor.expression,
                    start=start,
                    stop=min(start + PART, nbytes),
                    path=paths[tensor.file],
                    offset=tensor.offset,
                )
            )
    return items


def batches(items: Iterable[WorkItem]) -> Iterator[Batch]:
    """Consecutive items, about `_BATCH_BYTES` at a time."""
    batch: list[WorkItem] = []
    size = 0
    for item in items:
        length = item.stop - item.start
        if batch and (size + length > _BATCH_BYTES or len(batch) == _BATCH_ITEMS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def run(
    plan: Plan,
    destination: Path,
    *,
    budget: Budget,
    engine: str = "local",
    checksum: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback | None = None,
) -> Conversion:
    """Run a checked plan into `destination`, going on where an earlier run of it stopped.

    Raises:
        DestinationError: something else stands there.
        PlanError: there is too little room.
        ConversionError: the run failed; what it finished is kept.
    """
    began = time.monotonic()
    if engine not in ENGINES:
        raise UsageError(f"there is no engine '{engine}'", hint=f"known: {', '.join(ENGINES)}")
    places.check_apart(Path(plan.source), destination)
    places.check_sources_apart(plan, destination)
    problems = changed((*plan.files, *plan.side_files))
    if problems:
        raise CheckpointError("the source changed", hint="make the plan again", problems=problems)
    with places.locked(destination):
        state = places.prepare(plan, destination, overwrite=overwrite, restart=restart, checksum=checksum)
        if state.finished:
            return Conversion(destination, plan, finished_before=True)
        return _Run(plan, destination, budget, engine, checksum, progress, began).go(state.done)


@dataclass(slots=True)
class _Run:
    """The coordinator of one run."""

    plan: Plan
    destination: Path
    budget: Budget
    engine: str
    checksum: bool
    progress: ProgressCallback | None
    began: float
    meter: PeakMeter = field(default_factory=PeakMeter)

    def go(self, done: dict[int, Receipt]) -> Conversion:
        partials = [str(places.partial_path(self.destination, output.path)) for output in self.plan.outputs]
        items = work_items(self.plan, partials)
        total = sum(item.stop - item.start for item in items)
        done = self._create(items, done)
        resumed = sum(receipt.nbytes for receipt in done.values())
        self._check()
        forget = self._settings().forget
        with Journal(places.streamconv_directory(self.destination) / "journal") as journal:
            finisher = Finisher(self.plan, self.destination, journal, items, done, forget=forget)
            left = [item for item in items if item.index not in done]
            self._run_items(left, done, finisher, total, resumed)
        self._copy_side_files([side for side in self.plan.side_files if not side.is_marker])
        self._write_texts()
        self._copy_side_files([side for side in self.plan.side_files if side.is_marker])
        peak = self.meter.sample()
        losses = _losses(items, done)
        result = Conversion(
            self.destination,
            self.plan,
            bytes_written=total - resumed,
            bytes_resumed=resumed,
            bytes_copied=sum(receipt.nbytes for receipt in done.values() if receipt.copied),
            seconds=time.monotonic() - self.began,
            peak_memory=peak,
            losses=losses,
        )
        places.finish(self.destination, _record(result, items, done))
        return result

    def _create(self, items: Sequence[WorkItem], done: dict[int, Receipt]) -> dict[int, Receipt]:
        """Make what output files are missing; returns the receipts whose bytes are really there."""
        files = storage.Files()
        lost: set[str] = set()
        unfinished = {item.path for item in items if item.index not in done}
        try:
            for output in self.plan.outputs:
                final = self.destination / output.path
                partial = places.partial_path(self.destination, output.path)
                whole = final.is_file() and final.stat().st_size == output.layout.size
                if whole and str(partial) not in unfinished:
                    continue
                final.unlink(missing_ok=True)
                if not partial.is_file() or partial.stat().st_size != output.layout.size:
                    lost.add(str(partial))
                    with storage.failing(partial.parent, "create"):
                        partial.parent.mkdir(parents=True, exist_ok=True)
                    storage.create(partial, output.layout.size)
                # Again for a file that is there: the run that made it may have ended right after.
                for literal in output.layout.literals:
                    storage.write_from(files, str(partial), literal.data, literal.offset)
        finally:
            files.close()
        return {index: receipt for index, receipt in done.items() if items[index].path not in lost}

    def _settings(self) -> Settings:
        moved = 2 * sum(output.layout.size for output in self.plan.outputs)
        return Settings(self.budget.arena, self.checksum, forget=memory.crowds_page_cache(moved))

    def _check(self) -> None:
        """Prove what the plan takes for granted, before anything gets its final name."""
        worker = Worker(self._settings())
        try:
            for check in self.plan.checks:
                worker.prove_equal(check.left, check.right, check.meaning, check.tolerance)
        finally:
            worker.close()

    def _run_items(
        self,
        items: Sequence[WorkItem],
        done: dict[int, Receipt],
        finisher: Finisher,
        total: int,
        resumed: int,
    ) -> None:
        left = sum(item.stop - item.start for item in items)
        workers = self.budget.workers
        work = list(batches(items))
        workers = min(workers, len(work))
        engine = self.engine if workers > 1 and left >= WORTH_PROCESSES else "inline"
        told = 0.0
        finished = resumed
        by_index = {item.index: item for item in items}
        with finisher, ENGINES[engine](work, self._settings(), workers) as results:
            for receipts in results:
                finisher.add(receipts)
                done.update((receipt.index, receipt) for receipt in receipts)
                finished += sum(receipt.nbytes for receipt in receipts)
                now = time.monotonic()
                if now - told < _TELL_EVERY and finished < total:
                    continue
                told = now
                peak = self.meter.sample()
                if self.progress:
                    name = Path(by_index[receipts[-1].index].path).name.removesuffix(places.PARTIAL)
                    self.progress(Progress(finished, total, resumed, name, now - self.began, peak))

    def _copy_side_files(self, side_files: Sequence[SideFile]) -> None:
        files = storage.Files()
        buffer = memoryview(bytearray(1 << 20))
        try:
            for side in side_files:
                problems = changed([side])
                if problems:
                    raise ConversionError(
                        "the source changed", hint="begin anew with --restart", problems=problems
                    )
                final, partial = (
                    self.destination / side.path,
                    places.partial_path(self.destination, side.path),
                )
                with storage.failing(final, "create"):
                    final.parent.mkdir(parents=True, exist_ok=True)
                storage.create(partial, side.size)
                storage.copy_range(files, side.source, 0, str(partial), 0, side.size, buffer)
                storage.sync_file(partial)
                storage.publish(partial, final)
        finally:
            files.close()

    def _write_texts(self) -> None:
        for text in self.plan.texts:
            storage.write_whole(self.destination / text.path, text.content.encode())


def _losses(items: Sequence[WorkItem], done: Mapping[int, Receipt]) -> tuple[Loss, ...]:
    """What casts lost, a row a tensor that lost anything."""
    totals: dict[str, tuple[int, int]] = {}
    for item in items:
        receipt = done[item.index]
        if receipt.overflowed or receipt.flushed:
            overflowed, flushed = totals.get(item.name, (0, 0))
            totals[item.name] = (overflowed + receipt.overflowed, flushed + receipt.flushed)
    return tuple(Loss(name, *counts) for name, counts in totals.items())


def _record(result: Conversion, items: Sequence[WorkItem], done: Mapping[int, Receipt]) -> dict[str, Any]:
    """What `conversion.json` says: all that is needed to reproduce the conversion or to audit it.

    It holds nothing that differs between two runs of the same plan but the machine's versions.
    """
    plan = result.plan
    digests: dict[tuple[str, int], list[str | None]] = {}
    for item in items:
        digests.setdefault((item.path, item.offset), []).append(done[item.index].digest)
    tensors: dict[str, Any] = {}
    for tensor in plan.tensors:
        output = plan.outputs[tensor.file]
        partial = str(places.partial_path(result.destination, output.path))
        found = digests.get((partial, tensor.offset), [])
        tensors.setdefault(output.path, {})[tensor.spec.name] = {
            "dtype": tensor.spec.dtype.name,
            "shape": list(tensor.spec.shape),
            "from": list(tensor.sources),
            **({"xxh3_128": found} if found and None not in found else {}),
        }
    return {
        "streamconv": __version__,
        "versions": {name: version(name) for name in ("numpy", "ml_dtypes", "safetensors")},
        "python": platform.python_version(),
        "source": plan.source,
        "source_format": plan.source_format,
        "target_format": plan.target_format,
        "arguments": dict(plan.arguments),
        "fingerprint": fingerprint(plan),
        "sources": places.states(plan),
        "checksum_part_bytes": PART,
        "losses": [
            {"tensor": loss.name, "overflowed": loss.overflowed, "flushed": loss.flushed}
            for loss in result.losses
        ],
        "files": {
            **{output.path: output.layout.size for output in plan.outputs},
            **{side.path: side.size for side in plan.side_files},
            **{text.path: len(text.content.encode()) for text in plan.texts},
        },
        "tensors": tensors,
    }
