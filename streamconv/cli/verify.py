"""`streamconv verify`: does a destination match its plan.

With `--json`, one document on stdout; with `--log-json`, the same fields in the summary message on stderr:

    command             "verify"
    destination         text
    equal               whether nothing is wrong, in the comparison too
    tensors             number of tensors compared with the plan
    bytes_compared, seconds
    recorded            [text], options of the plan that DST's own record chose; empty where options are given
    problems            [{message, file, tensor, hint}], for a tensor its first difference
    comparison          with --against, the document that `cli.diff` describes; otherwise null
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from streamconv.cli import options
from streamconv.cli.progress import reporting
from streamconv.cli.text import count, duration, picked, printable, show, show_json, size, talk_json
from streamconv.options import Option, VerifyOptions

if TYPE_CHECKING:
    from streamconv.running.comparison import Comparison
    from streamconv.running.verification import Verification


class AgainstOptions(TypedDict, total=False):
    """What else DST is compared with."""

    against: Annotated[str | None, Option(
        None, "also compare DST with another checkpoint, as `streamconv diff DST OTHER` does",
        otherwise="none", metavar="OTHER",
    )]  # fmt: skip


def run(arguments: Namespace) -> int:
    """Verify, and compare on request."""
    from streamconv import api

    with reporting(arguments, "verify") as progress:
        found = api.verify(
            arguments.source,
            arguments.destination,
            progress=progress,
            **options.given(VerifyOptions, arguments),
        )
    comparison = None
    if arguments.against:
        comparison = api.compare(
            arguments.destination, arguments.against, memory_budget=arguments.memory_budget
        )
    equal = not found.problems and (comparison is None or comparison.equal)
    if arguments.json:
        show_json(_document(found, comparison, equal))
    elif arguments.log_json and not arguments.quiet:
        talk_json({"message_type": "summary", **_document(found, comparison, equal)})
    else:
        _report(found, comparison, arguments)
    return 0 if equal else 1


def require_equal(found: Verification) -> None:
    """Raise VerificationError where something is wrong."""
    from streamconv.errors import VerificationError

    if found.problems:
        raise VerificationError(
            f"the destination is not what the plan says{_chosen(found)}", problems=found.problems
        )


def verdict(found: Verification) -> str:
    """The line for a destination that matches."""
    return (
        f"verified {printable(str(found.destination))}: {count(found.tensors, 'tensor')}, "
        f"{size(found.bytes_compared)}, equal to the plan, in {duration(found.seconds)}{_chosen(found)}"
    )


def _chosen(found: Verification) -> str:
    """What the plan was made with, where it was the destination that chose it."""
    return f"; options on record: {printable(' '.join(found.recorded))}" if found.recorded else ""


def _report(found: Verification, comparison: Comparison | None, arguments: Namespace) -> None:
    from streamconv.cli.diff import reported

    if comparison is not None and not arguments.quiet:
        show("\n".join(reported(comparison, full=False)))
    require_equal(found)
    if not arguments.quiet:
        show(verdict(found))


def _document(found: Verification, comparison: Comparison | None, equal: bool) -> dict[str, Any]:
    from streamconv.cli.diff import document

    return {
        "command": "verify",
        "destination": str(found.destination),
        "equal": equal,
        **picked(found, "tensors bytes_compared seconds"),
        "recorded": list(found.recorded),
        "problems": [picked(problem, "message file tensor hint") for problem in found.problems],
        "comparison": None if comparison is None else document(comparison),
    }


COMMAND = options.Command(
    "does DST hold what the plan says, byte by byte",
    "Make the plan again and compare every byte of DST with it. Reads the source and DST once, writes nothing.\n"
    "Without options of the plan, those of the conversion itself are used, as DST has them on record.",
    {
        "what to compare": AgainstOptions,
        **options.PLANNING,
        **options.RESOURCES,
        **options.RESULT,
        **options.OUTPUT,
    },
    run,
    {"source": ("SRC", "what was converted"), "destination": ("DST", "what came out")},
    {**options.READ_ONLY_CODES, 0: "all is as planned", 1: "something differs"},
)
