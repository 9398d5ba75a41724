"""Tensor operations as lazily evaluated expressions: what they mean, not who runs them."""

from __future__ import annotations

from streamconv.ops.blocks import DequantBlocks, QuantBlocks
from streamconv.ops.cast import Cast
from streamconv.ops.constant import Constant
from streamconv.ops.elementwise import Affine, FlipSigns, Map, MultiplyAdd, ScaleAll, ScaleRows
from streamconv.ops.expression import (
    STEPS,
    Block,
    Exactness,
    Expression,
    Fold,
    Node,
    Numeric,
    Op,
    Rounding,
    Structural,
    Tally,
    apply,
    exactness,
    leaves,
    renamed,
)
from streamconv.ops.fold import GlobalScale, MeanRows
from streamconv.ops.frequencies import Frequencies
from streamconv.ops.lowrank import LowRankAdd
from streamconv.ops.normalize import RowNormalize
from streamconv.ops.packed import Gather, Pack, Unpack
from streamconv.ops.same import in_dtype, reshaped, turned
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
    fill,
    index_runs,
    strided,
)

OPS: dict[str, type[Op]] = {
    op.name: op
    for op in vars().copy().values()
    if isinstance(op, type) and issubclass(op, Op) and hasattr(op, "name")
}
"""Every operation by its name, as plans spell it."""

__all__ = [
    "OPS", "STEPS", "Affine", "Alias", "Block", "Cast", "Concat", "Constant", "DequantBlocks", "Drop",
    "Exactness", "Expression", "Fill", "FlipSigns", "Fold", "Frequencies", "Gather", "GlobalScale", "LowRankAdd", "Map", "MeanRows", "MultiplyAdd", "Node", "Numeric", "Op",
    "Pack", "Pad", "PermuteAxes", "QuantBlocks", "Reshape", "Rounding", "RowNormalize", "Same", "ScaleAll", "ScaleRows", "Split", "Stack",
    "Strided", "Structural", "Take", "Tally", "Truncate", "Unpack", "Unstack", "apply", "exactness", "fill",
    "in_dtype", "index_runs", "leaves", "renamed", "reshaped", "strided", "turned",
]  # fmt: skip
