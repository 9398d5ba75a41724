"""Weights with a scale for each block of them, made and undone: `quant_blocks` and `dequant_blocks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import (
    DEQUANTIZED,
    POWERS,
    Buffer,
    Product,
    Widener,
    as_matrices,
    scale_values,
    scaled_exactness,
    tiles,
    working,
)
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK, converter
from streamconv.ops.checks import check_dtype, check_scales, target_of
from streamconv.ops.expression import Block, Exactness, Numeric, Op, Tally
from streamconv.ops.layout import Box
from streamconv.ops.rounding import CODES, RULES, Codes, Encoder, Rule, errors
from streamconv.ops.tiles import codes
from streamconv.tensor import Shape, TensorSpec

# The dtypes of weights that are scaled by blocks.
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


def _check_blocks(op: str, block: tuple[int, int], weight: TensorSpec) -> None:
    """Refuse blocks without elements, and weights that are not matrices."""
    if len(block) != 2 or min(block) < 1:
        raise PlanError(f"{op} in blocks of {list(block)}: two sizes above 0 expected", tensor=weight.name)
    if len(weight.shape) < 2:
        raise PlanError(f"{op} of {list(weight.shape)}: [..., out, in] expected", tensor=weight.name)


def _scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """The shape of the scales of a weight [..., out, in]."""
    *front, rows, columns = shape
    return (*front, -(-rows // block[0]), -(-columns // block[1]))


def _blocks_of(box: Box, block: tuple[int, int]) -> Box:
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
class DequantBlocks(Numeric):
    """Codes, less the zero point of their block where there is one, times its scale.

    Weight [..., out, in], scale [..., ceil(out/b0), ceil(in/b1)], and perhaps a zero point of the scale's shape. The
    blocks of `block` = (b0, b1) elements are counted from the first row and column; those at the far edges are short
    where it does not divide the shape (DeepSeek-V3's kv_a_proj_with_mqa has 576 rows, and so 5 rows of scales). A block
    as large as the weight is a scale for all of it, (1, in) is one for each row, (1, 32) one for each group.

    Each value is (weight - zero) * scale in F32, rounded once to `dtype`; the difference is exact for integers. The
    tensor is often called weight_scale_inv, but it multiplies (deepseek-ai/DeepSeek-V3: inference/kernel.py,
    `weight_dequant`).

    Weights are F8, integers of 8 bits, or floats that codes were made into. Scales are floats, or powers of two
    (F8_E8M0, or U8 with its bytes, of which 255 is not-a-number). Axes in front, as of packed experts, are the same on
    all.
    """

    name: ClassVar[str] = "dequant_blocks"
    arity: ClassVar[int | None] = None
    block: tuple[int, int]
    dtype: str

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        if not 2 <= len(operands) <= 3:
            raise PlanError(
                f"dequant_blocks takes 2 or 3 operands, and is given {len(operands)}", tensor=operands[0].name
            )
        weight, scale, *zero = operands
        _check_blocks(self.name, self.block, weight)
        check_dtype(self.name, weight, (*_FLOAT8, "I8", "U8", *DEQUANTIZED), weight.name)
        check_dtype(self.name, scale, (*DEQUANTIZED, *POWERS), weight.name)
        for each in zero:
            check_dtype(self.name, each, ("I8", "U8", *DEQUANTIZED), weight.name)
        for each in (scale, *zero):
            check_scales(
                weight,
                each,
                _scale_shape(weight.shape, self.block),
                f"dequant_blocks of {list(weight.shape)} in blocks of {list(self.block)}",
                hint="check weight_block_size or group_size in the config's quantization_config",
            )
        return (replace(weight, dtype=target_of(self.name, self.dtype, DEQUANTIZED, weight.name)),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        return box, *((_blocks_of(box, self.block),) * (len(operands) - 1))

    def compute(self, block: Block) -> None:
        weight, scale, *zero = (spec.dtype for spec in block.specs)
        wide, target = working(), dtypes.parse(self.dtype)
        widen, multiply = Widener(weight, wide), Product(wide, target, block.tally)
        # Counted from the first block that the box touches.
        top, left = (start % size for (start, _), size in zip(block.box[-2:], self.block, strict=True))
        for source, scales, *zeros, made in zip(*map(as_matrices, (*block.inputs, block.out)), strict=True):
            for down, across in tiles(*source.shape):
                grid = _Grid(down, across, (top, left), self.block)
                shape, spread = grid.shape, grid.spread
                if whole := grid.by_block(source.shape[1]):
                    shape, spread = whole, grid.spread_rows
                values = widen(source[down, across]).reshape(shape)
                for points, dtype in zip(zeros, zero, strict=True):
                    values -= spread(_wide(points[grid.rows, grid.columns], dtype, wide))
                near = scale_values(scales[grid.rows, grid.columns], scale, wide)
                multiply(values, spread(near), made[down, across].reshape(shape))

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Quantise again, in the same blocks, where weights are F8 and the scales F32. It is lossy."""
        weight, scale = operands[0].dtype.name, operands[1].dtype.name
        again = weight in _FLOAT8 and scale == "F32" and len(operands) == 2
        return QuantBlocks(self.block, weight) if again else None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Value-exact for scales that are powers of two, while the exponent is in range, except for F16."""
        if operands[0].dtype.bits > 8:
            return self.loss
        return scaled_exactness(operands[1].dtype, dtypes.parse(self.dtype))


def _wide(block: Array, dtype: DType, wide: DType) -> Array:
    """A few numbers in the dtype that is computed in."""
    made = numpy.empty(block.shape, wide.numpy)
    converter(dtype, wide)(numpy.ascontiguousarray(block), made)
    return made


@dataclass(frozen=True)
class QuantBlocks(Numeric):
    """A weight [..., out, in] as codes and scales, one for each block (see `DequantBlocks`).

    - `dtype` is the kind of codes, see `rounding.CODES`; those of four bits take a byte each.
    - `rule` says how scales are chosen, and in which dtype all is computed, see `rounding.RULES`. Codes are rounded to
      nearest even, and kept in their range.
    - With `wide`, a block of zeros has scale 1 (in DeepSeek's kernels it comes out as not-a-number), and no scale is below
      2^-126, the least normal number of F32: nothing is divided by one that has lost digits, or by 0.
    - `global` takes a second operand, the scale of the scales.
    - Infinities do not count for the scale, and become the largest value. Not-a-number stays so, but is 0 in integers.
    - What becomes 0 is counted in the tally for floats of 8 bits.

    A block of the weight needs its whole scale blocks.
    """

    name: ClassVar[str] = "quant_blocks"
    arity: ClassVar[int | None] = None
    loss: ClassVar[Exactness] = Exactness.LOSSY
    block: tuple[int, int]
    dtype: str = "F8_E4M3"
    rule: str = "wide"

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        weight, *others = operands
        _check_blocks(self.name, self.block, weight)
        check_dtype(self.name, weight, DEQUANTIZED, weight.name, hint="cast it first")
        if self.dtype not in CODES or self.rule not in RULES:
            raise PlanError(
                f"quant_blocks to {self.dtype} by '{self.rule}': it makes {' or '.join(CODES)} by {' or '.join(RULES)}",
                tensor=weight.name,
            )
        if len(others) != (self.rule == "global") or any(each.numel != 1 for each in others):
            raise PlanError(
                f"quant_blocks by '{self.rule}' of {len(operands)} operands: a weight, and one number for 'global', expected",
                tensor=weight.name,
            )
        for each in others:
            check_dtype(self.name, each, ("F32",), weight.name)
        kind, own = dtypes.by_name(CODES[self.dtype].dtype), RULES[self.rule].dtype
        scale = weight.dtype if own is None else dtypes.by_name(own)
        return replace(weight, dtype=kind), TensorSpec(
            weight.name, scale, _scale_shape(weight.shape, self.block)
        )

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The box aligned outwards to whole blocks; for the scales, all their elements."""
        scales = box if result else _blocks_of(box, self.block)
        others = (((0, 1),) * len(each.shape) for each in operands[1:])
        return _elements_of(scales, self.block, operands[0].shape), *others

    def compute(self, block: Block) -> None:
        """A group of whole blocks at a time: first their scales, then their weights."""
        source, kind, rule = block.specs[0].dtype, CODES[self.dtype], RULES[self.rule]
        peaks = _Peaks(self.block, source)
        quantise = None if block.result else _Quantiser(self.block, source, kind, rule, block.tally)
        whole = block.inputs[1].reshape(-1)[0] if len(block.inputs) > 1 else None
        ((top, _), (left, _)) = block.needed[0][-2:]
        for values, made in zip(*map(as_matrices, (block.inputs[0], block.out)), strict=True):
            for down, across in _groups(values.shape, self.block):
                stored, factors = rule.scales(peaks(values[down, across]), source, kind, whole)
                if quantise is None:
                    row, column = down.start // self.block[0], across.start // self.block[1]
                    numpy.copyto(
                        codes(made)[row : row + stored.shape[0], column : column + stored.shape[1]],
                        codes(stored),
                    )
                    continue
                inside_rows, rows = _overlap(down, top, block.box[-2])
                inside_columns, columns = _overlap(across, left, block.box[-1])
                quantise(values[down, across], factors, inside_rows, inside_columns, made[rows, columns])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Multiply again; what rounding took away stays lost."""
        return None if self.rule == "global" else DequantBlocks(self.block, operands[0].dtype.name)


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


class _Peaks:
    """Finds the largest finite absolute values of blocks, for groups of them."""

    def __init__(self, block: tuple[int, int], source: DType) -> None:
        self.block, self.source = block, source
        # Bit patterns without their signs are ordered as absolute values are.
        self.sizes = Buffer(dtypes.by_name(f"U{source.bits}"))

    def __call__(self, values: Array) -> Array:
        """[rows of blocks, columns of blocks], in the values' dtype, for values that begin with a block."""
        bits = codes(values)
        unsigned = bits.dtype.type((1 << (self.source.bits - 1)) - 1)
        infinity = numpy.array(numpy.inf).astype(self.source.numpy).view(bits.dtype)
        peaks = numpy.zeros(_scale_shape(values.shape, self.block), bits.dtype)
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
        return peaks.view(self.source.numpy)


def _edges(part: slice, size: int) -> Array:
    """Where the blocks that meet a part of an axis begin in it."""
    edges: Array = numpy.maximum(numpy.arange(part.start // size * size, part.stop, size) - part.start, 0)
    return edges


class _Quantiser:
    """Divides `source` by the scales of its blocks, and rounds to codes."""

    def __init__(self, block: tuple[int, int], source: DType, kind: Codes, rule: Rule, tally: Tally) -> None:
        wide = working()
        self.block, self.room, self.held, self.tally = block, Buffer(wide), Buffer(wide), tally
        self.widen, self.encode = Widener(source, wide), Encoder(kind, rule, source, tally)
        self.decode = Widener(dtypes.by_name(kind.dtype), wide)

    def __call__(self, values: Array, scales: Array, rows: slice, columns: slice, out: Array) -> None:
        """Fill `out` with these rows and columns of a group of values, which have these scales."""
        inside = values[rows, columns]
        for down, across in tiles(*inside.shape):
            grid = _Grid(down, across, (rows.start, columns.start), self.block)
            tile = self.widen(inside[down, across])
            made = self.room.shaped(*tile.shape)
            factor = grid.spread(scales[grid.rows, grid.columns])
            numpy.divide(tile, factor, out=made)
            self.encode(made, tile, out[down, across])
            back = numpy.multiply(self.decode(out[down, across]), factor, out=self.held.shaped(*tile.shape))
            self.tally.rounding = self.tally.rounding.with_(errors(tile, back))


# ---------------------------------------------------------------------------------- blocks


class _Grid:
    """Which scales belong to a tile (with elements) of a matrix: those of all `rows` and `columns` that it touches.

    The tile is at these places of what begins at `corner` of a block.
    """

    def __init__(self, down: slice, across: slice, corner: tuple[int, int], block: tuple[int, int]) -> None:
        by_row, by_column = (
            (numpy.arange(part.start, part.stop) + start) // size
            for part, start, size in zip((down, across), corner, block, strict=True)
        )
        self.rows, self.columns = (slice(index[0], index[-1] + 1) for index in (by_row, by_column))
        self.shape: tuple[int, ...] = (len(by_row), len(by_column))
        # Which of these each row and column of the tile belongs to, from 0.
        self._down, self._across = by_row - by_row[0], by_column - by_column[0]
        self._begins, self._width = corner[1] == 0 and across.start == 0, block[1]

    def by_block(self, columns: int) -> tuple[int, ...]:
        """The tile's shape with an axis for the columns of a block, if it has whole blocks and whole rows; else nothing."""
        rows, own = self.shape
        if not self._begins or own != columns or own % self._width:
            return ()
        return rows, own // self._width, self._width

    def spread_rows(self, scales: Array) -> Array:
        """The scales of these rows and columns as factors that broadcast to the shape `by_block`."""
        made: Array = scales if len(scales) == 1 else numpy.take(scales, self._down, axis=0)
        return made[..., None]

    def spread(self, scales: Array) -> Array:
        """The scales of these rows and columns as factors that broadcast to the tile."""
        made: Array = numpy.take(scales, self._across, axis=1)
        return made if len(made) == 1 else numpy.take(made, self._down, axis=0)
