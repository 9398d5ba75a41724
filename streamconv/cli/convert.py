"""`streamconv convert`, and `streamconv SRC DST`: plan, print the plan, run it, report.

With `--log-json`, the summary message on stderr has:

    message_type        "summary"
    command             "convert"
    destination         text
    finished_before     whether the same conversion was there already, and nothing was done
    tensors, files      numbers
    bytes_written       of tensors, by this run
    bytes_resumed       of tensors, by the earlier run that this one resumed
    bytes_copied        of both, what went from file to file inside the kernel
    seconds, bytes_per_second, peak_memory
    losses              [{tensor, overflowed, flushed}], elements that casts lost
    rounding            [{tensor, largest, mean}], relative errors of codes that were made
    deleted             [text], the source files that --delete-source has deleted
    record              text, where conversion.json lies
    trial               the option that took a few layers only; null where the output is the whole
    verified            whether --verify found all equal; null without --verify
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from streamconv.cli import options
from streamconv.cli.progress import reporting
from streamconv.cli.text import confirmed, duration, labelled, picked, printable, show, size, talk, talk_json
from streamconv.errors import UsageError, count
from streamconv.options.option import Option
from streamconv.options.records import PlanningOptions, PlanOptions, ResourceOptions, RunningOptions

if TYPE_CHECKING:
    from streamconv.execution.memory import Budget
    from streamconv.plans import Plan
    from streamconv.readers.checkpoint import Checkpoint
    from streamconv.running.record import Figure, Loss
    from streamconv.running.run import Conversion

_MOST_LOSSES = 10


class ConsentOptions(TypedDict, total=False):
    """What is not asked for."""

    yes: Annotated[bool, Option(
        False, "with --delete-source, do not ask",
        otherwise="it is asked for on a terminal, and refused elsewhere", beside=("delete_source",),
    )]  # fmt: skip


class VerifyingOptions(TypedDict, total=False):
    """What follows the conversion."""

    verify: Annotated[bool, Option(
        False, "verify right after, which reads the source and the output once more; with --delete-source the output alone",
    )]  # fmt: skip


def run(arguments: Namespace) -> int:
    """Make the plan, then run it."""
    from streamconv.plans.ends import ends

    checkpoint, plan, _ = planned(arguments)
    code = carry_out(plan, arguments)
    given = options.given(PlanOptions, arguments)
    # What follows is about the source as it is.
    asked = any(given.get(option) for option in ("recipe", "to_arch", "rename", "drop", "only", "config"))
    if checkpoint and not (arguments.quiet or arguments.log_json or arguments.delete_source or asked):
        for line in ends(checkpoint).lines:
            show(line)
    return code


def planned(arguments: Namespace) -> tuple[Checkpoint | None, Plan, Budget]:
    """The plan for `plan` and `convert`, which so refuse the same calls."""
    from streamconv import api

    budget = api.budget(**options.given(ResourceOptions, arguments))
    given = options.given(PlanningOptions, arguments)
    return *api.compiled(arguments.source, arguments.destination, **given), budget


def carry_out(plan: Plan, arguments: Namespace) -> int:
    """Run a plan, and verify the output on request."""
    from streamconv import api
    from streamconv.cli.summary import summarize, summary_lines
    from streamconv.cli.verify import require_equal, verdict
    from streamconv.running.destination import unfinished

    for_people = not (arguments.quiet or arguments.log_json)
    resources = options.given(ResourceOptions, arguments)
    running = options.given(RunningOptions, arguments)
    if for_people:
        talk("\n".join(summary_lines(plan, summarize(plan))))
        if arguments.restart and unfinished(arguments.destination) is None:
            talk("note     --restart has nothing to throw away: no unfinished conversion stands there")
    _consent(plan, arguments)
    with reporting(arguments, "convert") as progress:
        result = api.convert(plan, arguments.destination, progress=progress, **resources, **running)
    if for_people:
        show("\n".join(_report(result)))
    if arguments.verify:
        with reporting(arguments, "verify") as progress:
            sides = (arguments.destination,) if arguments.delete_source else (plan, arguments.destination)
            found = api.verify(*sides, progress=progress, **resources)
        require_equal(found)
        if for_people:
            show(verdict(found))
    if arguments.log_json and not arguments.quiet:
        talk_json(_summary(result, True if arguments.verify else None))
    return 0


def _consent(plan: Plan, arguments: Namespace) -> None:
    """Say what will be deleted, and ask.

    Raises:
        UsageError: nobody agreed.
    """
    from streamconv.cli.summary import deletion_lines
    from streamconv.options.effect import no_effect
    from streamconv.options.fields import fields

    if arguments.yes and not arguments.delete_source:
        problem = no_effect(
            fields(ConsentOptions)["yes"], "without --delete-source", "use with --delete-source"
        )
        raise UsageError(problem.message, hint=problem.hint)
    if not arguments.delete_source:
        return
    if not (arguments.quiet or arguments.log_json):
        talk("\n".join(deletion_lines(plan, arguments.destination)))
    if arguments.yes or confirmed("delete the source as it is converted? [y/N] "):
        return
    raise UsageError(
        "--delete-source was not agreed to; nothing was written",
        hint="answer y on a terminal, or give --yes",
    )


def _report(result: Conversion) -> list[str]:
    """What was done, for people."""
    trial = result.plan.trial
    what = [f"{trial}: a few layers for testing, and not the model"] if trial else []
    record = labelled({"record": [str(result.record)], "trial": what})
    if result.finished_before:
        places = (
            [str(result.destination)]
            if result.has_checksums
            else [result.plan.source, str(result.destination)]
        )
        again = f"streamconv verify {shlex.join(places)}"
        return [f"already converted; not checked again ({printable(again)})", *record]
    tensors, files = count(len(result.plan.tensors), "tensor"), count(len(result.plan.outputs), "file")
    speed = f", {size(result.bytes_written / result.seconds)}/s" if result.seconds else ""
    resumed, copied = size(result.bytes_resumed), size(result.bytes_copied)
    entries = {
        "done": [f"{result.destination}: {tensors} in {files}"],
        "written": [f"{size(result.bytes_written)} in {duration(result.seconds)}{speed}"],
        "memory": [f"{size(result.peak_memory)} at most"],
        "resumed": [f"{resumed} were in place from an earlier run"] if result.bytes_resumed else [],
        "copied": [f"{copied} by the kernel, unchanged"] if result.bytes_copied else [],
        "deleted": [f"{count(len(result.deleted), 'file')} of {result.plan.source}"]
        if result.deleted
        else [],
        "lost": [f"{loss.name}: {lost_values(loss)}" for loss in result.losses],
        "rounded": [f"{each.name}: {rounded_by(each)}" for each in result.rounding],
    }
    return [*labelled(entries, _MOST_LOSSES), *record]


def _summary(result: Conversion, verified: bool | None) -> dict[str, Any]:
    """What the module's docstring says."""
    return {
        "message_type": "summary",
        "command": "convert",
        "destination": str(result.destination),
        "finished_before": result.finished_before,
        "tensors": len(result.plan.tensors),
        "files": len(result.plan.outputs),
        **picked(result, "bytes_written bytes_resumed bytes_copied seconds"),
        "bytes_per_second": result.bytes_written / result.seconds if result.seconds else None,
        "peak_memory": result.peak_memory,
        "losses": [{"tensor": loss.name, **picked(loss, "overflowed flushed")} for loss in result.losses],
        "rounding": [{"tensor": each.name, **picked(each, "largest mean")} for each in result.rounding],
        "deleted": list(result.deleted),
        "record": str(result.record),
        "trial": result.plan.trial,
        "verified": verified,
    }


