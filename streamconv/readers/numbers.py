"""Numbers from files, checked before anything is computed with them: counts, offsets and shapes."""

from __future__ import annotations

from math import prod

from streamconv.tensor import Shape

MOST = 1 << 62
"""No count, offset or number of elements is more; what is added up from a few of them stays in 64 bits."""

MAX_DIMENSIONS = 64  # as in torch (c10/core/TensorImpl.h)


def natural(value: object, most: int = MOST) -> int | None:
    """A count from a file; None where it is none, as a bool is not."""
    return value if type(value) is int and 0 <= value <= most else None


def naturals(values: object, most: int = MOST) -> tuple[int, ...] | None:
    """A list or tuple of counts from a file; None where it is none."""
    if not isinstance(values, (list, tuple)):
        return None
    if values and ({*map(type, values)} != {int} or min(values) < 0 or max(values) > most):
        return None
    return tuple(values)


def shape(value: object) -> Shape | None:
    """A shape from a file; None where it is none, or has more elements than there can be."""
    sizes = naturals(value)
    if sizes is None or len(sizes) > MAX_DIMENSIONS or prod(size or 1 for size in sizes) > MOST:
        return None
    return sizes
