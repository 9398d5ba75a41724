"""The table behind every structural operation: which source element each target element is.

A structural operation (reshape, split, concat, permute, ...) never computes. It rewrites a `Layout`: a
target shape and the `Piece`s that fill it. A piece is a nest of loops; each loop walks one axis of the
target in steps, and the source in a stride:

    target[origin + sum(index_k * step_k on axis_k)] = source.flat[start + sum(index_k * stride_k)]

Operations compose by rewriting the pieces that they are given, so a chain of any length is one table,
and what is a run of bytes from end to end comes out as one run. All coordinates count elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from streamconv.errors import PlanError
from streamconv.tensor import Shape, row_major_strides

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: (start, stop) on each axis."""

FILL = -1
"""The `source` of a piece that comes from no tensor: every element is `Piece.fill`."""

# A chain that shatters into more pieces than this has no structure worth a table: it would be moved
# an element at a time, and the table itself would outgrow the data.
_MAX_PIECES = 1 << 17


@dataclass(frozen=True, slots=True)
class Loop:
    """`count` steps along target `axis`, `step` coordinates each, `stride` source elements each."""

    axis: int
    count: int
    step: int
    stride: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A nest of loops from one source (see the module). No loop has a count below 2."""

    source: int
    start: int
    origin: Shape
    loops: tuple[Loop, ...]
    fill: float = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A target shape and the pieces that cover each of its elements exactly once."""

    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A piece within one row-major block: plain strides on both sides, adjacent loops merged.

    `loops` are (count, target stride, source stride), largest source stride first.
    """

    source: int
    source_start: int
    target_start: int
    loops: tuple[tuple[int, int, int], ...]
    fill: float = 0

    @property
    def run(self) -> int:
        """Elements that are consecutive on both sides, the longest that every inner walk has."""
        return self.loops[-1][0] if self.loops and self.loops[-1][1:] == (1, 1) else 1

    @property
    def numel(self) -> int:
        """Elements this move fills."""
        return math.prod(count for count, _, _ in self.loops)


# ------------------------------------------------------------------------------------- making


def identity(shape: Shape, source: int) -> Layout:
    """The layout of a row-major source tensor as itself."""
    return strided(shape, row_major_strides(shape), 0, source)


def strided(shape: Shape, strides: Sequence[int], start: int, source: int) -> Layout:
    """A view of a flat source: element `start` first, `strides` elements between neighbours."""
    if 0 in shape:
        return Layout(shape, ())
    loops = tuple(
        Loop(axis, count, 1, stride)
        for axis, (count, stride) in enumerate(zip(shape, strides, strict=True))
        if count > 1
    )
    return Layout(shape, (Piece(source, start, (0,) * len(shape), loops),))


def filled(shape: Shape, value: float) -> Layout:
    """A layout that comes from no source: every element is `value`."""
    return Layout(
        shape,
        tuple(replace(piece, fill=value) for piece in strided(shape, (0,) * len(shape), 0, FILL).pieces),
    )


# ---------------------------------------------------------------------------------- rewriting


def narrow(layout: Layout, axis: int, start: int, stop: int) -> Layout:
    """The part of `layout` with coordinates [start, stop) on `axis`."""
    shape = (*layout.shape[:axis], stop - start, *layout.shape[axis + 1 :])
    if start == 0 and stop == layout.shape[axis]:
        return layout
    return _layout(
        shape,
        (
            _moved(piece, axis, -start)
            for whole in layout.pieces
            for piece in _within(whole, axis, start, stop)
        ),
    )


def pick(layout: Layout, axis: int, start: int, step: int, count: int) -> Layout:
    """Every `step`-th slice of `layout` along `axis`: `count` of them from `start`."""
    if step == 1:
        return narrow(layout, axis, start, start + count)
    shape = (*layout.shape[:axis], count, *layout.shape[axis + 1 :])
    pieces: list[Piece] = []
    for piece in layout.pieces:
        along = [loop for loop in piece.loops if loop.axis == axis]
        if not along or (len(along) == 1 and along[0].step == 1):
            pieces.extend(_picked(piece, axis, along[0] if along else None, start, step, count))
        else:
            pieces.extend(
                _moved(part, axis, index - (start + index * step))
                for index in range(count)
                for part in _within(piece, axis, start + index * step, start + index * step + 1)
            )
    return _layout(shape, pieces)


def joined(layouts: Sequence[Layout], axis: int) -> Layout:
    """The layouts one after the other along `axis`."""
    pieces: list[Piece] = []
    offset = 0
    for layout in layouts:
        pieces.extend(_moved(piece, axis, offset) for piece in layout.pieces)
        offset += layout.shape[axis]
    first = layouts[0].shape
    return _layout((*first[:axis], offset, *first[axis + 1 :]), pieces)


def permuted(layout: Layout, axes: Sequence[int]) -> Layout:
    """The layout with its axes in another order: axis k of the result is axis `axes[k]`."""
    to = {axis: position for position, axis in enumerate(axes)}
    return Layout(
        tuple(layout.shape[axis] for axis in axes),
        tuple(
            replace(
                piece,
                origin=tuple(piece.origin[axis] for axis in axes),
                loops=tuple(replace(loop, axis=to[loop.axis]) for loop in piece.loops),
            )
            for piece in layout.pieces
        ),
    )


def reshaped(layout: Layout, shape: Shape) -> Layout:
    """The same elements in the same row-major order under another shape."""
    if shape == layout.shape:
        return layout
    old, new = row_major_strides(layout.shape), row_major_strides(shape)
    pieces: list[Piece] = []
    for piece in layout.pieces:
        base = sum(map(int.__mul__, piece.origin, old))
        loops = _merged((loop.count, loop.step * old[loop.axis], loop.stride) for loop in piece.loops)
        _align(piece, base, piece.start, loops, shape, new, pieces)
    return Layout(shape, tuple(pieces))


# ------------------------------------------------------------------------------------ reading


def moves(layout: Layout, box: Box) -> list[Move]:
    """What fills the row-major block `box` of the target; positions count from the block's start."""
    shape = tuple(stop - start for start, stop in box)
    strides = row_major_strides(shape)
    starts = tuple(start for start, _ in box)
    cut = [axis for axis, (start, stop) in enumerate(box) if (start, stop) != (0, layout.shape[axis])]
    result = []
    for whole in layout.pieces:
        pieces = [whole]
        for axis in cut:
            pieces = [part for piece in pieces for part in _within(piece, axis, *box[axis])]
        for piece in pieces:
            target = sum(
                (at - start) * stride for at, start, stride in zip(piece.origin, starts, strides, strict=True)
            )
            loops = _merged((loop.count, loop.step * strides[loop.axis], loop.stride) for loop in piece.loops)
            by_source = sorted(loops, key=lambda loop: (-abs(loop[2]), -loop[1]))
            result.append(Move(piece.source, piece.start, target, tuple(by_source), piece.fill))
    return result