def lost_values(loss: Loss) -> str:
    """`3 values overflowed, 1 value became zero`."""
    kinds = {"overflowed": loss.overflowed, "became zero": loss.flushed}
    return ", ".join(f"{count(number, 'value')} {kind}" for kind, number in kinds.items() if number)


def rounded_by(figure: Figure) -> str:
    """`relative error 2.1% in the mean, 100% at most`."""
    return f"relative error {figure.mean:.2%} in the mean, {figure.largest:.2%} at most"


COMMAND = options.Command(
    "convert SRC into DST; resumes an interrupted run",
    "Convert a checkpoint. The plan is made and checked from headers; then every tensor is read and written once.\n"
    "DST needs room for the whole output, unless the source may go (--delete-source). An interrupted run resumes when the same command is given again.",
    {
        **options.PLANNING,
        **options.RESOURCES,
        **options.RUNNING,
        "consent": ConsentOptions,
        "afterwards": VerifyingOptions,
        **options.OUTPUT,
    },
    run,
    {
        "source": ("SRC", "a file or a directory, recognised by its content"),
        "destination": (
            "DST",
            "a directory of its own, or one file that ends in .safetensors, .bin, .pt, .pth or .ckpt",
        ),
    },
    options.EXIT_CODES,
    usage="streamconv [convert] SRC DST [options]",
    defaults={"resumable": True},
)
