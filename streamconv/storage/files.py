"""The open files of a worker, in any storage: complete reads, writes, copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self, TypeVar

from streamconv.errors import ConversionError
from streamconv.storage.ahead import Ahead
from streamconv.storage.resolve import scheme, sink_of, source_of
from streamconv.storage.roles import OpenSink, OpenSource, State, failing
from streamconv.tensor import Extent

# Files kept open at once; far below the usual limit of 1024, far above what one block needs.
_MAX_OPEN = 64


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes to be copied unchanged from file to file."""

    source: str
    source_offset: int
    target: str
    target_offset: int
    length: int


class Files:
    """Open files by place, the least recently used closed first. Use it in a `with`, or close it.

    Args:
        known: what is known of files that are read, from a plan; see `Source.reopen`.
        ahead: bytes that may be held of what is expected of distant files, and is not read yet.

    All methods raise a ConversionError that names the file and the byte.
    """

    def __init__(self, known: Mapping[str, State] = MappingProxyType({}), ahead: int = 0) -> None:
        self._readers: OrderedDict[str, OpenSource] = OrderedDict()
        self._writers: OrderedDict[str, OpenSink] = OrderedDict()
        self._known = known
        self._ahead = Ahead(ahead) if ahead else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close them all."""
        if self._ahead:
            self._ahead.close()
        for held in (self._readers, self._writers):
            while held:
                held.popitem()[1].close()

    def read_into(self, place: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of a file."""
        reader = self._reader(place)
        with failing(place, f"read at byte {offset}"):
            if reader.distant and self._ahead:
                done = self._ahead.read_into(reader, place, buffer, offset)
            else:
                done = reader.read_into(buffer, offset)
        if done < len(buffer):
            raise _ends(place, offset + done, len(buffer) - done)

    def read_extents(self, extents: Sequence[Extent], start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of extents laid end to end."""
        done = 0
        for place, offset, length in spans(extents, start, len(buffer)):
            self.read_into(place, buffer[done : done + length], offset)
            done += length

    def read_runs(
        self,
        extents: Sequence[Extent],
        start: int,
        pitch: int,
        buffer: memoryview,
        step: int,
        length: int,
        count: int,
    ) -> None:
        """Read `count` runs of `length` bytes, `pitch` apart from byte `start`, to places `step` apart."""
        if len(extents) > 1 or count == 1:
            for index in range(count):
                run = buffer[index * step : index * step + length]
                self.read_extents(extents, start + index * pitch, run)
            return
        (extent,) = extents
        reader, first = self._reader(extent.file), extent.offset + start
        with failing(extent.file, f"read at byte {first}"):
            done = reader.read_runs(buffer, step, length, first, pitch, count)
        if done < count:  # the run that is not whole says where the file ends
            self.read_into(extent.file, buffer[done * step : done * step + length], first + done * pitch)

    def write(self, place: str, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at byte `offset` of a file that was created."""
        writer = self._writer(place)
        with failing(place, f"write at byte {offset}"):
            writer.write(data, offset)

    def copy(self, copy: Copy, buffer: memoryview) -> None:
        """Copy bytes between files as their storage does, or through `buffer`."""
        reader, writer = self._reader(copy.source), self._writer(copy.target)
        with failing(copy.target, f"copy from {copy.source} to byte {copy.target_offset}"):
            done = writer.copy_from(reader, copy.source_offset, copy.target_offset, copy.length, buffer)
        if done < copy.length:
            raise _ends(copy.source, copy.source_offset + done, copy.length - done)

    def begin_sync(self, place: str, offset: int, length: int) -> None:
        """Advice: start writing a range back to the disk. A file that has its final name by now is ignored."""
        with suppress(ConversionError):
            self._writer(place).begin_sync(offset, length)

    def forget(self, place: str, offset: int, length: int) -> None:
        """Advice: a range will not be read again."""
        self._reader(place).forget(offset, length)

    def is_distant(self, place: str) -> bool:
        """Whether a file that is read is; see `OpenSource.distant`."""
        return bool(scheme(place)) and self._reader(place).distant

    def expect(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        """Advice: these ranges (place, offset, length) of distant files will be read next, about in this order.

        Nothing else of such files should be: what was expected before and was not read is thrown away.
        """
        if self._ahead:
            self._ahead.expect(
                (self._reader(place), place, offset, length) for place, offset, length in ranges
            )

    def _reader(self, place: str) -> OpenSource:
        state = self._known.get(place)
        return _held(
            self._readers,
            place,
            lambda: source_of(place).reopen(place, state) if state else source_of(place).open(place),
        )

    def _writer(self, place: str) -> OpenSink:
        return _held(self._writers, place, lambda: sink_of(place).open(place))


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


_Open = TypeVar("_Open", bound=OpenSource)


def _held(held: OrderedDict[str, _Open], place: str, opened: Callable[[], _Open]) -> _Open:
    """The open file of a place, marked as the most recently used."""
    if place in held:
        held.move_to_end(place)
        return held[place]
    with failing(place, "open"):
        file = opened()
    if len(held) >= _MAX_OPEN:
        held.popitem(last=False)[1].close()
    held[place] = file
    return file


def _ends(place: str, end: int, missing: int) -> ConversionError:
    return ConversionError(
        f"the file ends at byte {end}, {missing} bytes early",
        file=place,
        hint="it changed since the plan was made; run again with --restart",
    )
