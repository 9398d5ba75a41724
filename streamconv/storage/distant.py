"""Files that are reached by requests: small reads share them, short runs are joined, and what is expected comes early.

A request costs a round trip, whatever it asks for. So headers are kept in pages, of which neighbours come in one
request; advice brings many at once; and runs that lie close together are fetched with the gaps between them.
"""

from __future__ import annotations

import random
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

from streamconv.storage.roles import OpenSource, State

AT_ONCE = 16
"""Requests of one process that are under way at once, for what is not a block of a tensor."""

_PAGE = 4 << 10
_FIRST = 16 << 10
_LONGEST_AHEAD = 256 << 10
_PAGES = 4096

# More than this is not kept: it is no header, or one that is read once.
_KEPT = 1 << 20

# A round trip takes as long as so many bytes, or longer.
_GAP = 128 << 10
_SPAN = 1 << 20

# Bytes of one request for a large range.
_REQUEST = 8 << 20

TRIES = 5
"""How often a request is made that fails in a way that may pass."""
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
"""Seconds before the second try, and before any; each has some chance added, so that many clients do not come at once."""


SEEN: dict[str, State] = {}
"""What was said last of each file, when it was listed or looked at. A file that is opened is that one, or an error: what
is read of it here and there is of one version."""


class PassingError(OSError):
    """A failure that may pass: the request is worth another try.

    `wait` is how many seconds the server asked for.
    """

    wait: float = 0.0


def waits() -> Iterator[float]:
    """The seconds to wait before each further try."""
    for attempt in range(TRIES - 1):
        most = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
        yield most * (0.5 + random.random() / 2)  # noqa: S311 - chance, not a secret


def pause(seconds: float) -> None:
    """Wait before another try."""
    time.sleep(min(seconds, 60.0))


@cache
def pool() -> ThreadPoolExecutor:
    """Threads that wait for answers."""
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="distant")


class Pages:
    """Parts of files that were read in small pieces, for as long as a source lives. Used from any thread."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = Lock()

    def get(self, place: str, number: int) -> bytes | None:
        """A page, if it is there."""
        with self._lock:
            found = self._held.get((place, number))
            if found is not None:
                self._held.move_to_end((place, number))
            return found

    def put(self, place: str, number: int, data: bytes) -> None:
        """Keep a page; the one that was not wanted for the longest time goes."""
        with self._lock:
            self._held[place, number] = data
            while len(self._held) > _PAGES:
                self._held.popitem(last=False)


class DistantFile(OpenSource):
    """A file of which ranges are asked for."""

    distant = True

    def __init__(self, place: str, size: int, pages: Pages) -> None:
        self.place = place
        self.size = size
        self._pages = pages

    @abstractmethod
    def fetch(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with bytes that the file has, by one request. Raises OSError where it is another file by now."""

    def close(self) -> None:
        """Nothing is open between requests."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        count = max(min(len(buffer), self.size - offset), 0)
        for start in range(0, count, _REQUEST):
            self.fetch(buffer[start : min(start + _REQUEST, count)], offset + start)
        return count

    def read(self, offset: int, length: int) -> bytes:
        length = max(min(length, self.size - offset), 0)
        if length > _KEPT or not length:
            return super().read(offset, length)
        first, stop = offset // _PAGE, -(-(offset + length) // _PAGE)
        held = {number: self._pages.get(self.place, number) for number in range(first, stop)}
        missing = [number for number, data in held.items() if data is None]
        for begin, end in _runs(missing):
            held.update(self._brought(begin, end))
        data = b"".join(page for number in range(first, stop) if (page := held[number]) is not None)
        return data[offset - first * _PAGE :][:length]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        wanted = sorted(
            {
                number
                for offset, length in ranges
                for number in range(offset // _PAGE, -(-min(offset + length, self.size) // _PAGE))
                if self._pages.get(self.place, number) is None
            }
        )[:_PAGES]
        for each in [pool().submit(self._brought, *run, more=False) for run in _runs(wanted)]:
            each.result()

    def _brought(self, first: int, stop: int, *, more: bool = True) -> dict[int, bytes]:
        """Pages [first, stop) by one request, kept; with some more where reading seems to go on."""
        if more:
            before = 0
            while before < stop - first + 8 and self._pages.get(self.place, first - before - 1) is not None:
                before += 1
            ahead = _FIRST if first == 0 else min(2 * before * _PAGE, _LONGEST_AHEAD)
            stop = max(stop, first + ahead // _PAGE)
        begin, end = first * _PAGE, min(stop * _PAGE, self.size)
        data = bytearray(end - begin)
        self.read_into(memoryview(data), begin)
        found = {
            first + at // _PAGE: bytes(memoryview(data)[at : at + _PAGE]) for at in range(0, len(data), _PAGE)
        }
        for number, page in found.items():
            self._pages.put(self.place, number, page)
        return found

    def read_runs(
        self, buffer: memoryview, step: int, length: int, offset: int, pitch: int, count: int
    ) -> int:
        whole = min(count, max((self.size - offset - length) // pitch + 1, 0)) if pitch > 0 else count
        joined = max((_SPAN - length) // pitch + 1, 1) if 0 < pitch - length <= _GAP else 1

        def fetch(first: int) -> None:
            several = min(joined, whole - first)
            start = offset + first * pitch
            if several == 1:
                self.read_into(buffer[first * step : first * step + length], start)
                return
            span = memoryview(bytearray((several - 1) * pitch + length))
            self.read_into(span, start)
            for index in range(several):
                at = (first + index) * step
                buffer[at : at + length] = span[index * pitch : index * pitch + length]

        for each in [pool().submit(fetch, first) for first in range(0, whole, joined)]:
            each.result()
        return whole


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sorted numbers as ranges [first, stop)."""
    first = None
    for index, number in enumerate(numbers):
        if first is None:
            first = number
        if index + 1 == len(numbers) or numbers[index + 1] != number + 1:
            yield first, number + 1
            first = None
