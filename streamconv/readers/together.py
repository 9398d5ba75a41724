"""Files read side by side, because on a network disk reading a header is mostly waiting. All problems are reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from streamconv.errors import Problems, located
from streamconv.storage.location import Location

_AT_ONCE = 8

Key = TypeVar("Key")
Found = TypeVar("Found")


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
