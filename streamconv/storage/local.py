"""The local disk: positioned reads and writes, kernel copies, reserved space, syncing.

Everything here takes explicit offsets, so that blocks can be moved in any order by anyone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import shutil
import stat
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from streamconv.storage.roles import Entry, Held, Kind, OpenSink, OpenSource, Sink, Source, State

# The longest kernel copy in one call, so that an interrupt is answered within a moment.
_COPY_AT_ONCE = 64 << 20

# Page cache for longer writes comes in huge pages, where the kernel can. Under a hypervisor that lends memory
# as it is touched, those were found to take eight times as long; and shorter writes are no slower anywhere.
_WRITE_AT_ONCE = 1 << 20

# copy_file_range says one of these where it cannot serve this pair of files: other file systems,
# kernels before 5.3, FUSE and some network file systems, containers that forbid the call.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}

# What says that nothing is at a path, as `pathlib` has it, and that nothing can be there.
_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP, errno.ENAMETOOLONG}

# What says that a directory, which may be none of ours, cannot be synced: it may be written in and not be read.
_NO_DIRECTORY_SYNC = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP}

# A pipe would wait for its other end, and a terminal become ours.
_WITHOUT_WAITING = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class _Descriptor(OpenSource):
    """An open file of the local disk."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def close(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        # Headers are many short reads: one call for each, as far as the file goes.
        data = os.pread(self.descriptor, max(min(length, self.size - offset), 0), offset)
        return data if len(data) == length else super().read(offset, length)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read_runs(
        self, buffer: memoryview, step: int, length: int, offset: int, pitch: int, count: int
    ) -> int:
        # A transpose reads millions of short runs, so that the loop over them is kept bare.
        descriptor, preadv = self.descriptor, os.preadv
        for at, start in zip(range(0, count * step, step), itertools.count(offset, pitch), strict=False):
            run = buffer[at : at + length]
            if preadv(descriptor, (run,), start) != length and self.read_into(run, start) < length:
                return at // step
        return count

    @contextmanager
    def mapped(self, length: int) -> Iterator[bytes | mmap.mmap]:
        if not length:
            yield b""
            return
        # The map goes when its last user does.
        yield mmap.mmap(self.descriptor, length, access=mmap.ACCESS_READ)

    def forget(self, offset: int, length: int) -> None:
        try:
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError:
            return  # a file system without it loses nothing


class LocalSource(Source):
    """See `Source`."""

    def state(self, place: str) -> State | None:
        try:
            found = Path(place).stat()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _NOTHING:
                raise
            return None
        return State(_kind(found.st_mode), found.st_size, found.st_mtime_ns)

    def entries(self, place: str) -> Sequence[Entry]:
        with os.scandir(place) as listing:
            found = [
                Entry(
                    entry.name,
                    "directory" if entry.is_dir() else "file" if entry.is_file() else "other",
                    entry.is_symlink(),
                )
                for entry in listing
            ]
        return sorted(found, key=lambda entry: entry.name)

    def open(self, place: str) -> OpenSource:
        return _Descriptor(_regular(place, os.O_RDONLY))

    def is_link(self, place: str) -> bool:
        try:
            return Path(place).is_symlink()
        except OSError as error:
            if error.errno not in _NOTHING:
                raise
            return False

    def canonical(self, place: str) -> str:
        return str(Path(place).resolve())

    def inode(self, place: str) -> Hashable | None:
        try:
            found = Path(place).stat()
        except (OSError, ValueError):
            return None
        return (found.st_dev, found.st_ino) if found.st_ino else None  # some file systems number nothing

    def alone(self, place: str) -> bool:
        found = Path(place).lstat()
        return stat.S_ISREG(found.st_mode) and found.st_nlink == 1

    def disk(self, place: str) -> Hashable | None:
        # Of the directory: layers of an overlay give files numbers of their own.
        return _existing(Path(place).parent).stat().st_dev

    def local(self, place: str) -> Path | None:
        return Path(place)


