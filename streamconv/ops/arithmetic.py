"""What the numeric operations share: working in tiles, in a wide dtype, and counting what is lost.

All of them compute in F32 (F64 where an operand is F64) and round once, to nearest even, to the dtype of
the result. They take a block in tiles of at most `CHUNK` elements, so that what they allocate does not
grow with it, and give every element the same bits whatever block it is part of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError, UsageError
from streamconv.ops.cast import CHUNK, converter, counter
from streamconv.ops.expression import Tally
from streamconv.tensor import TensorSpec

if TYPE_CHECKING:
    from streamconv.ops.expression import Array

# A float by kind, but of powers of two only: nothing can be rounded to it, and no arithmetic ends in it.
_SCALE = "F8_E8M0"

DEQUANTIZED = ("BF16", "F16", "F32")
"""The dtypes that quantised weights are made into."""


# ---------------------------------------------------------------------------------------- specs


def check_float(op: str, *operands: TensorSpec) -> None:
    """Refuse operands that are not floats of whole bytes, with sign and zero."""
    for operand in operands:
        dtype = operand.dtype
        if dtype.kind != "float" or dtype.packed or dtype.name == _SCALE:
            raise PlanError(
                f"{op} of '{operand.name}', which is {dtype}: it computes with floats",
                tensor=operands[0].name,
                hint="cast it first" if dtype.kind in ("bool", "int", "uint") else None,
            )


def target_of(op: str, text: str, allowed: Sequence[str], tensor: str) -> DType:
    """The dtype that `text` names, if it is one of `allowed`. Raises PlanError."""
    try:
        found = dtypes.parse(text)
    except UsageError as error:
        raise PlanError(
            f"{op} to {error.headline.message}", tensor=tensor, hint=error.headline.hint
        ) from None
    if found.name not in allowed:
        raise PlanError(f"{op} to {found}: it makes {' or '.join(allowed)}", tensor=tensor)
    return found


def check_number(op: str, value: float, meaning: str, tensor: str) -> None:
    """Refuse a number that F32 cannot hold: beyond its range, or so small that it would be 0 there."""
    if not fits(value):
        raise PlanError(f"{op} with {meaning} {value}, which F32 cannot hold", tensor=tensor)


def fits(value: float) -> bool:
    """Whether F32 has a finite value for this number, and one that is 0 only for 0."""
    import numpy

    with numpy.errstate(all="ignore"):
        held = float(numpy.float32(value))
    return abs(held) < float("inf") and (held == 0) == (value == 0)


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


def codes(block: Array) -> Array:
    """A block's bit patterns, which NumPy moves faster than types it does not know, and by any strides."""
    return block.view(f"u{block.itemsize}")


@dataclass(slots=True)
class Buffer:
    """A C-contiguous array that is reused for tiles of up to `size` elements.

    Attributes:
        dtype: of the elements.
        memory: the elements.
    """

    dtype: DType
    memory: Array

    @classmethod
    def of(cls, dtype: DType, size: int = CHUNK) -> Buffer:
        """Allocate one; `size` is in elements."""
        import numpy

        return cls(dtype, numpy.empty(size, dtype.numpy))

    def shaped(self, *shape: int) -> Array:
        """Its first elements, as an array of this shape. They hold anything."""
        return self.memory[: math.prod(shape)].reshape(shape)


@dataclass(slots=True)
class Widener:
    """Tiles of one dtype as tiles of another; the last one that it gave is overwritten by the next.

    Attributes:
        narrow, wide: room for one tile each, before and after.
    """

    narrow: Buffer
    wide: Buffer

    @classmethod
    def of(cls, source: DType, target: DType, size: int = CHUNK) -> Widener:
        """One for tiles of up to `size` elements."""
        return cls(Buffer.of(source, size), Buffer.of(target, size))

    def __call__(self, tile: Array) -> Array:
        """The tile, which may be a strided view, in the other dtype."""
        import numpy

        if not tile.flags.c_contiguous:
            held = self.narrow.shaped(*tile.shape)
            numpy.copyto(codes(held), codes(tile))
            tile = held
        made = self.wide.shaped(*tile.shape)
        converter(self.narrow.dtype, self.wide.dtype)(tile, made)
        return made


