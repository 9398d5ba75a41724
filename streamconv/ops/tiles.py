"""Copying between two orders of the same elements in tiles that stay in the processor's caches.

Loops are (count, target stride, source stride), as in `layout.Move`. Where both sides walk alike, NumPy's
own copy is the best there is. Where they do not (a transpose), one side of it takes an element of a cache
line at a time, and the line is gone before its next element's turn: ten times slower, so that is tiled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from streamconv.ops.arrays import Array, numpy

Loops = Sequence[tuple[int, int, int]]

# Steps of a tile along the target's and along the source's innermost axis, and elements in all. Measured:
# squares of 64 and slabs of 16 or 1024 are slower for all widths from 1 to 8 bytes.
_TARGET_STEPS = 128
_SOURCE_STEPS = 256
_ELEMENTS = _TARGET_STEPS * _SOURCE_STEPS

# Runs of so many bytes use whole cache lines in any order.
_LONG_RUN = 256


def codes(array: Array) -> Array:
    """Elements as integers of their width, where there are such.

    NumPy moves those faster than types of `ml_dtypes`, and cannot walk all of these in strides.
    """
    return array.view(f"u{array.itemsize}") if array.itemsize <= 8 else array


def by_target(loops: Loops) -> list[tuple[int, int, int]]:
    """The loops in the order the target is walked, innermost first."""
    return sorted(loops, key=lambda loop: loop[1])


def by_source(loops: Loops) -> list[tuple[int, int, int]]:
    """The loops in the order the source is walked, innermost first; what repeats the source comes last."""
    return sorted(loops, key=lambda loop: (not loop[2], loop[2], loop[1]))


def alike(loops: Loops) -> int:
    """Elements in the innermost loops that both sides walk in one order; all of them, or fewer."""
    shared = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(by_target(loops), by_source(loops), strict=True)
    )
    return math.prod(loop[0] for loop, _ in shared)


def transfer(target: Array, target_start: int, source: Array, source_start: int, loops: Loops) -> None:
    """Copy elements between flat arrays of one integer dtype, from the starts on."""
    size = target.itemsize
    order = by_target(loops)
    counts = tuple(count for count, _, _ in order)
    # Made by hand: `as_strided` takes longer than a tile.
    to, come_from = (
        numpy.ndarray(counts, flat.dtype, flat, start * size, tuple(loop[side] * size for loop in order))
        for flat, start, side in ((target, target_start, 1), (source, source_start, 2))
    )
    chunks = _chunks(order, size)
    if chunks == counts:
        to[...] = come_from
        return
    for tile in spans(counts, chunks):
        index = tuple(slice(start, stop) for start, stop in tile)
        to[index] = come_from[index]


def steps(loops: Loops) -> Iterator[tuple[int, int]]:
    """Every (target, source) displacement that a nest of loops visits, the last loop fastest."""
    for indices in itertools.product(*(range(count) for count, _, _ in loops)):
        yield (
            sum(index * to for index, (_, to, _) in zip(indices, loops, strict=True)),
            sum(index * by for index, (_, _, by) in zip(indices, loops, strict=True)),
        )


def spans(counts: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every box of `chunks` that `counts` are cut into, as (start, stop) of each, the first ones fastest."""
    axes = [
        [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
        for count, chunk in zip(counts, chunks, strict=True)
    ]
    for box in itertools.product(*reversed(axes)):
        yield box[::-1]


def _chunks(order: Loops, size: int) -> tuple[int, ...]:
    """How many steps of each loop, innermost in the target first, make a tile."""
    counts = tuple(count for count, _, _ in order)
    run = alike(order)
    if run == math.prod(counts) or run * size >= _LONG_RUN:
        return counts
    walked = by_source(order)
    shared = next(index for index, loop in enumerate(order) if loop != walked[index])
    chunks = [*counts[:shared], *(1 for _ in counts[shared:])]
    narrow = order.index(walked[shared])
    # The axis along which each side is contiguous, and then the rest, as far as a tile has room.
    chunks[shared] = min(counts[shared], max(_TARGET_STEPS // run, 8))
    chunks[narrow] = min(counts[narrow], max(_SOURCE_STEPS // run, 8))
    for index in range(shared, len(counts)):
        room = _ELEMENTS * chunks[index] // math.prod(chunks)
        chunks[index] = min(counts[index], max(room, chunks[index]))
    return tuple(chunks)
