"""The structural operations: each says where elements go, by rewriting layouts (`ops.layout`).

They stand in one file because they come in pairs: the inverse of each is another one (`Split` and `Concat`, `Pad` and
`Truncate`, `Fill` and `Drop`, `Alias` and `Same`). Each is a class of its own that needs no other to be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.ops import layout as table
from streamconv.ops.arrays import numpy
from streamconv.ops.checks import check_axis, parsed
from streamconv.ops.expression import Expression, Op, Structural, apply, renamed
from streamconv.ops.layout import Layout
from streamconv.storage.files import spans
from streamconv.tensor import Extent, Shape, Stored, TensorSpec, row_major_strides

# Results of one operation, and indices of a table that is inverted: bounds for what a plan may ask for
# in a few bytes, well above any number of experts, tied names or vocabulary rows.
_MAX_RESULTS = 1 << 16
_MAX_INDICES = 1 << 20


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _check_alike(what: str, operands: Sequence[TensorSpec], axis: int | None = None) -> None:
    """Refuse operands of several shapes; with `axis`, of shapes that differ in more than that."""

    def held(shape: Shape) -> tuple[int, Shape]:
        return len(shape), shape if axis is None else _without(shape, axis)

    first = operands[0]
    for other in operands:
        if held(other.shape) != held(first.shape):
            raise PlanError(
                f"{what}: '{first.name}' is {list(first.shape)}, '{other.name}' is {list(other.shape)}",
                tensor=first.name,
            )


def _check_fill(op: str, value: float, dtype: DType, tensor: str | None = None) -> None:
    """Refuse a fill that a dtype cannot hold: integers exactly, floats up to rounding."""
    if dtype.kind in ("float", "complex"):
        try:
            with numpy.errstate(all="ignore"):
                made = float(numpy.array(float(value)).astype(dtype.numpy).real)
        except OverflowError:  # an integer beyond any float
            made = math.inf
        right = _outline(made) == _outline(value)
    else:
        bounds = None if dtype.kind == "bool" else numpy.iinfo(dtype.numpy)
        low, high = (bounds.min, bounds.max) if bounds else (0, 1)
        right = low <= value <= high and value == int(value)
    if not right:
        raise PlanError(f"{op} of {dtype} with {value}, which that dtype cannot hold", tensor=tensor)


def _outline(value: float) -> tuple[bool, bool, bool, bool]:
    return value > 0, value < 0, value in (math.inf, -math.inf), value != value


@dataclass(frozen=True)
class Reshape(Structural):
    """The same elements in row-major order under `shape`; one dimension may be -1."""

    name: ClassVar[str] = "reshape"
    shape: Shape

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        return (self._resolved(operand.shape, operand.name),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        return (table.reshaped(operand, self._resolved(operand.shape, None)),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Reshape(operands[0].shape)

    def _resolved(self, source: Shape, name: str | None) -> Shape:
        known = math.prod(size for size in self.shape if size != -1)
        free = self.shape.count(-1)
        total = math.prod(source)
        fits = known == total if not free else free == 1 and known != 0 and total % known == 0
        if not fits or min(self.shape, default=0) < -1:
            raise PlanError(
                f"reshape of {list(source)}, {total} elements, to {list(self.shape)}", tensor=name
            )
        return tuple(total // known if size == -1 else size for size in self.shape)


@dataclass(frozen=True)
class Split(Structural):
    """One tensor into parts of `sizes` along `axis`; the sizes must add up."""

    name: ClassVar[str] = "split"
    axis: int
    sizes: tuple[int, ...]

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        axis = check_axis(self.name, self.axis, operand)
        if not self.sizes or min(self.sizes) < 0 or sum(self.sizes) != operand.shape[axis]:
            raise PlanError(
                f"split of axis {axis} of {list(operand.shape)} into {list(self.sizes)}: "
                f"the parts have {sum(self.sizes)}, the axis has {operand.shape[axis]}",
                tensor=operand.name,
            )
        return tuple(_with(operand.shape, axis, size) for size in self.sizes)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        stops = list(accumulate(self.sizes))
        return tuple(
            table.narrow(operand, self.axis, stop - size, stop)
            for size, stop in zip(self.sizes, stops, strict=True)
        )

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Concat(self.axis)


@dataclass(frozen=True)
class Concat(Structural):
    """Tensors one after the other along `axis`; their other dimensions are equal."""

    name: ClassVar[str] = "concat"
    arity: ClassVar[int | None] = None
    axis: int

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        axis = check_axis(self.name, self.axis, operands[0])
        _check_alike(f"concat on axis {axis}", operands, axis)
        return (_with(operands[0].shape, axis, sum(operand.shape[axis] for operand in operands)),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        return (table.joined(operands, self.axis),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Split(self.axis, tuple(operand.shape[self.axis] for operand in operands))


@dataclass(frozen=True)
class Stack(Structural):
    """Tensors of one shape as the slices of a new `axis`."""

    name: ClassVar[str] = "stack"
    arity: ClassVar[int | None] = None
    axis: int = 0

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        first = operands[0]
        if not 0 <= self.axis <= len(first.shape):
            raise PlanError(f"stack on axis {self.axis} of shape {list(first.shape)}", tensor=first.name)
        _check_alike("stack", operands)
        return ((*first.shape[: self.axis], len(operands), *first.shape[self.axis :]),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        slices = [
            table.reshaped(operand, (*operand.shape[: self.axis], 1, *operand.shape[self.axis :]))
            for operand in operands
        ]
        return (table.joined(slices, self.axis),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Unstack(self.axis, len(operands))


@dataclass(frozen=True)
class Unstack(Structural):
    """The `count` slices of `axis` as tensors without that axis."""

    name: ClassVar[str] = "unstack"
    axis: int
    count: int

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        axis = check_axis(self.name, self.axis, operand)
        if operand.shape[axis] != self.count or not 0 < self.count <= _MAX_RESULTS:
            raise PlanError(
                f"unstack of axis {axis} of {list(operand.shape)} into {self.count}, from 1 to {_MAX_RESULTS}",
                tensor=operand.name,
            )
        return (_without(operand.shape, axis),) * self.count

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        shape = _without(operand.shape, self.axis)
        return tuple(
            table.reshaped(table.narrow(operand, self.axis, index, index + 1), shape)
            for index in range(self.count)
        )

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Stack(self.axis)


@dataclass(frozen=True)
class PermuteAxes(Structural):
    """Axis k of the result is axis `axes[k]` of the operand; (1, 0) is the transpose."""

    name: ClassVar[str] = "permute_axes"
    axes: tuple[int, ...]

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        if sorted(self.axes) != list(range(len(operand.shape))):
            raise PlanError(
                f"permute_axes of {list(operand.shape)} by {list(self.axes)}, which is not an order of its axes",
                tensor=operand.name,
            )
        return (tuple(operand.shape[axis] for axis in self.axes),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        return (table.permuted(operand, self.axes),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return PermuteAxes(tuple(self.axes.index(axis) for axis in range(len(self.axes))))


@dataclass(frozen=True)
class Take(Structural):
    """Slices of `axis` in the order of `runs`: each run is (start, step, count), step at least 1."""

    name: ClassVar[str] = "take"
    axis: int
    runs: tuple[tuple[int, int, int], ...]

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        axis = check_axis(self.name, self.axis, operand)
        if not self.runs:
            raise PlanError(f"take of nothing from axis {axis} of {list(operand.shape)}", tensor=operand.name)
        for start, step, count in self.runs:
            if start < 0 or step < 1 or count < 1 or start + (count - 1) * step >= operand.shape[axis]:
                raise PlanError(
                    f"take of {count} from {start} in steps of {step} on axis {axis} of {list(operand.shape)}",
                    tensor=operand.name,
                )
        return (_with(operand.shape, axis, sum(count for _, _, count in self.runs)),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        return (table.joined([table.pick(operand, self.axis, *run) for run in self.runs], self.axis),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """The inverse table, where each slice is taken exactly once (and they are not too many to list)."""
        size = operands[0].shape[self.axis]
        if size > _MAX_INDICES or sum(count for _, _, count in self.runs) != size:
            return None
        position = [-1] * size
        order = (start + index * step for start, step, count in self.runs for index in range(count))
        for index, source in enumerate(order):
            position[source] = index
        return Take(self.axis, index_runs(position)) if min(position, default=-1) >= 0 else None


def index_runs(indices: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """A list of indices as (start, step, count) runs with steps of at least 1, greedily.

    Two indices with a gap between them are two runs, so that the second may begin a run of neighbours.
    """
    runs: list[tuple[int, int, int]] = []
    at = 0
    while at < len(indices):
        step = indices[at + 1] - indices[at] if at + 1 < len(indices) else 0
        stop = at + 1
        while step >= 1 and stop < len(indices) and indices[stop] - indices[stop - 1] == step:
            stop += 1
        if step < 1 or (step > 1 and stop - at == 2):
            step, stop = 1, at + 1
        runs.append((indices[at], step, stop - at))
        at = stop
    return tuple(runs)


@dataclass(frozen=True)
class Pad(Structural):
    """The operand followed by `fill` on `axis`, up to a length of `to`."""

    name: ClassVar[str] = "pad"
    axis: int
    to: int
    fill: float = 0

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        axis = check_axis(self.name, self.axis, operand)
        if self.to < operand.shape[axis]:
            raise PlanError(
                f"pad of axis {axis} of {list(operand.shape)} to {self.to}, which is less",
                tensor=operand.name,
                hint="use truncate",
            )
        _check_fill(self.name, self.fill, operand.dtype, operand.name)
        return (_with(operand.shape, axis, self.to),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        rest = _with(operand.shape, self.axis, self.to - operand.shape[self.axis])
        return (table.joined([operand, table.filled(rest, self.fill)], self.axis),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Truncate(self.axis, operands[0].shape[self.axis], self.fill)


@dataclass(frozen=True)
class Truncate(Structural):
    """The first `to` slices of `axis`. With `fill`, what is cut off must be that, in every element."""

    name: ClassVar[str] = "truncate"
    axis: int
    to: int
    fill: float | None = None

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        axis = check_axis(self.name, self.axis, operand)
        if not 0 <= self.to <= operand.shape[axis]:
            raise PlanError(
                f"truncate of axis {axis} of {list(operand.shape)} to {self.to}, which is more",
                tensor=operand.name,
                hint="use pad to make it longer",
            )
        if self.fill is not None:
            _check_fill(self.name, self.fill, operand.dtype, operand.name)
        return (_with(operand.shape, axis, self.to),)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        return (table.narrow(operand, self.axis, 0, self.to),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Grow it again, where what was cut off is known."""
        return None if self.fill is None else Pad(self.axis, operands[0].shape[self.axis], self.fill)

    def checks(self, operands: Sequence[Expression]) -> tuple[tuple[Expression, Expression], ...]:
        (operand,) = operands
        size = operand.spec.shape[self.axis]
        if self.fill is None or size == self.to:
            return ()
        _, rest = apply(Split(self.axis, (self.to, size - self.to)), operand)
        return ((rest, fill(rest.spec, self.fill)),)


