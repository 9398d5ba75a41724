"""Tensor operations as lazily evaluated expressions: what they mean, not who runs them."""

from __future__ import annotations

from streamconv.ops.cast import Cast
from streamconv.ops.expression import (
    Exactness,
    Expression,
    Node,
    Op,
    Structural,
    Tally,
    apply,
    exactness,
    leaves,
    renamed,
)
from streamconv.ops.structural import (
    Alias,
    Concat,
    Drop,
    Fill,
    Pad,
    PermuteAxes,
    Reshape,
    Same,
    Split,
    Stack,
    Strided,
    Take,
    Truncate,
    Unstack,
    cut,
    fill,
    index_runs,
    strided,
)

OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Alias, Cast, Concat, Drop, Fill, Pad, PermuteAxes, Reshape, Same, Split, Stack, Strided, Take,
        Truncate, Unstack,
    )
}  # fmt: skip
"""Every operation by its name, as plans spell it."""

__all__ = [
    "OPS", "Alias", "Cast", "Concat", "Drop", "Exactness", "Expression", "Fill", "Node", "Op", "Pad",
    "PermuteAxes", "Reshape", "Same", "Split", "Stack", "Strided", "Structural", "Take", "Tally",
    "Truncate", "Unstack", "apply", "cut", "exactness", "fill", "index_runs", "leaves", "renamed", "strided",
]  # fmt: skip
