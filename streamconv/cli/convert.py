"""`streamconv convert`, and `streamconv SRC DST`: plan, say what will be done, do it, say what was done.

With `--log-json`, the summary message on stderr has:

    message_type        "summary"
    command             "convert"
    destination         text
    finished_before     whether the same conversion stood there already, and nothing was done
    tensors, files      numbers
    bytes_written       of tensors, by this run
    bytes_resumed       of tensors, by an earlier run that this one went on with
    bytes_copied        of both, what went from file to file inside the kernel
    seconds, bytes_per_second, peak_memory
    losses              [{tensor, overflowed, flushed}], elements that casts lost
    record              text, where conversion.json lies
    verified            whether --verify found all equal; null without --verify
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Annotated, TypedDict

from streamconv.cli import options
from streamconv.cli.progress import reporting
from streamconv.cli.text import count, duration, first_lines, printable, show, size, talk, talk_json
from streamconv.options import Option, PlanOptions, ResourceOptions, RunningOptions

if TYPE_CHECKING:
    from streamconv.execution.memory import Budget
    from streamconv.plans import Plan
    from streamconv.readers.checkpoint import Checkpoint
    from streamconv.running.record import Loss
    from streamconv.running.run import Conversion
    from streamconv.storage.location import Location

SUMMARY = "convert SRC into the directory DST; resumes an interrupted run"

_MOST_LOSSES = 10


class VerifyingOptions(TypedDict, total=False):
    """What comes after the conversion."""

    verify: Annotated[
        bool, Option(False, "verify right after, which reads the source and the output once more")
    ]


def parser() -> ArgumentParser:
    """The command's options."""
    groups = {
        **options.PLANNING,
        **options.RESOURCES,
        **options.RUNNING,
        "afterwards": VerifyingOptions,
        **options.OUTPUT,
    }
    description = (
        "Convert a checkpoint. The plan is made and checked from headers; then every tensor is read and written "
        "once.\nDST needs room for the whole output. An interrupted run resumes when the same command is "
        "given again."
    )
    usage = "streamconv [convert] SRC DST [options]"
    made = options.command_parser("convert", description, options.EXIT_CODES, groups, usage)
    made.add_argument("source", metavar="SRC", help="a file or a directory, recognised by its content")
    made.add_argument("destination", metavar="DST", help="a directory of its own")
    made.set_defaults(resumable=True)
    return made


def run(arguments: Namespace) -> int:
    """Plan, then carry it out."""
    _, plan, _ = planned(arguments)
    return carry_out(plan, arguments)


def planned(arguments: Namespace) -> tuple[Checkpoint, Plan, Budget]:
    """What `plan` shows and `convert` carries out; so both refuse the same calls."""
    from streamconv import api

    budget = api.budget(**options.given(ResourceOptions, arguments))
    given = options.given(PlanOptions, arguments)
    return *api.compiled(arguments.source, arguments.destination, **given), budget


def carry_out(plan: Plan, arguments: Namespace) -> int:
    """Convert by a plan, and verify where that is asked for."""
    from streamconv import api

    for_people = not (arguments.quiet or arguments.log_json)
    if for_people:
        _announce(plan)
    with reporting(arguments, "convert") as progress:
        result = api.convert(
            plan,
            arguments.destination,
            progress=progress,
            **options.given(ResourceOptions, arguments),
            **options.given(RunningOptions, arguments),
        )
    if for_people:
        show("\n".join(_report(result)))
    verified = _verified(plan, arguments) if arguments.verify else None
    if arguments.log_json and not arguments.quiet:
        _log(result, verified)
    return 0


def _announce(plan: Plan) -> None:
    from streamconv.cli.summary import summarize, summary_lines

    talk("\n".join(summary_lines(plan, summarize(plan))))


def _verified(plan: Plan, arguments: Namespace) -> bool:
    from streamconv import api
    from streamconv.cli.verify import require_equal, verdict

    with reporting(arguments, "verify") as progress:
        found = api.verify(
            plan,
            arguments.destination,
            progress=progress,
            **options.given(ResourceOptions, arguments),
        )
    require_equal(found)
    if not (arguments.quiet or arguments.log_json):
        show(verdict(found))
    return True


def _report(result: Conversion) -> list[str]:
    """What was done, for people."""
    record = f"record   {printable(str(_record(result)))}"
    if result.finished_before:
        return [f"already converted; nothing to do: {printable(str(result.destination))}", record]
    speed = f", {size(result.bytes_written / result.seconds)}/s" if result.seconds else ""
    lines = [
        f"done     {printable(str(result.destination))}: {count(len(result.plan.tensors), 'tensor')} "
        f"in {count(len(result.plan.outputs), 'file')}",
        f"written  {size(result.bytes_written)} in {duration(result.seconds)}{speed}",
        f"memory   {size(result.peak_memory)} at most",
    ]
    if result.bytes_resumed:
        lines.append(f"resumed  {size(result.bytes_resumed)} were in place from an earlier run")
    if result.bytes_copied:
        lines.append(f"copied   {size(result.bytes_copied)} by the kernel, unchanged")
    lost = [f"lost     {printable(loss.name)}: {lost_values(loss)}" for loss in result.losses]
    return [*lines, *first_lines(lost, _MOST_LOSSES), record]


def _log(result: Conversion, verified: bool | None) -> None:
    talk_json(
        {
            "message_type": "summary",
            "command": "convert",
            "destination": str(result.destination),
            "finished_before": result.finished_before,
            "tensors": len(result.plan.tensors),
            "files": len(result.plan.outputs),
            "bytes_written": result.bytes_written,
            "bytes_resumed": result.bytes_resumed,
            "bytes_copied": result.bytes_copied,
            "seconds": result.seconds,
            "bytes_per_second": result.bytes_written / result.seconds if result.seconds else None,
            "peak_memory": result.peak_memory,
            "losses": [
                {"tensor": loss.name, "overflowed": loss.overflowed, "flushed": loss.flushed}
                for loss in result.losses
            ],
            "record": str(_record(result)),
            "verified": verified,
        }
    )


def _record(result: Conversion) -> Location:
    from streamconv.running.destination import record_file

    return record_file(result.destination)


def lost_values(loss: Loss) -> str:
    """`3 values overflowed, 1 value became zero`."""
    kinds = {"overflowed": loss.overflowed, "became zero": loss.flushed}
    return ", ".join(f"{count(number, 'value')} {kind}" for kind, number in kinds.items() if number)
