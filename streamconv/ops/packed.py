"""Codes of a few bits that share words, out of them and into them, and codes as places in a table.

Source of the layouts: compressed-tensors 0.20 (compressors/pack_quantized/helpers.py; its versions to 0.17 fill words),
GPTQModel 7.7 (nn_modules/qlinear), AutoAWQ 0.2.9 (utils/packing_utils.py), bitsandbytes 0.50 (functional.py). All are one
of three orders: a stream of bits, words that are filled from their lowest bit, and bytes with the highest bits first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from streamconv import dtypes
from streamconv.errors import ConversionError, PlanError
from streamconv.ops.arithmetic import Buffer, tiles
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK
from streamconv.ops.checks import check_dtype
from streamconv.ops.expression import Block, Exactness, Numeric, Op
from streamconv.ops.layout import Box
from streamconv.ops.tiles import codes
from streamconv.tensor import TensorSpec

_WORD = 32

# By the four bits of a code: a sign, two bits of exponent and one of mantissa (Open Compute Project:
# Microscaling Formats (MX) Specification 1.0, table 5, E2M1).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

MEANINGS = {"unsigned": "U8", "next": "U8", "signed": "I8", "offset": "I8", "e2m1": "F8_E4M3"}
"""What codes mean, and the dtype that has these values: the number itself, that plus one (without a carry out of its bits),
in two's complement, less half of the range; and the floats of four bits, which are among those of F8_E4M3."""


@dataclass(frozen=True, slots=True)
class _Order:
    """Where codes lie that repeat after `size` bytes: each from a bit on, counted from the lowest of the first byte."""

    size: int
    starts: tuple[int, ...]


