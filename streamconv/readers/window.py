"""A part of a file, read by position: whole or an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self

from streamconv.errors import CheckpointError
from streamconv.storage.location import Location
from streamconv.storage.roles import OpenSource

if TYPE_CHECKING:
    import mmap

_PREFIX = 1 << 20

CUT_OFF = "the file is cut off or damaged: copy it again, and check its size"


class Window:
    """Bytes [offset, offset + length) of a file. Use it in a `with` statement.

    Attributes:
        path: what `Extent.file` says.
        offset: where in the file it begins.
        length: bytes.
    """

    damaged: ClassVar[str] = "the file is damaged"
    """How errors begin."""

    def __init__(self, file: Location, offset: int = 0, length: int | None = None) -> None:
        """Open it; without a length, up to the end of the file.

        Raises:
            CheckpointError: the file cannot be read, is not a regular file, or is shorter than that.
        """
        self.path = file.place
        try:
            self._file: OpenSource = file.open()
        except OSError as error:
            there = file.is_file()
            message = f"the file cannot be read: {error.strerror}" if there else "there is no such file"
            raise CheckpointError(message, file=self.path) from error
        self.offset = offset
        self.length = self._file.size - offset if length is None else length
        if offset < 0 or self.length < 0 or offset + self.length > self._file.size:
            self._file.close()
            raise CheckpointError(
                f"{self.length} bytes are expected from byte {offset} on; the file has {self._file.size}",
                file=self.path,
                hint=CUT_OFF,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`. Raises CheckpointError where they do not lie in it."""
        if start < 0 or length < 0 or start + length > self.length:
            self.fail(f"bytes {start} to {start + length} are named, and there are {self.length}")
        try:
            data = self._file.read(self.offset + start, length)
        except OSError as error:
            self._unreadable(start, error)
        if len(data) < length:
            self.fail(f"it ended at byte {start + len(data)} while it was read")
        return data

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Advice: these short ranges (start, length), as far as they lie in it, will be read next."""
        inside = ((start, min(length, self.length - start)) for start, length in ranges)
        try:
            self._file.expect((self.offset + start, length) for start, length in inside if length > 0)
        except OSError:
            return  # reading says what is wrong, and where

    def _unreadable(self, start: int, error: OSError) -> NoReturn:
        raise CheckpointError(
            f"the file cannot be read at byte {self.offset + start}: {error.strerror}", file=self.path
        ) from error

    @contextmanager
    def mapped(self, length: int) -> Iterator[bytes | mmap.mmap]:
        """The first bytes of the file as a buffer that need not be in memory."""
        with self._file.mapped(length) as data:
            yield data

    def prefixes(self, limit: int) -> Iterator[int]:
        """How many first bytes to look at, each time that the ones before were too few: what `mapped` is good for."""
        most = min(self.length, limit)
        length = _PREFIX
        while self._file.distant and length < most:
            yield length
            length *= 8
        yield most

    def fail(self, message: str, hint: str = CUT_OFF) -> NoReturn:
        """Raise the error for this file."""
        raise CheckpointError(f"{self.damaged}: {message}", file=self.path, hint=hint)