def whole(shape: Shape) -> Box:
    """The box that is all of a tensor of `shape`."""
    return tuple((0, count) for count in shape)


def boxes(shape: Shape, start: int, stop: int) -> list[Box]:
    """The fewest boxes that are, in order, the elements [start, stop) of a row-major tensor."""
    if start >= stop:
        return []
    if not shape:
        return [()]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        index = start // row
        return [
            ((index, index + 1), *box) for box in boxes(shape[1:], start - index * row, stop - index * row)
        ]
    result: list[Box] = []
    if start < first * row:
        index = first - 1
        result += [((index, first), *box) for box in boxes(shape[1:], start - index * row, row)]
    if first < last:
        result.append(((first, last), *whole(shape[1:])))
    if stop > last * row:
        result += [((last, last + 1), *box) for box in boxes(shape[1:], 0, stop - last * row)]
    return result


# ------------------------------------------------------------------------------------- pieces


def _layout(shape: Shape, pieces: Iterable[Piece]) -> Layout:
    return Layout(shape, tuple(pieces) if 0 not in shape else ())


def _moved(piece: Piece, axis: int, by: int) -> Piece:
    if not by:
        return piece
    origin = piece.origin
    return replace(piece, origin=(*origin[:axis], origin[axis] + by, *origin[axis + 1 :]))


