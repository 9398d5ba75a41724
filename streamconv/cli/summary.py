"""The summary of a plan: what `plan` and `convert` show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.cli.tables import Row, fold
from streamconv.cli.text import labelled, size, tallies
from streamconv.errors import count
from streamconv.ops import Expression, Node, leaves
from streamconv.plans import Plan, PlannedTensor

_MOST_LINES = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in numbers.

    Attributes:
        tensors: in the output.
        bytes_to_read: of source tensors that the output comes from, each counted once.
        bytes_to_write: all files of the output.
        dtypes: `F32 -> BF16` or `I64` -> number of tensors, the most frequent first.
        exactness: `bit-exact` and the like -> number of tensors, the best first.
    """

    tensors: int
    bytes_to_read: int
    bytes_to_write: int
    dtypes: Mapping[str, int]
    exactness: Mapping[str, int]


def summarize(plan: Plan) -> Summary:
    """Count what a plan holds."""
    read: dict[tuple[str, int], int] = {}
    for tensor in plan.tensors:
        for leaf in leaves(tensor.expression):
            for extent in leaf.extents:
                place = (extent.file, extent.offset)
                read[place] = max(read.get(place, 0), extent.length)
    exactness = Counter(tensor.exactness for tensor in plan.tensors)
    return Summary(
        tensors=len(plan.tensors),
        bytes_to_read=sum(read.values()),
        bytes_to_write=plan.bytes_to_write,
        dtypes=dict(Counter(dtype_change(tensor.expression) for tensor in plan.tensors).most_common()),
        exactness={key.label: exactness[key] for key in sorted(exactness)},
    )


def summary_lines(plan: Plan, summary: Summary, full: bool = False) -> list[str]:
    """The summary as text, a few lines."""
    dropped = f", {len(plan.dropped):,} dropped" if plan.dropped else ""
    entries = {
        "from": [f"{plan.source} ({plan.source_format})"],
        "to": [f"{plan.target_format}, {count(len(plan.outputs), 'file')}"],
        "tensors": [f"{summary.tensors:,}{dropped}"],
        "bytes": [f"{size(summary.bytes_to_read)} to read, {size(summary.bytes_to_write)} to write"],
        "dtypes": [tallies(summary.dtypes)],
        "values": [tallies(summary.exactness)],
        "dropped": [
            f"{each.names[0]}: {each.values[0]}"
            + (f" ({number:,})" if (number := len(each.members)) > 1 else "")
            for each in fold((Row((tensor.name,), (tensor.reason,)) for tensor in plan.dropped), full)
        ],
        "note": plan.notes,
    }
    return labelled(entries, None if full else _MOST_LINES)


def deletion_lines(plan: Plan, destination: str | None) -> list[str]:
    """What `--delete-source` deletes, and the most that the disk holds while it does."""
    from streamconv.running.deleted import freed
    from streamconv.running.destination import destination_at
    from streamconv.running.freeing import besides, peak, to_be_freed

    place = None if destination is None else destination_at(destination)
    gone = frozenset[str]() if place is None else freed(place)
    files = [path for path in to_be_freed(plan) if path not in gone]
    sizes = {file.path: file.size for file in plan.files}
    rest = sum(map(sum, besides(plan, files).values()))
    entries = {
        "deletes": [
            f"{count(len(files), 'file')} of {plan.source}, {size(sum(sizes[path] for path in files))}: each once what "
            f"is taken from it is written, synced and re-read; {size(rest)} in them are no tensor's (headers, metadata)"
        ],
        "gone": [f"{count(len(gone), 'file')} that an earlier run has deleted"] if gone else [],
        "disk": []
        if place is None
        else [f"{size(peak(plan, place, gone=gone))} more than now at most, while it runs"],
    }
    return labelled(entries)


def target_name(plan: Plan, tensor: PlannedTensor) -> str:
    """A target's name with its component's directory, as the source's names have it."""
    directory, slash, _ = plan.outputs[tensor.file].path.rpartition("/")
    return f"{directory}{slash}{tensor.spec.name}"


def dtype_change(expression: Expression) -> str:
    """`F32 -> BF16`, or `I64` where nothing changes."""
    sources = dict.fromkeys(leaf.spec.dtype.name for leaf in leaves(expression))
    target = expression.spec.dtype.name
    return target if not sources or list(sources) == [target] else f"{'+'.join(sources)} -> {target}"


def operations(expression: Expression) -> list[str]:
    """The operations on the source in their order; empty for a copy."""
    steps: list[str] = []
    while isinstance(expression, Node):
        steps.append(str(expression.op))
        if len(expression.operands) != 1:
            # Beyond this, the operands have histories of their own.
            inner = dict.fromkeys(" > ".join(operations(operand)) for operand in expression.operands)
            shown = [step for step in inner if step]
            return [f"({' | '.join(shown)})"] * bool(shown) + steps[::-1]
        (expression,) = expression.operands
    return steps[::-1]
