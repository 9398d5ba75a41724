"""Reading ahead in distant files: what is expected is asked for before it is wanted, several requests at once.

What is held of it, or is on its way, is bounded. What is wanted and was not asked for yet, is asked for at once: so no
order of reading waits for what only a later read would make room for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from streamconv.storage.roles import OpenSource

AT_ONCE = 16
"""Requests that are under way at once."""

# Bytes of a request: fewer cost more round trips for the same, more keep others waiting.
_SHORTEST, _LONGEST = 256 << 10, 4 << 20


@dataclass(slots=True, eq=False)
class _Part:
    """Bytes of a file that will be read.

    `data` is there from when they are asked for; `left` of them are not read yet.
    """

    reader: OpenSource
    place: str
    offset: int
    length: int
    data: Future[bytearray] | None = None
    left: int = 0

    @property
    def stop(self) -> int:
        return self.offset + self.length


class Ahead:
    """What is expected of distant files. Used by one thread; close it."""

    def __init__(self, nbytes: int) -> None:
        self._room = self._free = nbytes
        self._longest = max(min(nbytes // AT_ONCE, _LONGEST), min(_SHORTEST, nbytes))
        self._queue: deque[_Part] = deque()
        self._parts: dict[str, list[_Part]] = {}
        self._stopped = Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ahead")

    def close(self) -> None:
        """Ask for nothing more; wait for what is under way."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def expect(self, ranges: Iterable[tuple[OpenSource, str, int, int]]) -> None:
        """Expect these ranges, about in this order, and nothing that was expected before."""
        for parts in self._parts.values():
            for part in parts:
                if part.data is not None:
                    part.data.cancel()
        self._queue.clear()
        self._parts.clear()
        self._free = self._room
        last: _Part | None = None
        for reader, place, offset, length in ranges:
            if not reader.distant:
                continue
            while length > 0:
                if last and last.place == place and last.stop == offset and last.length < self._longest:
                    count = min(length, self._longest - last.length)
                    last.length += count
                else:
                    count = min(length, self._longest)
                    last = _Part(reader, place, offset, count)
                    self._queue.append(last)
                    self._parts.setdefault(place, []).append(last)
                offset, length = offset + count, length - count
        for part in self._queue:
            part.left = part.length
        self._ask()

    def read_into(self, reader: OpenSource, place: str, buffer: memoryview, offset: int) -> int:
        """As `OpenSource.read_into`, out of what was expected as far as it was."""
        done = 0
        while done < len(buffer):
            at = offset + done
            parts = self._parts.get(place, ())
            part = next((each for each in parts if each.offset <= at < each.stop), None)
            if part is None:
                stop = min((each.offset for each in parts if each.offset > at), default=offset + len(buffer))
                wanted = buffer[done : max(min(stop - offset, len(buffer)), done)]
                count = reader.read_into(wanted, at)
                done += count
                if count < len(wanted):
                    break
                continue
            if part.data is None:
                self._queue.remove(part)
                self._start(part)
            assert part.data is not None
            found = memoryview(part.data.result())[at - part.offset :][: len(buffer) - done]
            buffer[done : done + len(found)] = found
            done += len(found)
            part.left -= len(found)
            if part.left <= 0:
                self._parts[place].remove(part)
                self._free += part.length
                self._ask()
            if at + len(found) < part.stop and done < len(buffer):
                break  # the file ends within it
        return done

    def _ask(self) -> None:
        """Ask for what there is room for."""
        while self._queue and self._queue[0].length <= self._free:
            self._start(self._queue.popleft())

    def _start(self, part: _Part) -> None:
        self._free -= part.length
        part.data = self._pool.submit(self._fetched, part)

    def _fetched(self, part: _Part) -> bytearray:
        data = bytearray(0 if self._stopped.is_set() else part.length)
        count = part.reader.read_into(memoryview(data), part.offset)
        return data if count == len(data) else data[:count]
