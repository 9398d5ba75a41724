"""Layouts against NumPy: a table says for each element what NumPy's own operations put there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.errors import PlanError
from streamconv.ops import layout as table
from streamconv.ops.layout import FILL, Box, Layout, Move

FILLED = -7


@dataclass(frozen=True)
class Pair:
    """A layout, and the array of element numbers that it should describe."""

    layout: Layout
    wanted: numpy.ndarray


def steps(loops: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Every (target, source) displacement of a nest of loops, the slow and obvious way."""
    return [
        (
            sum(index * to for index, (_, to, _) in zip(indices, loops, strict=True)),
            sum(index * by for index, (_, _, by) in zip(indices, loops, strict=True)),
        )
        for indices in itertools.product(*(range(count) for count, _, _ in loops))
    ]


def fill_block(
    found: Sequence[Move], shape: tuple[int, ...], sources: Sequence[numpy.ndarray]
) -> numpy.ndarray:
    """What moves put into a block; fails where an element is left out or set twice."""
    block = numpy.full(math.prod(shape), FILLED - 1)
    hits = numpy.zeros(block.shape, int)
    for move in found:
        for to, by in steps(move.loops):
            target = move.target_start + to
            assert 0 <= target < block.size
            value = (
                move.fill if move.source == FILL else sources[move.source].reshape(-1)[move.source_start + by]
            )
            assert move.source_start + by >= 0
            block[target] = value
            hits[target] += 1
    assert (hits == 1).all()
    return block.reshape(shape)


def block_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def cut_out(array: numpy.ndarray, box: Box) -> numpy.ndarray:
    return array[tuple(slice(start, stop) for start, stop in box)]


