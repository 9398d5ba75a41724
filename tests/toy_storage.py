"""A toy storage, `memory://`, as someone outside the package would write one: a dictionary of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from streamconv.storage.resolve import Storage
from streamconv.storage.roles import Entry, Held, OpenSink, OpenSource, Sink, Source, State

FILES: dict[str, bytearray] = {}
DIRECTORIES: set[str] = set()


class _Open(OpenSink):
    def __init__(self, place: str) -> None:
        self.data = FILES[place]
        self.size = len(self.data)

    def close(self) -> None:
        pass

    def read_into(self, buffer: memoryview, offset: int) -> int:
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        self.data[offset : offset + len(data)] = data


class _Source(Source):
    def state(self, place: str) -> State | None:
        if place in FILES:
            return State("file", len(FILES[place]), str(hash(bytes(FILES[place]))))
        inside = any(each.startswith(f"{place.rstrip('/')}/") for each in (*FILES, *DIRECTORIES))
        return State("directory", 0, "") if inside or place in DIRECTORIES else None

    def entries(self, place: str) -> Sequence[Entry]:
        below = f"{place.rstrip('/')}/"
        names = {
            each.removeprefix(below).split("/")[0]
            for each in (*FILES, *DIRECTORIES)
            if each.startswith(below)
        }
        if not names and place not in DIRECTORIES:
            raise FileNotFoundError(2, "No such directory", place)
        states = ((name, self.state(below + name)) for name in sorted(names))
        return [Entry(name, state.kind, state=state) for name, state in states if state]

    def open(self, place: str) -> OpenSource:
        if place not in FILES:
            raise FileNotFoundError(2, "No such file", place)
        return _Open(place)


class _Sink(Sink):
    def create(self, place: str, size: int, *, reserve: bool = True) -> None:
        FILES[place] = bytearray(size)

    def make_directory(self, place: str) -> None:
        DIRECTORIES.add(place)

    def open(self, place: str) -> OpenSink:
        return _Open(place)

    def sync(self, place: str, *, forget: bool = False) -> None:
        pass

    def publish(self, partial: str, final: str) -> None:
        FILES[final] = FILES.pop(partial)

    def remove(self, place: str) -> None:
        FILES.pop(place, None)

    def remove_directory(self, place: str) -> None:
        if any(each.startswith(f"{place}/") for each in (*FILES, *DIRECTORIES)):
            raise OSError(39, "Directory not empty", place)
        DIRECTORIES.discard(place)

    @contextmanager
    def _held(self, place: str) -> Iterator[None]:
        try:
            yield
        finally:
            del FILES[place]

    def lock(self, place: str, holder: str) -> AbstractContextManager[None]:
        if place in FILES:
            raise Held(FILES[place].decode())
        FILES[place] = bytearray(holder.encode())
        return self._held(place)

    def free(self, place: str) -> int | None:
        return None

    def allocated(self, place: str) -> int:
        return len(FILES.get(place, b""))


MEMORY = Storage(_Source, _Sink, shared=False)
