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
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from streamconv.errors import PlanError
from streamconv.tensor import Shape, row_major_strides

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: (start, stop) on each axis."""

FILL = -1
"""The `source` of a piece that comes from no tensor: every element is `Piece.fill`."""

# A reshape that shatters a table into more pieces than this has no structure worth a table: it would be
# moved an element at a time, and the table itself would outgrow the data.
_MAX_PIECES = 1 << 17


@dataclass(frozen=True, slots=True)
class Loop:
    """`count` steps along target `axis`, `step` coordinates each, `stride` source elements each.

    `step` is positive and `stride` is not negative: no operation walks backwards.
    """

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


@dataclass(frozen=True)
class Layout:
    """A target shape and the pieces that cover each of its elements exactly once."""

    shape: Shape
    pieces: tuple[Piece, ...]

    def between(self, start: int, stop: int) -> Sequence[Piece]:
        """All pieces with elements in [start, stop) of the first axis, and perhaps others near by.

        Takes a search, not a pass: a table may have a piece for each of a thousand experts, and is asked
        for every block.
        """
        ordered, begins, ends = self._by_first_axis
        return ordered[bisect_right(ends, start) : bisect_left(begins, stop)]

    @cached_property
    def _by_first_axis(self) -> tuple[list[Piece], list[int], list[int]]:
        """The pieces by where they begin, where each begins, and how far any up to it reaches."""
        ordered = sorted(self.pieces, key=lambda piece: piece.origin[0])
        ends = accumulate((piece.origin[0] + _reach(piece, 0) + 1 for piece in ordered), max)
        return ordered, [piece.origin[0] for piece in ordered], list(ends)


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
    blank = strided(shape, (0,) * len(shape), 0, FILL)
    return Layout(shape, tuple(replace(piece, fill=value) for piece in blank.pieces))


# ---------------------------------------------------------------------------------- rewriting


def narrow(layout: Layout, axis: int, start: int, stop: int) -> Layout:
    """The part of `layout` with coordinates [start, stop) on `axis`."""
    if start == 0 and stop == layout.shape[axis]:
        return layout
    shape = (*layout.shape[:axis], stop - start, *layout.shape[axis + 1 :])
    near = layout.pieces if axis else layout.between(start, stop)
    return _layout(
        shape,
        (_moved(part, axis, -start) for piece in near for part in _within(piece, axis, start, stop)),
    )


def pick(layout: Layout, axis: int, start: int, step: int, count: int) -> Layout:
    """Every `step`-th slice of `layout` along `axis`: `count` of them from `start`."""
    if step == 1 or count == 1:
        return narrow(layout, axis, start, start + count)
    # A column of the axis cut into rows of `step`. The column is chosen so that the last row ends with
    # the axis where it can; where it cannot, nothing lies in the rest of that row.
    before, size, after = layout.shape[:axis], layout.shape[axis], layout.shape[axis + 1 :]
    column = max(min(start, start + count * step - size), 0)
    first, stop = start - column, start - column + count * step
    rows = reshaped(narrow(layout, axis, first, stop), (*before, count, step, *after))
    return reshaped(narrow(rows, axis + 1, column, column + 1), (*before, count, *after))


def joined(layouts: Sequence[Layout], axis: int) -> Layout:
    """The layouts one after the other along `axis`; at least one."""
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
    """The same elements in the same row-major order under another shape.

    Raises:
        PlanError: the result has no structure (`_MAX_PIECES`).
    """
    if shape == layout.shape:
        return layout
    strides, onto = row_major_strides(layout.shape), row_major_strides(shape)
    most = _MAX_PIECES + len(layout.pieces)
    pieces: list[Piece] = []
    for piece in layout.pieces:
        loops = _merged((loop.count, loop.step * strides[loop.axis], loop.stride) for loop in piece.loops)
        waiting = [_Walk(_flat(piece.origin, strides), piece.start, loops)]
        while waiting:
            walk = waiting.pop()
            fitted = _fit(walk, shape, onto)
            if isinstance(fitted, list):
                waiting.extend(reversed(fitted))
                continue
            origin = _coordinates(walk.base, shape)
            pieces.append(replace(piece, start=walk.start, origin=origin, loops=fitted))
            if len(pieces) > most:
                raise PlanError(
                    f"a reshape of {list(layout.shape)} to {list(shape)} breaks into more than {most} pieces",
                    hint="check the shapes of this rule: the steps before it leave them no common factor",
                )
    return Layout(shape, tuple(pieces))


# ------------------------------------------------------------------------------------ reading


def moves(layout: Layout, box: Box) -> list[Move]:
    """What fills the row-major block `box` of the target; positions count from the block's start."""
    strides = row_major_strides(tuple(stop - start for start, stop in box))
    corner = _flat([start for start, _ in box], strides)
    cut = [axis for axis, span in enumerate(box) if span != (0, layout.shape[axis])]
    result = []
    for near in layout.between(*box[0]) if 0 in cut else layout.pieces:
        pieces = [near]
        for axis in cut:
            pieces = [part for piece in pieces for part in _within(piece, axis, *box[axis])]
        for piece in pieces:
            loops = _merged((loop.count, loop.step * strides[loop.axis], loop.stride) for loop in piece.loops)
            by_source = tuple(sorted(loops, key=lambda loop: (-loop[2], -loop[1])))
            target = _flat(piece.origin, strides) - corner
            result.append(Move(piece.source, piece.start, target, by_source, piece.fill))
    return result


