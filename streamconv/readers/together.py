"""Files read side by side: headers are waiting, on a network disk above all; and all that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from streamconv.errors import CheckpointError, Problem

_AT_ONCE = 8

Key = TypeVar("Key")
Place = TypeVar("Place")
Found = TypeVar("Found")


def read_together(
    places: Mapping[Key, Place], reader: Callable[[Place], Found], problems: list[Problem]
) -> dict[Key, Found]:
    """What a reader finds at each place, in their order; what it cannot read is added to the problems.

    Args:
        places: what to read, by any key.
        reader: of one; raises CheckpointError.
        problems: is added to.
    """
    found: dict[Key, Found] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for key, future in {key: pool.submit(reader, place) for key, place in places.items()}.items():
            try:
                found[key] = future.result()
            except CheckpointError as error:
                problems += error.problems
    return found


def read_all(places: Mapping[Key, Place], reader: Callable[[Place], Found], what: str) -> dict[Key, Found]:
    """What a reader finds at each place, in their order.

    Raises:
        CheckpointError: `what` cannot be read, with every problem.
    """
    problems: list[Problem] = []
    found = read_together(places, reader, problems)
    if problems:
        raise CheckpointError(f"{what} cannot be read", problems=problems)
    return found
