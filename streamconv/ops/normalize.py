"""`row_normalize`: vectors along an axis at length 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import FloatOp, Rounder, Widener, spread_undefined, tiles, working
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK
from streamconv.ops.checks import check_axis, check_number
from streamconv.ops.expression import Block, Exactness
from streamconv.ops.layout import Box
from streamconv.tensor import TensorSpec

# Elements of the axis whose squares are summed at a time, counted from the beginning of the axis. Part of
# what decides the result's last bits.
_STRETCH = 1 << 10


@dataclass(frozen=True)
class RowNormalize(FloatOp):
    """Vectors along `axis` at length 1: x / max(norm of x, eps), as torch.nn.functional.normalize does.

    The head of Baichuan 2 does it on every call (baichuan-inc/Baichuan2-13B-Chat: modeling_baichuan.py,
    `NormHead`, with eps 1e-12); Llama has the rows normalised in the file.

    Squares are summed in F64, in an order that only the length of the axis decides. The norm is rounded to
    F32 and divided by in F32 (F64 for F64); the quotient is rounded once to the operand's dtype. A block
    needs its whole vectors.
    """

    name: ClassVar[str] = "row_normalize"
    loss: ClassVar[Exactness] = Exactness.LOSSY
    axis: int
    eps: float = 1e-12

    def check(self, operands: Sequence[TensorSpec]) -> None:
        (operand,) = operands
        check_axis(self.name, self.axis, operand)
        check_number(self.name, self.eps, "eps", operand.name)
        if self.eps <= 0:
            raise PlanError(
                f"row_normalize with eps {self.eps}: above 0 expected, because rows of zeros are divided by it",
                tensor=operand.name,
            )

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        span = (0, operands[0].shape[self.axis])
        return ((*box[: self.axis], span, *box[self.axis + 1 :]),)

    def compute(self, block: Block) -> None:
        """Some vectors at a time: first their norms, then their quotients, in stretches of the axis."""
        dtype, shape = block.specs[0].dtype, block.specs[0].shape
        wide, out = working(dtype), block.out
        before, after = (math.prod(part) for part in (out.shape[: self.axis], out.shape[self.axis + 1 :]))
        length, (first, stop) = shape[self.axis], block.box[self.axis]
        source = block.inputs[0].reshape(before, length, after)
        target = out.reshape(before, stop - first, after)
        stretch = max(min(length, _STRETCH), 1)
        widen, finish = Widener(dtype, wide), Rounder(wide, dtype, block.tally)
        widen_far = Widener(dtype, dtypes.by_name("F64"))
        room = numpy.empty(CHUNK, wide.numpy)
        for front, back in tiles(before, after, CHUNK // stretch):
            vectors = source[front, :, back]
            norms = numpy.zeros((vectors.shape[0], 1, vectors.shape[2]))
            for start in range(0, length, stretch):
                norms += _sums_of_squares(widen_far(vectors[:, start : start + stretch]))
            norms = numpy.sqrt(norms).astype(wide.numpy)
            numpy.maximum(norms, wide.numpy.type(self.eps), out=norms)
            for start in range(first, stop, stretch):
                part = slice(start, min(start + stretch, stop))
                values = widen(vectors[:, part])
                made = numpy.divide(values, norms, out=room[: values.size].reshape(values.shape))
                spread_undefined(norms, made)
                place = target[front, part.start - first : part.stop - first, back]
                finish(made, place, [values], [values])


def _sums_of_squares(values: Array) -> Array:
    """Sums along the middle of three axes, which is kept with a length of 1; `values` are overwritten.

    The far half is added to the near half until one is left: the same order for any number of vectors,
    which a sum of NumPy's does not promise, and with as small an error.
    """
    numpy.square(values, out=values)
    count = values.shape[1]
    while count > 1:
        half = count // 2
        values[:, :half] += values[:, count - half : count]
        count -= half
    return values[:, :1]