def cropped(move: Move, shape: Shape) -> tuple[Box, Move]:
    """A small box that holds all that a move reads of its source, and the move with positions in that box.

    It is the smallest one, unless the move runs unevenly over the axes of the source, as a reshape may; then
    it holds the flat range of the move. `shape` is the source's.
    """
    first = _coordinates(move.source_start, shape)
    # How it walks the axes of its source (each loop's stride is the target's), if it does so evenly.
    by_source = sorted(((count, by, to) for count, to, by in move.loops if by), key=lambda loop: -loop[1])
    loops = _fit(_Walk(move.source_start, 0, tuple(by_source)), shape, row_major_strides(shape))
    if isinstance(loops, tuple):
        last = list(first)
        for loop in loops:
            last[loop.axis] += (loop.count - 1) * loop.step
        box = tuple((low, high + 1) for low, high in zip(first, last, strict=True))
    else:
        end = _coordinates(move.source_start + sum((count - 1) * by for count, _, by in move.loops), shape)
        shared = next(axis for axis, (low, high) in enumerate(zip(first, end, strict=True)) if low != high)
        box = (
            *((at, at + 1) for at in first[:shared]),
            (first[shared], end[shared] + 1),
            *whole(shape[shared + 1 :]),
        )
    if box == whole(shape):
        return box, move
    strides = row_major_strides(tuple(stop - start for start, stop in box))
    start = _flat([at - low for at, (low, _) in zip(first, box, strict=True)], strides)
    if not isinstance(loops, tuple):  # the axes that it runs over are as long in the box
        return box, replace(move, source_start=start)
    still = tuple((count, to, by) for count, to, by in move.loops if not by)
    walked = tuple((loop.count, loop.stride, loop.step * strides[loop.axis]) for loop in loops)
    return box, replace(move, source_start=start, loops=walked + still)


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


def _flat(coordinates: Sequence[int], strides: Sequence[int]) -> int:
    return sum(at * stride for at, stride in zip(coordinates, strides, strict=True))


