"""How much memory and how many processors a run may use, and how much memory it used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from streamconv.errors import UsageError

# A worker reads, computes and writes in its arena. Below the minimum, blocks are so small that system
# calls take over; above the maximum, nothing gets faster.
MIN_ARENA = 4 << 20
MAX_ARENA = 128 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory of one run.

    Attributes:
        total: bytes for all workers together.
        workers: processes.
        arena: bytes of block buffers in each worker; `workers * arena <= total`.
    """

    total: int
    workers: int
    arena: int


def budget(total: int, workers: int | None) -> Budget:
    """Divide `total` bytes among workers (default: the processors this process may use).

    Raises:
        UsageError: the total is too small for the workers that were asked for.
    """
    count = processors() if workers is None else workers
    if count < 1:
        raise UsageError(f"{workers} is not a number of workers", hint="at least 1")
    if workers is None:
        count = max(min(count, total // MIN_ARENA), 1)
    if total < count * MIN_ARENA:
        raise UsageError(
            f"a memory budget of {total} bytes is too small for {count} worker{'s' if count > 1 else ''}",
            hint=f"the smallest that works is {count * MIN_ARENA >> 20}MiB",
        )
    return Budget(total, count, min(total // count, MAX_ARENA))


def processors() -> int:
    """Processors this process may use: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(count, int(quota) if quota and quota >= 1 else count))


def _cpu_quota() -> float | None:
    """Processors that the control group grants (version 2, then 1), or None where it sets no limit."""
    group = Path("/sys/fs/cgroup")
    old = (_text(group / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    for words in (_text(group / "cpu.max").split(), " ".join(old).split()):
        if len(words) == 2 and words[0].isdigit() and int(words[0]) > 0:
            return int(words[0]) / int(words[1])
    return None


def _memory_limit() -> int | None:
    """Bytes that this process's control group may use, page cache included (versions 2 and 1)."""
    limits = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        base, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (Path(group), *Path(group).parents):
            limit = _text(Path("/sys/fs/cgroup") / base / str(folder).lstrip("/") / name).strip()
            if limit.isdigit():
                limits.append(int(limit))
    return min(limits, default=None)


def _text(path: Path) -> str:
    """The contents of a file of /proc or /sys; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def crowds_page_cache(byte_count: int) -> bool:
    """Whether reading or writing so many bytes would evict what others have cached."""
    available: int = psutil.virtual_memory().available
    limit = _memory_limit()
    return byte_count > min(available, limit if limit is not None else available) // 2


def ahead(arena: int) -> int:
    """Bytes of a worker's memory for what is read ahead of distant files: a half of it."""
    return arena // 2


class PeakMeter:
    """The most memory that this process and its children held at once, file-mapped pages apart."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()

    def sample(self) -> int:
        """Measure now; returns the peak so far, in bytes."""
        processes = [self._process, *self._process.children(recursive=True)]
        self.peak = max(self.peak, sum(_anonymous(process.pid) for process in processes))
        return self.peak


def _anonymous(pid: int) -> int:
    """Bytes of a process's resident memory that no file backs; 0 for one that has ended."""
    lines = _text(Path(f"/proc/{pid}/status")).splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
