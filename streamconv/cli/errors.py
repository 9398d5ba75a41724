"""From exceptions to one message on stderr and an exit code."""

from __future__ import annotations

import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence

from streamconv.cli.text import first_lines, paragraph, picked, talk, talk_json, unprinted
from streamconv.errors import Problem, StreamconvError

INTERRUPTED = 130

_MOST_PROBLEMS = 20

Command = Callable[[Namespace], int]


def exit_code(command: Command, arguments: Namespace) -> int:
    """Run a command, and report its errors as the options ask."""
    try:
        code = command(arguments)
        lost = unprinted()
        # A conversion is what it made, of any other command the result is what it prints.
        if lost and code == 0 and not arguments.resumable:
            return _reported(f"the result cannot be printed: {lost.strerror}", (), 1, arguments)
        return code
    except KeyboardInterrupt:
        again = "; run the same command again to resume" if arguments.resumable else ""
        return _reported(f"interrupted{again}", (), INTERRUPTED, arguments)
    except StreamconvError as error:
        _trace(arguments)
        problems = () if error.problems == (error.headline,) else error.problems
        return _reported(str(error.headline), problems, error.exit_code, arguments)
    except OSError as error:
        _trace(arguments)
        where = f"{error.filename}: " if error.filename else ""
        return _reported(f"{where}{error.strerror or error}", (), 1, arguments)
    except MemoryError:
        _trace(arguments)
        hint = "lower --memory or --workers, or give the process more"
        return _reported(f"there is not enough memory ({hint})", (), 1, arguments)
    except Exception as error:
        _trace(arguments)
        advice = "" if arguments.debug else "; run with --debug to see where, and report it"
        return _reported(f"internal error: {type(error).__name__}: {error}{advice}", (), 1, arguments)


def _reported(message: str, problems: Sequence[Problem], code: int, arguments: Namespace) -> int:
    if getattr(arguments, "log_json", False):
        found = [picked(problem, "message file tensor hint") for problem in problems]
        talk_json({"message_type": "error", "exit_code": code, "message": message, "problems": found})
        return code
    if problems:
        from streamconv.plans.findings import grouped

        problems = grouped(problems)
    talk(f"streamconv: {'' if code == INTERRUPTED else 'error: '}{paragraph(message)}")
    for line in first_lines((f"- {paragraph(str(problem))}" for problem in problems), _MOST_PROBLEMS):
        talk(f"  {line}")
    return code


def _trace(arguments: Namespace) -> None:
    if arguments.debug:
        talk(paragraph(traceback.format_exc().rstrip()))
