"""The two roles of storage: where bytes come from, and where they go.

    Source  lists, says size and identity, opens       -> OpenSource  reads ranges
    Sink    creates at a size, syncs, publishes, ...   -> OpenSink    writes ranges, copies from a source

A place is named by a string: an absolute local path, or `SCHEME://...`. `resolve` finds the storage of a place.
Implementations raise an OSError with a readable `strerror`; `failing` adds the file, the action and the hint.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from streamconv.errors import ConversionError

if TYPE_CHECKING:
    import mmap

Kind = Literal["file", "directory", "other"]


@dataclass(frozen=True, slots=True)
class State:
    """What is at a place, links followed.

    Attributes:
        kind: what it is; `other` is what must not be opened: a pipe, a device.
        size: bytes.
        identity: changes whenever the content does: the modification time in nanoseconds, an ETag.
    """

    kind: Kind
    size: int
    identity: int | str


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory.

    Attributes:
        name: without the directory's.
        kind: of what the name leads to; a link that leads nowhere is `other`.
        link: whether the name is a link.
        state: where the listing knew it.
    """

    name: str
    kind: Kind
    link: bool = False
    state: State | None = None


class OpenSource(ABC):
    """One file, open for reading. Use it in a `with`, or close it."""

    size: int
    """Bytes, when it was opened."""

    distant: ClassVar[bool] = False
    """Whether a read is mostly waiting, so that many are better made at once, from any thread."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read bytes from `offset` on; returns how many: fewer than `buffer` holds only at the end of the file."""

    @abstractmethod
    def close(self) -> None:
        """Release it."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer at the end of the file."""
        data = bytearray(max(min(length, self.size - offset), 0))
        return bytes(memoryview(data)[: self.read_into(memoryview(data), offset)])

    def read_runs(
        self, buffer: memoryview, step: int, length: int, offset: int, pitch: int, count: int
    ) -> int:
        """Read runs of `length` bytes, `pitch` apart from `offset`, to places `step` apart.

        Returns how many runs are whole; fewer than `count` only where the file ends.
        """
        for index in range(count):
            run = buffer[index * step : index * step + length]
            if self.read_into(run, offset + index * pitch) < length:
                return index
        return count

    @contextmanager
    def mapped(self, length: int) -> Iterator[bytes | mmap.mmap]:
        """The first `length` bytes, which the file must have, as a buffer that may be mapped."""
        yield self.read(0, length)

    def forget(self, offset: int, length: int) -> None:  # noqa: B027 - advice, that many storages have no use for
        """Advice: these bytes will not be read again."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:  # noqa: B027 - as above
        """Advice: these short ranges (offset, length) will be read next, each by itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Source(ABC):
    """A storage to read from. Cheap to make; keeps nothing open but what `open` gives."""

    @abstractmethod
    def state(self, place: str) -> State | None:
        """What is there; None where nothing is."""

    @abstractmethod
    def entries(self, place: str) -> Sequence[Entry]:
        """The names in a directory, sorted."""

    @abstractmethod
    def open(self, place: str) -> OpenSource:
        """Open a regular file; anything else is an OSError, and is not touched."""

    def reopen(self, place: str, state: State) -> OpenSource:
        """Open a file of which a listing or a plan says what it was.

        Where each read is a request of its own, each asks for the file as it was then: another one is an OSError.
        """
        return self.open(place)

    def is_link(self, place: str) -> bool:
        """Whether the last part of the place is a link."""
        return False

    def canonical(self, place: str) -> str:
        """The place with all links resolved."""
        return place

    def inode(self, place: str) -> Hashable | None:
        """What a file or directory is under any of its names, links followed; None where no two names lead to one."""
        return None

    def alone(self, place: str) -> bool:
        """Whether removing this name of a file frees what it holds: it is no link, and no other name leads there."""
        return not self.is_link(place)

    def disk(self, place: str) -> Hashable | None:
        """What a file shares its free space with; None where that is not known."""
        return None

    def local(self, place: str) -> Path | None:
        """The path by which other programs can open it, or None where they cannot."""
        return None


class OpenSink(OpenSource):
    """One file that grows: open for writing, and for reading back what was written."""

    @abstractmethod
    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at a byte. A write beyond the end, as to a journal, extends the file."""

    def copy_from(
        self, source: OpenSource, source_offset: int, offset: int, length: int, buffer: memoryview
    ) -> int:
        """Copy bytes from a file of any storage; returns how many: fewer only where the source ends.

        Args:
            source: the file to copy from.
            source_offset: its first byte.
            offset: where that goes.
            length: how many bytes.
            buffer: memory for what cannot be copied otherwise.
        """
        done = 0
        while done < length:
            part = buffer[: min(length - done, len(buffer))]
            count = source.read_into(part, source_offset + done)
            self.write(part[:count], offset + done)
            done += count
            if count < len(part):
                break
        return done

    def begin_sync(self, offset: int, length: int) -> None:
        """Advice: these bytes are written, and a sync will follow."""


class Sink(ABC):
    """A storage to write to. Cheap to make; what it holds is read by the `Source` of the same storage."""

    @abstractmethod
    def create(self, place: str, size: int, *, reserve: bool = True) -> None:
        """Create a file of `size` bytes with its space reserved. What was there is replaced; a link is not followed.

        Without `reserve`, it takes space as it is written, where the storage can.
        """

    def check_writable(self, place: str) -> None:  # noqa: B027 - what it is refused for shows when it is written to
        """Raise an OSError where it is known that no directory can be made at a place, or written in."""

    @abstractmethod
    def make_directory(self, place: str) -> None:
        """Create a directory and its parents, where missing, durably."""

    @abstractmethod
    def open(self, place: str) -> OpenSink:
        """Open a regular file that was created; one that is a link, or has another name, is an OSError."""

    @abstractmethod
    def sync(self, place: str, *, forget: bool = False) -> None:
        """Wait until a file, or a directory's names, would survive a crash of the machine.

        With `forget`, its bytes will not be read again.
        """

    @abstractmethod
    def publish(self, partial: str, final: str) -> None:
        """Give a synced file its final name, durably, replacing atomically a file that had it."""

    @abstractmethod
    def remove(self, place: str) -> None:
        """Remove a file or a link, where there is one."""

    @abstractmethod
    def remove_directory(self, place: str) -> None:
        """Remove a directory that is empty; an OSError where it is not."""

    @abstractmethod
    def lock(self, place: str, holder: str) -> AbstractContextManager[None]:
        """Lock a place, which is created, against other processes; child processes inherit the lock.

        Raises:
            Held: another process has it; says which.
        """

    @abstractmethod
    def free(self, place: str) -> int | None:
        """Free bytes where a place is, which need not exist; None where there is no limit."""

    @abstractmethod
    def allocated(self, place: str) -> int:
        """Bytes that removing what is there would free; 0 where nothing is."""


class Held(Exception):  # noqa: N818 - an answer, that the caller words
    """Another process holds a lock; the text says which."""


_AGAIN = "run the same command again to resume"
_HINTS = {
    errno.ENOSPC: f"the disk is full; free some space and {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; free some space and {_AGAIN}",
    errno.EIO: f"the disk or network reports a fault; {_AGAIN}",
    errno.ENOENT: "the file was there when the plan was made",
    errno.ESTALE: "put it back as it was, or run again with --restart",
    errno.EACCES: "renew what gives access and " + _AGAIN,
}


@contextmanager
def failing(place: object, action: str) -> Iterator[None]:
    """Turn an OSError into a ConversionError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"cannot {action}: {error.strerror or error}",
            file=str(place),
            hint=_HINTS.get(error.errno or 0),
        ) from error
