"""Bytes of local files: positioned reads and writes that are whole or an error, kernel copies, syncing.

Everything here takes explicit offsets, so that blocks can be moved in any order by anyone.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.errors import ConversionError

if TYPE_CHECKING:
    from streamconv.tensor import Extent

# Descriptors kept open at once; far below the usual limit of 1024, far above the files one block needs.
_MAX_OPEN = 64

# The longest kernel copy in one call, so that an interrupt is answered within a moment.
_COPY_AT_ONCE = 64 << 20

# Page cache for longer writes comes in huge pages, where the kernel can. Under a hypervisor that lends memory
# as it is touched, those were found to take eight times as long; and shorter writes are no slower anywhere.
_WRITE_AT_ONCE = 1 << 20

# copy_file_range says one of these where it cannot serve this pair of files: other file systems,
# kernels before 5.3, FUSE and some network file systems, containers that forbid the call.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


_LIBC = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class Files:
    """Open descriptors by path, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, bool], int] = OrderedDict()

    def reader(self, path: str) -> int:
        """A descriptor to read `path`."""
        return self._get(path, writable=False)

    def writer(self, path: str) -> int:
        """A descriptor to write `path`, which must exist and must not be a link."""
        return self._get(path, writable=True)

    def close(self) -> None:
        """Close them all."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _get(self, path: str, *, writable: bool) -> int:
        key = (path, writable)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        with failing(path, "open"):
            flags = os.O_RDWR | os.O_NOFOLLOW if writable else os.O_RDONLY
            descriptor = os.open(path, flags | os.O_CLOEXEC)
        if len(self._open) >= _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[key] = descriptor
        return descriptor


@contextmanager
def failing(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn an OSError into a ConversionError that names the file and says what to do next."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, it goes on",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, it goes on",
            errno.EIO: "the disk or network reports a fault; run the same command again, it goes on",
            errno.ENOENT: "the file was there when the plan was made",
        }
        raise ConversionError(
            f"cannot {action}: {error.strerror or error}",
            file=os.fspath(path),
            hint=hints.get(error.errno or 0),
        ) from error


def read_into(files: Files, path: str, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from byte `offset` of a file.

    Raises:
        ConversionError: the file ends before, or cannot be read.
    """
    descriptor = files.reader(path)
    done = 0
    with failing(path, f"read at byte {offset}"):
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise ConversionError(
                    f"the file ends at byte {offset + done}, {len(buffer) - done} bytes early",
                    file=path,
                    hint="it changed since the plan was made; run again with --restart",
                )
            done += count


def read_extents(files: Files, extents: Sequence[Extent], start: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `start` of extents laid end to end."""
    done = 0
    for path, offset, length in spans(extents, start, len(buffer)):
        read_into(files, path, buffer[done : done + length], offset)
        done += length


def read_runs(
    files: Files,
    extents: Sequence[Extent],
    start: int,
    pitch: int,
    buffer: memoryview,
    step: int,
    length: int,
    count: int,
) -> None:
    """Read `count` runs of `length` bytes, `pitch` apart from byte `start`, to places `step` apart.

    A transpose reads millions of short runs, so that the loop over them is kept bare.
    """
    if len(extents) > 1 or count == 1:
        for index in range(count):
            run = buffer[index * step : index * step + length]
            read_extents(files, extents, start + index * pitch, run)
        return
    (extent,) = extents
    descriptor, preadv = files.reader(extent.file), os.preadv
    first = extent.offset + start
    with failing(extent.file, f"read at byte {first}"):
        for at, offset in zip(range(0, count * step, step), itertools.count(first, pitch), strict=False):
            run = buffer[at : at + length]
            if preadv(descriptor, (run,), offset) != length:
                read_into(files, extent.file, run, offset)


def spans(extents: Sequence[Extent], start: int, length: int) -> Iterator[tuple[str, int, int]]:
    """Bytes [start, start + length) of extents laid end to end, as (file, offset, length)."""
    for extent in extents:
        if length <= 0:
            return
        if start < extent.length:
            taken = min(extent.length - start, length)
            yield extent.file, extent.offset + start, taken
            length -= taken
            start = 0
        else:
            start -= extent.length


def write_from(files: Files, path: str, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at byte `offset` of an existing file."""
    descriptor = files.writer(path)
    view = memoryview(data).cast("B")
    done = 0
    with failing(path, f"write at byte {offset}"):
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + _WRITE_AT_ONCE], offset + done)


def copy_range(
    files: Files,
    source: str,
    source_offset: int,
    target: str,
    target_offset: int,
    length: int,
    buffer: memoryview,
) -> None:
    """Copy bytes between files inside the kernel, or through `buffer` where the kernel cannot."""
    reader, writer = files.reader(source), files.writer(target)
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                reader, writer, min(length - done, _COPY_AT_ONCE), source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                with failing(target, f"copy from {source} to byte {target_offset + done}"):
                    raise
            count = 0
        if count == 0:
            # Refused, or the end of the file, or a file system that says 0 for "cannot": reading tells.
            count = min(length - done, len(buffer))
            read_into(files, source, buffer[:count], source_offset + done)
            write_from(files, target, buffer[:count], target_offset + done)
        done += count


def create(path: Path, size: int) -> None:
    """Make a file of `size` bytes with its space reserved, readable as the umask allows.

    Raises:
        ConversionError: there is no space, or something is in the way.
    """
    with failing(path, f"create with {size} bytes"):
        descriptor = _opened_anew(path)
        try:
            _reserve(descriptor, size)
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


def _opened_anew(path: Path) -> int:
    """A new file at `path`. What stood there goes, unread: it may be a link to what is not ours."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _reserve(descriptor: int, size: int) -> None:
    # posix_fallocate falls back on writing into every block where the file system cannot reserve, which
    # on a network disk takes as long as the conversion. The Linux call says so instead.
    fallocate = getattr(_LIBC, "fallocate", None)
    if fallocate is None or size == 0:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, 0, 0, size):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if code != errno.EINTR:  # a signal that Python has answered by now
            raise OSError(code, os.strerror(code))


def sync_file(path: Path, *, forget: bool = False) -> None:
    """Wait until a file's data and size are on the disk.

    Args:
        path: a file or a directory.
        forget: let go of the cached pages, which are clean now.
    """
    with failing(path, "sync"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            if forget:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def begin_writing_back(files: Files, path: str, offset: int, length: int) -> None:
    """Have the kernel send a written range on its way to the disk, so that a later sync finds little to do.

    Advice only: where the system has no such call, or the file has its final name by now, nothing happens.
    """
    call = getattr(_LIBC, "sync_file_range", None)
    if call is not None:
        with suppress(ConversionError):
            call(files.writer(path), ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def publish(partial: Path, final: Path) -> None:
    """Give a synced file its final name, durably."""
    with failing(final, "rename into place"):
        partial.replace(final)
    sync_file(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that `path` only ever names all of it."""
    partial = path.with_name(path.name + ".partial")
    with failing(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(_opened_anew(partial), "wb") as file:
            file.write(data)
    sync_file(partial)
    publish(partial, path)


def forget_pages(files: Files, path: str, offset: int, length: int) -> None:
    """Let the kernel drop clean cached pages of a range that will not be read again."""
    try:
        os.posix_fadvise(files.reader(path), offset, length, os.POSIX_FADV_DONTNEED)
    except OSError:
        return  # advice only: a file system without it loses nothing
