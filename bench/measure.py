"""Measuring commands: wall time until the output is on the disk, and the memory of all their processes.

What every contender gets alike:

    1. The destination is removed, what is still on its way to the disk is waited for, and then nothing is done
       for a while, because disks have caches and allowances of their own that need time. Not timed.
    2. The source is read, so that it is cached (warm), its pages are dropped (cold), or it is left as it
       is. Not timed.
    3. The command runs, with its memory sampled; then all files of its destination are synced. Timed.

Contenders take turns, in one order and then in the reverse, so that what the machine does meanwhile meets all
of them; ratios are taken within a turn, and reported as median, least and most.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Cache = Literal["warm", "cold", "as is"]

_EVERY = 0.025
_READ = 8 << 20

# A command that takes longer is stuck.
_LONGEST = 1800.0

# The end of what a failed command said, in characters.
_LAST_WORDS = 600


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory of a process tree at one moment.

    Attributes:
        seconds: since the command began.
        anonymous: bytes that no file backs (RssAnon + RssShmem), of all processes together. This is what
            cannot be given back under pressure, and what the kernel kills for.
        resident: all resident bytes (VmRSS); file pages that processes share count once for each.
        processes: how many there were.
    """

    seconds: float
    anonymous: int
    resident: int
    processes: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of a command.

    Attributes:
        seconds: until the command had ended and its files were on the disk.
        syncing: how many of them went into syncing after its end.
        curve: memory over time.
        failure: the last words of a command that failed, otherwise empty.
    """

    seconds: float
    syncing: float
    curve: tuple[Sample, ...]
    failure: str = ""

    @property
    def anonymous(self) -> int:
        """The most anonymous memory at once, in bytes."""
        return max((sample.anonymous for sample in self.curve), default=0)

    @property
    def resident(self) -> int:
        """The most resident memory at once, in bytes."""
        return max((sample.resident for sample in self.curve), default=0)

    @property
    def processes(self) -> int:
        """The most processes at once."""
        return max((sample.processes for sample in self.curve), default=0)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to make `destination` out of `source`.

    Attributes:
        name: in tables.
        command: what to run.
        source: what it reads, a file or a directory.
        destination: what it makes.
    """

    name: str
    command: Sequence[str]
    source: Path
    destination: Path


@dataclass(slots=True)
class Race:
    """Measurements of several contenders, turn by turn.

    Attributes:
        cache: what the source was read from.
        results: of each contender, a measurement a turn.
        failures: of each contender that gave up, why; it is not run again.
    """

    cache: Cache
    results: dict[str, list[Measurement]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, to: str) -> Spread:
        """Seconds of one contender by those of another, within turns."""
        pairs = zip(self.results[name], self.results[to], strict=True)
        return spread([own.seconds / other.seconds for own, other in pairs])

    def anonymous(self, name: str) -> int:
        """The most memory that any of its runs held, in bytes."""
        return max(result.anonymous for result in self.results[name])

    def resident(self, name: str) -> int:
        """The most memory, mapped files included, that any of its runs held, in bytes."""
        return max(result.resident for result in self.results[name])

    def typical(self, name: str) -> Measurement:
        """The run of the median time."""
        ordered = sorted(self.results[name], key=lambda result: result.seconds)
        return ordered[(len(ordered) - 1) // 2]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several values, with their range."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def race(
    contenders: Sequence[Contender], turns: int, cache: Cache, rest: float, say: Callable[[str], None]
) -> Race:
    """Run all contenders in turn, `turns` times over, after one turn that does not count."""
    outcome = Race(cache, {contender.name: [] for contender in contenders})
    for turn in range(turns + 1):
        for contender in contenders if turn % 2 else reversed(contenders):
            if contender.name in outcome.failures:
                continue
            prepare(contender.destination, contender.source, cache, rest)
            result = run(contender.command, contender.destination)
            say(
                f"{cache} turn {turn}: {contender.name}: {result.seconds:.2f} s, {result.syncing:.2f} s of them"
                f" syncing, {result.anonymous / 1e6:.0f} MB" + (", FAILED" if result.failure else "")
            )
            remove(contender.destination)
            if result.failure:
                say(result.failure)
                outcome.failures[contender.name] = result.failure
                del outcome.results[contender.name]
            elif turn:
                outcome.results[contender.name].append(result)
    return outcome


def prepare(destination: Path, source: Path, cache: Cache, rest: float = 0.0) -> None:
    """Give a run an empty destination, a quiet disk, and a cached or an uncached source."""
    remove(destination)
    os.sync()
    time.sleep(rest)
    if cache != "as is":
        for path in files_of(source):
            (_warm if cache == "warm" else _cool)(path)


def run(command: Sequence[str], destination: Path | None = None) -> Measurement:
    """Run a command and sync what it made, with its memory watched meanwhile."""
    began = time.monotonic()
    # A session of its own: a command that is given up on is ended with all its children.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    watch = _Watch(process.pid, began)
    watch.start()
    try:
        _, error = process.communicate(timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        _end(process)
        error = b"took too long"
    except BaseException:  # an interrupt must not leave the command behind
        _end(process)
        raise
    finally:
        watch.stop()
    ended = time.monotonic()
    if destination is not None:
        for path in files_of(destination):
            _sync(path)
    done = time.monotonic()
    failure = error.decode(errors="replace").strip()[-_LAST_WORDS:] or f"exit code {process.returncode}"
    return Measurement(done - began, done - ended, tuple(watch.curve), failure if process.returncode else "")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The regular files of a file or a directory."""
    if path.is_file():
        return [path]
    return sorted(inside for inside in path.rglob("*") if inside.is_file() and not inside.is_symlink())


def tree(root: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield root
    try:
        tasks = os.listdir(f"/proc/{root}/task")
    except OSError:
        return
    for task in tasks:
        try:
            with open(f"/proc/{root}/task/{task}/children") as children:
                found = children.read().split()
        except OSError:
            continue
        for child in found:
            yield from tree(int(child))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that was started in a session of its own, and all its children."""
    for pid in [*tree(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


class _Watch(threading.Thread):
    """Samples the memory of a process tree until told to stop."""

    def __init__(self, root: int, began: float) -> None:
        super().__init__(daemon=True)
        self.curve: list[Sample] = []
        self._root, self._began = root, began
        self._ended = threading.Event()

    def run(self) -> None:
        while True:
            found = [_memory(pid) for pid in tree(self._root)]
            held = [each for each in found if each[1]]
            if held:
                anonymous, resident = (sum(column) for column in zip(*held, strict=True))
                seconds = time.monotonic() - self._began
                self.curve.append(Sample(seconds, anonymous, resident, len(held)))
            if self._ended.wait(_EVERY):
                return

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process; 0 for one that has ended."""
    anonymous = resident = 0
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    anonymous += int(line.split()[1]) * 1024
                elif line.startswith("VmRSS:"):
                    resident = int(line.split()[1]) * 1024
    except OSError:
        return 0, 0
    return anonymous, resident


def _warm(path: Path) -> None:
    buffer = bytearray(_READ)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _cool(path: Path) -> None:
    """Drop a file's pages; only clean ones go, hence the syncing before."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
