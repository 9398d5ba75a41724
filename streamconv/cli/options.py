"""From records of options (`streamconv.options`) to parsers of `argparse`, and back to what was given.

Parsed arguments have a value for every option, and in `given` the names of those that the command line spells, so
that `verify` knows whether options of the plan were given. An option that is given twice adds, or is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn, TypedDict

from streamconv.cli.text import folded, paragraph, show, talk
from streamconv.engines import ENGINES
from streamconv.options.fields import Options, fields, part
from streamconv.options.option import Option
from streamconv.options.records import (
    ArchitectureOptions,
    DeletingOptions,
    MemoryOptions,
    ReadingOptions,
    ResourceOptions,
    RunningOptions,
    WritingOptions,
)
from streamconv.writers.formats import FORMATS

Groups = Mapping[str, type]
"""Titles in a help text, and the records of the options under them."""

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "the conversion or verification failed; what is finished is kept",
    2: "the call or its input is wrong; nothing was written",
    130: "interrupted; the same command resumes",
}

READ_ONLY_CODES: Mapping[int, str] = {
    0: "done",
    1: "it failed",
    2: "the call or its input is wrong",
    130: "interrupted",
}


class OutputOptions(TypedDict, total=False):
    """What is printed while work is done."""

    quiet: Annotated[bool, Option(False, "print nothing but errors")]
    log_json: Annotated[
        bool, Option(False, "print JSON lines on stderr instead of text: status, summary, error")
    ]


class ResultOptions(TypedDict, total=False):
    """How results are shown."""

    json: Annotated[bool, Option(False, "print one JSON document", otherwise="text")]


class FullResultOptions(ResultOptions, total=False):
    """How long results are shown."""

    full: Annotated[
        bool, Option(False, "a line for every tensor, and whole lists", otherwise="equal layers are one line")
    ]


class DebuggingOptions(TypedDict, total=False):
    """What every command has."""

    debug: Annotated[bool, Option(False, "print a traceback with an error")]


READING: Groups = {"what to read": ReadingOptions}
PLANNING: Groups = {
    **READING,
    "what to write": WritingOptions,
    "which architecture to write": ArchitectureOptions,
}
MEMORY: Groups = {"resources": MemoryOptions}
RESOURCES: Groups = {"resources": ResourceOptions}
DELETING: Groups = {"running": DeletingOptions}
RUNNING: Groups = {"running": RunningOptions}
OUTPUT: Groups = {"output": OutputOptions}
RESULT: Groups = {"results": ResultOptions}
RESULTS: Groups = {"results": FullResultOptions}


_KNOWN: Mapping[str, Collection[str]] = {"to": FORMATS, "engine": ENGINES}
"""Option -> the table of what it takes."""


_DESTINATION = (
    "-o",
    "--out",
    "--output",
    "--output-path",
    "--output_path",
    "--output-dir",
    "--outfile",
    "--dst",
)
"""What other programs call the destination, which has no option here."""


class _Folding(argparse.RawDescriptionHelpFormatter):
    """Help whose lines stay lines, as long as they fit."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(f"{folded(indent + line, width)}\n" for line in text.splitlines())


class Parser(argparse.ArgumentParser):
    """A parser that prints as all commands do, and says which option a misspelt one was meant to be."""

    def print_help(self, _file: object = None) -> None:
        """Print the help text."""
        show(self.format_help().rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line, and exit."""
        words = (
            message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrec") else []
        )
        for word in (word.partition("=")[0] for word in words if word.startswith("-")):
            near = get_close_matches(word, self._option_string_actions, n=1, cutoff=0.75)
            message += f"; {word}: did you mean {near[0]}?" if near else ""
            message += f"; {word}: the destination follows the source" if word in _DESTINATION else ""
        talk(f"{self.format_usage()}{self.prog}: error: {paragraph(message)}")
        sys.exit(2)


@dataclass(frozen=True, slots=True)
class Command:
    """One command, with what its help says.

    Attributes:
        summary: its line in the help of all.
        description: the beginning of its own help.
        groups: its options.
        run: carries it out, and gives the exit code.
        places: what it takes besides, by name: what that is called, in brackets where it may be left out, and its help.
        codes: what its exit codes mean.
        usage: where that does not follow from the rest.
        defaults: of what other commands have options for.
    """

    summary: str
    description: str
    groups: Groups
    run: Callable[[argparse.Namespace], int]
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    codes: Mapping[int, str] = field(default_factory=lambda: READ_ONLY_CODES)
    usage: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def parser(self, name: str) -> Parser:
        """The parser of its arguments, whose help ends with the exit codes."""
        made = Parser(
            prog=f"streamconv {name}",
            usage=self.usage,
            description=self.description,
            epilog=exit_codes(self.codes),
            formatter_class=_Folding,
            allow_abbrev=False,
        )
        for title, record in {**self.groups, "debugging": DebuggingOptions}.items():
            add(made.add_argument_group(title), record)
        for place, (called, about) in self.places.items():
            nargs = "?" if called.startswith("[") else None
            made.add_argument(place, metavar=called.strip("[]"), help=about, nargs=nargs)
        made.set_defaults(**{"resumable": False, "given": frozenset(), "command": name, **self.defaults})
        return made


def exit_codes(codes: Mapping[int, str]) -> str:
    """The end of a help text."""
    return "exit codes:" + "".join(f"\n  {code:<4} {meaning}" for code, meaning in codes.items())


def add(group: argparse._ActionsContainer, record: type) -> None:
    """Add every option of a record."""
    for name, option in fields(record).items():
        known = f": {', '.join(_KNOWN[name])}" if name in _KNOWN else ""
        otherwise = option.otherwise or ("no" if option.default is False else option.default)
        again = "; may be repeated" if option.repeats else ""
        made = group.add_argument(
            *option.flag.split("|"),
            dest=name,
            action=_Given,
            nargs=0 if option.convert is bool else None,
            default=option.default,
            type=option.convert,
            choices=option.choices,
            metavar=option.metavar,
            help=f"{option.help}{known}{again} (default: {otherwise})",
        )
        if isinstance(made, _Given):
            made.option = option


def given(record: type[Options], arguments: argparse.Namespace) -> Options:
    """The options of a record that were given, as keywords of the library."""
    return part(record, {name: getattr(arguments, name) for name in arguments.given})


class _Given(argparse.Action):
    """Takes a value, turns something on, or with `--no-` off; adds to the values before, or refuses a second one."""

    option: Option

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        spelled: str | None = None,
    ) -> None:
        if self.dest in namespace.given and not self.option.repeats:
            raise argparse.ArgumentError(self, "it is given twice; give it once")
        if self.nargs == 0:
            values = not (spelled or "").startswith("--no-")
        if self.option.repeats:
            values = [*self._before(namespace), values]
        namespace.given |= {self.dest}
        setattr(namespace, self.dest, values)

    def _before(self, namespace: argparse.Namespace) -> list[Any]:
        """The values that were given before; with nothing for each value of another option that has none of these."""
        before = self.option.each(getattr(namespace, self.dest))
        if not self.option.of:
            return before
        places = max(len(getattr(namespace, self.option.of) or ()), 1)
        if len(before) >= places:
            raise argparse.ArgumentError(self, "it is given twice; give it once")
        return [*before, *[None] * (places - 1 - len(before))]
