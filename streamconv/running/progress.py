"""What a run has done, and what it reports while it is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from streamconv.execution.execute import Item, Receipt, WorkItem
from streamconv.execution.memory import PeakMeter
from streamconv.storage import writing
from streamconv.storage.location import locate

# Seconds between looks at memory and reports.
_REPORT_EVERY = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run; given to progress callbacks several times a second at most.

    Attributes:
        bytes_done, bytes_total: of tensor data and of checks; work of earlier runs included.
        bytes_resumed: how much of `bytes_done` an earlier run did.
        file: the output file that is being filled; empty while the plan's checks are made.
        seconds: since this run began.
        peak_memory: bytes, all processes, file-mapped pages apart.
    """

    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    file: str
    seconds: float
    peak_memory: int


ProgressCallback = Callable[[Progress], None]


class Tracker:
    """Counts work as its receipts come, and reports it.

    Attributes:
        done: all receipts, by item index.
        total, resumed: bytes of all items, and of those that an earlier run has done.
    """

    def __init__(
        self, items: Sequence[Item], done: dict[int, Receipt], began: float, report: ProgressCallback | None
    ) -> None:
        self._items = items
        self._began = began
        self._report = report
        self._reported = 0.0
        self._meter = PeakMeter()
        self.done = done
        self.total = nbytes(items)
        self.resumed = self._finished = nbytes(items[index] for index in done)

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Count items; report if it is time, or all is done."""
        if not receipts:
            return
        # An item may be done twice.
        fresh = {receipt.index for receipt in receipts} - self.done.keys()
        self.done.update((receipt.index, receipt) for receipt in receipts)
        self._finished += nbytes(self._items[index] for index in fresh)
        now = time.monotonic()
        if now - self._reported < _REPORT_EVERY and self._finished < self.total:
            return
        self._reported = now
        peak = self.peak_memory()
        if self._report:
            item = self._items[receipts[-1].index]
            name = locate(item.path).name.removesuffix(writing.PARTIAL) if isinstance(item, WorkItem) else ""
            self._report(Progress(self._finished, self.total, self.resumed, name, now - self._began, peak))

    def peak_memory(self) -> int:
        """Measure now; returns the peak so far, in bytes."""
        return self._meter.sample()


def nbytes(items: Iterable[Item]) -> int:
    """Bytes that items cover."""
    return sum(item.stop - item.start for item in items)