def _coordinates(flat: int, shape: Shape) -> Shape:
    return tuple(flat // stride % size for stride, size in zip(row_major_strides(shape), shape, strict=True))


def _moved(piece: Piece, axis: int, by: int) -> Piece:
    if not by:
        return piece
    origin = piece.origin
    return replace(piece, origin=(*origin[:axis], origin[axis] + by, *origin[axis + 1 :]))


def _reach(piece: Piece, axis: int) -> int:
    """How far beyond its origin a piece goes on `axis`."""
    return sum((loop.count - 1) * loop.step for loop in piece.loops if loop.axis == axis)


def _within(piece: Piece, axis: int, start: int, stop: int) -> list[Piece]:
    """The parts of `piece` with coordinates [start, stop) on `axis`, where they are."""
    at, beyond = piece.origin[axis], _reach(piece, axis)
    if at >= stop or at + beyond < start:
        return []
    if at >= start and at + beyond < stop:
        return [piece]
    along = [loop for loop in piece.loops if loop.axis == axis]
    outer = max(along, key=lambda loop: loop.step)
    inner = beyond - (outer.count - 1) * outer.step
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


def _merged(loops: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Loops (count, target stride, source stride), outermost target first, adjacent ones as one."""
    result: list[tuple[int, int, int]] = []
    for count, target, source in sorted(loops, key=lambda loop: loop[1]):
        if result:
            inner_count, inner_target, inner_source = result[-1]
            if target == inner_target * inner_count and source == inner_source * inner_count:
                result[-1] = (inner_count * count, inner_target, inner_source)
                continue
        result.append((count, target, source))
    return tuple(reversed(result))


# -------------------------------------------------------------------------- walks along axes


@dataclass(frozen=True, slots=True)
class _Walk:
    """A piece over a flat target: loops (count, target stride, source stride), outermost first."""

    base: int
    start: int
    loops: tuple[tuple[int, int, int], ...]

    def cut(self, index: int, first: int) -> list[_Walk]:
        """Two walks: `first` iterations of one loop, and the rest."""
        count, target, source = self.loops[index]
        return [
            self._with(index, (first, target, source)),
            replace(self, base=self.base + first * target, start=self.start + first * source)._with(
                index, (count - first, target, source)
            ),
        ]

    def grouped(self, index: int, size: int) -> list[_Walk]:
        """One walk, with one loop as a loop over groups of `size` iterations, which divides its count."""
        count, target, source = self.loops[index]
        return [self._with(index, (count // size, target * size, source * size), (size, target, source))]

    def _with(self, index: int, *loops: tuple[int, int, int]) -> _Walk:
        kept = tuple(loop for loop in loops if loop[0] > 1)
        return replace(self, loops=(*self.loops[:index], *kept, *self.loops[index + 1 :]))


def _fit(walk: _Walk, shape: Shape, strides: Shape) -> tuple[Loop, ...] | list[_Walk]:
    """The loops of a walk along the axes of `shape`; or, where one of them fits no axis, walks that come closer.

    A loop fits an axis if none of its steps carries over into the next one, or if all carry alike because
    the loop fills the axis exactly, time and again: then it continues along the next axis.
    """
    room = [size - 1 - at for size, at in zip(shape, _coordinates(walk.base, shape), strict=True)]
    result: list[Loop] = []
    for index in reversed(range(len(walk.loops))):
        total, target, source = walk.loops[index]
        count = total
        while count > 1:
            axis = next(k for k, size in enumerate(shape) if strides[k] <= target < strides[k] * size)
            size, stride = shape[axis], strides[axis]
            step, askew = divmod(target, stride)
            fitting = room[axis] // step + 1
            taken = count
            if askew or fitting < count:
                done = total // count
                if askew:
                    phases, first = stride // math.gcd(target, stride), count // 2
                else:
                    phases, first = size // math.gcd(size, step), fitting
                if askew or size % step:
                    # Where the steps fall on the axis recurs after so many of them, and only then.
                    if count > phases:
                        rest = total % (phases * done)
                        return walk.cut(index, total - rest) if rest else walk.grouped(index, phases * done)
                    return walk.cut(index, first * done)
                taken = size // step
                if fitting < taken:  # up to the end of the axis, so that the rest begins at its beginning
                    return walk.cut(index, fitting * done)
                if count % taken:
                    return walk.cut(index, (count - count % taken) * done)
            result.append(Loop(axis, taken, step, source))
            room[axis] -= (taken - 1) * step
            count, target, source = count // taken, target * taken, source * taken
    return tuple(result)
