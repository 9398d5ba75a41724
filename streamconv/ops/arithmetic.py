"""What the numeric operations share: working in tiles, in a wide dtype, and counting what is lost.

All of them compute in F32 (F64 where an operand is F64) and round once, to nearest even, to the dtype of
the result. They take a block in tiles of at most `CHUNK` elements, so that what they allocate does not
grow with it, and give every element the same bits whatever block it is part of.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK, converter, counter
from streamconv.ops.checks import POWERS_OF_TWO, check_float
from streamconv.ops.expression import Exactness, Numeric, Tally
from streamconv.ops.tiles import codes
from streamconv.tensor import TensorSpec

DEQUANTIZED = ("BF16", "F16", "F32")
"""The dtypes that quantised weights are made into."""

POWERS = (POWERS_OF_TWO, "U8")
"""The dtypes of scales that are powers of two: F8_E8M0, or its bytes."""


class FloatOp(Numeric):
    """Floats as a tensor of the first one's dtype and shape."""

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        check_float(self.name, *operands)
        self.check(operands)
        return (operands[0],)

    @abstractmethod
    def check(self, operands: Sequence[TensorSpec]) -> None:
        """Refuse fields and shapes that do not fit. Raises PlanError."""


# ---------------------------------------------------------------------------------------- tiles


def working(*operands: DType) -> DType:
    """The dtype to compute in: F64 where an operand is, else F32."""
    return dtypes.by_name("F64" if any(dtype.name == "F64" for dtype in operands) else "F32")


def tiles(rows: int, columns: int, size: int = CHUNK) -> Iterator[tuple[slice, slice]]:
    """A matrix in tiles of at most `size` elements: several whole rows, or else part of one."""
    if not rows or not columns:
        return
    height = max(size // columns, 1)
    for first in range(0, columns, size):
        across = slice(first, min(first + size, columns))
        for top in range(0, rows, height):
            yield slice(top, min(top + height, rows)), across


def as_matrices(block: Array) -> Array:
    """A block as [count, rows, columns]: its last two axes, and how many such matrices there are."""
    *front, rows, columns = block.shape
    return block.reshape(math.prod(front), rows, columns)


class Buffer:
    """A C-contiguous array that is reused for tiles of up to `size` elements."""

    def __init__(self, dtype: DType, size: int = CHUNK) -> None:
        self.dtype, self._memory = dtype, numpy.empty(size, dtype.numpy)

    def shaped(self, *shape: int) -> Array:
        """Its first elements, as an array of this shape. They hold anything."""
        return self._memory[: math.prod(shape)].reshape(shape)


class Widener:
    """Tiles of up to `size` elements of one dtype as tiles of another; the next one takes the place of the last."""

    def __init__(self, source: DType, target: DType, size: int = CHUNK) -> None:
        self._narrow, self._wide = Buffer(source, size), Buffer(target, size)

    def __call__(self, tile: Array) -> Array:
        """The tile, which may be a strided view, in the other dtype."""
        if not tile.flags.c_contiguous:
            held = self._narrow.shaped(*tile.shape)
            numpy.copyto(codes(held), codes(tile))
            tile = held
        made = self._wide.shaped(*tile.shape)
        converter(self._narrow.dtype, self._wide.dtype)(tile, made)
        return made


class Rounder:
    """Tiles of up to `size` elements of a wide dtype rounded into a block of the result's, with losses counted."""

    def __init__(self, wide: DType, target: DType, tally: Tally, size: int = CHUNK) -> None:
        self._wide, self._made, self._tally = wide, Buffer(target, size), tally

    def __call__(self, tile: Array, out: Array, nonzero: Sequence[Array], finite: Sequence[Array]) -> None:
        """Round `tile` into `out`, a part of a block that need not be contiguous.

        A value is lost to zero where the result is 0 and all of `nonzero` are not; it is lost to overflow
        where the result is not finite and all of `finite` are. Both hold arrays or numbers that broadcast
        to the tile; the first of `nonzero` has its shape.
        """
        if not tile.size:
            return
        target = self._made.dtype
        made = out if out.flags.c_contiguous else self._made.shaped(*tile.shape)
        converter(self._wide, target)(tile, made)
        if made is not out:
            numpy.copyto(codes(out), codes(made))
        zeros, unbound = counter(target)(made.reshape(-1))
        # With no result unbounded, a zero among factors is a zero among the results: equal counts are equal
        # places, and the common case is done without looking at places.
        count = counter(self._wide)
        if not unbound and (not zeros or zeros == count(nonzero[0].reshape(-1), unbounded=False)[0]):
            return
        held = numpy.empty(made.shape, self._wide.numpy)
        converter(target, self._wide)(made, held)
        self._tally.flushed += _count(held == 0, *(factor != 0 for factor in nonzero))
        self._tally.overflowed += _count(~numpy.isfinite(held), *map(numpy.isfinite, finite))


def _count(first: Any, *others: Any) -> int:
    """In how many places all conditions, which broadcast to the first, hold."""
    for other in others:
        first &= other
    return int(numpy.count_nonzero(first))


class Product:
    """Tiles of up to `size` elements times factors, computed in `wide`, rounded as by a `Rounder`."""

    def __init__(self, wide: DType, target: DType, tally: Tally, size: int = CHUNK) -> None:
        self._room, self._finish = Buffer(wide, size), Rounder(wide, target, tally, size)

    def __call__(self, values: Array, factor: Array, out: Array) -> None:
        """Fill `out`, a part of a block, from a tile of values and what broadcasts to it."""
        made = numpy.multiply(values, factor, out=self._room.shaped(*values.shape))
        spread_undefined(factor, made)
        self._finish(made, out, [values, factor], [values, factor])


def spread_undefined(operand: Array, made: Array) -> None:
    """Have the same not-a-number in `made` wherever `operand`, which broadcasts to it, is any.

    Which of two not-a-numbers an operation keeps is up to how the loop was compiled, and so to the tile.
    """
    undefined = numpy.isnan(operand)
    if undefined.any():
        numpy.copyto(made, numpy.nan, where=undefined)


# --------------------------------------------------------------------------------------- scales


def scale_values(block: Array, dtype: DType, wide: DType) -> Array:
    """Scales in the dtype computed in; U8 holds F8_E8M0: 2^(byte - 127), and not-a-number for 255.

    (Open Compute Project: Microscaling Formats (MX) Specification 1.0, section 5.4.) The result is
    allocated: ask for few at a time.
    """
    if dtype.name == "U8":
        dtype = dtypes.by_name(POWERS_OF_TWO)
        block = block.view(dtype.numpy)
    made = numpy.empty(block.shape, wide.numpy)
    converter(dtype, wide)(numpy.ascontiguousarray(block), made)
    return made


def scaled_exactness(scale: DType, target: DType) -> Exactness:
    """Of F8 or F4 times a scale: value-exact for powers of two, while the exponent is in range, except for F16.

    F8 and F4 have fewer digits than any target, and so has their product with a power of two; F16 has fewer
    exponents.
    """
    exact = scale.name in POWERS and target.name in ("BF16", "F32")
    return Exactness.VALUE_EXACT if exact else Exactness.ROUNDING
