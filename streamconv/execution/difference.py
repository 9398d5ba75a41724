"""Where two blocks of bytes differ, in elements of a dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from streamconv.dtypes import DType
from streamconv.execution.evaluate import Array

# Bytes compared at a time: the mask that says which of them differ takes memory of its own.
_COMPARED = 256 << 10


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a tensor first is not what it should be: element position, and both values as text."""

    element: int
    expected: str
    found: str


def first_difference(dtype: DType, start: int, expected: Array, found: Array) -> Difference | None:
    """The first difference of two byte blocks; `start` is the byte of the tensor that they begin at."""
    position = next(
        (
            at + int(numpy.argmax(found[at : at + _COMPARED] != expected[at : at + _COMPARED]))
            for at in range(0, len(expected), _COMPARED)
            if not numpy.array_equal(found[at : at + _COMPARED], expected[at : at + _COMPARED])
        ),
        None,
    )
    if position is None:
        return None
    if dtype.packed:
        return Difference(
            (start + position) * 8 // dtype.bits, f"{expected[position]:#x}", f"{found[position]:#x}"
        )
    first = position // dtype.itemsize
    return Difference(
        start // dtype.itemsize + first,
        str(expected.view(dtype.numpy)[first]),
        str(found.view(dtype.numpy)[first]),
    )


def close(dtype: DType, expected: Array, found: Array, tolerance: float) -> bool:
    """Whether two byte blocks hold the same numbers, but for a relative difference of `tolerance`."""
    wanted, other = (side.view(dtype.numpy).astype(numpy.float64) for side in (expected, found))
    return numpy.allclose(wanted, other, rtol=tolerance, atol=0.0)