@dataclass(slots=True)
class Rounder:
    """Tiles of a wide dtype rounded into a block of the result's dtype, with losses counted.

    Attributes:
        wide: the dtype computed in.
        made: room for one tile of the result.
        tally: where losses are counted.
    """

    wide: DType
    made: Buffer
    tally: Tally

    @classmethod
    def of(cls, wide: DType, target: DType, tally: Tally, size: int = CHUNK) -> Rounder:
        """One for tiles of up to `size` elements."""
        return cls(wide, Buffer.of(target, size), tally)

    def __call__(self, tile: Array, out: Array, nonzero: Sequence[Array], finite: Sequence[Array]) -> None:
        """Round `tile` into `out`, a part of a block that need not be contiguous.

        A value is lost to zero where the result is 0 and all of `nonzero` are not; it is lost to overflow
        where the result is not finite and all of `finite` are. Both hold arrays or numbers that broadcast
        to the tile; the first of `nonzero` has its shape.
        """
        import numpy

        if not tile.size:
            return
        target = self.made.dtype
        made = out if out.flags.c_contiguous else self.made.shaped(*tile.shape)
        converter(self.wide, target)(tile, made)
        if made is not out:
            numpy.copyto(codes(out), codes(made))
        zeros, unbound = counter(target)(made.reshape(-1))
        # With no result unbounded, a zero among factors is a zero among the results: equal counts are equal
        # places, and the common case is done without looking at places.
        count = counter(self.wide)
        if not unbound and (not zeros or zeros == count(nonzero[0].reshape(-1), unbounded=False)[0]):
            return
        held = numpy.empty(made.shape, self.wide.numpy)
        converter(target, self.wide)(made, held)
        self.tally.flushed += _count(held == 0, *(factor != 0 for factor in nonzero))
        self.tally.overflowed += _count(~numpy.isfinite(held), *map(numpy.isfinite, finite))


def _count(first: Any, *others: Any) -> int:
    """In how many places all conditions, which broadcast to the first, hold."""
    import numpy

    for other in others:
        first &= other
    return int(numpy.count_nonzero(first))


def multiply(values: Array, factor: Array, out: Array) -> None:
    """Fill `out` with values * factor, with not-a-number always the same one where the factor is that.

    Which of two not-a-numbers a product keeps is up to how the loop was compiled, and so to the tile.
    """
    import numpy

    numpy.multiply(values, factor, out=out)
    undefined = numpy.isnan(factor)
    if undefined.any():
        numpy.copyto(out, numpy.nan, where=undefined)


# --------------------------------------------------------------------------------------- scales


def scale_values(block: Array, dtype: DType, wide: DType) -> Array:
    """Scales in the dtype computed in; U8 holds F8_E8M0: 2^(byte - 127), and not-a-number for 255.

    (Open Compute Project: Microscaling Formats (MX) Specification 1.0, section 5.4.) The result is
    allocated: ask for few at a time.
    """
    import numpy

    if dtype.name == "U8":
        dtype = dtypes.by_name(_SCALE)
        block = block.view(dtype.numpy)
    made = numpy.empty(block.shape, wide.numpy)
    converter(dtype, wide)(numpy.ascontiguousarray(block), made)
    return made


@dataclass(frozen=True, slots=True)
class Grid:
    """Which scales belong to a tile of a matrix: those of the rows and columns of blocks that it touches.

    Attributes:
        rows, columns: of the scales.
        down, across: for each row and column of the tile, which of these it belongs to, from 0.
    """

    rows: slice
    columns: slice
    down: Array
    across: Array

    @classmethod
    def of(cls, rows: tuple[int, int], columns: tuple[int, int], block: tuple[int, int]) -> Grid:
        """Of a tile (with elements) of these rows and columns, counted from where a block begins."""
        import numpy

        down, across = (
            numpy.arange(start, stop) // size
            for (start, stop), size in zip((rows, columns), block, strict=True)
        )
        return cls(
            slice(down[0], down[-1] + 1),
            slice(across[0], across[-1] + 1),
            down - down[0],
            across - across[0],
        )

    def spread(self, scales: Array) -> Array:
        """The scales of these rows and columns as factors that broadcast to the tile."""
        import numpy

        made: Array = numpy.take(scales, self.across, axis=1)
        return made if len(made) == 1 else numpy.take(made, self.down, axis=0)
