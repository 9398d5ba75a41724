"""Output files come to their end: patches, sync, journal, final name; in a thread of its own, because
waiting for a disk is no reason to stop reading.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

from streamconv.errors import ConversionError
from streamconv.execution import patches
from streamconv.execution.execute import Receipt, WorkItem
from streamconv.ops import leaves
from streamconv.plans import Plan
from streamconv.plans.plan import SourceFile, changed
from streamconv.running.destination import partial_path
from streamconv.running.journal import Journal
from streamconv.storage import files as storage

# How often, in seconds, what is written is pushed to the disk and the journal says so.
_SYNC_EVERY = 10.0


class Finisher:
    """Gives each file its final name once its last item is done. Use it in a `with`."""

    def __init__(
        self,
        plan: Plan,
        destination: Path,
        journal: Journal,
        items: Sequence[WorkItem],
        done: dict[int, Receipt],
        *,
        forget: bool,
    ) -> None:
        self._journal = journal
        self._forget = forget
        self._items = items
        self._final = {
            str(partial_path(destination, output.path)): (destination / output.path, output.layout)
            for output in plan.outputs
        }
        # By index, not by count: an item may be done twice.
        self._left: dict[str, set[int]] = {path: set() for path in self._final}
        for item in items:
            if item.index not in done:
                self._left[item.path].add(item.index)
        self._sources = _sources(
            plan, [str(partial_path(destination, output.path)) for output in plan.outputs]
        )
        self._range: dict[str, tuple[int, int]] = {}
        for item in items:
            first, _ = self._range.get(item.path, (item.index, 0))
            self._range[item.path] = (first, item.index + 1)
        self._queue: SimpleQueue[tuple[list[Receipt], int] | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._given_up = False
        self._files = storage.Files()
        self._thread = threading.Thread(target=self._serve, name="finisher")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._given_up = kind is not None
        self._queue.put(None)
        self._thread.join()
        self._files.close()
        if kind is None and self._failure is not None:
            raise self._failure

    def add(self, receipts: list[Receipt]) -> None:
        """Take note of items whose bytes are written. Raises what went wrong in the thread so far."""
        self._queue.put((receipts, self._journal.done(receipts)))
        if self._failure is not None:
            raise self._failure

    def _serve(self) -> None:
        try:
            for path in self._final:
                if not self._left[path]:
                    self._finish(path)
            touched: set[str] = set()
            synced = time.monotonic()
            while (message := self._queue.get()) is not None and not self._given_up:
                receipts, noted = message
                for receipt in receipts:
                    item = self._items[receipt.index]
                    begin, length = item.offset + item.start, item.stop - item.start
                    storage.begin_writing_back(self._files, item.path, begin, length)
                paths = [self._items[receipt.index].path for receipt in receipts]
                touched.update(paths)
                for receipt, path in zip(receipts, paths, strict=True):
                    self._left[path].discard(receipt.index)
                for path in sorted(set(paths)):
                    if not self._left[path]:
                        self._finish(path)
                        touched.discard(path)
                if time.monotonic() - synced > _SYNC_EVERY:
                    for path in sorted(touched):
                        storage.sync_file(Path(path), forget=self._forget)
                    self._journal.synced(noted)
                    touched.clear()
                    synced = time.monotonic()
        except BaseException as error:  # raised again in the run's own thread
            self._failure = error

    def _finish(self, path: str) -> None:
        final, layout = self._final[path]
        if final.exists():
            return
        problems = changed(self._sources.get(path, ()))
        if problems:
            raise ConversionError(
                "the source changed while it was read", hint="begin anew with --restart", problems=problems
            )
        patches.apply(layout, path)
        storage.sync_file(Path(path), forget=self._forget)
        # The journal must know before the name does: a whole file without receipts has no checksums.
        self._journal.whole(*self._range.get(path, (0, 0)))
        storage.publish(Path(path), final)


def _sources(plan: Plan, paths: Sequence[str]) -> dict[str, list[SourceFile]]:
    """For each output file, the source files that its tensors come from."""
    by_path = {file.path: file for file in plan.files}
    found: dict[str, dict[str, SourceFile]] = {path: {} for path in paths}
    for tensor in plan.tensors:
        for leaf in leaves(tensor.expression):
            for extent in leaf.extents:
                found[paths[tensor.file]][extent.file] = by_path[extent.file]
    return {path: list(files.values()) for path, files in found.items()}