@dataclass(frozen=True)
class Fill(Structural):
    """A new tensor, every element `value`."""

    name: ClassVar[str] = "fill"
    arity: ClassVar[int | None] = 0
    dtype: str
    shape: Shape
    value: float = 0

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        dtype = parsed("fill of", self.dtype)
        if dtype.packed or min(self.shape, default=0) < 0:
            raise PlanError(f"fill cannot make {dtype} {list(self.shape)}")
        _check_fill(self.name, self.value, dtype)
        return (TensorSpec("", dtype, self.shape),)

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        return (self.shape,)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        return (table.filled(self.shape, self.value),)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Drop(self.value)


def fill(like: TensorSpec, value: float) -> Expression:
    """A tensor of another's spec, every element `value`."""
    (result,) = apply(Fill(like.dtype.name, like.shape, value))
    return renamed(result, like.name)


@dataclass(frozen=True)
class Drop(Structural):
    """A tensor that leads to no target. With `fill`, every element must be that."""

    name: ClassVar[str] = "drop"
    fill: float | None = None

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """No results. What is not looked at may be of any dtype."""
        return super().spec(operands) if self.fill is not None else ()

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        if self.fill is not None:
            _check_fill(self.name, self.fill, operand.dtype, operand.name)
        return ()

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (_,) = operands
        return ()

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        (operand,) = operands
        return None if self.fill is None else Fill(operand.dtype.name, operand.shape, self.fill)

    def checks(self, operands: Sequence[Expression]) -> tuple[tuple[Expression, Expression], ...]:
        (operand,) = operands
        return () if self.fill is None else ((operand, fill(operand.spec, self.fill)),)


