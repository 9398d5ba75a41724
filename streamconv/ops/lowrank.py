"""`lowrank_add`: a weight with a low-rank update merged in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import (
    Buffer,
    FloatOp,
    Rounder,
    Widener,
    as_matrices,
    spread_undefined,
    working,
)
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK, converter
from streamconv.ops.checks import check_number
from streamconv.ops.expression import Block
from streamconv.ops.layout import Box
from streamconv.tensor import TensorSpec

# Elements of a tile of a factor, in F64; and sides of a tile of the result: no more than the one, and no
# less than the other for the sake of a high rank.
_FACTOR = 1 << 17
_WIDEST = 4096
_NARROWEST = 16

# Bits of a whole number that F64 holds.
_EXACT_BITS = 53

# Powers of two that keep factors of F32, and sums of their products, far within F64.
_PLAIN_EXPONENT = 64


@dataclass(frozen=True)
class LowRankAdd(FloatOp):
    """A weight and a low-rank update, W + scale * (B @ A).

    Operands W [..., m, n], A [..., r, n] and B [..., m, r], of any float dtypes, the axes in front alike.
    The names are those of LoRA (huggingface/peft: tuners/lora/layer.py, `get_delta_weight`), where scale is
    lora_alpha / r. The update is rounded to F32, added to W in F32 and rounded once to W's dtype (with W in
    F64: added there, unrounded).

    The same element has the same bits in any block, with any number of threads, on any processor, which a
    matrix product does not promise: it adds in an order that depends on all of these. So the factors are
    rounded to fixed point first, each column of A and each row of B in steps of 2^-t of its largest value,
    with t so small that all sums of r products are whole numbers of at most 53 bits. Then no addition in
    F64 rounds, and every order has the same result (the first step of K. Ozaki, T. Ogita, S. Oishi and
    S. Rump, "Error-free transformations of matrix multiplication by using fast routines of matrix
    multiplication"). t is 23 for a rank of 64 and 22 for 256, so that a step is about what F32 has at the
    largest value, and the update is as exact as a sum in F32. Factors of F64 are rounded to F32 before.
    """

    name: ClassVar[str] = "lowrank_add"
    arity: ClassVar[int | None] = 3
    scale: float = 1.0

    def check(self, operands: Sequence[TensorSpec]) -> None:
        weight, right, left = operands
        check_number(self.name, self.scale, "scale", weight.name)
        if len(weight.shape) < 2 or len(right.shape) != len(weight.shape):
            raise PlanError(
                f"lowrank_add to {list(weight.shape)} of '{right.name}' {list(right.shape)}: "
                "W [..., m, n] and A [..., r, n] expected",
                tensor=weight.name,
            )
        *front, rows, columns = weight.shape
        rank = right.shape[-2]
        for operand, wanted in ((right, (*front, rank, columns)), (left, (*front, rows, rank))):
            if operand.shape != wanted or not rank:
                raise PlanError(
                    f"lowrank_add of rank {rank} to {list(weight.shape)} needs {list(wanted)}: "
                    f"'{operand.name}' is {list(operand.shape)}",
                    tensor=weight.name,
                    hint="the operands are W [m, n], A [r, n], B [m, r], in this order",
                )

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The same box; its columns of A and its rows of B, whole."""
        *front, rows, columns = box
        rank = (0, operands[1].shape[-2])
        return box, (*front, rank, columns), (*front, rows, rank)

    def compute(self, block: Block) -> None:
        """A tile at a time, of any shape: see the class for why that makes no difference."""
        dtype, right_dtype, left_dtype = (spec.dtype for spec in block.specs)
        wide, near, far = working(dtype), dtypes.by_name("F32"), dtypes.by_name("F64")
        rank = block.specs[1].shape[-2]
        strip = max(_FACTOR // rank, _NARROWEST)
        side = _even(block.out.shape[-1], min(strip, _WIDEST))
        height = min(strip, CHUNK // side)
        widen, finish = Widener(dtype, wide), Rounder(wide, dtype, block.tally)
        widen_right, fixed_right = Widener(right_dtype, near, rank * side), Buffer(far, rank * side)
        widen_left, fixed_left = Widener(left_dtype, near, rank * strip), Buffer(far, rank * strip)
        upright = Buffer(near, rank * strip)
        product, update, total = Buffer(far), Buffer(wide), Buffer(wide)
        within, after = _parts(self.scale)
        for weight, right, left, made in zip(*map(as_matrices, (*block.inputs, block.out)), strict=True):
            for start, first in itertools.product(
                range(0, weight.shape[0], strip), range(0, weight.shape[1], side)
            ):
                across = slice(first, first + side)
                if not first:
                    values = widen_left(left[start : start + strip]).T
                    turned = upright.shaped(*values.shape)
                    numpy.copyto(turned, values)
                    rows, rows_defined = _fixed_point(turned, fixed_left)
                    rows *= within
                columns, columns_defined = _fixed_point(widen_right(right[:, across]), fixed_right)
                for top in range(0, rows.shape[1], height):
                    down = slice(start + top, start + min(top + height, rows.shape[1]))
                    values = widen(weight[down, across])
                    exact = product.shaped(*values.shape)
                    numpy.matmul(rows[:, top : top + height].T, columns, out=exact)
                    if after != 1:
                        exact *= after
                    delta, whole = update.shaped(*values.shape), total.shaped(*values.shape)
                    converter(far, wide)(exact, delta)
                    numpy.add(values, delta, out=whole)
                    if not (rows_defined and columns_defined):
                        spread_undefined(delta, whole)
                    finish(whole, made[down, across], [whole], [values, exact])


def _even(length: int, most: int) -> int:
    """The length of parts of at most `most`, no more than needed, and about as long as each other."""
    count = max(math.ceil(length / most), 1)
    return max(math.ceil(length / count), 1)


def _parts(scale: float) -> tuple[float, float]:
    """A factor of the rows, and one of the product, that make a scale: the first is a power of two, and rounds nothing."""
    part, exponent = math.frexp(scale)
    return (scale, 1.0) if abs(part) == 0.5 and abs(exponent) <= _PLAIN_EXPONENT else (1.0, scale)


def _fixed_point(values: Array, fixed: Buffer) -> tuple[Array, bool]:
    """F32 [rank, vectors] as F64, in steps of 2^-t of the largest value of each vector; whether all are finite.

    t is the most for which a sum of as many products as the rank is exact in F64.
    """
    bits = (_EXACT_BITS - (values.shape[0] - 1).bit_length()) // 2
    largest = numpy.maximum(values.max(axis=0, keepdims=True), -values.min(axis=0, keepdims=True))
    finite = numpy.isfinite(largest)
    _, exponent = numpy.frexp(numpy.where(finite, largest, 1.0))
    # A number in whose binade F64 has just these steps: adding it rounds, taking it away leaves the rest.
    shift = numpy.ldexp(1.5, exponent + (_EXACT_BITS - 1 - bits))
    made: Array = numpy.add(values, shift, out=fixed.shaped(*values.shape))
    made -= shift
    return made, bool(finite.all())
