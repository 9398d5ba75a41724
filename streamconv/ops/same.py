"""The same tensor in another shape, order or dtype; itself where it is so already."""

from __future__ import annotations

from streamconv.ops.cast import Cast
from streamconv.ops.expression import Expression, apply
from streamconv.ops.structural import PermuteAxes, Reshape
from streamconv.tensor import Shape


def reshaped(tensor: Expression, shape: Shape) -> Expression:
    """The same elements in another shape."""
    return tensor if tensor.spec.shape == shape else apply(Reshape(shape), tensor)[0]


def turned(tensor: Expression) -> Expression:
    """The last two axes exchanged."""
    axes = len(tensor.spec.shape)
    return apply(PermuteAxes((*range(axes - 2), axes - 1, axes - 2)), tensor)[0]


def in_dtype(tensor: Expression, dtype: str) -> Expression:
    """In another dtype, by its name."""
    return tensor if tensor.spec.dtype.name == dtype else apply(Cast(dtype), tensor)[0]
