"""Progress of a long command, as text or as JSON lines.

On a terminal: one live line. Otherwise: a line for each tenth of the work. `--quiet`: nothing. `--log-json`:
JSON lines on stderr, each an object with a `message_type`:

    status      at most once a second, and at the end of a phase
        phase               "convert" or "verify"
        bytes_done          integer, of tensor data and of checks; work of earlier runs included
        bytes_total         integer
        bytes_resumed       integer, how much of bytes_done an earlier run did
        fraction_done       0 to 1
        bytes_per_second    number, of this run; null before it is known
        seconds_elapsed     number
        seconds_remaining   number; null before it is known
        file                text, the output file being written
        peak_memory         integer, bytes of all processes, file-mapped pages apart
    summary     once, when a command is done; its fields are listed in `cli.convert` and `cli.verify`
    error       once, when it failed
        exit_code           integer
        message             text
        problems            list of {message, file, tensor, hint}; all but message may be null

A signal USR1 prints the state at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from streamconv.cli.text import duration, picked, printable, put, size, talk, talk_json

if TYPE_CHECKING:
    from types import FrameType

    from streamconv.running.progress import Progress, ProgressCallback

# Seconds between status lines: a day's run should not fill a disk with them.
_STATUS_EVERY = 1.0

_STEPS = 10
_NARROWEST_BAR = 10


class Lines:
    """Prints a line for each tenth, for logs."""

    def __init__(self) -> None:
        self._step = 0

    def __call__(self, progress: Progress) -> None:
        """Print when another tenth is done."""
        step = int(fraction(progress) * _STEPS)
        if step > self._step:
            self._step = step
            talk(line(progress))


class JsonLines:
    """Prints status messages, as the module's docstring lists them."""

    def __init__(self, phase: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._phase = phase
        self._clock = clock
        self._next = clock()

    def __call__(self, progress: Progress) -> None:
        """Print at most once a second, and at the end."""
        if self._clock() >= self._next or progress.bytes_done >= progress.bytes_total:
            self._next = self._clock() + _STATUS_EVERY
            talk_json(status(self._phase, progress))


@contextmanager
def reporting(arguments: Namespace, phase: str) -> Iterator[ProgressCallback]:
    """The progress callback for the options `--quiet` and `--log-json`, and for a terminal."""
    on_terminal = not (arguments.quiet or arguments.log_json) and sys.stderr.isatty()
    report = _bar if on_terminal else JsonLines(phase) if arguments.log_json else Lines()
    latest: list[Progress] = []

    def update(progress: Progress) -> None:
        latest[:] = [progress]
        if not arguments.quiet:
            report(progress)

    def state(_number: int, _frame: FrameType | None) -> None:
        # The signal may have come in the middle of a print, which cannot be entered twice.
        text = line(latest[0]) if latest else f"{phase}: nothing is done yet"
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())

    with on_signal("SIGUSR1", state):
        try:
            yield update
        finally:
            if on_terminal:
                _redraw("")


def _bar(progress: Progress) -> None:
    """A live line on a terminal."""
    text = line(progress)
    width = shutil.get_terminal_size().columns - 1
    room = width - len(text) - 4
    full = round(max(room, 0) * fraction(progress))
    bar = f"|{'#' * full}{' ' * (room - full)}|  " if room >= _NARROWEST_BAR else ""
    _redraw(f"{bar}{text}"[:width])


def _redraw(text: str) -> None:
    # To the start of the line, what is new, and nothing after it.
    put(f"\r{text}\x1b[K", sys.stderr)


def fraction(progress: Progress) -> float:
    """How much is done, 0 to 1."""
    return progress.bytes_done / progress.bytes_total if progress.bytes_total else 1.0


def rate(progress: Progress) -> float | None:
    """Bytes per second of this run so far, or None before there are any."""
    done = progress.bytes_done - progress.bytes_resumed
    return done / progress.seconds if done > 0 and progress.seconds > 0 else None


def remaining(progress: Progress) -> float | None:
    """Seconds left at the rate so far, or None before there is one."""
    speed = rate(progress)
    return (progress.bytes_total - progress.bytes_done) / speed if speed else None


def line(progress: Progress) -> str:
    """The progress in words."""
    speed, left = rate(progress), remaining(progress)
    parts = (
        f"{size(progress.bytes_done)} of {size(progress.bytes_total)}",
        f"{size(speed)}/s" if speed else "",
        f"{duration(left)} left" if left else "",
        printable(progress.file),
        f"peak memory {size(progress.peak_memory)}",
    )
    return f"{fraction(progress):4.0%}  {', '.join(filter(None, parts))}"


def status(phase: str, progress: Progress) -> dict[str, Any]:
    """The fields of a status message."""
    return {
        "message_type": "status",
        "phase": phase,
        **picked(progress, "bytes_done bytes_total bytes_resumed"),
        "fraction_done": round(fraction(progress), 6),
        "bytes_per_second": rate(progress),
        "seconds_elapsed": progress.seconds,
        "seconds_remaining": remaining(progress),
        **picked(progress, "file peak_memory"),
    }


@contextmanager
def on_signal(name: str, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle a signal, where this is the main thread and the system has it."""
    number = getattr(signal, name, None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
