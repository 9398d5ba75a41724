"""Bounds on what is made from a pickle: how deep it nests, and what may be hashed."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType

from streamconv.readers.pickle.values import Global, Record, describe

HOSTILE = "no training program writes such a file; do not trust it"

MAX_NESTING = 256
"""Containers within containers. Python's own pickler ends at its recursion limit, 1000 by default."""

_MAX_KEY_LENGTH = 1 << 16
_MAX_KEY_PARTS = 256

_OBJECT_KEY = Global("", "object as key")
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset, Record})


class PickleError(Exception):
    """What is wrong with the pickle, for the loop to say where."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint


def hashable(value: object) -> object:
    """`value` as a dict key or set element: itself, or a record by identity for what cannot be compared.

    Raises:
        PickleError: hashing or comparing it would fail or could take long.
    """
    parts = [value]
    seen = characters = 0
    while parts:
        part = parts.pop()
        seen += 1
        if isinstance(part, (tuple, frozenset)):
            if seen + len(parts) + len(part) > _MAX_KEY_PARTS:
                raise PickleError(f"a dict key or set element has more than {_MAX_KEY_PARTS} parts", HOSTILE)
            parts.extend(part)
        elif isinstance(part, (str, bytes)):
            characters += len(part)
            if characters > _MAX_KEY_LENGTH:
                raise PickleError(f"a dict key or set element has {characters} characters", HOSTILE)
        elif isinstance(part, int):
            # Python hashes integers modulo 2**61 - 1: longer ones can be made to collide at will.
            if not -(1 << 64) < part < 1 << 64:
                raise PickleError("a dict key or set element is a huge integer", HOSTILE)
        elif isinstance(part, (list, dict, set, bytearray)):
            raise PickleError(f"{describe(part)} is used as a dict key or set element")
        elif not isinstance(part, (float, complex, NoneType, Global, Record)):
            if part is value:
                return Record(_OBJECT_KEY, (value,))
            raise PickleError(f"{describe(part)} is used within a dict key or set element")
    return value


def set_checked(target: dict[object, object], key: object, value: object) -> None:
    """`target[key] = value`, after a look at the key."""
    if type(key) is not str or len(key) > _MAX_KEY_LENGTH:
        key = hashable(key)
    target[key] = value


def _children(value: object) -> Iterator[object]:
    """The values directly inside a container of this module's making; nothing for any other value."""
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, Record):
        yield value.args
        yield value.state
        yield value.items


def check_nesting(root: object) -> None:
    """Refuse a value that a recursive walk could not follow. A cycle is followed once around."""
    if type(root) not in _CONTAINERS:
        return
    heights: dict[int, int] = {id(root): 0}
    path = [(root, _children(root))]
    tallest = [0]  # for each container of the path: the height of its tallest child so far
    while path:
        container, rest = path[-1]
        for child in rest:
            if type(child) not in _CONTAINERS:
                continue
            known = heights.get(id(child))
            if known is None:
                heights[id(child)] = 0
                path.append((child, _children(child)))
                tallest.append(0)
                break
            tallest[-1] = max(tallest[-1], known)
        else:
            path.pop()
            height = tallest.pop() + 1
            heights[id(container)] = height
            if tallest:
                tallest[-1] = max(tallest[-1], height)
        # On the path down there is no height yet, but the path itself is as high.
        if len(path) + (tallest[-1] if tallest else 0) > MAX_NESTING:
            raise PickleError(f"containers are nested more than {MAX_NESTING} deep", HOSTILE)
