"""What a run reports while it is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run; given to progress callbacks several times a second at most.

    Attributes:
        bytes_done, bytes_total: of tensor data, and what checks go over; work of earlier runs included.
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