@dataclass(frozen=True)
class Alias(Structural):
    """One tensor under `count` names (tied weights)."""

    name: ClassVar[str] = "alias"
    count: int = 2

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        (operand,) = operands
        if not 0 < self.count <= _MAX_RESULTS:
            raise PlanError(f"alias under {self.count} names, from 1 to {_MAX_RESULTS}", tensor=operand.name)
        return (operand.shape,) * self.count

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        (operand,) = operands
        return (operand,) * self.count

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Same()


@dataclass(frozen=True)
class Same(Structural):
    """One of several tensors that must be equal: tied names, or what every rank holds a copy of."""

    name: ClassVar[str] = "same"
    arity: ClassVar[int | None] = None

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        _check_alike("same", operands)
        return (operands[0].shape,)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        return (operands[0],)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Alias(len(operands))

    def checks(self, operands: Sequence[Expression]) -> tuple[tuple[Expression, Expression], ...]:
        return tuple((operands[0], other) for other in operands[1:])


@dataclass(frozen=True)
class Strided(Structural):
    """A view of a flat storage as torch describes views: a first element, a shape, and strides."""

    name: ClassVar[str] = "strided"
    shape: Shape
    strides: tuple[int, ...]
    offset: int = 0

    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        """The field, if no element of it lies outside the storage."""
        (operand,) = operands
        inside = (
            len(operand.shape) == 1
            and len(self.shape) == len(self.strides)
            and min(self.offset, *self.shape, *self.strides, 0) == 0
        )
        if inside and 0 not in self.shape:
            steps = zip(self.shape, self.strides, strict=True)
            inside = self.offset + sum((size - 1) * stride for size, stride in steps) < operand.numel
        if not inside:
            raise PlanError(
                f"strided view {list(self.shape)} with strides {list(self.strides)} from {self.offset} "
                f"reaches outside its storage of {list(operand.shape)}",
                tensor=operand.name,
            )
        return (self.shape,)

    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        """A strided walk of the storage. Raises PlanError for one that is not evenly spaced itself."""
        (operand,) = operands
        if 0 in self.shape:
            return (Layout(self.shape, ()),)
        if len(operand.pieces) != 1 or len(operand.pieces[0].loops) > 1:
            raise PlanError(f"strided view {list(self.shape)} of a storage that is itself in pieces")
        (piece,) = operand.pieces
        pitch = piece.loops[0].stride if piece.loops else 1
        strides = tuple(stride * pitch for stride in self.strides)
        made = table.strided(self.shape, strides, piece.start + self.offset * pitch, piece.source)
        return (replace(made, pieces=tuple(replace(each, fill=piece.fill) for each in made.pieces)),)


def strided(storage: Stored, spec: TensorSpec, strides: Sequence[int], offset: int) -> Expression:
    """A view of a flat `storage` (shape [n], the view's dtype); strides and offset in elements.

    A contiguous view is itself stored; any other is a node.

    Raises:
        PlanError: the view reaches outside its storage.
    """
    op = Strided(spec.shape, tuple(strides), offset)
    op.shapes([replace(storage.spec, name=spec.name)])
    if 0 in spec.shape:
        return Stored(spec, ())
    contiguous = all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(spec.shape, strides, row_major_strides(spec.shape), strict=True)
    )
    if contiguous and (offset * spec.dtype.bits) % 8 == 0 and (spec.numel * spec.dtype.bits) % 8 == 0:
        runs = spans(storage.extents, offset * spec.dtype.bits // 8, spec.nbytes)
        return Stored(spec, tuple(Extent(*run) for run in runs))
    (view,) = apply(op, storage)
    return renamed(view, spec.name)
