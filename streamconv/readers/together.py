"""Several files that make one checkpoint: which there are, and all of them read side by side.

On a network disk reading a header is mostly waiting. All problems are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from streamconv.errors import CheckpointError, Problems, listed, located
from streamconv.readers.numbers import MOST
from streamconv.storage.location import Location

_AT_ONCE = 8

APART = "each node keeps its own ranks' files: bring them together"
"""What to do where files of ranks are missing."""

Key = TypeVar("Key")
Found = TypeVar("Found")


def numbered(directory: Location, names: re.Pattern[str]) -> dict[int, Location]:
    """Rank -> file of a directory, in the order of the ranks, which are a group of the names: `rank`."""
    matches = ((names.fullmatch(entry.name), entry) for entry in directory.entries())
    return dict(sorted((int(match["rank"]), entry) for match, entry in matches if match))


@dataclass(frozen=True, slots=True)
class Missing(Collection[int]):
    """The numbers [first, stop) that are not found. A file says how many there are: what it says is only counted."""

    found: Collection[int]
    stop: int
    first: int = 0

    @property
    def _all(self) -> range:
        return range(self.first, max(self.first, min(self.stop, MOST)))

    def __contains__(self, number: object) -> bool:
        return number in self._all and number not in self.found

    def __iter__(self) -> Iterator[int]:
        return (number for number in self._all if number not in self.found)

    def __len__(self) -> int:
        return len(self._all) - sum(number in self._all for number in self.found)


def require_all(found: Mapping[int, Location], count: int, what: str, hint: str) -> None:
    """Raise CheckpointError where one of `count` files is missing; `what` they are of."""
    missing = Missing(found, count)
    if missing:
        (example, *_) = found.values()
        raise CheckpointError(
            f"of {count} {what}, {listed(missing, 8)} are missing", file=str(example.parent), hint=hint
        )


def read_together(
    places: Mapping[Key, Location], reader: Callable[[Location], Found], problems: Problems
) -> dict[Key, Found]:
    """What a reader finds in each file, in their order; what it cannot read is added to the problems.

    Errors that do not name a file get the name of the one that was read.
    """

    def read(place: Location) -> Found:
        with located(place.place):
            return reader(place)

    found: dict[Key, Found] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for key, future in {key: pool.submit(read, place) for key, place in places.items()}.items():
            with problems.collecting():
                found[key] = future.result()
    return found


def read_all(
    places: Mapping[Key, Location], reader: Callable[[Location], Found], what: str
) -> dict[Key, Found]:
    """What a reader finds in each file, in their order.

    Raises:
        CheckpointError: `what` cannot be read, with every problem.
    """
    problems = Problems()
    found = read_together(places, reader, problems)
    problems.report(f"{what} cannot be read")
    return found
