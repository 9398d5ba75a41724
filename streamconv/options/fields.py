"""The fields of records of options: what they are, what they hold, and how that is recorded."""

from __future__ import annotations

import shlex
import types
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from streamconv.errors import UsageError
from streamconv.options.option import Option

Options = TypeVar("Options")
"""A record of options."""


ADDED: dict[type, dict[str, Any]] = {}
"""What packages outside add to a record, and so to all that hold it: `Annotated[type, Option(...)]` by name."""


def fields(record: type) -> Mapping[str, Option]:
    """The options of a record, by name, in its order; what is added comes last."""
    hints = dict(_hints(record))
    for each, added in ADDED.items():
        if _hints(each).keys() <= hints.keys():
            hints |= added
    return {
        name: replace(option, types=_alternatives(hint.__origin__), flag=option.flag or _flag(name))
        for name, hint in hints.items()
        for option in hint.__metadata__
    }


@cache
def _hints(record: type) -> Mapping[str, Any]:
    """The types of a record's fields; working them out compiles text, and every call of the API asks for them."""
    return get_type_hints(record, include_extras=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(each for each in get_args(hint) if each is not type(None))
    return (hint,)


def filled(record: type[Options], given: Options) -> Options:
    """Every option of a record: what is given, and the defaults of the rest.

    Raises:
        TypeError: a name that is not an option of the record.
    """
    known, values = fields(record), cast(Mapping[str, Any], given)
    for name in values.keys() - known.keys():
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"there is no option '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return cast(Options, {name: values.get(name, option.default) for name, option in known.items()})


def part(record: type[Options], given: object) -> Options:
    """Those of the given options that belong to a record."""
    values = cast(Mapping[str, Any], given)
    return cast(Options, {name: values[name] for name in fields(record) if name in values})


def recorded(record: type[Options], options: Options) -> dict[str, Any]:
    """Options as JSON holds them, from which the same plan can be made anywhere: paths are absolute."""
    values = cast(Mapping[str, Any], options)
    return {name: option.recorded(values[name]) for name, option in fields(record).items()}


def from_record(record: type[Options], document: object) -> Options:
    """Options as they were recorded.

    Raises:
        UsageError: the record is of another version, or was changed.
    """
    known = fields(record)
    values = document if isinstance(document, dict) else {"arguments": document}
    odd = [name for name, value in values.items() if name not in known or not known[name].accepts(value)]
    if odd:
        raise UsageError(
            f"the options on record cannot be used: {', '.join(map(str, odd))}",
            hint="give the options of the conversion, those of this version",
        )
    return cast(Options, values)


def spelled(record: type[Options], options: Options) -> tuple[str, ...]:
    """The options that ask for something, each as it is given on the command line, ready for a shell."""
    values, words = recorded(record, filled(record, options)), []
    known = fields(record)
    for name, option in known.items():
        if not option.is_given(values[name]) or (option.of and known[option.of].is_given(values[option.of])):
            continue
        followers = [each for each, other in known.items() if other.of == name]
        for place, value in enumerate(option.each(values[name])):
            words.append(_spelled(option, value))
            for each in followers:
                of_it = known[each].each(values[each])[place : place + 1]
                words += [_spelled(known[each], own) for own in of_it if own is not None]
    return tuple(words)


def _spelled(option: Option, value: Any) -> str:
    return option.flag if isinstance(value, bool) else f"{option.flag} {shlex.quote(str(value))}"
