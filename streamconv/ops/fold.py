"""Operations that need a pass over their whole operand before the first block of their result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import converter
from streamconv.ops.expression import Exactness, Fold
from streamconv.ops.layout import Box
from streamconv.tensor import TensorSpec

CHUNK = 1 << 18
"""Elements of the operand that are folded at once, but at least a row."""


@dataclass(frozen=True)
class MeanRows(Fold):
    """`count` rows, each the mean of all rows of the operand: `[n, ...]` -> `[count, ...]`.

    Summed in F64, chunk by chunk from the first row to the last, and rounded to the operand's dtype.
    """

    name: ClassVar[str] = "mean_rows"
    loss: ClassVar[Exactness] = Exactness.ROUNDING
    count: int

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        (operand,) = operands
        if not operand.shape or operand.numel == 0 or self.count < 0:
            raise PlanError(f"mean_rows of {list(operand.shape)}, {self.count} times", tensor=operand.name)
        if operand.dtype.kind != "float" or operand.dtype.bits < 16:
            raise PlanError(f"mean_rows of {operand.dtype}", tensor=operand.name)
        return (replace(operand, shape=(self.count, *operand.shape[1:])),)

    def height(self, operand: TensorSpec) -> int:
        """As many rows as have `CHUNK` elements."""
        return max(CHUNK // max(operand.numel // operand.shape[0], 1), 1)

    def fold(self, chunks: Iterable[Array], operand: TensorSpec) -> Array:
        """The mean row, in the operand's dtype."""
        total = numpy.zeros(operand.numel // operand.shape[0], numpy.float64)
        for rows in chunks:
            # One at a time, so that nothing of the chunk's size is allocated.
            for row in rows.reshape(len(rows), -1):
                total += row.astype(numpy.float64)
        mean = numpy.empty(total.shape, operand.dtype.numpy)
        convert = converter(dtypes.by_name("F64"), operand.dtype)
        step = 1 << 16
        for at in range(0, len(total), step):
            convert(total[at : at + step] / operand.shape[0], mean[at : at + step])
        return mean

    def place(self, kept: Array, box: Box, out: Array, operand: TensorSpec) -> None:
        """Each row of the block is the mean row."""
        out[...] = kept.reshape(operand.shape[1:])[tuple(slice(start, stop) for start, stop in box[1:])]


@dataclass(frozen=True)
class GlobalScale(Fold):
    """One F32 number, by which the scales of NVFP4 fill the range of F8: 448 * 6 / the largest absolute value.

    As compressed-tensors 0.20 has it: the reciprocal first, and both steps in the operand's dtype. Weights that are
    computed with as one (q, k and v) need one of them all. With zeros only, it is 1.
    """

    name: ClassVar[str] = "global_scale"
    loss: ClassVar[Exactness] = Exactness.LOSSY

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        (operand,) = operands
        if not operand.shape or operand.dtype.name not in ("BF16", "F16", "F32"):
            raise PlanError(f"global_scale of {operand.dtype} {list(operand.shape)}", tensor=operand.name)
        return (TensorSpec(operand.name, dtypes.by_name("F32"), (1,)),)

    def height(self, operand: TensorSpec) -> int:
        """As many rows as have `CHUNK` elements."""
        return max(CHUNK // max(operand.numel // max(operand.shape[0], 1), 1), 1)

    def fold(self, chunks: Iterable[Array], operand: TensorSpec) -> Array:
        """The scale, [1]."""
        bits = operand.dtype.bits
        unsigned, infinity = (
            (1 << (bits - 1)) - 1,
            int(numpy.array(numpy.inf).astype(operand.dtype.numpy).view(f"u{bits // 8}")),
        )
        most = 0
        for rows in chunks:
            sizes = rows.reshape(-1).view(f"u{bits // 8}")
            for at in range(0, len(sizes), 1 << 16):
                part = sizes[at : at + (1 << 16)] & sizes.dtype.type(unsigned)
                most = max(most, int(part[part < infinity].max(initial=0)))
        largest = numpy.array([most], f"u{bits // 8}").view(operand.dtype.numpy).astype(numpy.float32)
        if not largest[0]:
            return numpy.ones(1, numpy.float32)
        with numpy.errstate(all="ignore"):
            back = (numpy.float32(1) / largest).astype(operand.dtype.numpy).astype(numpy.float32)
            made: Array = (numpy.float32(2688) * back).astype(operand.dtype.numpy).astype(numpy.float32)
        return made

    def place(self, kept: Array, box: Box, out: Array, operand: TensorSpec) -> None:
        """All of it, or nothing."""
        out[...] = kept[slice(*box[0])]