def _within(piece: Piece, axis: int, start: int, stop: int) -> list[Piece]:
    """The parts of `piece` with coordinates [start, stop) on `axis`, where they are."""
    at = piece.origin[axis]
    along = [loop for loop in piece.loops if loop.axis == axis]
    reach = sum((loop.count - 1) * loop.step for loop in along)
    if at >= start and at + reach < stop:
        return [piece]
    if at >= stop or at + reach < start or not along:
        return []
    outer = max(along, key=lambda loop: loop.step)
    inner = reach - (outer.count - 1) * outer.step
    # Iterations [touched_from, touched_to) meet the range, [full_from, full_to) lie wholly in it.
    touched_from = max(-((at + inner - start) // outer.step), 0)
    touched_to = min((stop - 1 - at) // outer.step + 1, outer.count)
    full_from = max(-((at - start) // outer.step), 0)
    full_to = min((stop - 1 - inner - at) // outer.step + 1, outer.count)
    if full_from >= full_to:
        full_from = full_to = touched_to
    result: list[Piece] = []
    for index in range(touched_from, full_from):
        result += _within(_iterations(piece, outer, index, 1), axis, start, stop)
    if full_from < full_to:
        result.append(_iterations(piece, outer, full_from, full_to - full_from))
    for index in range(full_to, touched_to):
        result += _within(_iterations(piece, outer, index, 1), axis, start, stop)
    return result


def _iterations(piece: Piece, loop: Loop, first: int, count: int) -> Piece:
    """`piece` with only `count` iterations of one of its loops."""
    loops = tuple(
        replace(other, count=count) if other is loop else other
        for other in piece.loops
        if other is not loop or count > 1
    )
    moved = _moved(piece, loop.axis, first * loop.step)
    return replace(moved, start=piece.start + first * loop.stride, loops=loops)


def _picked(
    piece: Piece, axis: int, along: Loop | None, start: int, step: int, count: int
) -> Iterable[Piece]:
    at = piece.origin[axis]
    length, stride = (along.count, along.stride) if along else (1, 0)
    first = max(-((start - at) // step), 0)
    stop = min((at + length - 1 - start) // step + 1, count)
    if first >= stop:
        return ()
    others = tuple(loop for loop in piece.loops if loop.axis != axis)
    taken = (Loop(axis, stop - first, 1, stride * step),) if stop - first > 1 else ()
    return (
        replace(
            piece,
            start=piece.start + (start + first * step - at) * stride,
            origin=(*piece.origin[:axis], first, *piece.origin[axis + 1 :]),
            loops=others + taken,
        ),
    )


def _merged(loops: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Loops (count, target stride, source stride), outermost target first, adjacent ones as one."""
    result: list[tuple[int, int, int]] = []
    for count, target, source in sorted(loops, key=lambda loop: loop[1]):
        if result:
            inner_count, inner_target, inner_source = result[-1]
            if target == inner_target * inner_count and source == inner_source * inner_count:
                result[-1] = (inner_count * count, inner_target, inner_source)
                continue
        result.append((count, target, source))
    result.reverse()
    return result


def _align(
    piece: Piece,
    base: int,
    start: int,
    loops: list[tuple[int, int, int]],
    shape: Shape,
    strides: Shape,
    found: list[Piece],
) -> None:
    """Add to `found` the pieces that walk `loops` of the flat target with one axis of `shape` a loop.

    Where the loops' counts do not factor along the axes, the outermost is halved until they do.
    """
    fitted = _fit(base, loops, shape, strides)
    if fitted is not None:
        origin, axis_loops = fitted
        found.append(replace(piece, start=start, origin=origin, loops=axis_loops))
        if len(found) > _MAX_PIECES:
            raise PlanError(
                f"a reshape to {list(shape)} breaks into more than {_MAX_PIECES} pieces",
                hint="check the shapes of this rule: they have no common factor with the tensor's",
            )
        return
    (count, target, source), rest = loops[0], loops[1:]
    half = count // 2
    for first, many in ((0, half), (half, count - half)):
        part = [(many, target, source), *rest] if many > 1 else rest
        _align(piece, base + first * target, start + first * source, part, shape, strides, found)


def _fit(
    base: int, loops: Sequence[tuple[int, int, int]], shape: Shape, strides: Shape
) -> tuple[Shape, tuple[Loop, ...]] | None:
    """Origin and axis loops for flat `loops`, or None where some loop carries over an axis unevenly."""
    origin = tuple(base // stride % count for stride, count in zip(strides, shape, strict=True))
    reach = [0] * len(shape)
    result: list[Loop] = []
    for count, target, source in reversed(loops):
        while count > 1:
            axis = next(
                (k for k, size in enumerate(shape) if size > 1 and strides[k] <= target < strides[k] * size),
                None,
            )
            if axis is None or target % strides[axis]:
                return None
            step = target // strides[axis]
            used = origin[axis] + reach[axis]
            fitting = (shape[axis] - 1 - used) // step + 1
            if fitting < count:
                # Only a loop that fills the axis exactly can go on along the next one.
                fitting = shape[axis] // step
                if shape[axis] % step or used >= step or count % fitting:
                    return None
            many = min(fitting, count)
            if many > 1:
                result.append(Loop(axis, many, step, source))
                reach[axis] += (many - 1) * step
            elif many < count:
                return None
            count //= many
            target, source = target * many, source * many
    return origin, tuple(result)
