"""Where two blocks of bytes differ, in elements of a dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from streamconv.dtypes import DType
from streamconv.ops.arrays import Array

# Bytes compared at a time: the mask that says which of them differ takes memory of its own.
_COMPARED = 256 << 10


@dataclass(frozen=True, slots=True)
class Difference:
    """The first element of a tensor that is not what it should be: its position, and both values as text."""

    element: int
    expected: str
    found: str


def first_difference(
    dtype: DType, start: int, expected: Array, found: Array, tolerance: float = 0.0
) -> Difference | None:
    """The first difference of two byte blocks that begin at byte `start` of the tensor.

    `tolerance` is the relative difference that numbers may have; with 0, every bit must be equal.
    """
    for at in range(0, len(expected), _COMPARED):
        sides = expected[at : at + _COMPARED], found[at : at + _COMPARED]
        position = None if numpy.array_equal(*sides) else _position(dtype, *sides, tolerance)
        if position is None:
            continue
        first, size = start + at + position, 1 if dtype.packed else dtype.itemsize
        shown = [side[position : position + size] for side in sides]
        if dtype.packed:
            return Difference(first * 8 // dtype.bits, *(f"{side[0]:#x}" for side in shown))
        return Difference(first // size, *(str(side.view(dtype.numpy)[0]) for side in shown))
    return None


def _position(dtype: DType, expected: Array, found: Array, tolerance: float) -> int | None:
    """The first byte of the first element that differs; for packed dtypes, the first byte that differs."""
    size = 1 if dtype.packed else dtype.itemsize
    unlike = (expected != found).reshape(-1, size).any(axis=1)
    if tolerance and not dtype.packed:
        wide = numpy.complex128 if dtype.kind == "complex" else numpy.float64
        wanted, other = (side.view(dtype.numpy).astype(wide) for side in (expected, found))
        unlike &= ~numpy.isclose(wanted, other, rtol=tolerance, atol=0.0)
    return int(numpy.argmax(unlike)) * size if unlike.any() else None
