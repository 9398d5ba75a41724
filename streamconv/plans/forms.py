"""How records stand in JSON, both ways, derived from the types of their fields.

The way back takes outside data: what has another type than the field is `Damaged`, which says where it is.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from streamconv.writers.layout import LARGEST

Form = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""How a value stands in JSON: the way there, and the way back."""

_SHOWN = 60

# What JSON has no numbers for.
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Damaged(ValueError):  # noqa: N818 - a finding, that the caller words
    """A value of a document is not what was written there."""

    def __init__(self, expected: str, value: object) -> None:
        found = repr(value)
        self.where: list[str] = []
        super().__init__(
            f"expected {expected}, found {found if len(found) <= _SHOWN else f'{found[:_SHOWN]}...'}"
        )

    def __str__(self) -> str:
        where = ".".join(reversed(self.where))
        return f"{where}: {self.args[0]}" if where else str(self.args[0])


class Forms(dict[Any, Form]):
    """Types and their forms: a tuple or a record is a list, what JSON has stands for itself."""

    def __missing__(self, kind: Any) -> Form:
        origin, inner = get_origin(kind), get_args(kind)
        form: Form
        if origin is tuple and inner[-1] is ...:
            write, read = self[inner[0]]
            form = (lambda values: [write(value) for value in values]), _each(read)
        elif origin is tuple:
            form = list, _row(tuple, {str(at): self[each] for at, each in enumerate(inner)})
        elif dataclasses.is_dataclass(kind):
            form = self.record(cast(type, kind))
        elif origin in (Union, types.UnionType):
            form = _as_it_is, _any_of([self[each][1] for each in inner])
        elif origin is Literal:
            form = _as_it_is, _checked(lambda value: value in inner, f"one of {', '.join(map(str, inner))}")
        elif origin is not None and issubclass(origin, Mapping):
            write, read = self[inner[1]]
            form = (lambda values: {key: write(each) for key, each in values.items()}), _members(read)
        else:
            form = _PLAIN[kind]
        self[kind] = form
        return form

    def fields(self, kind: type) -> dict[str, Form]:
        """The forms of a record's fields."""
        hints = get_type_hints(kind)
        return {field.name: self[hints[field.name]] for field in dataclasses.fields(kind)}

    def record(self, kind: type, **own: Form) -> Form:
        """A record as the list of its fields, of which some have forms of their `own`."""
        forms = self.fields(kind) | own
        return (
            lambda record: [write(getattr(record, name)) for name, (write, _) in forms.items()],
            _row(lambda values: kind(*values), forms),
        )

    def table(self, kind: type, own: Mapping[str, Form] | None = None, **keys: str) -> Form:
        """A record as an object, with `keys` for fields that have another name there; unknown keys are ignored."""
        own_or_derived = self.fields(kind) | dict(own or {})
        forms = [(name, keys.get(name, name), *form) for name, form in own_or_derived.items()]

        def back(row: Any) -> Any:
            if not isinstance(row, dict):
                raise Damaged("an object", row)
            values = {}
            for name, key, _, read in forms:
                try:
                    values[name] = read(row[key])
                except Damaged as error:
                    error.where.append(key)
                    raise
            return kind(**values)

        return (lambda record: {key: write(getattr(record, name)) for name, key, write, _ in forms}), back


def _row(make: Callable[[list[Any]], Any], forms: Mapping[str, Form]) -> Callable[[Any], Any]:
    def back(row: Any) -> Any:
        if not isinstance(row, list) or len(row) != len(forms):
            raise Damaged(f"a list of {len(forms)}", row)
        values = []
        for (name, (_, read)), value in zip(forms.items(), row, strict=True):
            try:
                values.append(read(value))
            except Damaged as error:
                error.where.append(name)
                raise
        return make(values)

    return back


def _each(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def back(row: Any) -> tuple[Any, ...]:
        if not isinstance(row, list):
            raise Damaged("a list", row)
        values = []
        for value in row:
            try:
                values.append(read(value))
            except Damaged as error:
                error.where.append(str(len(values)))
                raise
        return tuple(values)

    return back


def _members(read: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def back(row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise Damaged("an object", row)
        values = {}
        for key, value in row.items():
            try:
                values[key] = read(value)
            except Damaged as error:
                error.where.append(key)
                raise
        return values

    return back


def _any_of(reads: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def back(value: Any) -> Any:
        for read in reads[:-1]:
            try:
                return read(value)
            except Damaged:
                continue
        return reads[-1](value)

    return back


def _checked(accepts: Callable[[Any], object], what: str) -> Callable[[Any], Any]:
    def back(value: Any) -> Any:
        if not accepts(value):
            raise Damaged(what, value)
        return value

    return back


def _as_it_is(value: Any) -> Any:
    return value


def _number(value: Any) -> Any:
    if isinstance(value, str) and value in _FLOATS:
        return _FLOATS[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Damaged("a number", value)
    return value


def _inside(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    path = PurePosixPath(value)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


NATURAL: Form = _as_it_is, _checked(_is_natural, "a number of 0 or more, in 64 bits")
"""A count, an offset, a size."""

SHAPE: Form = (
    list,
    lambda row: tuple(map(NATURAL[1], row if isinstance(row, list) else [row])),
)

INSIDE: Form = _as_it_is, _checked(_inside, "a path that stays in the destination")
"""A path relative to the destination."""

_PLAIN: dict[Any, Form] = {
    Any: (_as_it_is, _as_it_is),
    bool: (_as_it_is, _checked(lambda value: isinstance(value, bool), "true or false")),
    int: (
        _as_it_is,
        _checked(lambda value: type(value) is int and abs(value) <= LARGEST, "a whole number in 64 bits"),
    ),
    str: (_as_it_is, _checked(lambda value: isinstance(value, str), "text")),
    type(None): (_as_it_is, _checked(lambda value: value is None, "null")),
    # orjson writes what JSON has no number for as null.
    float: (
        lambda value: value if value is None or math.isfinite(value) else str(value),
        _number,
    ),
}