def _by_stream(bits: int) -> _Order:
    shared = math.gcd(bits, 8)
    return _Order(bits // shared, tuple(range(0, 8 * bits // shared, bits)))


_ORDERS: dict[str, Callable[[int], _Order]] = {
    "stream": _by_stream,
    "words": lambda bits: _Order(_WORD // 8, tuple(range(0, _WORD // bits * bits, bits))),
    "high_first": lambda bits: _Order(1, tuple(range(8 - bits, -1, -bits))),
}


@cache
def _order(name: str, bits: int, itemsize: int) -> _Order:
    """The order of codes in whole elements of so many bytes."""
    one = _ORDERS[name](bits)
    size = math.lcm(one.size, itemsize)
    starts = (8 * at + start for at in range(0, size, one.size) for start in one.starts)
    return _Order(size, tuple(starts))


def _check(op: str, bits: int, meaning: str, tensor: str, order: str = "stream") -> None:
    """Refuse fields that mean nothing."""
    if meaning not in MEANINGS or order not in _ORDERS:
        raise PlanError(
            f"{op} of '{meaning}' in the order '{order}'",
            tensor=tensor,
            hint=f"known: {', '.join((*MEANINGS, *_ORDERS))}",
        )
    if not 1 <= bits <= 8 or (meaning == "e2m1" and bits != 4) or (order == "high_first" and 8 % bits):
        raise PlanError(f"{op} of {bits} bits as '{meaning}' in the order '{order}'", tensor=tensor)


@dataclass(frozen=True)
class Unpack(Numeric):
    """Codes of `bits` bits out of the bytes of a tensor's last axis: [..., words] as [..., count].

    - `order`: `stream`: code i begins at bit i * bits of the row, counted from the lowest bit of its first byte, and may
      go on in the next word. `words`: a word of 32 bits has as many whole ones as it holds, from its lowest bits on.
      `high_first`: so does a byte, from its highest bits on.
    - `meaning`: see `MEANINGS`.

    Elements may be of any dtype: some formats type bytes as floats.
    """

    name: ClassVar[str] = "unpack"
    loss: ClassVar[Exactness] = Exactness.VALUE_EXACT
    bits: int
    count: int
    meaning: str = "unsigned"
    order: str = "stream"

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        (packed,) = operands
        _check(self.name, self.bits, self.meaning, packed.name, self.order)
        if packed.dtype.packed or not packed.shape:
            raise PlanError(f"unpack of {packed.dtype} {list(packed.shape)}", tensor=packed.name)
        size = packed.dtype.itemsize
        order = _order(self.order, self.bits, size)
        whole, rest = divmod(self.count, len(order.starts))
        end = -(-max((order.starts[k] + self.bits for k in range(rest)), default=0) // (8 * size))
        if self.count < 0 or packed.shape[-1] != (wanted := whole * order.size // size + end):
            raise PlanError(
                f"unpack of {self.count} codes of {self.bits} bits needs {wanted} {packed.dtype} in a row: "
                f"'{packed.name}' is {list(packed.shape)}",
                tensor=packed.name,
            )
        made = dtypes.by_name(MEANINGS[self.meaning])
        return (TensorSpec(packed.name, made, (*packed.shape[:-1], self.count)),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """Whole repeats of the order, as far as there are."""
        (packed,) = operands
        order = _order(self.order, self.bits, packed.dtype.itemsize)
        words = order.size // packed.dtype.itemsize
        first, end = box[-1][0] // len(order.starts), -(-box[-1][1] // len(order.starts))
        return ((*box[:-1], (first * words, max(min(end * words, packed.shape[-1]), first * words))),)

    def compute(self, block: Block) -> None:
        """Whole bytes by a table where codes do not straddle them; else each place of the order by shifts."""
        if not block.out.size:
            return
        order = _order(self.order, self.bits, block.specs[0].dtype.itemsize)
        *front, width = block.out.shape
        count, rows = len(order.starts), math.prod(front)
        packed = block.inputs[0].reshape(rows, -1).view(numpy.uint8)
        made = codes(block.out).reshape(rows, width)
        lead, most = block.box[-1][0] % count, max(CHUNK // count, 1) * count
        room, held = (Buffer(dtypes.by_name("U8"), most) for _ in range(2))
        # In whole repeats, of which the last may hold less than it could.
        for down, across in tiles(rows, -(-(lead + width) // count) * count, most):
            part = packed[down, across.start // count * order.size : across.stop // count * order.size]
            cut = slice(max(lead - across.start, 0), min(lead + width, across.stop) - across.start)
            place = slice(across.start + cut.start - lead, across.start + cut.stop - lead)
            if _ORDERS[self.order](self.bits).size == 1:
                found = unpacked(_byte_table(self.bits, self.meaning, self.order), part)
            else:
                found = room.shaped(part.shape[0], across.stop - across.start)
                _shifted(part, order, self.bits, found, held)
                found = numpy.take(_values(self.bits, self.meaning), found)
            numpy.copyto(made[down, place], found[:, cut])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Pack again, where that is done."""
        known = self.order == "stream" and self.bits in _PACKED and self.meaning != "next"
        return Pack(self.bits, operands[0].dtype.name, self.meaning) if known else None


def _shifted(part: Array, order: _Order, bits: int, out: Array, held: Buffer) -> None:
    """The numbers of `bits` bits in bytes [rows, n] as `out` [rows, codes]; what is missing of a last repeat is zeros."""
    rows, repeats = len(part), out.shape[1] // len(order.starts)
    if part.shape[1] < repeats * order.size:
        part = numpy.pad(part, ((0, 0), (0, repeats * order.size - part.shape[1])))
    part = part.reshape(rows, repeats, order.size)
    target = out.reshape(rows, repeats, len(order.starts))
    for place, start in enumerate(order.starts):
        byte, shift = divmod(start, 8)
        number = numpy.right_shift(part[..., byte], shift, out=held.shaped(rows, repeats))
        if shift + bits > 8:
            number |= part[..., byte + 1] << numpy.uint8(8 - shift)
        number &= numpy.uint8((1 << bits) - 1)
        target[..., place] = number


@cache
def _values(bits: int, meaning: str) -> Array:
    """By number: the bit pattern of what it means."""
    number = numpy.arange(1 << bits)
    half = 1 << (bits - 1)
    values = {
        "unsigned": number,
        "next": (number + 1) & (2 * half - 1),
        "signed": (number ^ half) - half,
        "offset": number - half,
    }
    made = (
        numpy.array([*_FP4, *(-value for value in _FP4)], numpy.float32)
        if meaning == "e2m1"
        else values[meaning]
    )
    return codes(made.astype(dtypes.by_name(MEANINGS[meaning]).numpy))


@cache
def _byte_table(bits: int, meaning: str, order: str) -> Array:
    """By byte: the bit patterns of all codes in it, [256, codes]."""
    byte = numpy.arange(256, dtype=numpy.uint8)[:, None]
    found = numpy.empty((256, 8 // bits), numpy.uint8)
    _shifted(byte, _ORDERS[order](bits), bits, found, Buffer(dtypes.by_name("U8"), 256))
    made: Array = numpy.ascontiguousarray(_values(bits, meaning)[found])
    return made


def unpacked(table: Array, index: Array) -> Array:
    """All entries of a table [codes, entries] for each index: [rows, n] as [rows, n * entries]."""
    together = table.view(f"u{table.shape[1] * table.itemsize}").reshape(-1)
    made = numpy.empty(index.shape, together.dtype)
    numpy.take(together, index, out=made, mode="clip")
    return made.view(table.dtype).reshape(len(index), -1)


# ----------------------------------------------------------------------------------------- into words

# Bits of codes that fill bytes.
_PACKED = (4, 8)


@dataclass(frozen=True)
class Pack(Numeric):
    """Codes [..., n] into elements of `dtype`, 4 or 8 bits each, the first in the lowest: undoes `Unpack` of a stream.

    What is left of the last element is zeros.
    """

    name: ClassVar[str] = "pack"
    loss: ClassVar[Exactness] = Exactness.VALUE_EXACT
    bits: int
    dtype: str
    meaning: str = "unsigned"

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        (values,) = operands
        _check(self.name, self.bits, self.meaning, values.name)
        if self.bits not in _PACKED or self.meaning == "next" or not values.shape:
            raise PlanError(
                f"pack of {self.bits} bits as '{self.meaning}' of {list(values.shape)}", tensor=values.name
            )
        check_dtype(self.name, values, (MEANINGS[self.meaning],), values.name)
        check_dtype(
            "pack to", TensorSpec(values.name, dtypes.parse(self.dtype), ()), ("U8", "I8", "I32"), values.name
        )
        words = -(-values.shape[-1] // self._count)
        return (replace(values, dtype=dtypes.parse(self.dtype), shape=(*values.shape[:-1], words)),)

    @property
    def _count(self) -> int:
        """Codes in an element."""
        return dtypes.parse(self.dtype).bits // self.bits

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        most, (start, stop) = operands[0].shape[-1], box[-1]
        return ((*box[:-1], (min(start * self._count, most), min(stop * self._count, most))),)

    def compute(self, block: Block) -> None:
        if not block.out.size:
            return
        *front, words = block.out.shape
        rows, each = math.prod(front), 8 // self.bits
        values = codes(block.inputs[0]).reshape(rows, -1)
        made = block.out.reshape(rows, words).view(numpy.uint8)
        table = _numbers(self.bits, self.meaning)
        for down, across in tiles(rows, made.shape[1]):
            part = numpy.take(table, values[down, across.start * each : across.stop * each])
            target = made[down, across]
            target[...] = 0
            for place in range(each):
                here = part[:, place::each]
                target[:, : here.shape[1]] |= here << numpy.uint8(place * self.bits)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Unpack(self.bits, operands[0].shape[-1], self.meaning)


@cache
def _numbers(bits: int, meaning: str) -> Array:
    """By the bit pattern of a value: its code. What has no code gets that of zero."""
    values = _values(bits, meaning)
    made = numpy.zeros(256, numpy.uint8)
    made[values] = numpy.arange(len(values), dtype=numpy.uint8)
    return made


# ------------------------------------------------------------------------------------------ by index


@dataclass(frozen=True)
class Gather(Numeric):
    """Elements of the last axis by number: values [..., n] and numbers of any shape as [..., *shape].

    A table of sixteen floats and codes make floats (bitsandbytes' NF4); scales of groups and the group of each column
    make a scale for each column (`g_idx` of GPTQ and compressed-tensors).
    """

    name: ClassVar[str] = "gather"
    arity: ClassVar[int | None] = 2
    loss: ClassVar[Exactness] = Exactness.BIT_EXACT

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        values, index = operands
        if values.dtype.packed or not values.shape or index.dtype.kind not in ("int", "uint"):
            raise PlanError(
                f"gather from {values.dtype} {list(values.shape)} by '{index.name}', which is {index.dtype}: a tensor with "
                "an axis and whole numbers expected",
                tensor=values.name,
            )
        return (replace(values, shape=(*values.shape[:-1], *index.shape)),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        values = operands[0].shape
        front = len(values) - 1
        return (*box[:front], (0, values[-1])), box[front:]

    def compute(self, block: Block) -> None:
        """Raises ConversionError for a number that is none of an element."""
        values, index = block.inputs
        if not block.out.size:
            return
        size = values.shape[-1]
        table = codes(values).reshape(-1, size)
        places, made = index.reshape(-1), codes(block.out).reshape(len(table), -1)
        for down, across in tiles(*made.shape):
            here = places[across]
            if here.min() < 0 or here.max() >= size:
                raise ConversionError(
                    f"'{block.specs[1].name}' has the number {int(here.max() if here.min() >= 0 else here.min())}, of {size}",
                    tensor=block.specs[0].name,
                    hint="the checkpoint is damaged: download it again",
                )
            numpy.copyto(made[down, across], numpy.take(table[down], here, axis=1))
