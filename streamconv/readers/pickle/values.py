"""What a pickle is decoded to besides plain values: names, and records of what would have been made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

_LONGEST_QUOTE = 200  # characters of the file that a message quotes


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant that a pickle names. Only the name."""

    module: str
    name: str

    def __str__(self) -> str:
        return describe(f"{self.module}.{self.name}", quote="")


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object of a class that this program does not know: how it was made, as data.

    Attributes:
        cls: what the pickle called or instantiated.
        args: what with.
        state: what was put into the object afterwards: mostly its `__dict__`.
        items: elements that were appended to it (a list) or set in it (a dict), or None.
    """

    cls: Global
    args: tuple[object, ...] = ()
    state: object = None
    items: dict[object, object] | list[object] | None = None

    def __repr__(self) -> str:
        return f"Record({self.cls})"

    @property
    def fields(self) -> dict[object, object]:
        """The object's attributes as its pickled state gives them: from `__dict__` and from slots."""
        state = self.state
        if type(state) is dict:
            return state
        if type(state) is tuple and len(state) == 2:
            parts = [part for part in state if part is not None]
            if parts and all(type(part) is dict for part in parts):
                return {key: value for part in parts for key, value in part.items()}
        return {}


def under(value: object, *keys: str) -> Any:
    """What lies under keys of nested dicts and attributes of records from a file; None where there is nothing."""
    for key in keys:
        fields = value.fields if isinstance(value, Record) else value
        value = fields.get(key) if isinstance(fields, dict) else None
    return value


def elements(value: object, *keys: str) -> Sequence[Any]:
    """The elements of the list or tuple that lies under keys, see `under`; none where nothing of the kind is there."""
    found = under(value, *keys)
    return found if isinstance(found, (list, tuple)) else ()


def describe(value: object, quote: str = "'") -> str:
    """A value from a file in a few printable words, for messages. Never walks into containers."""
    if isinstance(value, str):
        text = value if len(value) <= _LONGEST_QUOTE else value[:_LONGEST_QUOTE] + "..."
        printable = text if text.isprintable() else text.encode("unicode-escape").decode()
        return f"{quote}{printable}{quote}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge integer"
    if isinstance(value, (int, float, NoneType, Global, Record)):
        return str(value)
    return f"a {type(value).__name__}"
