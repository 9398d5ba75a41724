"""What no mutant may do: take long, take memory, run code, or touch a file that is not its own."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = 96 << 20
"""Bytes that a call may take for a small file; most of it is what a run allocates for its blocks."""
TIMES = 64
"""Bytes of memory for each byte of files: what the machine of pickles promises."""
SECONDS = 60.0
"""Of a processor, after which a call is broken off; how long it waits for one is the machine's affair."""

_ROOMS = [*{str(Path(each).resolve()) for each in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])}]
_MACHINE = ("/proc/", "/sys/", "/dev/null", "/usr/", "/etc/localtime", "/lib")
_PEAK = "/proc/self/clear_refs"
_CODE = {"exec", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen", "pty.spawn",
         "socket.connect", "socket.bind", "socket.getaddrinfo"}  # fmt: skip
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.rmtree",
}


class Finding(Exception):
    """Something that must not be.

    Attributes:
        kind: of it, the same for all cases that are alike.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class _Watch:
    """What the hook of this process knows."""

    root = ""
    """The directory of the case that runs; empty between cases."""
    found: Finding | None = None
    work = SECONDS
    """Seconds of a processor for small files, while lines are looked at."""


@contextmanager
def bounded(size: int, seconds: float = SECONDS) -> Iterator[None]:
    """Hold a call to time, and to memory for files of `size` bytes. Where nothing watches, it only does the call."""
    if not _Watch.root:
        yield
        return
    _reset_peak()
    before = _peak()
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken = _peak() - before
        if taken > MEMORY + TIMES * size:
            raise Finding("memory", f"{taken:,} bytes for files of {size:,}")
        worked = time.process_time() - began
        if worked > _Watch.work * (1 + size / (1 << 20)):
            raise Finding("slow", f"{worked:.1f} seconds of work for files of {size:,}")


def expect(seconds: float) -> None:
    """Find what takes longer for small files on this processor, which is known to be no slow one."""
    _Watch.work = seconds


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Hold a case to the files of its directory, and to no code."""
    _Watch.root, _Watch.found = str(root), None
    try:
        yield
    finally:
        _Watch.root = ""
    if _Watch.found:
        raise _Watch.found


def begin() -> None:
    """Set the limits of this process, which has to be one of its own."""
    faulthandler.disable()  # how a process died is told from outside
    signal.signal(signal.SIGPROF, _late)
    resource.setrlimit(resource.RLIMIT_AS, (_size() + (3 << 30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_audit)


def _late(*_: object) -> None:
    raise Finding("hang", "not done in time")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _Watch.root or _Watch.found:
        return
    if event == "open":
        _opened(*arguments)
    elif event == "exec":
        file = getattr(arguments[0], "co_filename", "")
        if not file.startswith(("<frozen", "<string", "<attrs", *_ROOMS, *_MACHINE)):
            _Watch.found = Finding("code was run", file)
    elif event in _CODE:
        _Watch.found = Finding("code was run", f"{event} {arguments!r:.200}")
    elif event in _CHANGES:
        for place in arguments[:2]:
            if isinstance(place, str | bytes) and not _inside(place):
                _Watch.found = Finding("changed outside", f"{event} {arguments!r:.200}")


def _opened(place: Any, _: Any, flags: int) -> None:
    if isinstance(place, int) or place == _PEAK or _inside(place):
        return
    real = os.path.realpath(os.fsdecode(place))
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not writes and (_Watch.root + "/").startswith(real.rstrip("/") + "/"):
        return  # a directory above, whose names are synced
    if writes and not real.startswith("/dev/null"):
        _Watch.found = Finding("written outside", real)
    elif not real.startswith((*_MACHINE, *_ROOMS)):
        _Watch.found = Finding("opened outside", real)


def _inside(place: str | bytes) -> bool:
    return (os.path.realpath(os.fsdecode(place)) + "/").startswith(_Watch.root + "/")


def _reset_peak() -> None:
    file = os.open(_PEAK, os.O_WRONLY)
    os.write(file, b"5")
    os.close(file)


def _peak() -> int:
    return _status("VmHWM")


def _size() -> int:
    return _status("VmSize")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
