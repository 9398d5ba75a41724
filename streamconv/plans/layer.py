"""A quantised weight: its parts, what the config says of it, and the pieces that plain weights are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from streamconv.errors import PlanError
from streamconv.ops import DequantBlocks, Expression, Unpack, apply, reshaped
from streamconv.plans.told import Told
from streamconv.readers.window import Window
from streamconv.storage.location import locate
from streamconv.tensor import Shape, Stored

FLOATS = ("BF16", "F16", "F32")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
POWERS = ("F8_E8M0", "U8")
WORD = 32
"""Bits that packed codes come in."""

# Bytes of a tensor that holds a setting.
_LONGEST_SETTING = 1 << 16


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantised weight.

    Attributes:
        name: of the plain weight.
        parts: by what their names end in.
        told: see there.
        dtype: that is wanted.
        notes: what a user should know is added, once for all layers.
        checks: pairs that the run must find equal, and what a difference would mean.
    """

    name: str
    parts: Mapping[str, Expression]
    told: Told
    dtype: str
    notes: dict[str, None]
    checks: list[tuple[str, Expression, Expression]]

    @property
    def module(self) -> str:
        """The layer's own name."""
        return self.name.removesuffix(".weight")

    def __getitem__(self, part: str) -> Expression:
        return self.parts[part]

    def shape(self, part: str) -> Shape:
        """The shape of a part; empty where there is none."""
        return self.parts[part].spec.shape if part in self.parts else ()

    def sizes(self, part: str, axes: int) -> Shape:
        """The shape of a part that has so many axes.

        Raises:
            PlanError: it has others.
        """
        shape = self.shape(part)
        if len(shape) != axes:
            raise self.wrong(f"'{self[part].spec.name}' is {list(shape)}, and should have {axes} axes")
        return shape

    def width(self, part: str) -> int:
        """How long the last axis of a part is.

        Raises:
            PlanError: it has none.
        """
        return (self.shape(part) or self.sizes(part, 1))[-1]

    def wrong(self, message: str, hint: str | None = None) -> PlanError:
        """An error about the layer."""
        return PlanError(message, tensor=self.name, hint=hint)

    def read(self, part: str, first: int | None = None) -> bytes:
        """The bytes of a part that says how others are to be read: a shape, a setting; or only its `first` ones."""
        tensor = self.parts[part]
        if not isinstance(tensor, Stored) or (first is None and tensor.spec.nbytes > _LONGEST_SETTING):
            raise self.wrong(
                f"'{tensor.spec.name}' says how it is quantised, and is not stored as it should be"
            )
        made = b""
        for extent in tensor.extents if first is None else tensor.extents[:1]:
            with Window(locate(extent.file), extent.offset, extent.length) as window:
                made += window.read(0, extent.length if first is None else min(first, extent.length))
        return made

    def settings(self, part: str) -> Mapping[str, Any]:
        """The JSON document in a part's bytes."""
        try:
            made = orjson.loads(self.read(part))
        except orjson.JSONDecodeError as error:
            raise self.wrong(
                f"'{self[part].spec.name}' is not the JSON that it should be: {error}"
            ) from error
        if not isinstance(made, dict):
            raise self.wrong(f"'{self[part].spec.name}' is no JSON object")
        return made


Make = Callable[[Layer], Expression]


def unpacked(
    tensor: Expression, bits: int, count: int, meaning: str = "unsigned", order: str = "stream"
) -> Expression:
    """Packed codes of so many bits as a whole row of `count` (see `Unpack`)."""
    return apply(Unpack(bits, count, meaning, order), tensor)[0]


def floats(layer: Layer, part: str) -> Expression:
    """Codes of four bits, two a byte, as floats with twice as many columns."""
    return unpacked(layer[part], 4, 2 * layer.width(part), "e2m1")


def scaled(
    layer: Layer, codes: Expression, scale: Expression, zero: Expression | None = None, dtype: str = ""
) -> Expression:
    """Codes times scales whose shape says what each is for."""
    block, shape = _grid(layer, codes.spec.shape, scale.spec.shape)
    others = [reshaped(each, shape) for each in (scale, zero) if each is not None]
    return apply(DequantBlocks(block, dtype or layer.dtype), codes, *others)[0]


def _grid(layer: Layer, weight: Shape, scale: Shape) -> tuple[tuple[int, int], Shape]:
    """The size of blocks, and the shape of their scales, for a weight [..., rows, columns].

    One scale for all, for each row, for each group of columns; else for blocks of the size that the config says, or of
    128 x 128.
    """
    *front, rows, columns = weight if len(weight) > 1 else (0, 0)
    held = list(scale)
    if 4 <= len(held) == len(weight) + 2 and held[-1] == held[-3] == 1:
        held = [*held[:-4], held[-4], held[-2]]  # [rows, 1, columns, 1]
    if math.prod(held) == 1 and not front:
        held = [1, 1]
    elif len(held) == len(weight) - 1 and held[-1:] == [rows]:
        held = [*held, 1]
    elif held == front and front:
        held = [*front, 1, 1]
    size = layer.told.blocks(layer.module)[0]
    by_block = [*front, -(-rows // size[0]), -(-columns // size[1])]
    wrong = layer.wrong(
        f"its scales are {list(scale)}, for a weight {list(weight)}: {by_block} expected for blocks of {list(size)}, or one "
        "for all, for each row or for each group",
        "check weight_block_size or group_size in the config's quantization_config",
    )
    if len(held) != len(weight) or len(weight) < 2 or held[:-2] != front:
        raise wrong
    down, across = held[-2:]
    for block in layer.told.blocks(layer.module) if (down, across) != (1, 1) else ():
        if (-(-rows // block[0]), -(-columns // block[1])) == (down, across) and (down != rows or rows == 1):
            return block, (*front, down, across)
    # One for each column is what experts have that were transposed; of a matrix it is another layer's, or not whole.
    by_column = down == 1 and across > 1 and rows > 1 and not front
    if down not in (1, rows) or by_column or not across or columns % across:
        raise wrong
    return (max(rows // down, 1), max(columns // across, 1)), (*front, down, across)
