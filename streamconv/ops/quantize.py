"""`quant_blocks`: floats as F8 weights and a scale for each block of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import (
    DEQUANTIZED,
    Buffer,
    Grid,
    Rounder,
    Widener,
    as_matrices,
    codes,
    target_of,
    tiles,
    working,
)
from streamconv.ops.cast import CHUNK
from streamconv.ops.expression import Exactness, Op, Tally
from streamconv.ops.layout import Box
from streamconv.tensor import Shape, TensorSpec

if TYPE_CHECKING:
    from streamconv.ops.expression import Array

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""The dtypes of weights that are scaled by blocks."""


def check_blocks(op: str, block: tuple[int, int], weight: TensorSpec) -> None:
    """Refuse blocks without elements, and weights that are no matrices."""
    if len(block) != 2 or min(block) < 1:
        raise PlanError(f"{op} in blocks of {list(block)}: two sizes above 0 expected", tensor=weight.name)
    if len(weight.shape) < 2:
        raise PlanError(f"{op} of {list(weight.shape)}: [..., out, in] expected", tensor=weight.name)


def scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """The shape of the scales of a weight [..., out, in]."""
    *front, rows, columns = shape
    return (*front, -(-rows // block[0]), -(-columns // block[1]))


def blocks_of(box: Box, block: tuple[int, int]) -> Box:
    """The scales of all blocks that a box of the weight touches."""
    edges = zip(box[-2:], block, strict=True)
    return (*box[:-2], *((start // size, -(-stop // size)) for (start, stop), size in edges))


def _elements_of(scales: Box, block: tuple[int, int], shape: Shape) -> Box:
    """The elements of a weight of `shape` that a box of scales is for."""
    edges = zip(scales[-2:], block, shape[-2:], strict=True)
    return (
        *scales[:-2],
        *((min(start * size, most), min(stop * size, most)) for (start, stop), size, most in edges),
    )


@dataclass(frozen=True)
class QuantBlocks(Op):
    """A weight [..., out, in] as F8 weights and F32 scales, one for each block (see `DequantBlocks`).

    - The scale is the block's largest absolute value / 448 (57344 for F8_E5M2), in F32; the weight is
      value / scale in F32, rounded once to F8. So do DeepSeek's own kernels (deepseek-ai/DeepSeek-V3:
      inference/kernel.py, `act_quant` and `weight_quant`).
    - There a block of zeros comes out as not-a-number (0 / 0); here its scale is 1 (as in
      huggingface/transformers: integrations/finegrained_fp8.py, `Fp8Quantize`).
    - No scale is below 2^-126, the least normal number of F32: nothing is divided by one that has lost
      digits, or by 0.
    - Infinities do not count for the scale, and become the largest value. Not-a-number stays so.
    - What becomes 0 is counted in the tally.

    A block of the weight needs its whole scale blocks.
    """

    name: ClassVar[str] = "quant_blocks"
    block: tuple[int, int]
    dtype: str = "F8_E4M3"

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The weight in F8, and its scales."""
        (weight,) = operands
        check_blocks(self.name, self.block, weight)
        if weight.dtype.name not in DEQUANTIZED:
            raise PlanError(
                f"quant_blocks of {weight.dtype}: {' or '.join(DEQUANTIZED)} expected",
                tensor=weight.name,
                hint="cast it first",
            )
        target = target_of(self.name, self.dtype, FLOAT8, weight.name)
        scales = TensorSpec(weight.name, dtypes.by_name("F32"), scale_shape(weight.shape, self.block))
        return replace(weight, dtype=target), scales

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The box aligned outwards to whole blocks; for the scales, all their elements."""
        scales = box if result else blocks_of(box, self.block)
        return (_elements_of(scales, self.block, operands[0].shape),)

    def compute(
        self,
        result: int,
        box: Box,
        out: Array,
        operands: Sequence[TensorSpec],
        needed: Sequence[Box],
        blocks: Sequence[Array],
        tally: Tally,
    ) -> None:
        """A group of whole blocks at a time: first their scales, then their weights."""
        source = operands[0].dtype
        target = dtypes.parse(self.dtype)
        scales = _Scales.of(self.block, source, target)
        quantise = None if result else _Quantiser.of(self.block, source, target, tally)
        ((top, _), (left, _)) = needed[0][-2:]
        for values, made in zip(as_matrices(blocks[0]), as_matrices(out), strict=True):
            for down, across in _groups(values.shape, self.block):
                found = scales(values[down, across])
                if quantise is None:
                    row, column = down.start // self.block[0], across.start // self.block[1]
                    made[row : row + found.shape[0], column : column + found.shape[1]] = found
                    continue
                inside_rows, rows = _overlap(down, top, box[-2])
                inside_columns, columns = _overlap(across, left, box[-1])
                quantise(values[down, across], found, inside_rows, inside_columns, made[rows, columns])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Multiply again; what rounding to F8 took away stays lost."""
        from streamconv.ops.dequantize import DequantBlocks  # which needs this module

        return DequantBlocks(self.block, operands[0].dtype.name)

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Lossy: three or two bits of mantissa are left."""
        del operands
        return Exactness.LOSSY


def _groups(shape: tuple[int, ...], block: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """A matrix that begins with a block in groups of whole blocks: about `CHUNK` elements, or one block."""
    rows, columns = shape
    height, width = block
    width *= max(CHUNK // (min(height, max(rows, 1)) * width), 1)
    height *= max(CHUNK // (min(width, max(columns, 1)) * height), 1)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _overlap(part: slice, start: int, span: tuple[int, int]) -> tuple[slice, slice]:
    """Where `span` meets a part of an axis that begins at `start`: within the part, and within the span."""
    begin = part.start + start
    low = max(begin, span[0])
    high = max(min(part.stop + start, span[1]), low)
    return slice(low - begin, high - begin), slice(low - span[0], high - span[0])


def _largest(dtype: DType) -> float:
    import ml_dtypes

    finfo: Any = ml_dtypes.finfo  # comes without types
    return float(finfo(dtype.numpy).max)


@dataclass(slots=True)
class _Scales:
    """Finds the scales of a group of blocks.

    Attributes:
        block: rows and columns of a block.
        source: dtype of the values.
        largest: what the largest absolute value of a block becomes.
        sizes: room for a tile's bit patterns without their signs, which are ordered as absolute values are.
    """

    block: tuple[int, int]
    source: DType
    largest: float
    sizes: Buffer

    @classmethod
    def of(cls, block: tuple[int, int], source: DType, target: DType) -> _Scales:
        return cls(block, source, _largest(target), Buffer.of(dtypes.by_name(f"U{source.bits}")))

    def __call__(self, values: Array) -> Array:
        """F32 [rows of blocks, columns of blocks] for values that begin with a block."""
        import numpy

        bits = codes(values)
        unsigned = bits.dtype.type((1 << (self.source.bits - 1)) - 1)
        infinity = numpy.array(numpy.inf).astype(self.source.numpy).view(bits.dtype)
        peaks = numpy.zeros(scale_shape(values.shape, self.block), bits.dtype)
        for down, across in tiles(*values.shape):
            tile = bits[down, across]
            sizes = numpy.bitwise_and(tile, unsigned, out=self.sizes.shaped(*tile.shape))
            if sizes.max() >= infinity:
                sizes[sizes >= infinity] = 0
            found = numpy.maximum.reduceat(sizes, _edges(across, self.block[1]), axis=1)
            found = numpy.maximum.reduceat(found, _edges(down, self.block[0]), axis=0)
            row, column = down.start // self.block[0], across.start // self.block[1]
            near = peaks[row : row + found.shape[0], column : column + found.shape[1]]
            numpy.maximum(near, found, out=near)
        scales: Array = peaks.view(self.source.numpy).astype(numpy.float32) / numpy.float32(self.largest)
        numpy.maximum(scales, numpy.finfo(numpy.float32).tiny, out=scales)
        scales[peaks == 0] = 1
        return scales


def _edges(part: slice, size: int) -> Array:
    """Where the blocks that meet a part of an axis begin in it."""
    import numpy

    edges: Array = numpy.maximum(numpy.arange(part.start // size * size, part.stop, size) - part.start, 0)
    return edges


@dataclass(slots=True)
class _Quantiser:
    """Divides by scales and rounds to F8.

    Attributes:
        block: rows and columns of a block.
        largest: finite value of the F8.
        widen, finish, room: from the values' dtype to F32, from there to F8, and in between.
    """

    block: tuple[int, int]
    largest: float
    widen: Widener
    finish: Rounder
    room: Buffer

    @classmethod
    def of(cls, block: tuple[int, int], source: DType, target: DType, tally: Tally) -> _Quantiser:
        wide = working()
        widen, finish = Widener.of(source, wide), Rounder.of(wide, target, tally)
        return cls(block, _largest(target), widen, finish, Buffer.of(wide))

    def __call__(self, values: Array, scales: Array, rows: slice, columns: slice, out: Array) -> None:
        """Fill `out` with these rows and columns of a group of values, which have these scales."""
        import numpy

        top, left = rows.start, columns.start
        inside = values[rows, columns]
        with numpy.errstate(all="ignore"):
            for down, across in tiles(*inside.shape):
                grid = Grid.of(
                    (top + down.start, top + down.stop), (left + across.start, left + across.stop), self.block
                )
                tile = self.widen(inside[down, across])
                made = self.room.shaped(*tile.shape)
                numpy.divide(tile, grid.spread(scales[grid.rows, grid.columns]), out=made)
                numpy.clip(made, -self.largest, self.largest, out=made)
                self.finish(made, out[down, across], [tile], [tile])
