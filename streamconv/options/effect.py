"""Options that have no effect are refused.

The field of an option says with which sources or other options it has one; the record of a target format says which
options act on it (`writers.formats`), and one that no format names acts on all. A default is never refused, and neither
is an option that asks for what is so already (`--dtype BF16` for a model in BF16).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

from streamconv.errors import Problem, UsageError
from streamconv.options.fields import Options, fields
from streamconv.options.option import Option
from streamconv.options.spelling import either


class Source(Protocol):
    """What options may apply to: an open checkpoint."""

    @property
    def format(self) -> str:
        """What its reader recognised."""

    @property
    def traits(self) -> frozenset[str]:
        """What it has that options apply to."""


class Choice(Protocol):
    """What options may apply to: what another option names, such as a format that can be written, or an engine."""

    @property
    def options(self) -> frozenset[str]:
        """The options, by name, that act on it and not on every one."""


def require_effect(
    record: type[Options],
    options: Options,
    chooser: str = "",
    choices: Mapping[str, Choice] = MappingProxyType({}),
    source: Source | None = None,
) -> None:
    """Refuse options that would have no effect.

    Args:
        record: whose options these are.
        options: all of them.
        chooser: the option that names one of `choices`, or nothing where the library chooses.
        choices: by name.
        source: None where it is not read yet, so that options that apply to it cannot be judged.

    Raises:
        UsageError: options that do not apply.
    """
    known, values = fields(record), cast(Mapping[str, Any], options)
    given = [name for name, option in known.items() if option.is_given(values[name])]
    problems = []
    for name in given:
        option = known[name]
        takers = [each for each, choice in choices.items() if name in choice.options]
        beside, against = ([known[each].flag for each in names] for names in (option.beside, option.against))
        stopped = [known[each].flag for each in option.against if each in given]
        acts = (
            not (takers or option.source or beside)
            or (takers and values[chooser] in (None, *takers))
            or (option.source and (source is None or not source.traits.isdisjoint(option.source)))
            or not set(given).isdisjoint(option.beside)
        )
        if acts and not stopped:
            continue
        if acts:
            where, uses = f"with {either(stopped)}", [f"use without {either(against)}"]
        elif source is not None and option.source:
            where, uses = f"on this source ({source.format})", [*option.source]
        elif takers:
            where, uses = f"with {known[chooser].flag} {values[chooser]}", []
        else:
            where, uses = f"without {either(beside)}", []
        if not acts:
            uses += [
                *(f"{known[chooser].flag} {each}" for each in takers),
                *(f"use with {each}" for each in beside),
            ]
        problems.append(no_effect(option, where, either(uses)))
    if len(problems) == 1:
        raise UsageError(problems[0].message, hint=problems[0].hint)
    if problems:
        raise UsageError("there are options that have no effect", problems=problems)


def no_effect(option: Option, where: str, uses: str) -> Problem:
    """The problem of an option that has no effect."""
    return Problem(f"{option.flag} has no effect {where}", hint=f"it is for {uses}; leave it out")
