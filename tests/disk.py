"""A disk for tests: what a run asks of the local file system, call by call, and what a power cut leaves of it.

    with recorded(root) as recorder:
        streamconv.convert(source, root / "out", workers=1)
    for disk in recorder.cuts():
        disk.image(random.Random(0)).put(root)

    with recorded(root, calls=9):  # the process ends before the tenth
        streamconv.convert(source, root / "out", workers=1)

Calls are taken where Python makes them, below every storage. What is not synced may be lost, as POSIX has it, which is
more than any one file system does: of a file's bytes each block by itself, and its size; of a directory any of the
names that were made, changed or removed in it, in any order. What is synced stays: a file's bytes by a sync of the
file, its name by one of the directory.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

BLOCK = 64
"""Bytes that reach a disk together: few, so that small files are torn as large ones are."""


@dataclass(slots=True)
class _File:
    """Bytes that are synced, and what was done since: a new size, or bytes at an offset."""

    synced: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)
    time: int | None = None

    def settle(self) -> None:
        self.synced, self.since = self.states()[-1], []

    def states(self) -> list[bytes]:
        """What it held after the last sync, and after each call since."""
        found = [self.synced]
        for offset, data in self.since:
            had = found[-1]
            if data is None:
                found.append(had[:offset].ljust(offset, b"\0"))
            else:
                found.append(had[:offset].ljust(offset, b"\0") + data + had[offset + len(data) :])
        return found

    def left(self, draw: Random, kept: float) -> bytes:
        """What a cut leaves; of what was not synced, about the share `kept`."""
        states = self.states()
        size = len(states[_kept(draw, kept, len(states))])
        blocks = []
        for at in range(0, size, BLOCK):
            state = states[_kept(draw, kept, len(states))]
            blocks.append(state[at : at + BLOCK].ljust(min(BLOCK, size - at), b"\0"))
        return b"".join(blocks)


def _kept(draw: Random, kept: float, count: int) -> int:
    """One of `count` states in a row: the last with a chance of `kept`, the first with the rest of it squared."""
    if draw.random() < kept:
        return count - 1
    return 0 if draw.random() > kept else draw.randrange(count)


@dataclass(slots=True)
class _Directory:
    """Names that are synced, and what was done to them since."""

    synced: dict[str, int] = field(default_factory=dict)
    since: list[dict[str, int | None]] = field(default_factory=list)

    def names(self, done: list[dict[str, int | None]] | None = None) -> dict[str, int]:
        found: dict[str, int | None] = dict(self.synced)
        for change in self.since if done is None else done:
            found |= change
        return {name: inode for name, inode in found.items() if inode is not None}

    def settle(self) -> None:
        self.synced, self.since = self.names(), []


@dataclass(frozen=True, slots=True)
class Image:
    """Files and directories, by their path below the root; of a file its bytes, and its time where nobody wrote to it."""

    files: dict[str, tuple[bytes, int | None]]
    directories: tuple[str, ...]

    def put(self, root: Path) -> None:
        """Have a directory hold this and nothing else."""
        for entry in root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path in self.directories:
            (root / path).mkdir()
        for path, (data, time) in self.files.items():
            (root / path).write_bytes(data)
            if time is not None:
                os.utime(root / path, ns=(time, time))


class Disk:
    """Files and directories below a root, with what is synced of them and what is not."""

    def __init__(self, root: Path) -> None:
        """What is there now is synced."""
        self._root = str(root)
        self._inodes: list[_File | _Directory] = [_Directory()]
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                self.mkdir(str(path))
            else:
                self._inodes.append(_File(path.read_bytes(), time=path.stat().st_mtime_ns))
                self._name(str(path), len(self._inodes) - 1)
        for inode in self._inodes:
            if isinstance(inode, _Directory):
                inode.settle()

    def inode(self, path: str) -> int:
        """What has a name now."""
        at = 0
        for part in Path(path).relative_to(self._root).parts:
            at = self._directory(at).names()[part]
        return at

    # Calls; a file that is open is known by its inode.

    def mkdir(self, path: str) -> None:
        self._inodes.append(_Directory())
        self._name(path, len(self._inodes) - 1)

    def create(self, path: str) -> None:
        self._inodes.append(_File())
        self._name(path, len(self._inodes) - 1)

    def size(self, inode: int, size: int) -> None:
        self._change(inode, size, None)

    def write(self, inode: int, data: bytes, offset: int) -> None:
        self._change(inode, offset, data)

    def sync(self, inode: int) -> None:
        self._inodes[inode].settle()

    def rename(self, old: str, new: str) -> None:
        assert Path(old).parent == Path(new).parent, "a name goes from one directory to another"
        changed = {Path(old).name: None, Path(new).name: self.inode(old)}
        self._directory(self.inode(str(Path(old).parent))).since.append(changed)

    def remove(self, path: str) -> None:
        self._name(path, None)

    # What is left.

    def image(self, draw: Random | None = None, kept: float | None = None) -> Image:
        """What a cut leaves, with about the share `kept` of what is not synced; without `draw`, what the machine sees."""
        files: dict[str, tuple[bytes, int | None]] = {}
        directories: list[str] = []
        # Names and bytes apart: one kind may be written back late, and the other at once.
        shares = (0.0, 0.3, 0.7, 1.0) if kept is None else (kept,)
        names, data = (draw.choice(shares) for _ in range(2)) if draw else (1.0, 1.0)

        def walk(at: int, path: str) -> None:
            directory = self._directory(at)
            chosen = [each for each in directory.since if not draw or draw.random() < names]
            for name, inode in sorted(directory.names(chosen).items()):
                below, found = f"{path}{name}", self._inodes[inode]
                if isinstance(found, _Directory):
                    directories.append(below)
                    walk(inode, f"{below}/")
                else:
                    files[below] = (found.left(draw, data) if draw else found.states()[-1], found.time)

        walk(0, "")
        return Image(files, tuple(directories))

    def _name(self, path: str, inode: int | None) -> None:
        parent = self._directory(self.inode(str(Path(path).parent)))
        parent.since.append({Path(path).name: inode})

    def _change(self, inode: int, offset: int, data: bytes | None) -> None:
        found = self._file(inode)
        found.since.append((offset, data))
        found.time = None

    def _file(self, inode: int) -> _File:
        found = self._inodes[inode]
        assert isinstance(found, _File)
        return found

    def _directory(self, inode: int) -> _Directory:
        found = self._inodes[inode]
        assert isinstance(found, _Directory)
        return found


class Killed(BaseException):
    """The process ended before a call, and makes none after it."""


class Recorder:
    """The calls that change what is below a root, in their order.

    Args:
        root: a directory.
        calls: how many go well before the process ends, half-way in the next one where that writes bytes.
        disk: what an earlier process left there, synced or not; otherwise what is there is synced.
    """

    def __init__(self, root: Path, calls: float = inf, disk: Disk | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._root, self._left = root, calls
        self.disk = disk or Disk(root)
        self._first = deepcopy(self.disk)
        self._open: dict[int, int] = {}  # descriptor -> inode
        self._lock = threading.RLock()

    @property
    def killed(self) -> bool:
        """Whether it came to that."""
        return self._left < 0

    def cuts(self) -> Iterator[Disk]:
        """The disk before the first call, and after each: one object, that goes on."""
        disk = deepcopy(self._first)
        yield disk
        for name, arguments in self.calls:
            getattr(disk, name)(*arguments)
            yield disk

    def check(self) -> None:
        """That what is there came by these calls."""
        image = self.disk.image()
        there = {path.relative_to(self._root).as_posix(): path for path in self._root.rglob("*")}
        assert {name: path.read_bytes() for name, path in there.items() if path.is_file()} == {
            name: data for name, (data, _) in image.files.items()
        }
        assert sorted(name for name, path in there.items() if path.is_dir()) == sorted(image.directories)

    def end(self) -> None:
        """Close what the process left open."""
        for descriptor in list(self._open):
            os.close(descriptor)
        self._open.clear()

    @contextmanager
    def _call(self, name: str, *arguments: Any) -> Iterator[None]:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                raise Killed
            yield
            getattr(self.disk, name)(*arguments)
            self.calls.append((name, arguments))

    def _inside(self, path: Any) -> bool:
        return not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(self._root)

    def patches(self) -> dict[str, Callable[..., Any]]:
        """What stands for functions of `os` meanwhile."""
        real = {name: getattr(os, name) for name in CALLS}

        def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if not self._inside(path):
                return real["open"](path, flags, *arguments, **options)
            with self._lock:
                new = flags & os.O_CREAT and not os.path.lexists(path)
                with self._call("create", str(path)) if new else nullcontext():
                    descriptor: int = real["open"](path, flags, *arguments, **options)
                self._open[descriptor] = self.disk.inode(str(path))
            return descriptor

        def close(descriptor: int) -> None:
            self._open.pop(descriptor, None)
            real["close"](descriptor)

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if descriptor not in self._open:
                return int(real["pwrite"](descriptor, data, offset))
            if self._left == 0:
                half = bytes(data[: len(data) // 2])
                real["pwrite"](descriptor, half, offset)
                self.disk.write(self._open[descriptor], half, offset)
            with self._call("write", self._open[descriptor], bytes(data), offset):
                assert real["pwrite"](descriptor, data, offset) == len(data)
            return len(data)

        def copy_file_range(source: int, target: int, count: int, at: int, offset: int) -> int:
            data = os.pread(source, count, at)
            return pwrite(target, data, offset)

        def ftruncate(descriptor: int, size: int) -> None:
            with self._call("size", self._open[descriptor], size):
                real["ftruncate"](descriptor, size)

        def fsync(descriptor: int) -> None:
            if descriptor in self._open:  # what it would wait for is not what is tested
                with self._call("sync", self._open[descriptor]):
                    pass

        def named(name: str, call: str) -> Callable[..., None]:
            def function(path: Any, *arguments: Any, **options: Any) -> None:
                if not self._inside(path):
                    real[name](path, *arguments, **options)
                    return
                with self._lock:
                    if call == "mkdir" or os.path.lexists(path):
                        with self._call(call, str(path), *map(str, arguments if call == "rename" else ())):
                            real[name](path, *arguments, **options)
                    else:
                        real[name](path, *arguments, **options)

            return function

        return {
            "open": open_, "close": close, "pwrite": pwrite, "copy_file_range": copy_file_range,
            "ftruncate": ftruncate, "fsync": fsync, "mkdir": named("mkdir", "mkdir"),
            "replace": named("replace", "rename"), "unlink": named("unlink", "remove"),
            "rmdir": named("rmdir", "remove"),
        }  # fmt: skip


CALLS = (
    "open",
    "close",
    "pwrite",
    "copy_file_range",
    "ftruncate",
    "fsync",
    "mkdir",
    "replace",
    "unlink",
    "rmdir",
)


@contextmanager
def recorded(root: Path, calls: float = inf, disk: Disk | None = None) -> Iterator[Recorder]:
    """Record the calls of this process, or have it end after some; see `Recorder`."""
    recorder = Recorder(root, calls, disk)
    try:
        with mock.patch.multiple(os, **recorder.patches()):
            yield recorder
    except Killed:
        pass
    finally:
        recorder.end()
