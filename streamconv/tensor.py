"""The words all layers share: what a tensor is called, how it looks, and where its bytes are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from streamconv.dtypes import DType

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its data. `shape` counts logical elements, also for packed dtypes."""

    name: str
    dtype: DType
    shape: Shape

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the row-major tensor in a file."""
        bits = math.prod(self.shape) * self.dtype.bits
        if bits % 8:
            raise ValueError(f"tensor '{self.name}': {bits} bits of {self.dtype} do not fill whole bytes")
        return bits // 8


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of `length` bytes at `offset` of the source file with absolute path `file`."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Checksum:
    """What is known of bytes: what a source file says of its own, or what a conversion recorded.

    Attributes:
        extents: the bytes, end to end.
        value: their checksum, in hexadecimal.
        meaning: what another one would mean.
        kind: how it is made; CRC-32 is that of zip and zlib.
    """

    extents: tuple[Extent, ...]
    value: str
    meaning: str
    kind: Literal["CRC-32", "xxh3-128"] = "CRC-32"


@dataclass(frozen=True, slots=True)
class Stored:
    """A source tensor whose row-major little-endian bytes are these extents, end to end.

    Every reader ends here. The extents' lengths add up to `spec.nbytes`; a 0-size tensor has none.
    """

    spec: TensorSpec
    extents: tuple[Extent, ...]

    def __post_init__(self) -> None:
        held = sum(extent.length for extent in self.extents)
        if held != self.spec.nbytes:
            raise ValueError(
                f"tensor '{self.spec.name}': {self.spec.nbytes} bytes of {self.spec.dtype} "
                f"{list(self.spec.shape)} expected, {held} in its extents"
            )


def row_major_strides(shape: Shape) -> Shape:
    """Strides, in elements, of a contiguous row-major tensor of `shape`."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)
