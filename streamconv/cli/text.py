"""Words on the two streams: results on stdout, talk on stderr; numbers as people read them.

A checkpoint's names and strings come from strangers: whatever is printed passes `printable` or JSON, so that
no terminal escape sequence gets through.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

_USUAL_WIDTH = 80

# `note     text`, `  plan   what a conversion would do`: a label, and the column in which its text begins.
_LABEL = re.compile(r" *\S+(?: \S+)? {2,}")

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def printable(text: str) -> str:
    """`text` with everything that a terminal might act on, line ends too, spelled as an escape."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def paragraph(text: str) -> str:
    """As `printable`, but lines stay lines; all but the first are indented, so that none can pose as ours."""
    return "\n    ".join(map(printable, text.split("\n")))


def size(count: float) -> str:
    """Bytes in powers of 1000, three digits: `13.5 GB`."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    digits = 0 if power == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4:05`, `1:02:03`."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def first_lines(items: Iterable[str], most: int | None) -> list[str]:
    """The first `most` items, then how many more there are; all of them where `most` is None."""
    everything = list(items)
    if most is None or len(everything) <= most:
        return everything
    return [*everything[:most], f"... and {len(everything) - most:,} more"]


def labelled(entries: Mapping[str, Iterable[str]], most: int | None = None, width: int = 9) -> list[str]:
    """Lines that begin with their label in a column of `width`, printable, at most so many of each label."""
    return [
        line
        for label, texts in entries.items()
        for line in first_lines((f"{label:<{width}}{printable(text)}" for text in texts), most)
    ]


def tallies(numbers: Mapping[str, int]) -> str:
    """`bit-exact 3, rounding 288`."""
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


def show(text: str = "") -> None:
    """A line, or several, of results."""
    _print(text, sys.stdout)


def talk(text: str = "") -> None:
    """A line, or several, for whoever watches."""
    _print(text, sys.stderr)


def confirmed(question: str) -> bool:
    """Whether the person at the terminal says yes to a question; nobody does where there is no terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    put(question, sys.stderr)
    answer = ""
    try:
        answer = sys.stdin.readline()
    finally:
        if not answer:  # it was interrupted, or ended: what follows begins on a line of its own
            put("\n", sys.stderr)
    return answer.strip().lower() in ("y", "yes")


def present(
    arguments: Namespace, document: Callable[[], Mapping[str, Any]], lines: Callable[[], Iterable[str]]
) -> None:
    """Show a result as a document with `--json`, otherwise as lines."""
    if arguments.json:
        show_json(document())
    else:
        show("\n".join(lines()))


def show_json(document: Mapping[str, Any]) -> None:
    """The one JSON document that is the result; in ASCII, so that terminals are safe from its text."""
    _print(json.dumps(document, allow_nan=False), sys.stdout, whole=True)


def talk_json(message: Mapping[str, Any]) -> None:
    """One JSON line for whatever program watches."""
    _print(json.dumps(message, allow_nan=False), sys.stderr, whole=True)


def picked(record: object, names: str) -> dict[str, Any]:
    """Attributes of a record by these names, in JSON's types."""
    return {name: as_json(getattr(record, name)) for name in names.split()}


def as_json(value: object) -> Any:
    """A value of plain JSON types: infinities and NaN become their names, what JSON lacks its `repr`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return repr(value)


def columns(stream: TextIO) -> int | None:
    """How wide the terminal is that a stream goes to; None where it is none, and lines may have any width."""
    try:
        if not stream.isatty():
            return None
        given = os.environ.get("COLUMNS", "")
        width = int(given) if given.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        width = 0
    return width or _USUAL_WIDTH


def folded(line: str, width: int) -> str:
    """A line as lines of at most `width`, broken at blanks where it has some; what follows stands under its text."""
    if len(line) <= width:
        return line
    label = _LABEL.match(line)
    indent = len(label[0]) if label else len(line) - len(line.lstrip(" -"))
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * (indent if indent < width // 2 else 0),
            break_on_hyphens=False,
        )
    )


def _print(text: str, stream: TextIO, *, whole: bool = False) -> None:
    """Print lines, folded to the width of a terminal unless they are to stay `whole`."""
    width = None if whole else columns(stream)
    if width is not None:
        text = "\n".join(folded(line, width) for line in text.split("\n"))
    # A name that the stream's encoding lacks must not stop a report.
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    put(text + "\n", stream)


_UNPRINTED: list[OSError] = []


def put(text: str, stream: TextIO) -> None:
    """Write text as it is. What cannot be written stops nothing: the work goes on, and `unprinted` tells of results."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError) as error:  # a full disk, a closed stream
        # A reader that has seen enough (`| head`) must not turn a finished conversion into a failed one.
        if isinstance(error, OSError) and error.errno != errno.EPIPE and stream is sys.stdout:
            _UNPRINTED.append(error)
        # What is still buffered would be tried again when the process ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def unprinted() -> OSError | None:
    """Why results could not be written since this was last asked; None where all were."""
    found = _UNPRINTED[0] if _UNPRINTED else None
    _UNPRINTED.clear()
    return found


def stand_in_for_closed_streams() -> None:
    """Open what this process was started without, so that no file of a conversion gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)  # workers inherit it
            if nowhere != number:
                os.close(nowhere)
            else:
                os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115 - as long as the process
