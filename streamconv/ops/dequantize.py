"""Packed and scaled weights as plain floats: `dequant_blocks`, `dequant_mxfp4`, `dequant_rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar

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
    check_float,
    codes,
    multiply,
    scale_values,
    target_of,
    tiles,
    working,
)
from streamconv.ops.cast import CHUNK
from streamconv.ops.expression import Exactness, Op, Tally
from streamconv.ops.layout import Box
from streamconv.ops.quantize import FLOAT8, QuantBlocks, blocks_of, check_blocks, scale_shape
from streamconv.tensor import TensorSpec

if TYPE_CHECKING:
    from streamconv.ops.expression import Array

# Scales that are powers of two, as F8_E8M0 or as its bytes.
_POWERS = ("F8_E8M0", "U8")


@dataclass(frozen=True)
class DequantBlocks(Op):
    """F8 weights times the scale of their block: weight [..., out, in], scale [..., ceil(out/b0), ceil(in/b1)].

    The blocks of `block` = (b0, b1) elements are counted from the first row and column; those at the far
    edges are short where it does not divide the shape (DeepSeek-V3's kv_a_proj_with_mqa has 576 rows, and
    so 5 rows of scales). Each value is weight * scale in F32, rounded once to `dtype`. The tensor is called
    weight_scale_inv, but it multiplies (deepseek-ai/DeepSeek-V3: inference/kernel.py, `weight_dequant`).

    Scales are F32, BF16, or powers of two (F8_E8M0, or U8 with its bytes, of which 255 is not-a-number).
    Axes in front, as of packed experts, are the same on both.
    """

    name: ClassVar[str] = "dequant_blocks"
    arity: ClassVar[int | None] = 2
    block: tuple[int, int]
    dtype: str

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The weight with another dtype."""
        weight, scale = operands
        check_blocks(self.name, self.block, weight)
        if weight.dtype.name not in FLOAT8:
            raise PlanError(
                f"dequant_blocks of {weight.dtype}: {' or '.join(FLOAT8)} expected", tensor=weight.name
            )
        if scale.dtype.name not in ("F32", "BF16", *_POWERS):
            raise PlanError(
                f"dequant_blocks with scales '{scale.name}' of {scale.dtype}: "
                "F32, BF16, F8_E8M0 or U8 expected",
                tensor=weight.name,
            )
        wanted = scale_shape(weight.shape, self.block)
        if scale.shape != wanted:
            raise PlanError(
                f"dequant_blocks of {list(weight.shape)} in blocks of {list(self.block)} needs scales "
                f"{list(wanted)}: '{scale.name}' is {list(scale.shape)}",
                tensor=weight.name,
                hint="check weight_block_size in the config's quantization_config",
            )
        return (replace(weight, dtype=target_of(self.name, self.dtype, DEQUANTIZED, weight.name)),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The same box, and the scales of the blocks that it touches."""
        del result, operands
        return box, blocks_of(box, self.block)

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
        """A tile at a time."""
        del result, needed
        import numpy

        weight, scale = operands
        wide, target = working(), dtypes.parse(self.dtype)
        widen, finish = Widener.of(weight.dtype, wide), Rounder.of(wide, target, tally)
        room = Buffer.of(wide)
        # Counted from the first block that the box touches.
        top, left = (start % size for (start, _), size in zip(box[-2:], self.block, strict=True))
        with numpy.errstate(all="ignore"):
            for source, scales, made in zip(*map(as_matrices, (*blocks, out)), strict=True):
                for down, across in tiles(*source.shape):
                    grid = Grid.of(
                        (top + down.start, top + down.stop),
                        (left + across.start, left + across.stop),
                        self.block,
                    )
                    near = scale_values(scales[grid.rows, grid.columns], scale.dtype, wide)
                    factor = grid.spread(near)
                    values = widen(source[down, across])
                    product = room.shaped(*values.shape)
                    multiply(values, factor, product)
                    finish(product, made[down, across], [values, factor], [values, factor])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Quantise again, in the same blocks, where the scales are F32. It is lossy."""
        weight, scale = operands
        return QuantBlocks(self.block, weight.dtype.name) if scale.dtype.name == "F32" else None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Value-exact for scales that are powers of two, while the exponent is in range, but for F16."""
        return _power_exactness(operands[1].dtype, dtypes.parse(self.dtype))


def _power_exactness(scale: DType, target: DType) -> Exactness:
    """F8 and F4 have fewer digits than any target, and so times a power of two; F16 has fewer exponents."""
    exact = scale.name in _POWERS and target.name in ("BF16", "F32")
    return Exactness.VALUE_EXACT if exact else Exactness.ROUNDING


# ---------------------------------------------------------------------------------------- MXFP4

# By the four bits of a code: a sign, two bits of exponent and one of mantissa (Open Compute Project:
# Microscaling Formats (MX) Specification 1.0, table 5, E2M1).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # values of one scale
_GROUP_BYTES = _GROUP // 2


@dataclass(frozen=True)
class DequantMxfp4(Op):
    """MXFP4 as gpt-oss stores it: blocks U8 [..., G, 16] and scales U8 [..., G] as [..., G * 32].

    A byte holds two values, the low four bits first; each is a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6,
    times 2^(scale - 127) (openai/gpt-oss: gpt_oss/torch/weights.py). Scale 255 is not-a-number, as the
    format's specification has it; scales may be F8_E8M0 as well.

    BF16 and F32 have all these values for scales from 0 to 252: the least, 0.5 * 2^-127, is within BF16's
    subnormals (down to 2^-133), and 6 * 2^125 is below its largest. From 253 on some overflow; F16 flushes
    and overflows much sooner. Both are counted in the tally.
    """

    name: ClassVar[str] = "dequant_mxfp4"
    arity: ClassVar[int | None] = 2
    dtype: str

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The blocks' name, and their last two axes as one of twice as many values."""
        packed, scale = operands
        for operand, known in ((packed, ("U8",)), (scale, _POWERS)):
            if operand.dtype.name not in known:
                raise PlanError(
                    f"dequant_mxfp4 of '{operand.name}', which is {operand.dtype}: "
                    f"{' or '.join(known)} expected",
                    tensor=packed.name,
                )
        if len(packed.shape) < 2 or packed.shape[-1] != _GROUP_BYTES:
            raise PlanError(
                f"dequant_mxfp4 of {list(packed.shape)}: [..., groups, {_GROUP_BYTES}] expected",
                tensor=packed.name,
            )
        if scale.shape != packed.shape[:-1]:
            raise PlanError(
                f"dequant_mxfp4 of {list(packed.shape)} needs scales {list(packed.shape[:-1])}: "
                f"'{scale.name}' is {list(scale.shape)}",
                tensor=packed.name,
            )
        shape = (*packed.shape[:-2], packed.shape[-2] * _GROUP)
        return (TensorSpec(packed.name, target_of(self.name, self.dtype, DEQUANTIZED, packed.name), shape),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The groups that the box touches."""
        del result, operands
        groups = (*box[:-1], _outward(box[-1], _GROUP))
        return (*groups, (0, _GROUP_BYTES)), groups

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
        """Whole groups by a table of every scale with every byte, then cut."""
        del result, operands
        import numpy

        width = out.shape[-1]
        groups = blocks[1].shape[-1]
        lead = box[-1][0] - needed[1][-1][0] * _GROUP
        count = math.prod(out.shape[:-1])
        packed = blocks[0].reshape(count, groups * _GROUP_BYTES)
        scales = codes(blocks[1]).reshape(count, groups)
        made = codes(out).reshape(count, width)
        table = _mxfp4_table(dtypes.parse(self.dtype))
        for down, across in tiles(count, groups * _GROUP):
            near = scales[down, across.start // _GROUP : across.stop // _GROUP]
            pairs = packed[down, across.start // 2 : across.stop // 2].reshape(*near.shape, _GROUP_BYTES)
            index = (near[..., None].astype(numpy.uint16) << 8) | pairs
            cut = slice(max(lead - across.start, 0), min(lead + width - across.start, CHUNK))
            place = slice(across.start + cut.start - lead, min(across.stop - lead, width))
            values = _unpacked(table.values, index)
            numpy.copyto(made[down, place], values[:, cut])
            if table.loses[near].any():
                tally.overflowed += int(numpy.count_nonzero(_unpacked(table.overflowed, index)[:, cut]))
                tally.flushed += int(numpy.count_nonzero(_unpacked(table.flushed, index)[:, cut]))

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """None: there is no operation that makes MXFP4."""
        del operands
        return None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Value-exact while the exponent is in range, but for F16."""
        return _power_exactness(operands[1].dtype, dtypes.parse(self.dtype))


@dataclass(frozen=True, slots=True)
class _Mxfp4Table:
    """By scale * 256 + byte: both values of the byte, and whether they are lost.

    Attributes:
        values: [65536, 2] bit patterns of the target.
        overflowed, flushed: [65536, 2] of bool.
        loses: [256] of bool: whether anything is lost with this scale.
    """

    values: Array
    overflowed: Array
    flushed: Array
    loses: Array


@cache
def _mxfp4_table(target: DType) -> _Mxfp4Table:
    import numpy

    byte, wide = numpy.arange(256, dtype=numpy.uint8), dtypes.by_name("F64")
    both = numpy.stack([byte & 0xF, byte >> 4], axis=-1)
    exact = numpy.array([*_FP4, *(-value for value in _FP4)])[both]
    scales = scale_values(byte, dtypes.by_name("U8"), wide)
    exact = (scales[:, None, None] * exact).reshape(-1, 2)
    with numpy.errstate(all="ignore"):
        # F32 has every value of F64 here, or is beyond the target's range with it.
        made = exact.astype(numpy.float32).astype(target.numpy)
        held = made.astype(numpy.float64)
    overflowed = numpy.isfinite(exact) & ~numpy.isfinite(held)
    flushed = (exact != 0) & (held == 0)
    loses = (overflowed | flushed).reshape(256, -1).any(axis=1)
    return _Mxfp4Table(codes(made), overflowed, flushed, loses)


def _unpacked(table: Array, index: Array) -> Array:
    """All entries of a table [codes, entries] for each index: [rows, ...] as [rows, ...  * entries]."""
    import numpy

    together = table.view(f"u{table.shape[1] * table.itemsize}").reshape(-1)
    made = numpy.empty(index.shape, together.dtype)
    numpy.take(together, index, out=made, mode="clip")
    return made.view(table.dtype).reshape(len(index), -1)


def _outward(span: tuple[int, int], size: int) -> tuple[int, int]:
    """The blocks of `size` that a range touches."""
    return span[0] // size, -(-span[1] // size)


# --------------------------------------------------------------------------------- rows of integers


@dataclass(frozen=True)
class DequantRows(Op):
    """Integers times a scale for each row: weight I8 [out, in * bits / 8], scale [out], as [out, in].

    With 4 `bits` a byte holds two values from -8 to 7; `low_first` says that its low four bits come first.
    ChatGLM's own packing has the high four first (THUDM/chatglm2-6b-int4: quantization.py). Each value is
    weight * scale in F32, rounded once to `dtype`.
    """

    name: ClassVar[str] = "dequant_rows"
    arity: ClassVar[int | None] = 2
    bits: int
    dtype: str
    low_first: bool = True

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The weight with another dtype, and with 4 bits twice as many columns."""
        weight, scale = operands
        if self.bits not in (4, 8):
            raise PlanError(f"dequant_rows of {self.bits} bits: 4 or 8 expected", tensor=weight.name)
        if weight.dtype.name != "I8" or len(weight.shape) != 2:
            raise PlanError(
                f"dequant_rows of {weight.dtype} {list(weight.shape)}: I8 [rows, columns] expected",
                tensor=weight.name,
            )
        check_float(self.name, scale)
        if scale.shape != weight.shape[:1]:
            raise PlanError(
                f"dequant_rows of {list(weight.shape)} needs scales {list(weight.shape[:1])}: "
                f"'{scale.name}' is {list(scale.shape)}",
                tensor=weight.name,
            )
        target = target_of(self.name, self.dtype, DEQUANTIZED, weight.name)
        rows, columns = weight.shape
        return (TensorSpec(weight.name, target, (rows, columns * 8 // self.bits)),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The bytes that the box touches, and its rows of the scale."""
        del result, operands
        down, across = box
        return (down, _outward(across, 8 // self.bits)), (down,)

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
        """A tile of whole bytes at a time, then cut."""
        del result
        import numpy

        target, wide = dtypes.parse(self.dtype), working()
        a_byte = 8 // self.bits
        lead, width = box[1][0] - needed[0][1][0] * a_byte, out.shape[1]
        finish, room = Rounder.of(wide, target, tally), Buffer.of(wide)
        table = _signed_table(self.bits, self.low_first)
        with numpy.errstate(all="ignore"):
            for down, across in tiles(len(out), blocks[0].shape[1] * a_byte):
                index = blocks[0][down, across.start // a_byte : across.stop // a_byte].view(numpy.uint8)
                cut = slice(max(lead - across.start, 0), min(lead + width - across.start, CHUNK))
                place = slice(across.start + cut.start - lead, min(across.stop - lead, width))
                values = _unpacked(table, index)[:, cut]
                factor = scale_values(blocks[1][down], operands[1].dtype, wide)[:, None]
                product = room.shaped(*values.shape)
                multiply(values, factor, product)
                finish(product, out[down, place], [values, factor], [values, factor])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """None: there is no operation that makes rows of integers."""
        del operands
        return None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Rounding."""
        del operands
        return Exactness.ROUNDING


@cache
def _signed_table(bits: int, low_first: bool) -> Array:
    """By byte: the integers in it as F32, [256, 1] or [256, 2]."""
    import numpy

    byte = numpy.arange(256)
    low, high = byte & 0xF, byte >> 4
    parts = [byte] if bits == 8 else [low, high] if low_first else [high, low]
    sign = 1 << (bits - 1)
    return ((numpy.stack(parts, axis=-1) ^ sign) - sign).astype(numpy.float32)
