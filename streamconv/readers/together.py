"""Several files that make one checkpoint: which there are, and all of them read side by side.

On a network disk reading a header is mostly waiting. All problems are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from streamconv.errors import CheckpointError, Problems, listed, located
from streamconv.storage.location import Location

_AT_ONCE = 8
_MOST = 1 << 20

APART = "each node keeps its own ranks' files: bring them together"
"""What to do where files of ranks are missing."""

Key = TypeVar("Key")
Found = TypeVar("Found")


def numbered(directory: Location, names: re.Pattern[str]) -> dict[int, Location]:
    """Rank -> file of a directory, in the order of the ranks, which are a group of the names: `rank`."""
    matches = ((names.fullmatch(entry.name), entry) for entry in directory.entries())
    return dict(sorted((int(match["rank"]), entry) for match, entry in matches if match))


def require_all(found: Mapping[int, Location], count: int, what: str, hint: str) -> None:
    """Raise CheckpointError where one of `count` files is missing; `what` they are of."""
    missing = [rank for rank in range(min(count, _MOST)) if rank not in found]
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
