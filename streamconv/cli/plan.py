"""`streamconv plan`: what a conversion would do. Writes nothing.

With `--json`, one document on stdout:

    streamconv          version
    source, source_format, destination (or null), target_format, fingerprint
    tensors             number of tensors in the output
    bytes_to_read       of source tensors, each counted once
    bytes_to_write      all files of the output
    memory              {budget, workers, buffers}: bytes allowed, processes, bytes of buffers in all of them
    disk                {needed, free} in bytes, or null without a destination; with --delete-source, what is needed at
                        most at any time
    dtypes, exactness   {"F32 -> BF16": 290, ...}, {"rounding": 290, ...}: numbers of tensors
    outputs             [{path, bytes, tensors}]
    other_files         [{path, bytes, source}]; source is null for what the plan makes
    dropped             [{name, reason}]
    ignored             [{path, reason}]: files of the source that nothing comes from
    notes               [text]
    rows                [{target, sources, operations, source_dtypes, dtype, shape, bytes, exactness, file,
                        offset}], every tensor in the order of the output
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from typing import TYPE_CHECKING, Any

from streamconv.cli import options
from streamconv.cli.convert import planned
from streamconv.cli.tables import Row, fold, render
from streamconv.cli.text import labelled, picked, present, size
from streamconv.errors import count

if TYPE_CHECKING:
    from streamconv.execution.memory import Budget
    from streamconv.plans import Plan
    from streamconv.readers.checkpoint import Ignored

_WIDEST_OPERATION = 72
_MOST_FILES = 20


def run(arguments: Namespace) -> int:
    """Print a plan."""
    checkpoint, compiled, budget = planned(arguments)
    ignored = checkpoint.ignored if checkpoint else ()
    present(
        arguments,
        lambda: _document(compiled, arguments, budget, ignored),
        lambda: _lines(compiled, arguments, budget, ignored),
    )
    return 0


def _lines(plan: Plan, arguments: Namespace, budget: Budget, ignored: tuple[Ignored, ...]) -> list[str]:
    from streamconv.cli.summary import deletion_lines, summarize, summary_lines
    from streamconv.running.destination import free_space

    destination, full = arguments.destination, arguments.full
    summary = summarize(plan)
    buffers = size(budget.workers * budget.arena)
    entries = {"memory": [f"at most {buffers} of buffers, in {count(budget.workers, 'worker')}"]}
    if destination is not None:
        free = free_space(destination)
        room = "as much as is needed" if free is None else size(free)
        entries["disk"] = [f"{size(_needed(plan, arguments))} needed, {room} free"]
    entries["ignored"] = [f"{file.path}: {file.reason}" for file in ignored]
    most = None if full else _MOST_FILES
    about = [*summary_lines(plan, summary, full), *labelled(entries, most)]
    if arguments.delete_source:
        about += deletion_lines(plan, destination)
    return [*about, "", *_table(plan, full), "", *_files(plan, full)]


def _needed(plan: Plan, arguments: Namespace) -> int:
    """Bytes that the disk of the destination needs at most, beyond what it holds now."""
    from streamconv.running.deleted import freed
    from streamconv.running.destination import destination_at
    from streamconv.running.freeing import peak

    if not arguments.delete_source:
        return plan.bytes_to_write
    place = destination_at(arguments.destination)
    return peak(plan, place, gone=freed(place))


def _table(plan: Plan, full: bool) -> list[str]:
    """Source -> target, a line for each tensor or each kind of layer."""
    from streamconv.cli.summary import dtype_change, operations, target_name

    rows = [
        Row(
            (target_name(plan, tensor), _listed(tensor.sources, full)),
            (
                _shown(" > ".join(operations(tensor.expression)) or "copy", full),
                dtype_change(tensor.expression),
                str(list(tensor.spec.shape)),
                tensor.exactness.label,
            ),
        )
        for tensor in plan.tensors
    ]
    cells = []
    for line in fold(rows, full):
        target, source = line.names
        same = "=" if source == target else target
        cells.append((source, same, *line.values, f"{len(line.members):,}"))
    titles = ("source", "target", "operation", "dtype", "shape", "values", "count")
    return render(titles, cells, right=["count"])


def _listed(sources: tuple[str, ...], full: bool) -> str:
    """The sources of a tensor; those that differ in their indices alone are one, with their number."""
    if full or len(sources) < 2:
        return " + ".join(sources)
    lines = fold(Row((name,)) for name in sources)
    numbers = (f" ({len(line.members):,})" if len(line.members) > 1 else "" for line in lines)
    return " + ".join(line.names[0] + number for line, number in zip(lines, numbers, strict=True))


def _shown(operations: str, full: bool) -> str:
    """The operations on a tensor, shortened to fit in a column unless `full`."""
    fits = full or len(operations) <= _WIDEST_OPERATION
    return operations if fits else operations[: _WIDEST_OPERATION - 4] + " ..."


def _files(plan: Plan, full: bool) -> list[str]:
    """The files of the output."""
    weights = [(path, size(nbytes), count(number, "tensor")) for path, nbytes, number in _weights(plan)]
    others = [(path, size(nbytes), "copied" if source else "made") for path, nbytes, source in _others(plan)]
    most = None if full else _MOST_FILES
    return render(("file", "size", "holds"), [*weights, *others], right=["size"], most=most)


def _weights(plan: Plan) -> list[tuple[str, int, int]]:
    """Path, bytes and number of tensors of each weight file."""
    tensors = Counter(tensor.file for tensor in plan.tensors)
    return [(output.path, output.layout.size, tensors[at]) for at, output in enumerate(plan.outputs)]


def _others(plan: Plan) -> list[tuple[str, int, str | None]]:
    """Path, bytes and source of every other file; what the plan makes has no source."""
    made = ((text.path, len(text.content.encode()), None) for text in plan.texts)
    return [*made, *((side.path, side.size, side.source) for side in plan.side_files)]


def _document(
    plan: Plan, arguments: Namespace, budget: Budget, ignored: tuple[Ignored, ...]
) -> dict[str, Any]:
    """What the module's docstring says."""
    from streamconv import __version__
    from streamconv.cli.summary import operations, summarize, target_name
    from streamconv.ops import leaves
    from streamconv.plans import fingerprint
    from streamconv.running.destination import free_space

    destination = arguments.destination
    summary = summarize(plan)
    rows = [
        {
            "target": target_name(plan, tensor),
            "sources": tensor.sources,
            "operations": operations(tensor.expression),
            "source_dtypes": [leaf.spec.dtype.name for leaf in leaves(tensor.expression)],
            "dtype": tensor.spec.dtype.name,
            "shape": tensor.spec.shape,
            "bytes": tensor.spec.nbytes,
            "exactness": tensor.exactness.label,
            "file": plan.outputs[tensor.file].path,
            "offset": tensor.offset,
        }
        for tensor in plan.tensors
    ]
    disk = destination and {"needed": _needed(plan, arguments), "free": free_space(destination)}
    return {
        "streamconv": __version__,
        **picked(plan, "source source_format"),
        "destination": destination and str(destination),
        "target_format": plan.target_format,
        "fingerprint": fingerprint(plan),
        **picked(summary, "tensors bytes_to_read bytes_to_write"),
        "memory": {
            "budget": budget.total,
            "workers": budget.workers,
            "buffers": budget.workers * budget.arena,
        },
        "disk": disk,
        **picked(summary, "dtypes exactness"),
        "outputs": [dict(zip(("path", "bytes", "tensors"), each, strict=True)) for each in _weights(plan)],
        "other_files": [dict(zip(("path", "bytes", "source"), each, strict=True)) for each in _others(plan)],
        "dropped": [picked(tensor, "name reason") for tensor in plan.dropped],
        "ignored": [picked(file, "path reason") for file in ignored],
        "notes": plan.notes,
        "rows": rows,
    }


COMMAND = options.Command(
    "what a conversion would do; writes nothing",
    "Compile and check the plan of a conversion, and print it. Reads only headers, writes nothing.",
    {**options.PLANNING, **options.DELETING, **options.RESOURCES, **options.RESULTS},
    run,
    {
        "source": ("SRC", "a file or a directory"),
        "destination": ("[DST]", "where it would go: checks that disk"),
    },
)
