"""`streamconv verify`: does a destination match its plan, or its own record.

With `--json`, one document on stdout; with `--log-json`, the same fields in the summary message on stderr:

    command             "verify"
    destination         text
    against             "plan", made again from the source, or "record", where no source is given
    headers             whether --headers was given, and no tensor was read
    equal               whether nothing is wrong, in the comparison too
    whole               whether nothing is wrong and everything that was asked for was compared
    tensors             number of tensors compared
    files               number of files without tensors compared
    bytes_compared, seconds
    recorded            [text], options of the plan that DST's own record chose; empty where options are given
    problems            [{message, file, tensor, hint}], for a tensor its first difference
    unchecked           [{file, tensor, nbytes}], tensors that the record has no checksum of
    unlisted            files that are in the destination and not part of the conversion
    trial               the option that took a few layers only; null where the destination is the whole
    activations         with --logits, {layers: [{name, difference}], same_choice, tolerance, close}: how far what both
                        compute is apart after each layer; otherwise null
    comparison          with --against, the document that `cli.diff` describes; otherwise null
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

from streamconv.cli import options
from streamconv.cli.progress import reporting
from streamconv.cli.text import duration, picked, printable, show, show_json, size, talk_json
from streamconv.errors import count
from streamconv.options.option import Option
from streamconv.options.records import CheckingOptions, ReadingOptions, VerifyOptions

if TYPE_CHECKING:
    from streamconv.running.activations import Activations
    from streamconv.running.comparison import Comparison
    from streamconv.running.verification import Verification


class ComparingOptions(CheckingOptions, total=False):
    """How much of DST is looked at, and what else it is compared with."""

    logits: Annotated[
        bool,
        Option(
            False,
            "also run SRC and DST, a language model, on the same tokens by the classes of transformers, and compare what "
            "they compute; memory holds the weights of one module at a time (pip install 'streamconv[torch]')",
        ),
    ]
    against: Annotated[str | None, Option(
        None, "also compare DST with another checkpoint, as `streamconv diff DST OTHER` does",
        otherwise="none", metavar="OTHER",
    )]  # fmt: skip


def run(arguments: Namespace) -> int:
    """Verify, and compare on request."""
    from streamconv import api
    from streamconv.errors import UsageError

    if arguments.logits and arguments.source is None:
        raise UsageError("--logits runs the source, too", hint="name the source before the destination")
    reading = options.given(ReadingOptions, arguments)
    if arguments.logits:
        with redirect_stdout(sys.stderr):  # what is imported may print
            api.require_runnable(arguments.source, **reading)
    with reporting(arguments, "verify") as progress:
        places = [place for place in (arguments.source, arguments.destination) if place is not None]
        found = api.verify(*places, progress=progress, **options.given(VerifyOptions, arguments))
    comparison = None
    if arguments.against:
        comparison = api.compare(
            arguments.destination,
            arguments.against,
            memory_budget=arguments.memory_budget,
            values=not arguments.headers,
        )
    activations = None
    if arguments.logits:
        with redirect_stdout(sys.stderr):
            activations = api.compare_activations(arguments.source, arguments.destination, **reading)
    alike = (comparison is None or comparison.equal) and (activations is None or activations.close)
    equal = not found.problems and alike
    if arguments.json:
        show_json(_document(found, comparison, activations, equal))
    elif arguments.log_json and not arguments.quiet:
        talk_json({"message_type": "summary", **_document(found, comparison, activations, equal)})
    else:
        _report(found, comparison, activations, arguments)
    return 1 if not equal else 0 if found.whole else 2


def require_equal(found: Verification) -> None:
    """Raise VerificationError where something is wrong, and UsageError where something cannot be compared."""
    from streamconv.errors import Problem, UsageError, VerificationError

    if found.problems:
        raise VerificationError(
            f"the destination is not what the {found.against} says{_chosen(found)}", problems=found.problems
        )
    if found.unchecked:
        missing = sum(tensor.nbytes for tensor in found.unchecked)
        raise UsageError(
            f"{count(len(found.unchecked), 'tensor')}, {size(missing)}, NOT checked: only the kernel saw them, and there "
            "is no checksum of them on record",
            hint="compare them with the source: streamconv verify SRC DST; --checksum keeps a checksum of every "
            "tensor when a conversion is made",
            problems=[
                Problem("not checked", file=tensor.file, tensor=tensor.tensor) for tensor in found.unchecked
            ],
        )


def verdict(found: Verification) -> str:
    """The line for a destination in which nothing is wrong."""
    line = _verdict(found)
    return f"{line}; it is a trial ({printable(found.trial)}), and not the model" if found.trial else line


def _verdict(found: Verification) -> str:
    where, tensors = printable(str(found.destination)), count(found.tensors, "tensor")
    files = f" and {count(found.files, 'other file')}" if found.files else ""
    what = "equal to the plan" if found.against == "plan" else "as the record says"
    if found.headers:
        what = f"names, dtypes, shapes and sizes {what}, no tensor read"
        return f"headers verified {where}: {tensors}{files}: {what}, in {duration(found.seconds)}{_chosen(found)}"
    word = "only part verified" if found.unchecked else "verified"
    what = f"{size(found.bytes_compared)}{files}, {what}, in {duration(found.seconds)}{_chosen(found)}"
    return f"{word} {where}: {tensors}, {what}"


def _chosen(found: Verification) -> str:
    """What the plan was made with, where it was the destination that chose it."""
    return f"; options on record: {printable(' '.join(found.recorded))}" if found.recorded else ""


def _computed(activations: Activations) -> str:
    """The line for what both sides compute."""
    *layers, logits = activations.layers
    worst = max(layers, key=lambda layer: layer.difference)
    return (
        f"logits: {logits.difference:.2g} apart, of at most {activations.tolerance:g} for rounding; {worst.name} is the "
        f"furthest, {worst.difference:.2g}; the same next token after {activations.same_choice:.0%}"
    )


def _report(
    found: Verification, comparison: Comparison | None, activations: Activations | None, arguments: Namespace
) -> None:
    from streamconv.cli.diff import reported
    from streamconv.errors import VerificationError, listed

    if comparison is not None and not arguments.quiet:
        show("\n".join(reported(comparison, full=False)))
    if not (found.problems or arguments.quiet):
        show(verdict(found))
        if found.unlisted:
            show(f"not checked, as no part of the conversion: {printable(listed(found.unlisted))}")
    require_equal(found)
    if activations is not None and not activations.close:
        raise VerificationError(
            f"the two do not compute the same: {_computed(activations)}",
            hint="what rounding does not explain is a wrong tensor, a wrong name or a wrong config",
        )
    if activations is not None and not arguments.quiet:
        show(_computed(activations))


def _document(
    found: Verification, comparison: Comparison | None, activations: Activations | None, equal: bool
) -> dict[str, Any]:
    from streamconv.cli.diff import document

    return {
        "command": "verify",
        "destination": str(found.destination),
        **picked(found, "against headers"),
        "equal": equal,
        "whole": equal and found.whole,
        **picked(found, "tensors files bytes_compared seconds"),
        "recorded": list(found.recorded),
        "problems": [picked(problem, "message file tensor hint") for problem in found.problems],
        "unchecked": [picked(tensor, "file tensor nbytes") for tensor in found.unchecked],
        "unlisted": list(found.unlisted),
        "trial": found.trial,
        "activations": None
        if activations is None
        else {
            "layers": [picked(layer, "name difference") for layer in activations.layers],
            **picked(activations, "same_choice tolerance close"),
        },
        "comparison": None if comparison is None else document(comparison),
    }


COMMAND = options.Command(
    "does DST hold what the plan says, or its own record",
    "With SRC: make the plan again and compare every byte of DST with it. Without: compare every byte of DST with the\n"
    "checksums that its conversion recorded; tensors without one are named, and the exit code is 2.\n"
    "Either finds files that are missing, changed or too many. Reads what it compares once, writes nothing.\n"
    "Without options of the plan, those of the conversion itself are used, as DST has them on record.",
    {
        "what to compare": ComparingOptions,
        **options.PLANNING,
        **options.RESOURCES,
        **options.RESULT,
        **options.OUTPUT,
    },
    run,
    {"source": ("[SRC]", "what was converted"), "destination": ("DST", "what came out")},
    {
        **options.READ_ONLY_CODES,
        0: "everything was compared, and all is as it should be",
        1: "something differs",
        2: "the call or its input is wrong, or tensors have no checksum on record",
    },
)
