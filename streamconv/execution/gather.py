"""Reading the elements of a move (`ops.layout`) from files into their places.

Long runs are read straight into place. Short ones are read in tiles: what a tile needs is read into scratch in the
longest runs that the source has, narrow gaps included, and moved into place from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from streamconv.ops.layout import FILL, Move
from streamconv.ops.tiles import Loops, alike, by_source, spans, steps, transfer
from streamconv.storage.files import Files
from streamconv.tensor import Stored

Array = numpy.ndarray[Any, numpy.dtype[Any]]

# Runs of so many bytes are read straight into place: the cost of a call is small beside them.
LONG_RUN = 4 << 10

# Reading a gap as narrow as this takes no longer than another call.
_NARROW_GAP = 4 << 10

# Scratch of this size is still in a core's cache when the last of it is read and the first put in place.
_TILE = 1 << 20

# Steps of a tile along the axis on which the target is contiguous: cache lines are filled whole.
_TARGET_STEPS = 128

_CACHE_LINE = 64
_SOME_LINES = 8


def is_scattered(moves: Sequence[Move], itemsize: int) -> bool:
    """Whether some runs are short because target and source are walked in different orders.

    Then the source's runs are as long as a block of the target is tall.
    """
    return any(
        shared < move.numel and shared * itemsize < LONG_RUN
        for move in moves
        if move.source != FILL
        for shared in (alike(move.loops),)
    )


def gather(files: Files, source: Stored, move: Move, flat: Array, scratch: Array) -> None:
    """Fill a move's places in `flat`.

    Args:
        files: where the source is read from.
        source: what the move's source positions count in.
        move: what to read.
        flat: the block, 1-d, of integers as wide as the source's elements.
        scratch: bytes that hold at least one element; what they held is lost.
    """
    size = flat.itemsize
    run = move.run
    around = by_source(move.loops)[1 if run > 1 else 0 :]
    gap = around[0][2] - run if around else 0
    if run == move.numel or run * size >= LONG_RUN or (run > 1 and gap * size > _NARROW_GAP):
        _read(files, source, move.source_start, run, flat[move.target_start :], around)
        return
    loops = by_source(move.loops)
    room = min(len(scratch), _TILE) // size
    tile = _tile(loops, size, room)
    held = scratch[: len(scratch) // size * size].view(flat.dtype)
    for box in spans([count for count, _, _ in loops], tile.chunks):
        start, place = move.source_start, move.target_start
        for (_, to, by), (first, _) in zip(loops, box, strict=True):
            start, place = start + first * by, place + first * to
        counts = [stop - first for first, stop in box]
        unit = 1 + sum(
            (count - 1) * by for count, (_, _, by) in zip(counts[: tile.apart], loops, strict=False)
        )
        apart = [
            (count, stride, by)
            for count, stride, (_, _, by) in list(zip(counts, tile.strides, loops, strict=True))[tile.apart :]
            if count > 1 and by
        ]
        _read(files, source, start, unit, held, apart)
        walk = [
            (count, to, stride)
            for count, stride, (_, to, _) in zip(counts, tile.strides, loops, strict=True)
            if count > 1
        ]
        transfer(flat, place, held, 0, walk)


def _read(files: Files, source: Stored, start: int, run: int, target: Array, around: Loops) -> None:
    """Read runs of `run` elements into the places given by the loops around them, innermost first."""
    size = target.itemsize
    raw = target.view(numpy.uint8).data
    (count, to, by), *outer = around or [(1, 0, 0)]
    for place, come_from in steps(outer):
        files.read_runs(
            source.extents,
            (start + come_from) * size,
            by * size,
            raw[place * size :],
            to * size,
            run * size,
            count,
        )


@dataclass(frozen=True, slots=True)
class _Tile:
    """How much of each loop (innermost in the source first) is in scratch at once, and where.

    Attributes:
        chunks: steps of each loop.
        strides: elements in scratch between two steps of each loop.
        apart: the loops from this one on step from read to read; those before it lie within one read.
    """

    chunks: tuple[int, ...]
    strides: tuple[int, ...]
    apart: int


def _tile(loops: Loops, size: int, room: int) -> _Tile:
    """The largest tile of about the right proportions that `room` elements of scratch hold."""
    chunks = [1] * len(loops)

    def grow(index: int, most: int) -> None:
        least = chunks[index]
        chunks[index] = most
        while chunks[index] > least and _placed(loops, chunks, size)[1] > room:
            chunks[index] = max((chunks[index] + 1) // 2, least)

    # First enough of the target's innermost axis, then the longest runs, then all there is room for.
    contiguous = min(range(len(loops)), key=lambda index: loops[index][1])
    grow(contiguous, min(loops[contiguous][0], _TARGET_STEPS, math.isqrt(room)))
    for index, (count, _, _) in enumerate(loops):
        grow(index, count)
    return _placed(loops, chunks, size)[0]


def _placed(loops: Loops, chunks: Sequence[int], size: int) -> tuple[_Tile, int]:
    """A tile of these chunks, and the elements of scratch that it takes."""
    strides: list[int] = []
    taken, apart = 1, len(loops)
    for index, ((_, _, by), chunk) in enumerate(zip(loops, chunks, strict=True)):
        if apart == len(loops) and chunk > 1 and (by - taken) * size > _NARROW_GAP:
            apart = index
            taken = _pitch(taken, size)
        if index < apart or not by:
            strides.append(by)
            taken += (chunk - 1) * by
        else:
            strides.append(taken)
            taken *= chunk
    return _Tile(tuple(chunks), tuple(strides), apart), taken


def _pitch(run: int, size: int) -> int:
    """Elements from one run to the next in scratch: an odd number of cache lines, where runs fill some.

    A power of two would have the elements of a column share a few lines of a cache, pushing each other out.
    """
    lines = -(-run * size // _CACHE_LINE)
    return (lines | 1) * _CACHE_LINE // size if lines >= _SOME_LINES else run
