"""Giving an output file its final name: patches, sync, journal, rename, once its last item is done.

It runs in its own thread, so that reading continues while the disk syncs. Where the source is to be deleted, it does that
too, as `freeing` has it; and then a file gets its name only when its items are proven: read again from the disk, they
have the digests of what was written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue

import xxhash

from streamconv.errors import ConversionError
from streamconv.execution import patches
from streamconv.execution.execute import Item, Receipt, WorkItem
from streamconv.execution.node import node
from streamconv.ops import leaves
from streamconv.plans import Plan
from streamconv.plans.plan import SourceFile, changed, rewritten
from streamconv.running import deleted, freeing
from streamconv.running.destination import Destination
from streamconv.running.freeing import Step
from streamconv.running.items import by_files_read
from streamconv.running.journal import Journal
from streamconv.storage import writing
from streamconv.storage.files import Files
from streamconv.storage.location import Location, locate

# Seconds that one question after what is freed waits, and bytes that are read again at once.
_A_MOMENT = 0.05
_READ = 1 << 20

# Seconds between syncs of what is written, each noted in the journal.
_SYNC_EVERY = 10.0


class Finisher:
    """Gives each file its final name once its last item and all checks are done. Use it in a `with`."""

    def __init__(
        self,
        plan: Plan,
        place: Destination,
        finals: Sequence[Location],
        journal: Journal,
        items: Sequence[Item],
        done: Mapping[int, Receipt],
        steps: Sequence[Step] = (),
        gone: Iterable[str] = (),
        *,
        forget: bool,
    ) -> None:
        """Record what is left to do of all items; with `forget`, drop cached pages as files are synced.

        After each of `steps`, its files are deleted; none is where there are no steps. Those `gone` are already.
        """
        self._place = place
        self._journal = journal
        self._forget = forget
        self._items = items
        self._here = node()
        partials = [str(writing.partial(final)) for final in finals]
        self._final = {
            path: (final, output.layout)
            for path, final, output in zip(partials, finals, plan.outputs, strict=True)
        }
        # Indexes, not counts: an item may be done twice.
        self._left: dict[str, set[int]] = {path: set() for path in partials}
        self._unproven: set[int] = set()
        self._range: dict[str, tuple[int, int]] = {}
        for item in items:
            left = self._left[item.path] if isinstance(item, WorkItem) else self._unproven
            if item.index not in done:
                left.add(item.index)
            if isinstance(item, WorkItem):
                first, _ = self._range.get(item.path, (item.index, 0))
                self._range[item.path] = (first, item.index + 1)
        self._sources = _sources(plan, partials)
        self._by_path = {file.path: file for file in plan.files}
        self._steps = steps
        self._freed = 0
        self._step = {index: number for number, step in enumerate(steps) for index in step.items}
        self._step_left = [sum(index not in done for index in step.items) for step in steps]
        self._gone = {*gone}
        self._moved = threading.Condition()
        self._touched: set[str] = set()
        self._digests = {at: receipt.digest for at, receipt in done.items()} if steps else {}
        self._proven: set[int] = set()
        self._queue: SimpleQueue[tuple[list[Receipt], int] | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._given_up = False
        self._files = Files()
        self._thread = threading.Thread(target=self._serve, name="finisher")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._given_up = kind is not None
        self._queue.put(None)
        self._thread.join()
        self._files.close()
        if kind is not None or self._failure is not None:
            with suppress(ConversionError):  # of a run that fails already, perhaps for its disk
                self._take_back()
        if kind is None and self._failure is not None:
            raise self._failure

    def add(self, receipts: list[Receipt]) -> None:
        """Record items that are done. Raises any error from the thread so far.

        Raises:
            ConversionError: the bytes are in another node's page cache, which this run cannot sync.
        """
        for receipt in receipts:
            if not receipt.holds_on(self._here):
                raise ConversionError(
                    "a worker on another node wrote it and did not sync it",
                    tensor=self._items[receipt.index].name,
                    hint="the engine must declare that its workers do not share a page cache (`shares_page_cache`)",
                )
        if receipts:
            self._queue.put((receipts, self._journal.done(receipts)))
        if self._failure is not None:
            raise self._failure

    @property
    def gone(self) -> frozenset[str]:
        """The source files that are deleted, by this run or before it."""
        return frozenset(self._gone)

    def has_freed(self, number: int) -> bool:
        """Whether the files of a step are deleted; waits a moment for it."""
        with self._moved:
            return self._moved.wait_for(lambda: self._freed > number, _A_MOMENT)

    def _take_back(self) -> None:
        """Note as not done what was read of files that were written to meanwhile: they may be put back as they were."""
        files = rewritten(file for file in self._by_path.values() if file.path not in self._gone)
        if not files:
            return
        lost = [
            item.index
            for read, group in by_files_read(self._items).items()
            # What was deleted cannot be read again; it was as it should be when it was.
            if read & files and not read & self._gone
            for item in group
            if not self._final[item.path][0].exists()
        ]
        self._journal.lost(_ranges(sorted(lost)))

    def _serve(self) -> None:
        try:
            self._finish_all(self._left)
            self._free(0)
            touched = self._touched
            synced = time.monotonic()
            while (message := self._queue.get()) is not None and not self._given_up:
                receipts, noted = message
                paths = set()
                proving = bool(self._unproven)
                for receipt in receipts:
                    item = self._items[receipt.index]
                    if not isinstance(item, WorkItem):
                        self._unproven.discard(item.index)
                        continue
                    paths.add(item.path)
                    if self._steps:
                        self._digests[item.index] = receipt.digest
                        self._step_left[self._step[item.index]] -= item.index in self._left[item.path]
                    self._left[item.path].discard(item.index)
                    if not receipt.durable:
                        touched.add(item.path)
                        self._files.begin_sync(item.path, item.offset + item.start, item.stop - item.start)
                # Files that were complete before the last check have been waiting for it.
                touched -= self._finish_all(self._left if proving else paths)
                self._free(noted)
                if time.monotonic() - synced > _SYNC_EVERY:
                    self._sync(sorted(touched))
                    self._journal.synced(noted)
                    touched.clear()
                    synced = time.monotonic()
        except BaseException as error:  # raised again in the run's own thread
            self._failure = error

    def _finish_all(self, paths: Iterable[str]) -> set[str]:
        """Finish those files that are complete; returns which."""
        whole = {path for path in paths if not self._left[path] and not self._unproven}
        for path in sorted(whole):
            self._finish(path)
        return whole

    def _finish(self, path: str) -> None:
        final, layout = self._final[path]
        if final.exists():
            return
        problems = changed(file for file in self._sources.get(path, ()) if file.path not in self._gone)
        if problems:
            raise ConversionError(
                "the source changed while it was read", hint="start over with --restart", problems=problems
            )
        patches.apply(layout, path)
        self._sync([path])
        if self._steps:
            self._prove(self._items[slice(*self._range.get(path, (0, 0)))])
        # The journal is written before the rename: a complete file without receipts would have no checksums.
        self._journal.whole(self._range.get(path, (0, 0)))
        writing.publish(final)

    def _sync(self, paths: Sequence[str]) -> None:
        # Linux tells of a failed sync once, and keeps what it could not write as if it were on the disk.
        self._journal.syncing(self._range.get(path, (0, 0)) for path in paths)
        try:
            for path in paths:
                writing.sync(locate(path), forget=self._forget or bool(self._steps))
        except ConversionError:
            self._journal.failed()
            raise

    def _free(self, noted: int) -> None:
        """Delete the files of every step that is done, once all checks are; `noted` items are in the journal."""
        while not self._unproven and self._freed < len(self._steps):
            if self._step_left[self._freed]:
                return
            step = self._steps[self._freed]
            if step.files:
                items = [self._items[index] for index in step.items]
                growing = {item.path for item in items if isinstance(item, WorkItem)} | self._touched
                self._sync(sorted(path for path in growing if not self._final[path][0].exists()))
                self._journal.synced(noted)
                self._touched.clear()
                self._prove(items)
                self._journal.whole(*_ranges(step.items))
                self._delete(step.files)
            with self._moved:
                self._freed += 1
                self._moved.notify_all()

    def _prove(self, items: Iterable[Item]) -> None:
        """Read items again that are synced and not cached, and compare them with what was written.

        Raises:
            ConversionError: one differs; it is noted as not done.
        """
        buffer = memoryview(bytearray(_READ))
        with Files() as files:
            for item in items:
                if not isinstance(item, WorkItem) or item.index in self._proven:
                    continue
                final = self._final[item.path][0]
                path = final.place if final.exists() else item.path
                hasher = xxhash.xxh3_128()
                files.forget(path, item.offset + item.start, item.stop - item.start)
                for at in range(item.start, item.stop, _READ):
                    part = buffer[: item.stop - at]
                    files.read_into(path, part, item.offset + at)
                    hasher.update(part)
                if hasher.hexdigest() != self._digests[item.index]:
                    self._journal.lost([(item.index, item.index + 1)])
                    raise ConversionError(
                        f"what was written from byte {item.offset + item.start} on is not what the disk holds",
                        file=path,
                        tensor=item.name,
                        hint="what it was made of is not deleted; see that the disk is sound, and run the same command "
                        "again, which writes it again",
                    )
                self._proven.add(item.index)

    def _delete(self, paths: Sequence[str]) -> None:
        """Delete source files, whose names are noted before."""
        there = [path for path in paths if path not in self._gone]
        problems = changed(self._by_path[path] for path in there)
        if problems:
            raise ConversionError(
                "the source changed while it was read, and is not deleted",
                hint="put it back as it was, and run the same command again",
                problems=problems,
            )
        deleted.note(self._place, there)
        self._gone.update(there)
        for path in there:
            writing.remove_durably(freeing.names(locate(path)))


def _ranges(indexes: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted indexes as ranges [first, stop)."""
    found: list[tuple[int, int]] = []
    for index in indexes:
        if found and found[-1][1] == index:
            found[-1] = found[-1][0], index + 1
        else:
            found.append((index, index + 1))
    return found


def _sources(plan: Plan, paths: Sequence[str]) -> dict[str, list[SourceFile]]:
    """For each output file, the source files that its tensors come from."""
    by_path = {file.path: file for file in plan.files}
    found: dict[str, dict[str, SourceFile]] = {path: {} for path in paths}
    for tensor in plan.tensors:
        for leaf in leaves(tensor.expression):
            for extent in leaf.extents:
                found[paths[tensor.file]][extent.file] = by_path[extent.file]
    return {path: list(files.values()) for path, files in found.items()}
