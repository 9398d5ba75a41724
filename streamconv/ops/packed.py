"""Codes of less than a byte, or of one, that a table turns into floats: `dequant_mxfp4` and `dequant_rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import (
    DEQUANTIZED,
    POWERS,
    Product,
    scale_values,
    scaled_exactness,
    tiles,
    working,
)
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK
from streamconv.ops.checks import check_dtype, check_float, check_scales, target_of
from streamconv.ops.expression import Block, Exactness, Numeric
from streamconv.ops.layout import Box
from streamconv.ops.tiles import codes
from streamconv.tensor import TensorSpec

# ---------------------------------------------------------------------------------------- MXFP4

# By the four bits of a code: a sign, two bits of exponent and one of mantissa (Open Compute Project:
# Microscaling Formats (MX) Specification 1.0, table 5, E2M1).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # values of one scale
_GROUP_BYTES = _GROUP // 2


@dataclass(frozen=True)
class DequantMxfp4(Numeric):
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
        check_dtype(self.name, packed, ("U8",), packed.name)
        check_dtype(self.name, scale, POWERS, packed.name)
        if len(packed.shape) < 2 or packed.shape[-1] != _GROUP_BYTES:
            raise PlanError(
                f"dequant_mxfp4 of {list(packed.shape)}: [..., groups, {_GROUP_BYTES}] expected",
                tensor=packed.name,
            )
        check_scales(packed, scale, packed.shape[:-1], f"dequant_mxfp4 of {list(packed.shape)}")
        shape = (*packed.shape[:-2], packed.shape[-2] * _GROUP)
        return (TensorSpec(packed.name, target_of(self.name, self.dtype, DEQUANTIZED, packed.name), shape),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        groups = (*box[:-1], _outward(box[-1], _GROUP))
        return (*groups, (0, _GROUP_BYTES)), groups

    def compute(self, block: Block) -> None:
        """Whole groups by a table of every scale with every byte, then cut."""
        *front, width = block.out.shape
        count, groups = math.prod(front), block.inputs[1].shape[-1]
        packed = block.inputs[0].reshape(count, groups * _GROUP_BYTES)
        scales = codes(block.inputs[1]).reshape(count, groups)
        made = codes(block.out).reshape(count, width)
        lead = block.box[-1][0] - block.needed[1][-1][0] * _GROUP
        table = _mxfp4_table(dtypes.parse(self.dtype))
        for down, across in tiles(count, groups * _GROUP):
            near = scales[down, across.start // _GROUP : across.stop // _GROUP]
            pairs = packed[down, across.start // 2 : across.stop // 2].reshape(*near.shape, _GROUP_BYTES)
            index = (near[..., None].astype(numpy.uint16) << 8) | pairs
            cut, place = _wanted(across, lead, width)
            numpy.copyto(made[down, place], _unpacked(table.values, index)[:, cut])
            if table.loses[near].any():
                block.tally.overflowed += int(numpy.count_nonzero(_unpacked(table.overflowed, index)[:, cut]))
                block.tally.flushed += int(numpy.count_nonzero(_unpacked(table.flushed, index)[:, cut]))

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Value-exact while the exponent is in range, except for F16."""
        return scaled_exactness(operands[1].dtype, dtypes.parse(self.dtype))


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
    together = table.view(f"u{table.shape[1] * table.itemsize}").reshape(-1)
    made = numpy.empty(index.shape, together.dtype)
    numpy.take(together, index, out=made, mode="clip")
    return made.view(table.dtype).reshape(len(index), -1)


def _wanted(across: slice, lead: int, width: int) -> tuple[slice, slice]:
    """What of a tile of columns is wanted, and where that is in a block of `width` that begins at column `lead`."""
    cut = slice(max(lead - across.start, 0), min(lead + width - across.start, CHUNK))
    return cut, slice(across.start + cut.start - lead, min(across.stop - lead, width))


def _outward(span: tuple[int, int], size: int) -> tuple[int, int]:
    """The blocks of `size` that a range touches."""
    return span[0] // size, -(-span[1] // size)


# --------------------------------------------------------------------------------- rows of integers


@dataclass(frozen=True)
class DequantRows(Numeric):
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
        check_dtype(self.name, weight, ("I8",), weight.name)
        if len(weight.shape) != 2:
            raise PlanError(f"dequant_rows of {list(weight.shape)}: [out, in] expected", tensor=weight.name)
        check_float(self.name, scale)
        check_scales(weight, scale, weight.shape[:1], f"dequant_rows of {list(weight.shape)}")
        target = target_of(self.name, self.dtype, DEQUANTIZED, weight.name)
        rows, columns = weight.shape
        return (TensorSpec(weight.name, target, (rows, columns * 8 // self.bits)),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        down, across = box
        return (down, _outward(across, 8 // self.bits)), (down,)

    def compute(self, block: Block) -> None:
        (weight, scales), wide = block.inputs, working()
        a_byte = 8 // self.bits
        lead = block.box[1][0] - block.needed[0][1][0] * a_byte
        multiply = Product(wide, dtypes.parse(self.dtype), block.tally)
        table = _signed_table(self.bits, self.low_first)
        for down, across in tiles(len(block.out), weight.shape[1] * a_byte):
            index = weight[down, across.start // a_byte : across.stop // a_byte].view(numpy.uint8)
            cut, place = _wanted(across, lead, block.out.shape[1])
            factor = scale_values(scales[down], block.specs[1].dtype, wide)[:, None]
            multiply(_unpacked(table, index)[:, cut], factor, block.out[down, place])


@cache
def _signed_table(bits: int, low_first: bool) -> Array:
    """By byte: the integers in it as F32, [256, 1] or [256, 2]."""
    byte = numpy.arange(256)
    low, high = byte & 0xF, byte >> 4
    parts = [byte] if bits == 8 else [low, high] if low_first else [high, low]
    sign = 1 << (bits - 1)
    return ((numpy.stack(parts, axis=-1) ^ sign) - sign).astype(numpy.float32)
