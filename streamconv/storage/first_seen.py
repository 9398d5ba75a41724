"""What files were when they were first opened: what is read of a file holds for that state of it alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from streamconv.storage.location import Location
from streamconv.storage.roles import Entry, OpenSource, Source, State


class FirstSeen(Source):
    """A source that notes the state of each file before it is first opened; all else is another's."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.states: dict[str, State] = {}

    def open(self, place: str) -> OpenSource:
        """See `Source`."""
        if place not in self.states:
            state = self._inner.state(place)
            if state is not None:
                self.states[place] = state
        return self._inner.open(place)

    def reopen(self, place: str, state: State) -> OpenSource:
        """See `Source`."""
        self.states.setdefault(place, state)
        return self._inner.reopen(place, state)

    def state(self, place: str) -> State | None:
        """See `Source`."""
        return self._inner.state(place)

    def entries(self, place: str) -> Sequence[Entry]:
        """See `Source`."""
        return self._inner.entries(place)

    def is_link(self, place: str) -> bool:
        """See `Source`."""
        return self._inner.is_link(place)

    def canonical(self, place: str) -> str:
        """See `Source`."""
        return self._inner.canonical(place)

    def inode(self, place: str) -> Hashable | None:
        """See `Source`."""
        return self._inner.inode(place)

    def local(self, place: str) -> Path | None:
        """See `Source`."""
        return self._inner.local(place)


def watched(place: Location) -> Location:
    """A place, with all that is reached from it, whose files are noted as they are opened."""
    if isinstance(place.source, FirstSeen):
        return place
    return Location(place.place, FirstSeen(place.source), place.entry)


def first_seen(places: Iterable[Location]) -> dict[str, State]:
    """What files were when they were first opened by way of some places."""
    found: dict[str, State] = {}
    for place in places:
        if isinstance(place.source, FirstSeen):
            found |= place.source.states
    return found