def _regular(place: str, flags: int, *, alone: bool = False) -> int:
    """A descriptor of a regular file, opened without waiting; with `alone`, of one that has no second name.

    Raises:
        OSError: it is something else.
    """
    # What is not a regular file may do something when it is opened; and it may have come since it was looked at.
    _require_regular(Path(place).stat(), place)
    descriptor = os.open(place, flags | _WITHOUT_WAITING)
    try:
        (_require_alone if alone else _require_regular)(os.fstat(descriptor), place)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(found: os.stat_result, place: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", place)


def _require_alone(found: os.stat_result, place: str) -> None:
    """Refuse to write into a file that would change under another name, too."""
    _require_regular(found, place)
    if found.st_nlink > 1:
        raise OSError(errno.EMLINK, "it has another name (a hard link), under which it would change", place)


def _kind(mode: int) -> Kind:
    return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"


class _Growing(_Descriptor, OpenSink):
    """An open file of the local disk that is written to."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(self.descriptor, view[done : done + _WRITE_AT_ONCE], offset + done)

    def copy_from(
        self, source: OpenSource, source_offset: int, offset: int, length: int, buffer: memoryview
    ) -> int:
        """Copies inside the kernel, or through `buffer` where the kernel cannot."""
        if not isinstance(source, _Descriptor):
            return super().copy_from(source, source_offset, offset, length, buffer)
        done = 0
        while done < length:
            most = min(length - done, _COPY_AT_ONCE)
            try:
                count = os.copy_file_range(
                    source.descriptor, self.descriptor, most, source_offset + done, offset + done
                )
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                count = 0
            if count == 0:
                # Refused, or the end of the file, or a file system that says 0 for "cannot": reading shows which.
                most = min(most, len(buffer))
                count = super().copy_from(source, source_offset + done, offset + done, most, buffer)
                if count < most:
                    return done + count
            done += count
        return done

    def begin_sync(self, offset: int, length: int) -> None:
        call = getattr(_LIBC, "sync_file_range", None)
        if call is not None:
            call(self.descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


class LocalSink(Sink):
    """See `Sink`."""

    def create(self, place: str, size: int, *, reserve: bool = True) -> None:
        # It may be a link to a file that is not ours.
        self.remove(place)
        with _opened(place, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
            if reserve:
                _reserve(descriptor, size)
            os.ftruncate(descriptor, size)

    def check_writable(self, place: str) -> None:
        existing = _existing(Path(place))
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        if os.statvfs(existing).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(existing))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))

    def make_directory(self, place: str) -> None:
        path = Path(place)
        missing = [each for each in (path, *path.parents) if not each.exists()]
        # From above, each name synced before there is anything below it: a run that ended in between left one at most.
        for each in (missing[-1].parent if missing else path, *reversed(missing)):
            if each in missing:
                each.mkdir(exist_ok=True)
            try:
                self.sync(str(each.parent))
            except OSError as error:
                if error.errno not in _NO_DIRECTORY_SYNC:
                    raise

    def open(self, place: str) -> OpenSink:
        return _Growing(_regular(place, os.O_RDWR | os.O_NOFOLLOW, alone=True))

    def sync(self, place: str, *, forget: bool = False) -> None:
        with _opened(place, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
            if forget:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def publish(self, partial: str, final: str) -> None:
        Path(partial).replace(final)
        self.sync(str(Path(final).parent))

    def remove(self, place: str) -> None:
        Path(place).unlink(missing_ok=True)

    def remove_directory(self, place: str) -> None:
        Path(place).rmdir()

    def lock(self, place: str, holder: str) -> AbstractContextManager[None]:
        return _released(Path(place), _locked(Path(place), holder))

    def free(self, place: str) -> int | None:
        return shutil.disk_usage(_existing(Path(place))).free

    def allocated(self, place: str) -> int:
        try:
            return Path(place).stat().st_blocks * 512
        except OSError:
            return 0


def _existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


@contextmanager
def _opened(place: str, flags: int) -> Iterator[int]:
    descriptor = os.open(place, flags | _WITHOUT_WAITING, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(path: Path, holder: str) -> int:
    """A descriptor that holds the lock. Child processes inherit it: the lock is free when the last of them has ended."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            _require_regular(path.lstat(), str(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | _WITHOUT_WAITING, 0o666)
        try:
            _require_alone(os.fstat(descriptor), str(path))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our opening and locking it.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.set_inheritable(descriptor, True)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder.encode(), 0)
                return descriptor
            os.close(descriptor)
        except BlockingIOError as error:
            found = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise Held(found or "unknown process") from error
        except OSError:
            os.close(descriptor)
            raise


@contextmanager
def _released(path: Path, descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        # It is no lock any more without its holder; and what the run itself failed of is not to be hidden.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


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
