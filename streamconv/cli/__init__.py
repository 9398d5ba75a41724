"""The command line: words and flags in, calls to `streamconv.api`, tables and progress out.

One module per command, each with a `COMMAND`. Results go to stdout, all else to stderr.
Exit codes: 0 done, 1 the conversion or verification failed, 2 the call or its input was wrong, 130 interrupted.
JSON is described where it is made: `cli.progress` for `--log-json`, each command for `--json`.

Nothing here imports NumPy before a command runs, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from streamconv import __version__
from streamconv.cli import convert, demo, diff, inspect, plan, recipes, verify
from streamconv.cli.errors import exit_code
from streamconv.cli.options import EXIT_CODES, Command, exit_codes
from streamconv.cli.progress import on_signal
from streamconv.cli.text import show, stand_in_for_closed_streams, talk
from streamconv.errors import StreamconvError
from streamconv.storage.location import locate

if TYPE_CHECKING:
    from types import FrameType


COMMANDS: Mapping[str, Command] = {
    module.__name__.rpartition(".")[2]: module.COMMAND
    for module in (convert, plan, inspect, verify, diff, recipes, demo)
}

_DEFAULT = "convert"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process's) and return its exit code."""
    stand_in_for_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        (show if words else talk)(_help())
        return 0 if words else 2
    if words[0] == "--version":
        show(f"streamconv {__version__}")
        return 0
    if _mistyped(words):
        return 2
    try:
        arguments = parse(words)
    except SystemExit as end:  # argparse has printed its message
        return end.code if isinstance(end.code, int) else 2
    return perform(COMMANDS[arguments.command].run, arguments)


def perform(command: Callable[[Namespace], int], arguments: Namespace) -> int:
    """Run a command; its errors are reported, and the exit code says how it ended."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # A batch system's SIGTERM is as ^C: workers end, finished work is kept, and the run can be resumed.
    with on_signal("SIGTERM", interrupt):
        return exit_code(command, arguments)


def parse(words: Sequence[str]) -> Namespace:
    """The arguments of a command line; where its first word is not a command, it is a conversion.

    Raises:
        SystemExit: they cannot be read, or ask for help.
    """
    named = bool(words) and words[0] in COMMANDS
    command = words[0] if named else _DEFAULT
    parser = COMMANDS[command].parser(command)
    rest = list(words[1:] if named else words)
    # Intermixed, so that options may stand between SRC and DST; but that does not handle `--`.
    return parser.parse_args(rest) if "--" in rest else parser.parse_intermixed_args(rest)


def _help() -> str:
    commands = "\n".join(f"  {name:<9}{command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: streamconv SRC DST [options]
       streamconv COMMAND ...

Convert checkpoints of very large models between formats: planned from headers,
streamed in bounded memory, resumable, verified.

commands:
{commands}

Without a command: convert. `streamconv COMMAND --help` lists the options of a
command. Write a path that has the name of a command as ./COMMAND.
`streamconv --version` prints the version.

{exit_codes(EXIT_CODES)}"""


def _mistyped(words: Sequence[str]) -> bool:
    """Whether the first word is neither a command, nor an option, nor an existing path; if so, report it."""
    first = words[0]
    if first in COMMANDS or first.startswith("-") or _may_be_there(first):
        return False
    near = get_close_matches(first, COMMANDS, n=1)
    if not near and len(words) > 1:
        return False
    guess = f"; did you mean '{near[0]}'?" if near else f"; commands are {', '.join(COMMANDS)}"
    talk(f"streamconv: error: {first!r} is neither a command nor a file or directory{guess}")
    return True


def _may_be_there(place: str) -> bool:
    """Whether a place exists, or is one that the command itself will refuse with a better message."""
    try:
        return locate(place).exists()
    except (StreamconvError, OSError):
        return True
