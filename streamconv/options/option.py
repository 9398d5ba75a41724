"""What an option is, besides its name and its type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from streamconv.storage.location import sought


@dataclass(frozen=True, slots=True)
class Option:
    """What an option is, besides its name and its type.

    Attributes:
        default: its value where it is not given.
        help: for the command line; without the default.
        otherwise: what happens without it, in words, where the default's value does not say so.
        metavar: what its value is called.
        flag: its spelling, where that is not `--name`.
        source: what the source has where the option has an effect, any of it; empty: all sources do.
        beside: options, by name, that give it an effect.
        against: options, by name, that leave it without one.
        of: the option, by name, each value of which may have one of these; its place in the list is that of its own.
        met: values besides the default that are never refused: they ask for what happens in any case.
        record: how its value is recorded, where the type does not say so.
        types: the alternatives of its type without `None`; filled in from the record.
    """

    default: Any
    help: str
    otherwise: str = ""
    metavar: str | None = None
    flag: str = ""
    source: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    of: str = ""
    met: tuple[Any, ...] = ()
    record: Callable[[Any], Any] | None = None
    types: tuple[Any, ...] = ()

    @property
    def repeats(self) -> bool:
        """Whether giving it again adds to it."""
        return any(get_origin(each) is Sequence for each in self.types)

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The only values that its type has, or None."""
        return next((get_args(each) for each in self.types if get_origin(each) is Literal), None)

    @property
    def convert(self) -> type:
        """The plain type that its text stands for."""
        alone = tuple(each for each in self.types if get_origin(each) is not Sequence)
        return next((each for each in (bool, int, float) if alone == (each,)), str)

    def is_given(self, value: Any) -> bool:
        """Whether a value asks for something that the default does not."""
        return value not in (None, self.default, *self.met) and not (self.repeats and not value)

    def accepts(self, value: Any) -> bool:
        """Whether a value out of a record has the right type."""
        if value is None:
            return self.default is None
        if self.choices is not None:
            return value in self.choices
        if self.repeats and (isinstance(value, list) or self.default is not None):
            missing = (type(None),) * bool(self.of)
            return isinstance(value, list) and all(
                isinstance(each, (*self._plain, *missing)) for each in value
            )
        return isinstance(value, self._plain) and (bool in self.types) == isinstance(value, bool)

    @property
    def _plain(self) -> tuple[type, ...]:
        """The types of one value in a record."""
        plain = tuple(each for each in (str, int, float) if each in self.types)
        if not plain:
            return (str,) if self.repeats else (bool,)
        return plain + (int,) * (float in plain)  # a whole number is one, and Python callers write it so

    def each(self, value: Any) -> list[Any]:
        """The values that were given, one or several."""
        if value is None:
            return []
        several = isinstance(value, Sequence) and not isinstance(value, str)
        return list(value) if several else [value]

    def recorded(self, value: Any) -> Any:
        """A value as JSON holds it."""
        if value is None:
            return None
        if self.record is not None:
            return self.record(value)
        if self.repeats:
            values = (
                [sought(each).place for each in self.each(value)] if Path in self.types else self.each(value)
            )
            # What may be left out is recorded as one value where it is one.
            return values[0] if self.default is None and len(values) == 1 else values
        return sought(value).place if Path in self.types else value
