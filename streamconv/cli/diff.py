"""`streamconv diff`: how the contents of two checkpoints differ, whatever their formats.

With `--json`, one document on stdout:

    equal       whether both hold the same tensors
    tensors     number of names in either
    rows        [{name, equal, left, right, differing, max_abs, max_rel, note}]; left and right are
                {dtype, shape} or null where that side lacks it; differing is a number of elements;
                infinite differences are the text "inf"
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from streamconv.cli import options
from streamconv.cli.tables import Row, fold, render
from streamconv.cli.text import picked, present
from streamconv.errors import count
from streamconv.options.option import Option

if TYPE_CHECKING:
    from streamconv.running.comparison import ComparedTensor, Comparison
    from streamconv.tensor import TensorSpec

_MOST_ROWS = 50


class ComparingOptions(TypedDict, total=False):
    """What is compared."""

    headers: Annotated[bool, Option(
        False, "compare names, dtypes and shapes only, which reads headers only", otherwise="values too",
    )]  # fmt: skip


def run(arguments: Namespace) -> int:
    """Compare and print."""
    from streamconv import api

    found = api.compare(
        arguments.left, arguments.right, memory_budget=arguments.memory_budget, values=not arguments.headers
    )
    present(arguments, lambda: document(found), lambda: reported(found, arguments.full))
    return 0 if found.equal else 1


def reported(found: Comparison, full: bool) -> list[str]:
    """The comparison as text: what differs, then a count."""
    unequal = [row for row in found.rows if not row.equal]
    if not unequal:
        return [f"equal: {count(len(found.rows), 'tensor')}"]
    rows = [Row((row.name,), (_side(row.left), _side(row.right), row.note)) for row in unequal]
    cells = []
    for line in fold(rows, full):
        left, right, note = line.values
        numbers = _numbers([unequal[member] for member in line.members])
        cells.append((line.names[0], left, right, *numbers, note, f"{len(line.members):,}"))
    titles = ("tensor", "left", "right", "differing", "max abs", "max rel", "note", "count")
    at_right = ["differing", "max abs", "max rel", "count"]
    return [
        *render(titles, cells, at_right, most=None if full else _MOST_ROWS),
        f"{len(unequal):,} of {count(len(found.rows), 'tensor')} differ",
    ]


def document(found: Comparison) -> dict[str, Any]:
    """What the module's docstring says."""
    return {
        "equal": found.equal,
        "tensors": len(found.rows),
        "rows": [
            {
                **picked(row, "name equal"),
                "left": _spec(row.left),
                "right": _spec(row.right),
                **picked(row, "differing max_abs max_rel note"),
            }
            for row in found.rows
        ],
    }


def _numbers(rows: Sequence[ComparedTensor]) -> tuple[str, str, str]:
    """The elements that differ, summed over rows, and the largest differences."""
    differing, absolute, relative = (
        [value for row in rows if (value := getattr(row, name)) is not None]
        for name in ("differing", "max_abs", "max_rel")
    )
    return (
        f"{sum(differing):,}" if differing else "",
        f"{max(absolute):.3g}" if absolute else "",
        f"{max(relative):.3g}" if relative else "",
    )


def _side(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"


def _spec(spec: TensorSpec | None) -> dict[str, Any] | None:
    return None if spec is None else {"dtype": spec.dtype.name, "shape": spec.shape}


COMMAND = options.Command(
    "compare two checkpoints' contents",
    "Compare two checkpoints: names, dtypes, shapes and values. Reads both once, writes nothing.",
    {"what to compare": ComparingOptions, **options.MEMORY, **options.RESULTS},
    run,
    {"left": ("A", "a file or a directory"), "right": ("B", "another; its format may be another")},
    {**options.READ_ONLY_CODES, 0: "the same", 1: "something differs"},
)
