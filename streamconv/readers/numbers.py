"""Numbers from files, checked before anything is computed with them: counts, offsets, shapes, and values of tensors."""

from __future__ import annotations

import struct
from math import prod

from streamconv.ops import Expression
from streamconv.readers.window import Window
from streamconv.storage.location import locate
from streamconv.tensor import Shape, Stored

MOST = 1 << 62
"""No count, offset or number of elements is more; what is added up from a few of them stays in 64 bits."""

_FORMS = {"I64": "q", "I32": "i", "F32": "f", "F64": "d", "BOOL": "?"}
_MOST_VALUES = 1 << 20

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


def values(tensor: Expression) -> tuple[float | int | bool, ...] | None:
    """The elements of a small tensor of ordinary numbers, which are read; None of any other."""
    form = _FORMS.get(tensor.spec.dtype.name)
    if form is None or not isinstance(tensor, Stored) or len(tensor.extents) != 1:
        return None
    (extent,) = tensor.extents
    if tensor.spec.numel > _MOST_VALUES:
        return None
    with Window(locate(extent.file)) as window:
        return struct.unpack(f"<{tensor.spec.numel}{form}", window.read(extent.offset, extent.length))