def numbered(shapes: Sequence[tuple[int, ...]]) -> list[numpy.ndarray]:
    """Arrays in which no number occurs twice."""
    starts = itertools.accumulate((math.prod(shape) for shape in shapes), initial=0)
    return [
        numpy.arange(start, start + math.prod(shape)).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


# --------------------------------------------------------------------------- random operations


def draw_narrow(draw: st.DrawFn, pair: Pair) -> Pair:
    axis = draw(st.integers(0, pair.wanted.ndim - 1))
    start = draw(st.integers(0, pair.wanted.shape[axis]))
    stop = draw(st.integers(start, pair.wanted.shape[axis]))
    wanted = numpy.take(pair.wanted, range(start, stop), axis)
    return Pair(table.narrow(pair.layout, axis, start, stop), wanted)


def draw_pick(draw: st.DrawFn, pair: Pair) -> Pair:
    axis = draw(st.integers(0, pair.wanted.ndim - 1))
    size = pair.wanted.shape[axis]
    if not size:
        return pair
    start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 5))
    count = draw(st.integers(1, (size - 1 - start) // step + 1))
    wanted = numpy.take(pair.wanted, [start + index * step for index in range(count)], axis)
    return Pair(table.pick(pair.layout, axis, start, step, count), wanted)


def draw_permuted(draw: st.DrawFn, pair: Pair) -> Pair:
    axes = draw(st.permutations(range(pair.wanted.ndim)))
    return Pair(table.permuted(pair.layout, axes), pair.wanted.transpose(axes))


def draw_reshaped(draw: st.DrawFn, pair: Pair) -> Pair:
    shape = draw(shapes_of(pair.wanted.size))
    return Pair(table.reshaped(pair.layout, shape), pair.wanted.reshape(shape))


def draw_joined(draw: st.DrawFn, pair: Pair) -> Pair:
    """With a part of itself, or with a fill, before or after it."""
    axis = draw(st.integers(0, pair.wanted.ndim - 1))
    if draw(st.booleans()):
        size = pair.wanted.shape[axis]
        stop = draw(st.integers(0, size))
        other = Pair(table.narrow(pair.layout, axis, 0, stop), numpy.take(pair.wanted, range(stop), axis))
    else:
        shape = list(pair.wanted.shape)
        shape[axis] = draw(st.integers(0, 3))
        other = Pair(table.filled(tuple(shape), FILLED), numpy.full(shape, FILLED))
    pairs = draw(st.permutations([pair, other]))
    wanted = numpy.concatenate([each.wanted for each in pairs], axis)
    return Pair(table.joined([each.layout for each in pairs], axis), wanted)


@st.composite
def shapes_of(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """Shapes of so many elements, axes of one among them."""
    if not total:
        return tuple(draw(st.permutations([0, *draw(st.lists(st.integers(0, 3), max_size=2))])))
    shape = []
    while total > 1 and len(shape) < 4:
        size = draw(st.sampled_from([size for size in range(1, total + 1) if total % size == 0]))
        shape.append(size)
        total //= size
    return (*shape, total) if total > 1 or draw(st.booleans()) else tuple(shape)


OPERATIONS: list[Callable[[st.DrawFn, Pair], Pair]] = [
    draw_narrow,
    draw_pick,
    draw_permuted,
    draw_reshaped,
    draw_joined,
]


@st.composite
def chains(draw: st.DrawFn) -> tuple[Pair, list[numpy.ndarray]]:
    """A layout after up to seven random operations on two sources, beside what NumPy makes of it."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 2, 3, 4, 5, 6, 7]), max_size=3)))
    sources = numbered([shape, shape])
    pair = Pair(table.identity(shape, 0), sources[0])
    if shape and draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        layouts = [table.identity(shape, 0), table.identity(shape, 1)]
        pair = Pair(table.joined(layouts, axis), numpy.concatenate(sources, axis))
    for operation in draw(st.lists(st.sampled_from(OPERATIONS), max_size=7)):
        if (pair.wanted.ndim or operation is draw_reshaped) and pair.wanted.size < 1500:
            pair = operation(draw, pair)
    return pair, sources


@st.composite
def boxes_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    spans = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    return tuple((start, stop) for start, stop in spans)


@settings(max_examples=400, deadline=None)
@given(chains(), st.data())
def test_a_chain_is_what_numpy_makes_of_it(
    chain: tuple[Pair, list[numpy.ndarray]], data: st.DataObject
) -> None:
    pair, sources = chain
    shape = pair.wanted.shape
    assert pair.layout.shape == shape
    found = fill_block(table.moves(pair.layout, table.whole(shape)), shape, sources)
    assert (found == pair.wanted).all()
    for _ in range(2):
        box = data.draw(boxes_of(shape))
        found = fill_block(table.moves(pair.layout, box), block_shape(box), sources)
        assert (found == cut_out(pair.wanted, box)).all()


@settings(max_examples=300, deadline=None)
@given(chains(), st.data())
def test_the_boxes_of_moves_are_enough_to_make_them_from(
    chain: tuple[Pair, list[numpy.ndarray]], data: st.DataObject
) -> None:
    pair, sources = chain
    box_is_enough(pair, sources, data.draw(boxes_of(pair.wanted.shape)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple), st.data())
def test_so_are_those_of_a_reshape_which_runs_unevenly(shape: tuple[int, ...], data: st.DataObject) -> None:
    (source,) = numbered([shape])
    other = (*data.draw(st.permutations([*shape[:-1], 1])), shape[-1])
    other = data.draw(st.sampled_from([other, other[::-1], shape[::-1], (source.size,)]))
    pair = Pair(table.reshaped(table.identity(shape, 0), other), source.reshape(other))
    box_is_enough(pair, [source], data.draw(boxes_of(other)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=3), st.integers(0, 3), st.data())
def test_so_are_those_of_views_that_repeat_and_overlap(
    steps: list[tuple[int, int]], offset: int, data: st.DataObject
) -> None:
    shape, strides = tuple(size for size, _ in steps), tuple(stride for _, stride in steps)
    source = numpy.arange(80)
    wanted = numpy.lib.stride_tricks.as_strided(source[offset:], shape, [8 * stride for stride in strides])
    pair = Pair(table.strided(shape, strides, offset, 0), wanted)
    box_is_enough(pair, [source], data.draw(boxes_of(shape)))


def box_is_enough(pair: Pair, sources: Sequence[numpy.ndarray], box: Box) -> None:
    """Each move, made from no more of its source than its box."""
    local, blocks = [], []
    for move in table.moves(pair.layout, box):
        if move.source != FILL:
            source = sources[move.source]
            needed, cropped = table.cropped(move, source.shape)
            move = replace(cropped, source=len(blocks))
            blocks.append(cut_out(source, needed).copy())
            assert blocks[-1].shape == block_shape(needed)
        local.append(move)
    assert (fill_block(local, block_shape(box), blocks) == cut_out(pair.wanted, box)).all()


@settings(deadline=None)
@given(chains())
def test_no_loop_stands_still(chain: tuple[Pair, list[numpy.ndarray]]) -> None:
    pair, _ = chain
    for piece in pair.layout.pieces:
        assert all(loop.count > 1 and loop.step > 0 and loop.stride >= 0 for loop in piece.loops)
        assert len(piece.origin) == len(pair.layout.shape)


@given(st.lists(st.integers(0, 6), max_size=4).map(tuple), st.data())
def test_boxes_are_a_range_of_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    elements = numpy.arange(total).reshape(shape)
    found = [cut_out(elements, box) for box in table.boxes(shape, start, stop)]
    assert all(block.size for block in found)
    assert [element for block in found for element in block.reshape(-1)] == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


# ------------------------------------------------------------------------ structure that stays

D, HEADS, GROUPS, HIDDEN = 128, 32, 2, 4096


def rotary(layout: Layout, heads: int) -> Layout:
    split = table.reshaped(layout, (heads, D // 2, 2, HIDDEN))
    return table.reshaped(table.permuted(split, (0, 2, 1, 3)), (heads * D, HIDDEN))


def test_rotary_interleave_is_one_piece() -> None:
    layout = rotary(table.identity((HEADS * D, HIDDEN), 0), HEADS)
    assert len(layout.pieces) == 1
    (move,) = table.moves(layout, table.whole(layout.shape))
    assert move.run == HIDDEN and move.numel == HEADS * D * HIDDEN


def test_its_inverse_is_the_identity_again() -> None:
    layout = rotary(table.identity((HEADS * D, HIDDEN), 0), HEADS)
    split = table.reshaped(layout, (HEADS, 2, D // 2, HIDDEN))
    back = table.reshaped(table.permuted(split, (0, 2, 1, 3)), layout.shape)
    (move,) = table.moves(back, table.whole(back.shape))
    assert move == Move(0, 0, 0, ((HEADS * D * HIDDEN, 1, 1),))


def test_half_rotary_of_the_query_of_a_fused_weight_is_three_pieces() -> None:
    fused = table.identity(((HEADS + 2 * GROUPS) * D, HIDDEN), 0)
    heads = table.reshaped(table.narrow(fused, 0, 0, HEADS * D), (HEADS, 2, D // 2, HIDDEN))
    turning, still = table.narrow(heads, 1, 0, 1), table.narrow(heads, 1, 1, 2)
    turning = table.permuted(table.reshaped(turning, (HEADS, D // 4, 2, HIDDEN)), (0, 2, 1, 3))
    layout = table.joined([turning, table.reshaped(still, (HEADS, 2, D // 4, HIDDEN))], 2)
    assert len(table.reshaped(layout, (HEADS * D, HIDDEN)).pieces) <= 3


@pytest.mark.parametrize(("start", "stop"), [(0, HEADS // GROUPS), (HEADS // GROUPS, HEADS // GROUPS + 1)])
def test_a_part_of_a_grouped_fused_weight_is_one_piece(start: int, stop: int) -> None:
    grouped = HEADS // GROUPS + 2
    fused = table.identity((GROUPS * grouped * D, HIDDEN), 0)
    parts = table.reshaped(fused, (GROUPS, grouped, D, HIDDEN))
    layout = table.reshaped(table.narrow(parts, 1, start, stop), (GROUPS * (stop - start) * D, HIDDEN))
    assert len(layout.pieces) == 1
    (move,) = table.moves(layout, table.whole(layout.shape))
    assert move.run == (stop - start) * D * HIDDEN


def test_rows_of_a_contiguous_tensor_are_one_run() -> None:
    layout = table.narrow(table.identity((3 * HIDDEN, HIDDEN), 0), 0, HIDDEN, 2 * HIDDEN)
    (move,) = table.moves(layout, ((5, 100), (0, HIDDEN)))
    assert move == Move(0, (HIDDEN + 5) * HIDDEN, 0, ((95 * HIDDEN, 1, 1),))


def test_every_other_row_is_one_piece_from_either_end() -> None:
    layout = table.identity((64, HIDDEN), 0)
    for start in (0, 1):
        assert len(table.pick(layout, 0, start, 2, 32).pieces) == 1


def test_every_other_head_after_a_reshape_stays_structured() -> None:
    merged = table.reshaped(table.permuted(table.identity((D, HEADS, 8), 0), (1, 0, 2)), (HEADS * D, 8))
    assert len(table.pick(merged, 0, 0, 2, HEADS * D // 2).pieces) == 1


def test_stacked_experts_are_a_piece_each_and_a_block_asks_only_for_its_own() -> None:
    experts, rows = 256, 2048
    slices = [table.identity((1, rows, HIDDEN), expert) for expert in range(experts)]
    layout = table.joined(slices, 0)
    assert len(layout.pieces) == experts
    box = ((17, 19), (0, rows), (0, HIDDEN))
    assert [move.source for move in table.moves(layout, box)] == [17, 18]
    assert len(layout.between(17, 19)) == 2


def test_a_block_of_a_long_table_is_found_without_a_pass_over_it() -> None:
    rows = 1 << 14
    whole = table.identity((rows, 8), 0)
    reversed_rows = table.joined([table.narrow(whole, 0, row, row + 1) for row in reversed(range(rows))], 0)
    assert len(reversed_rows.between(100, 110)) == 10


@pytest.mark.parametrize("seam", [7, 4096 * 4096 - 1, 1_000_003])
def test_a_flat_storage_cut_anywhere_is_a_few_pieces_of_a_matrix(seam: int) -> None:
    """What sharded optimizers write: a flat run that ends in the middle of a row."""
    total = 4096 * 4096
    flat = table.joined([table.identity((seam,), 0), table.identity((total - seam,), 1)], 0)
    assert len(table.reshaped(flat, (4096, 4096)).pieces) <= 4
    assert len(table.reshaped(flat, (64, 64, 4096)).pieces) <= 8


def test_columns_reshaped_across_rows_recur_in_phases() -> None:
    columns = table.narrow(table.identity((1 << 20, 4), 0), 1, 0, 3)
    layout = table.reshaped(columns, (3 << 19, 2))
    assert len(layout.pieces) <= 8
    columns = table.narrow(table.identity((1 << 20, 8), 0), 1, 0, 6)
    assert len(table.reshaped(columns, (3 << 19, 4)).pieces) <= 5


@pytest.mark.parametrize(
    ("shape", "other"),
    [((29, 31), (31, 29)), ((7, 11, 13), (13, 77)), ((97, 5), (5, 97))],
)
def test_coprime_reshapes_stay_right(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    (source,) = numbered([shape])
    axes = tuple(reversed(range(len(shape))))
    layout = table.reshaped(table.permuted(table.identity(shape, 0), axes), other)
    made = fill_block(table.moves(layout, table.whole(other)), other, [source])
    assert (made == source.transpose(axes).reshape(other)).all()


def test_a_shattered_reshape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_MAX_PIECES", 1000)
    columns = table.permuted(table.identity((4099, 4093), 0), (1, 0))
    with pytest.raises(PlanError, match="pieces") as caught:
        table.reshaped(columns, (4099, 4093))
    assert caught.value.headline.hint


def test_many_pieces_are_no_shattering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_MAX_PIECES", 100)
    rows = 300
    whole = table.identity((rows, 2, 3), 0)
    pieces = tuple(piece for row in range(rows) for piece in table.narrow(whole, 0, row, row + 1).pieces)
    placed = tuple(
        table.Piece(piece.source, piece.start, (row, 0, 0), piece.loops) for row, piece in enumerate(pieces)
    )
    assert len(table.reshaped(Layout((rows, 2, 3), placed), (rows, 6)).pieces) == rows


def test_a_long_chain_of_misfits_needs_no_deep_stack() -> None:
    tall = table.permuted(table.identity((2, 20011), 0), (1, 0))
    layout = table.reshaped(tall, (2, 20011))
    assert sum(math.prod(loop.count for loop in piece.loops) for piece in layout.pieces) == 40022


def test_the_box_of_a_transpose_is_a_tile() -> None:
    layout = table.permuted(table.identity((50_000, 4096), 0), (1, 0))
    (move,) = table.moves(layout, ((10, 20), (100, 300)))
    assert table.cropped(move, (50_000, 4096))[0] == ((100, 300), (10, 20))


def test_the_box_of_a_column_split_is_those_columns() -> None:
    (move,) = table.moves(table.narrow(table.identity((1000, 12), 0), 1, 4, 12), ((10, 20), (0, 8)))
    assert table.cropped(move, (1000, 12))[0] == ((10, 20), (4, 12))


def test_a_block_of_one_source_moves_nothing_of_another() -> None:
    layout = table.joined([table.identity((4, 3), 0), table.identity((4, 3), 1)], 0)
    (move,) = table.moves(layout, ((5, 7), (0, 3)))
    assert (move.source, table.cropped(move, (4, 3))[0]) == (1, ((1, 3), (0, 3)))


def test_run_is_what_is_consecutive_on_both_sides() -> None:
    layout = table.permuted(table.identity((3, 4, 5), 0), (1, 0, 2))
    (move,) = table.moves(layout, table.whole(layout.shape))
    assert move.run == 5
    (move,) = table.moves(table.identity((), 0), ())
    assert (move.run, move.numel, move.loops) == (1, 1, ())
