"""Every operation against NumPy: its specs, its bytes in any pieces, its inverse, its checks."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import Array, Sources, same_bytes, sources

from streamconv import dtypes, ops
from streamconv.dtypes import DType
from streamconv.errors import ConversionError, PlanError
from streamconv.execution.evaluate import fuse
from streamconv.execution.execute import Settings, Worker
from streamconv.ops import cast as cast_module
from streamconv.ops.expression import (
    Block,
    Exactness,
    Expression,
    Node,
    Op,
    Tally,
    apply,
    exactness,
    leaves,
    renamed,
)
from streamconv.ops.layout import whole
from streamconv.tensor import Extent, Stored, TensorSpec


def stored(spec: TensorSpec) -> Stored:
    """A tensor of which nothing is read."""
    return Stored(spec, (Extent("/source", 0, spec.nbytes),) if spec.nbytes else ())


# --------------------------------------------------------------------------------- one case an op


@dataclass(frozen=True)
class Case:
    """An operation, operands for it, and what NumPy says that the results are."""

    op: Op
    arrays: list[Array]
    dtype: DType
    wanted: list[Array]
    lost: bool = False
    """Whether the operands' bytes are not all in the results."""

    def stored(self, source: Sources) -> list[Stored]:
        return [
            source.store(array, self.dtype.name, f"operand{index}") for index, array in enumerate(self.arrays)
        ]


STRUCTURAL_DTYPES = [
    dtypes.by_name(name) for name in ("BOOL", "U8", "F8_E4M3", "F8_E5M2", "BF16", "F16", "I32", "F64", "C128")
]
sizes = st.integers(0, 5)
shapes = st.lists(sizes, max_size=4).map(tuple)
# The least holds two of the widest elements, operand and result.
arenas = st.integers(1 << 8, 1 << 13)
some_axes = st.lists(sizes, min_size=1, max_size=4).map(tuple)


def contents(draw: st.DrawFn, dtype: DType, shape: tuple[int, ...]) -> Array:
    """Any bit patterns."""
    seed = draw(st.integers(0, 1 << 32))
    raw = numpy.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, numpy.uint8)
    return (raw % 2 if dtype.kind == "bool" else raw).view(dtype.numpy).reshape(shape)


def draw_array(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[DType, Array]:
    dtype = draw(st.sampled_from(STRUCTURAL_DTYPES))
    return dtype, contents(draw, dtype, shape)


def draw_axis(draw: st.DrawFn, shape: tuple[int, ...]) -> int:
    return draw(st.integers(0, len(shape) - 1))


def with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def fill_value(draw: st.DrawFn, dtype: DType) -> int:
    return draw(st.sampled_from([0, 1] if dtype.kind in ("bool", "uint") else [0, 1, -2]))


def draw_alias(draw: st.DrawFn) -> Case:
    dtype, array = draw_array(draw, draw(shapes))
    count = draw(st.integers(1, 3))
    return Case(ops.Alias(count), [array], dtype, [array] * count)


def draw_cast(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    source, target = draw(
        st.sampled_from([("F32", "BF16"), ("BF16", "F32"), ("I32", "F64"), ("F16", "F8_E5M2")])
    )
    row, goal = dtypes.by_name(source), dtypes.by_name(target)
    array = contents(draw, row, shape)
    if row.kind == "float":
        array = numpy.where(numpy.isnan(array.astype(numpy.float64)), row.numpy.type(1), array)
    with numpy.errstate(all="ignore"):
        wanted = array.astype(numpy.float64).astype(numpy.float32 if goal.bits < 32 else goal.numpy)
        return Case(ops.Cast(target), [array], row, [wanted.astype(goal.numpy)], lost=target != "F32")


def draw_concat(draw: st.DrawFn) -> Case:
    shape = draw(some_axes)
    axis = draw_axis(draw, shape)
    dtype, first = draw_array(draw, shape)
    others = [
        contents(draw, dtype, with_size(shape, axis, size)) for size in draw(st.lists(sizes, max_size=3))
    ]
    arrays = [first, *others]
    return Case(ops.Concat(axis), arrays, dtype, [numpy.concatenate(arrays, axis)])


def draw_drop(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    if draw(st.booleans()):
        dtype, array = draw_array(draw, shape)
        return Case(ops.Drop(), [array], dtype, [], lost=True)
    dtype = draw(st.sampled_from(STRUCTURAL_DTYPES))
    value = fill_value(draw, dtype)
    return Case(ops.Drop(value), [numpy.full(shape, value, dtype.numpy)], dtype, [])


def draw_fill(draw: st.DrawFn) -> Case:
    dtype, shape = draw(st.sampled_from(STRUCTURAL_DTYPES)), draw(shapes)
    value = fill_value(draw, dtype)
    return Case(ops.Fill(dtype.name, shape, value), [], dtype, [numpy.full(shape, value, dtype.numpy)])


def draw_pad(draw: st.DrawFn) -> Case:
    shape = draw(some_axes)
    axis = draw_axis(draw, shape)
    dtype, array = draw_array(draw, shape)
    more, value = draw(sizes), fill_value(draw, dtype)
    rest = numpy.full(with_size(shape, axis, more), value, dtype.numpy)
    op = ops.Pad(axis, shape[axis] + more, value)
    return Case(op, [array], dtype, [numpy.concatenate([array, rest], axis)])


def draw_permute_axes(draw: st.DrawFn) -> Case:
    dtype, array = draw_array(draw, draw(shapes))
    axes = tuple(draw(st.permutations(range(array.ndim))))
    return Case(ops.PermuteAxes(axes), [array], dtype, [array.transpose(axes)])


def draw_reshape(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    dtype, array = draw_array(draw, shape)
    other = draw(st.permutations([*shape, 1]))
    choices = [tuple(other), (*other, 1, 1), (array.size,)]
    if array.size:
        choices += [(-1,), (1, -1), (-1, array.size)]
    asked = draw(st.sampled_from(choices))
    return Case(ops.Reshape(asked), [array], dtype, [array.reshape(asked)])


def draw_same(draw: st.DrawFn) -> Case:
    dtype, array = draw_array(draw, draw(shapes))
    return Case(ops.Same(), [array] * draw(st.integers(1, 3)), dtype, [array])


def draw_split(draw: st.DrawFn) -> Case:
    shape = draw(some_axes)
    axis = draw_axis(draw, shape)
    dtype, array = draw_array(draw, shape)
    stops = sorted(draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    edges = [0, *stops, shape[axis]]
    parts = tuple(stop - start for start, stop in itertools.pairwise(edges))
    return Case(ops.Split(axis, parts), [array], dtype, numpy.split(array, stops, axis))


def draw_stack(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    dtype, first = draw_array(draw, shape)
    arrays = [first, *(contents(draw, dtype, shape) for _ in range(draw(st.integers(0, 3))))]
    axis = draw(st.integers(0, len(shape)))
    return Case(ops.Stack(axis), arrays, dtype, [numpy.stack(arrays, axis)])


def draw_strided(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    strides = tuple(draw(st.integers(0, 6)) for _ in shape)
    offset = draw(st.integers(0, 3))
    last = offset + sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))
    dtype, storage = draw_array(draw, (last + draw(st.integers(1, 3)),))
    positions = numpy.full(shape, offset)
    for axis, stride in enumerate(strides):
        positions += numpy.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1)) * stride
    wanted = storage[positions]
    return Case(ops.Strided(shape, strides, offset), [storage], dtype, [wanted], lost=True)


def draw_take(draw: st.DrawFn) -> Case:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple))
    axis = draw_axis(draw, shape)
    dtype, array = draw_array(draw, shape)
    size = shape[axis]
    whole_order = draw(st.booleans())
    picks = st.permutations(range(size)) if whole_order else st.lists(st.integers(0, size - 1), min_size=1)
    order = list(draw(picks))
    lost = sorted(order) != list(range(size))
    return Case(ops.Take(axis, ops.index_runs(order)), [array], dtype, [array.take(order, axis)], lost=lost)


def draw_truncate(draw: st.DrawFn) -> Case:
    shape = draw(some_axes)
    axis = draw_axis(draw, shape)
    dtype, array = draw_array(draw, shape)
    to = draw(st.integers(0, shape[axis]))
    kept = array.take(range(to), axis)
    if draw(st.booleans()):
        return Case(ops.Truncate(axis, to), [array], dtype, [kept], lost=True)
    value = fill_value(draw, dtype)
    rest = numpy.full(with_size(shape, axis, shape[axis] - to), value, dtype.numpy)
    return Case(ops.Truncate(axis, to, value), [numpy.concatenate([kept, rest], axis)], dtype, [kept])


def draw_unstack(draw: st.DrawFn) -> Case:
    shape = draw(some_axes.filter(any))
    axis = draw(st.sampled_from([axis for axis, size in enumerate(shape) if size]))
    dtype, array = draw_array(draw, shape)
    wanted = [array.take(index, axis) for index in range(shape[axis])]
    return Case(ops.Unstack(axis, shape[axis]), [array], dtype, wanted)


CASES: dict[str, Callable[[st.DrawFn], Case]] = {
    "alias": draw_alias,
    "cast": draw_cast,
    "concat": draw_concat,
    "drop": draw_drop,
    "fill": draw_fill,
    "pad": draw_pad,
    "permute_axes": draw_permute_axes,
    "reshape": draw_reshape,
    "same": draw_same,
    "split": draw_split,
    "stack": draw_stack,
    "strided": draw_strided,
    "take": draw_take,
    "truncate": draw_truncate,
    "unstack": draw_unstack,
}


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    return CASES[name](draw)


# Casts of every bit pattern, not-a-number among them, are what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

every_op = pytest.mark.parametrize("name", sorted(CASES))


# The other numeric operations have a module of tests of their own.
HERE = {name for name, op in ops.OPS.items() if issubclass(op, ops.Structural) or op is ops.Cast}


def test_every_op_has_a_case_and_its_name() -> None:
    assert set(CASES) == HERE
    assert all(op.name == name for name, op in ops.OPS.items())


@every_op
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_results_are_what_numpy_makes(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    cuts, order = data.draw(st.lists(st.integers(0, 1 << 10), max_size=4)), data.draw(st.integers(0, 9))
    with sources() as source:
        results = apply(case.op, *case.stored(source))
        assert [result.spec.shape for result in results] == [wanted.shape for wanted in case.wanted]
        for result, wanted in zip(results, case.wanted, strict=True):
            assert result.spec.dtype.numpy == wanted.dtype
            assert result.spec.name == ("operand0" if case.arrays else "")
            assert same_bytes(source.written(result, data.draw(arenas), cuts, order), wanted)


@every_op
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_inverse_gives_the_operands_back(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    with sources() as source:
        operands = case.stored(source)
        inverse = case.op.inverse([operand.spec for operand in operands])
        assert (inverse is None) == case.lost
        if inverse is None:
            return
        back = apply(inverse, *apply(case.op, *operands))
        assert len(back) == len(operands)
        for result, operand, array in zip(back, operands, case.arrays, strict=True):
            assert (result.spec.shape, result.spec.dtype) == (operand.spec.shape, operand.spec.dtype)
            assert same_bytes(source.written(result), array)


@every_op
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_checks_hold_on_right_operands(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    with sources() as source:
        for left, right in case.op.checks(case.stored(source)):
            assert (left.spec.dtype, left.spec.shape) == (right.spec.dtype, right.spec.shape)
            assert same_bytes(source.written(left), source.written(right))


@every_op
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_an_op_is_plain_data(name: str, data: st.DataObject) -> None:
    op = data.draw(cases(name)).op
    assert hash(op) == hash(type(op)(**vars(op))) and op == type(op)(**vars(op))
    assert str(op).startswith(name)


# ------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("op", "values", "right"),
    [
        (ops.Truncate(0, 2, 0), [5, 6, 0, 0], True),
        (ops.Truncate(0, 2, 0), [5, 6, 0, 1e-45], False),
        (ops.Truncate(0, 2, 0), [5, 6, 0, -0.0], False),
        (ops.Truncate(0, 4, 0), [5, 6, 7, 8], True),
        (ops.Drop(0), [0, 0], True),
        (ops.Drop(0), [0, 3], False),
        (ops.Drop(1), [1, 1], True),
    ],
)
def test_checks_find_what_would_be_lost(op: Op, values: list[float], right: bool) -> None:
    with sources() as source:
        pairs = op.checks([source.store(numpy.array(values, numpy.float32), "F32")])
        assert all(same_bytes(source.written(left), source.written(other)) for left, other in pairs) == right


def test_what_nobody_promised_is_not_checked() -> None:
    assert ops.Truncate(0, 1).checks([tensor(3)]) == ops.Drop().checks([tensor(3)]) == ()


def test_same_checks_every_copy_against_the_first() -> None:
    pairs = ops.Same().checks([tensor(2, name=name) for name in "abc"])
    assert [(left.spec.name, right.spec.name) for left, right in pairs] == [("a", "b"), ("a", "c")]


# --------------------------------------------------------------------------------------- refusals


def tensor(*shape: int, dtype: str = "F32", name: str = "layer.weight") -> Stored:
    return stored(TensorSpec(name, dtypes.by_name(dtype), shape))


HOSTILE: list[tuple[Op, list[Stored]]] = [
    (ops.Alias(0), [tensor(2)]),
    (ops.Alias(-1), [tensor(2)]),
    (ops.Alias(10**12), [tensor(2)]),
    (ops.Alias(2), [tensor(2), tensor(2)]),
    (ops.Alias(2), [tensor(2, dtype="F4")]),
    (ops.Cast("F32"), []),
    (ops.Cast("F32"), [tensor(2), tensor(2)]),
    (ops.Cast("float99"), [tensor(2)]),
    (ops.Cast("F4"), [tensor(2)]),
    (ops.Cast("BF16"), [tensor(2, dtype="F4")]),
    (ops.Cast("F32"), [tensor(2, dtype="C64")]),
    (ops.Cast("C64"), [tensor(2)]),
    (ops.Cast("I32"), [tensor(2)]),
    (ops.Cast("I32"), [tensor(2, dtype="I64")]),
    (ops.Cast("U64"), [tensor(2, dtype="I8")]),
    (ops.Cast("BOOL"), [tensor(2, dtype="U8")]),
    (ops.Cast("F8_E8M0"), [tensor(2)]),
    (ops.Cast("F16", "ignore"), [tensor(2)]),
    (ops.Concat(0), []),
    (ops.Concat(-1), [tensor(2), tensor(2)]),
    (ops.Concat(1), [tensor(2), tensor(2)]),
    (ops.Concat(0), [tensor(), tensor()]),
    (ops.Concat(0), [tensor(2, 3), tensor(2, 4)]),
    (ops.Concat(0), [tensor(2, 3), tensor(2)]),
    (ops.Concat(0), [tensor(2), tensor(2, dtype="BF16")]),
    (ops.Concat(0), [tensor(2, dtype="F4"), tensor(2, dtype="F4")]),
    (ops.Drop(0), [tensor(2, dtype="F4")]),
    (ops.Drop(0), [tensor(2, dtype="F8_E8M0")]),
    (ops.Drop(0), []),
    (ops.Drop(0.5), [tensor(2, dtype="I64")]),
    (ops.Fill("F32", (2,)), [tensor(2)]),
    (ops.Fill("F32", (-2,)), []),
    (ops.Fill("F32", (-2, -2)), []),
    (ops.Fill("F32", (10**30,)), []),
    (ops.Fill("F4", (2,)), []),
    (ops.Fill("nothing", (2,)), []),
    (ops.Fill("F16", (2,), 1e6), []),
    (ops.Fill("F16", (2,), 1e-30), []),
    (ops.Fill("F64", (2,), 10**400), []),
    (ops.Fill("I8", (2,), 128), []),
    (ops.Fill("U8", (2,), -1), []),
    (ops.Fill("I64", (2,), 0.5), []),
    (ops.Fill("I64", (2,), math.nan), []),
    (ops.Fill("I64", (2,), math.inf), []),
    (ops.Fill("BOOL", (2,), 2), []),
    (ops.Fill("F8_E8M0", (2,), 0), []),
    (ops.Pad(-1, 5), [tensor(2)]),
    (ops.Pad(1, 5), [tensor(2)]),
    (ops.Pad(0, 1), [tensor(2)]),
    (ops.Pad(0, 10**30), [tensor(2)]),
    (ops.Pad(0, 1 << 62), [tensor(2)]),
    (ops.Pad(0, 5, 0.5), [tensor(2, dtype="I32")]),
    (ops.Pad(0, 5), [tensor()]),
    (ops.PermuteAxes((0,)), [tensor(2, 3)]),
    (ops.PermuteAxes((0, 0)), [tensor(2, 3)]),
    (ops.PermuteAxes((-1, 0)), [tensor(2, 3)]),
    (ops.PermuteAxes((0, 1, 2)), [tensor(2, 3)]),
    (ops.Reshape((5,)), [tensor(2, 3)]),
    (ops.Reshape((-1, -1)), [tensor(2, 3)]),
    (ops.Reshape((-2, -3)), [tensor(2, 3)]),
    (ops.Reshape((-1, 4)), [tensor(2, 3)]),
    (ops.Reshape((0, -1)), [tensor(2, 3)]),
    (ops.Reshape((0, -1)), [tensor(0, 3)]),
    (ops.Reshape((10**30,)), [tensor(2, 3)]),
    (ops.Reshape((6,)), [tensor(2, 3, dtype="F4")]),
    (ops.Same(), []),
    (ops.Same(), [tensor(2), tensor(3)]),
    (ops.Same(), [tensor(2), tensor(2, dtype="I32")]),
    (ops.Split(0, ()), [tensor(2)]),
    (ops.Split(0, ()), [tensor(0)]),
    (ops.Split(0, (1, 2)), [tensor(2)]),
    (ops.Split(0, (3, -1)), [tensor(2)]),
    (ops.Split(-1, (1, 1)), [tensor(2)]),
    (ops.Split(0, (1,)), [tensor()]),
    (ops.Stack(0), []),
    (ops.Stack(2), [tensor(2)]),
    (ops.Stack(-1), [tensor(2)]),
    (ops.Stack(0), [tensor(2), tensor(3)]),
    (ops.Strided((2,), (1, 1)), [tensor(9)]),
    (ops.Strided((2, 2), (1,)), [tensor(9)]),
    (ops.Strided((2,), (-1,), 3), [tensor(9)]),
    (ops.Strided((-2,), (1,), 3), [tensor(9)]),
    (ops.Strided((2,), (1,), -1), [tensor(9)]),
    (ops.Strided((10,), (1,)), [tensor(9)]),
    (ops.Strided((2,), (10**30,)), [tensor(9)]),
    (ops.Strided((10**30,), (0,)), [tensor(9)]),
    (ops.Strided((2,), (1,)), [tensor(3, 3)]),
    (ops.Strided((), ()), [tensor(0)]),
    (ops.Take(0, ()), [tensor(2)]),
    (ops.Take(0, ((0, 1, 3),)), [tensor(2)]),
    (ops.Take(0, ((-1, 1, 1),)), [tensor(2)]),
    (ops.Take(0, ((0, 0, 2),)), [tensor(2)]),
    (ops.Take(0, ((1, -1, 2),)), [tensor(2)]),
    (ops.Take(0, ((0, 1, 0),)), [tensor(2)]),
    (ops.Take(0, ((0, 1, 10**30),)), [tensor(2)]),
    (ops.Take(1, ((0, 1, 1),)), [tensor(2)]),
    (ops.Truncate(0, 3), [tensor(2)]),
    (ops.Truncate(0, -1), [tensor(2)]),
    (ops.Truncate(-1, 1), [tensor(2)]),
    (ops.Truncate(0, 1, 0.5), [tensor(2, dtype="U8")]),
    (ops.Unstack(0, 3), [tensor(2)]),
    (ops.Unstack(0, 0), [tensor(0)]),
    (ops.Unstack(-1, 2), [tensor(2)]),
    (ops.Unstack(0, 1 << 40), [stored(TensorSpec("layer.weight", dtypes.by_name("U8"), (1 << 40,)))]),
    (ops.Unstack(0, 1), [tensor()]),
]


@pytest.mark.parametrize(("op", "operands"), HOSTILE, ids=lambda value: str(value)[:60])
def test_hostile_parameters_end_in_a_plan_error(op: Op, operands: list[Stored]) -> None:
    with pytest.raises(PlanError) as caught:
        apply(op, *operands)
    assert op.name in caught.value.headline.message
    assert caught.value.headline.tensor == ("layer.weight" if operands else None)


def test_every_op_is_in_the_hostile_table() -> None:
    assert {op.name for op, _ in HOSTILE} == HERE


def test_a_mixed_dtype_names_both_tensors_and_the_way_out() -> None:
    with pytest.raises(PlanError, match="'a' is F32, 'b' is BF16") as caught:
        apply(ops.Concat(0), tensor(2, name="a"), tensor(2, name="b", dtype="BF16"))
    assert "cast" in (caught.value.headline.hint or "")


def test_any_dtype_may_be_dropped() -> None:
    assert apply(ops.Drop(), tensor(2, dtype="F4")) == ()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("F16", 0.1), ("F8_E5M2", math.nan), ("F8_E4M3", -448), ("F8_E8M0", 2), ("U64", 2**64 - 1), ("C64", -1)],
)
def test_fills_a_dtype_can_hold(dtype: str, value: float) -> None:
    (result,) = apply(ops.Fill(dtype, (3,), value))
    with sources() as source:
        assert same_bytes(source.written(result), numpy.full((3,), value, result.spec.dtype.numpy))


def chain(expression: Expression, *steps: Op) -> Expression:
    for step in steps:
        (expression,) = apply(step, expression)
    return expression


@pytest.mark.parametrize(
    ("steps", "formula"),
    [
        ((ops.Take(0, ((1, 2, 5),)), ops.Strided((2, 2), (1, 2), 1)), lambda _: [[3, 7], [5, 9]]),
        ((ops.Fill("F32", (6,), 3), ops.Strided((2, 2), (1, 2), 1)), lambda _: [[3, 3], [3, 3]]),
        (
            (
                ops.Reshape((6, 4)),
                ops.PermuteAxes((1, 0)),
                ops.Reshape((2, 12)),
                ops.Take(1, ((1, 3, 4), (0, 2, 3))),
            ),
            lambda x: x.reshape(6, 4).T.reshape(2, 12)[:, [1, 4, 7, 10, 0, 2, 4]],
        ),
        (
            (ops.Pad(0, 30, 9), ops.Reshape((5, 2, 3)), ops.PermuteAxes((2, 0, 1)), ops.Truncate(1, 4)),
            lambda x: numpy.append(x, [9] * 6).reshape(5, 2, 3).transpose(2, 0, 1)[:, :4],
        ),
    ],
    ids=["taken", "filled", "permuted", "padded"],
)
def test_a_chain_is_one_table(steps: tuple[Op, ...], formula: Callable[[Array], Array]) -> None:
    values = numpy.arange(24, dtype=numpy.float32)
    with sources() as source:
        operands = [source.store(values, "F32")][: steps[0].arity]
        expression = chain(apply(steps[0], *operands)[0], *steps[1:])
        assert fuse(expression).moves_bytes_only
        assert same_bytes(source.written(expression), numpy.array(formula(values), numpy.float32))


@pytest.mark.parametrize(
    "steps",
    [
        (ops.Take(0, ((8, 1, 4), (0, 1, 4))),),
        (ops.Reshape((6, 4)), ops.PermuteAxes((1, 0)), ops.Reshape((24,))),
    ],
    ids=str,
)
def test_a_view_of_a_storage_in_pieces_is_refused(steps: tuple[Op, ...]) -> None:
    view = chain(tensor(24), *steps, ops.Strided((2,), (3,)))
    with pytest.raises(PlanError, match="strided"):
        fuse(view)


# ---------------------------------------------------------------------------- tables and storages


@given(st.lists(st.integers(0, 30), max_size=40))
def test_index_runs_are_the_list_again(indices: list[int]) -> None:
    runs = ops.index_runs(indices)
    assert [start + index * step for start, step, count in runs for index in range(count)] == indices
    assert all(step >= 1 and count >= 1 for _, step, count in runs)


def test_index_runs_are_few_where_there_is_order() -> None:
    assert ops.index_runs([*range(5, 90)]) == ((5, 1, 85),)
    assert ops.index_runs([*range(0, 64, 2), *range(1, 64, 2)]) == ((0, 2, 32), (1, 2, 32))
    assert ops.index_runs([3, 10, 11, 12]) == ((3, 1, 1), (10, 1, 3))


def test_a_table_too_long_to_list_has_no_inverse() -> None:
    spec = TensorSpec("x", dtypes.by_name("U8"), (1 << 40,))
    assert ops.Take(0, ((0, 1, 1 << 40),)).inverse([spec]) is None


def test_contiguous_views_are_stored() -> None:
    row = dtypes.by_name("F32")
    extents = (Extent("/a", 100, 16), Extent("/b", 0, 24))
    storage = Stored(TensorSpec("", row, (10,)), extents)
    view = ops.strided(storage, TensorSpec("w", row, (1, 2, 3)), (99, 3, 1), 2)
    assert view == Stored(TensorSpec("w", row, (1, 2, 3)), (Extent("/a", 108, 8), Extent("/b", 0, 16)))
    transposed = ops.strided(storage, TensorSpec("w", row, (3, 2)), (1, 3), 0)
    assert isinstance(transposed, Node) and transposed.spec.name == "w" and leaves(transposed) == [storage]
    empty = ops.strided(storage, TensorSpec("w", row, (3, 0)), (1, 3), 0)
    assert empty == Stored(TensorSpec("w", row, (3, 0)), ())
    for shape, strides, offset in [((11,), (1,), 0), ((2,), (1, 1), 0), ((2,), (-1,), 5), ((2,), (1,), -1)]:
        with pytest.raises(PlanError, match="storage") as caught:
            ops.strided(storage, TensorSpec("w", row, shape), strides, offset)
        assert caught.value.headline.tensor == "w"


def test_a_view_of_packed_elements_takes_whole_bytes() -> None:
    row = dtypes.by_name("F4")
    storage = Stored(TensorSpec("", row, (8,)), (Extent("/a", 100, 4),))
    view = ops.strided(storage, TensorSpec("w", row, (2, 2)), (2, 1), 2)
    assert view == Stored(TensorSpec("w", row, (2, 2)), (Extent("/a", 101, 2),))
    for shape, strides, offset in [((2,), (1,), 1), ((3,), (1,), 0), ((2,), (2,), 0)]:
        with pytest.raises(PlanError, match="share bytes"):
            ops.strided(storage, TensorSpec("w", row, shape), strides, offset)


def test_expressions_know_their_leaves_names_and_exactness() -> None:
    a, b = tensor(2, name="a"), tensor(2, name="b")
    (joined,) = apply(ops.Concat(0), a, b)
    (rounded,) = apply(ops.Cast("BF16"), joined)
    assert leaves(renamed(rounded, "c")) == [a, b]
    assert renamed(rounded, "c").spec == TensorSpec("c", dtypes.by_name("BF16"), (4,))
    assert [exactness(each) for each in (a, joined, rounded)] == [
        Exactness.BIT_EXACT,
        Exactness.BIT_EXACT,
        Exactness.ROUNDING,
    ]
    assert Exactness.VALUE_EXACT.label == "value-exact"


# -------------------------------------------------------------------------------------------- cast

FLOATS = [row for row in dtypes.BY_NAME.values() if row.kind == "float" and not row.packed]
TARGETS = [row for row in FLOATS if row.name != "F8_E8M0"]
WHOLE = [row for row in dtypes.BY_NAME.values() if row.kind in ("bool", "int", "uint")]
PAIRS = [(source, target) for source in FLOATS for target in TARGETS if source != target]
every_pair = pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
NO_INFINITY = ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def all_codes(row: DType) -> Array:
    return numpy.arange(1 << row.bits, dtype=f"u{row.itemsize}").view(row.numpy)


def finite_values(row: DType) -> Array:
    """Every finite value of a dtype of up to 16 bits that is not below zero, ascending, once each."""
    values = all_codes(row).astype(numpy.float64)
    return numpy.unique(numpy.abs(values[numpy.isfinite(values)]))


def samples(row: DType) -> Array:
    """All bit patterns, or many, with ties of every short dtype and what is next to them."""
    if row.bits <= 16:
        return all_codes(row)
    generator = numpy.random.default_rng(row.bits)
    raw = generator.integers(0, 256, 20_000 * row.itemsize, numpy.uint8).view(row.numpy)
    parts = [raw, (generator.standard_normal(20_000) * numpy.exp2(generator.integers(-160, 20, 20_000)))]
    for short in FLOATS:
        if short.bits <= 16:
            values = finite_values(short)
            step = values[-1] - values[-2] if len(values) < 256 else 0
            ties = numpy.append((values[1:] + values[:-1]) / 2, [values[-1] + step / 2, values[-1] + step])
            ties = ties[:: max(len(ties) // 6000, 1)]
            ties = numpy.concatenate([ties, -ties])
            parts += [
                ties,
                *(
                    numpy.nextafter(ties.astype(row.numpy), row.numpy.type(to))
                    for to in (-numpy.inf, numpy.inf)
                ),
            ]
    with numpy.errstate(all="ignore"):
        return numpy.concatenate([part.astype(row.numpy) for part in parts])


def run_cast(values: Array, source: DType, target: DType, overflow: str = "inf") -> tuple[Array, Tally]:
    spec, box, tally = TensorSpec("x", source, values.shape), whole(values.shape), Tally()
    op = ops.Cast(target.name, overflow)
    (result,) = op.spec([spec])
    out = numpy.empty(values.shape, result.dtype.numpy)
    with numpy.errstate(all="ignore"):
        op.compute(Block(0, box, out, [spec], [box], [values], tally))
    return out, tally


def nearest(values: Array, target: DType) -> Array:
    """Doubles, rounded to nearest even among all finite values of a short dtype; overflow is infinite."""
    known = numpy.array(ladder(target))
    past = known[-1]
    sizes = numpy.minimum(numpy.abs(values), past)
    above = numpy.clip(numpy.searchsorted(known, sizes), 1, len(known) - 1)
    low, high = known[above - 1], known[above]
    # Ascending values have ascending patterns, so that every other one is even.
    even_low = (above - 1) % 2 == 0
    down = (sizes - low < high - sizes) | ((sizes - low == high - sizes) & even_low)
    rounded = numpy.where(down, low, high)
    rounded = numpy.where(rounded == past, numpy.inf, rounded)
    return numpy.where(numpy.isnan(values), numpy.nan, numpy.copysign(rounded, values))


@every_pair
def test_every_value_is_rounded_once_to_nearest_even(source: DType, target: DType) -> None:
    values = samples(source)
    made = run_cast(values, source, target)[0].astype(numpy.float64)
    exact = values.astype(numpy.float64)
    if target.bits > 16:
        with numpy.errstate(all="ignore"):
            wanted = exact.astype(target.numpy).astype(numpy.float64)
    else:
        wanted = nearest(exact, target)
    if target.name in NO_INFINITY:
        wanted = numpy.where(numpy.isinf(wanted), numpy.nan, wanted)
    if target.name.endswith("FNUZ"):
        wanted = wanted + 0.0  # no negative zero
    assert (numpy.isnan(made) == numpy.isnan(wanted)).all()
    kept = ~numpy.isnan(wanted)
    assert (made[kept] == wanted[kept]).all()
    assert (numpy.signbit(made[kept]) == numpy.signbit(wanted[kept])).all()


@every_pair
def test_torch_rounds_alike_but_for_what_is_documented(source: DType, target: DType) -> None:
    values = samples(source)
    made = run_cast(values, source, target)[0]
    raw = torch.from_numpy(values.view(f"i{source.itemsize}"))
    there = raw.view(getattr(torch, str(source.torch_name))).to(getattr(torch, str(target.torch_name)))
    theirs = there.view(getattr(torch, f"int{target.bits}")).numpy().view(target.numpy)
    ours, other = made.astype(numpy.float64), theirs.astype(numpy.float64)
    differs = (numpy.isnan(ours) != numpy.isnan(other)) | (
        ~numpy.isnan(ours) & (made.view(f"u{target.itemsize}") != theirs.view(f"u{target.itemsize}"))
    )
    if target.name == "F8_E4M3":
        saturated = numpy.isnan(ours) & (numpy.abs(other) == 448)
        differs &= ~saturated
    if source.name == "F64" and target.bits < 32:
        once = values.astype(numpy.float64)
        with numpy.errstate(all="ignore"):
            twice = values.astype(numpy.float32).astype(numpy.float64)
        differs &= (once == twice) | numpy.isnan(once)
    assert not differs.any()


@every_pair
def test_losses_are_counted(source: DType, target: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast_module, "CHUNK", 999)
    values = samples(source)
    # Some values once, some often, so that one count cannot pass for another.
    values = values[(numpy.random.default_rng(0).random(20_000) ** 3 * len(values)).astype(int)]
    made, tally = run_cast(values, source, target)
    before, after = values.astype(numpy.float64), made.astype(numpy.float64)
    flushed = (after == 0) & (before != 0)
    overflowed = numpy.isfinite(before) & ~numpy.isfinite(after)
    assert (tally.flushed, tally.overflowed) == (flushed.sum(), overflowed.sum())


@every_pair
def test_a_cast_is_value_exact_where_every_value_comes_back(source: DType, target: DType) -> None:
    values = samples(source)
    made = run_cast(values, source, target)[0]
    before, after = values.astype(numpy.float64), made.astype(numpy.float64)
    both_nan = numpy.isnan(before) & numpy.isnan(after)
    kept = both_nan | ((before == after) & (numpy.signbit(before) == numpy.signbit(after)))
    spec = TensorSpec("x", source, values.shape)
    op = ops.Cast(target.name)
    assert (op.exactness([spec]) is Exactness.VALUE_EXACT) == kept.all()
    assert (op.inverse([spec]) == ops.Cast(source.name)) == (kept.all() and source.name != "F8_E8M0")


@every_pair
def test_saturating_changes_only_what_overflows(source: DType, target: DType) -> None:
    values = samples(source)
    plain, lost = run_cast(values, source, target)
    made, also_lost = run_cast(values, source, target, "saturate")
    assert also_lost == lost
    before, after = values.astype(numpy.float64), plain.astype(numpy.float64)
    has_infinity = target.name not in NO_INFINITY
    beyond = ~numpy.isfinite(after) & (numpy.isfinite(before) if has_infinity else ~numpy.isnan(before))
    found = made.astype(numpy.float64)
    with numpy.errstate(all="ignore"):
        largest = float(ml_dtypes.finfo(target.numpy).max)
    assert (found[beyond] == numpy.copysign(largest, before[beyond])).all()
    width = f"u{target.itemsize}"
    assert (made.view(width)[~beyond] == plain.view(width)[~beyond]).all()


@pytest.mark.parametrize(
    ("source", "target", "values", "wanted"),
    [
        (
            "F32",
            "F16",
            [70_000, -1e9, 65_519, math.inf, math.nan],
            [65_504, -65_504, 65_504, math.inf, math.nan],
        ),
        ("F32", "F8_E4M3", [464, 465, -math.inf, math.nan], [448, 448, -448, math.nan]),
        ("F64", "F32", [1e39, -1e300], [3.4028234663852886e38, -3.4028234663852886e38]),
        ("I64", "F8_E5M2", [1 << 60, -(1 << 62), 3], [57_344, -57_344, 3]),
    ],
)
def test_saturating_ends_at_the_largest_value(
    source: str, target: str, values: list[float], wanted: list[float]
) -> None:
    row = dtypes.by_name(source)
    made, _ = run_cast(numpy.array(values).astype(row.numpy), row, dtypes.by_name(target), "saturate")
    numpy.testing.assert_array_equal(made.astype(numpy.float64), wanted)


def test_an_overflow_that_is_an_error_names_the_tensor_and_how_many() -> None:
    row, goal = dtypes.by_name("F32"), dtypes.by_name("F16")
    fine = numpy.array([1, -65_519, math.inf, math.nan], numpy.float32)
    assert same_bytes(run_cast(fine, row, goal, "error")[0], run_cast(fine, row, goal)[0])
    with pytest.raises(ConversionError, match="cast to F16: 2 of 4 values") as caught:
        run_cast(numpy.array([1, 70_000, math.inf, -1e30], numpy.float32), row, goal, "error")
    assert caught.value.headline.tensor == "x"
    assert "saturate" in str(caught.value.headline.hint)


def test_a_policy_is_part_of_a_cast_and_shows_where_chosen() -> None:
    assert ops.Cast("F16") == ops.Cast("F16", "inf") != ops.Cast("F16", "saturate")
    assert str(ops.Cast("F16")) == "cast(dtype=F16)"
    assert str(ops.Cast("F16", "error")) == "cast(dtype=F16, overflow=error)"
    with pytest.raises(PlanError, match="policy 'wrap'") as caught:
        apply(ops.Cast("F16", "wrap"), tensor(2))
    assert caught.value.headline.hint == "known: inf, saturate, error"


@pytest.mark.parametrize("source", WHOLE, ids=str)
@pytest.mark.parametrize("target", [row for row in TARGETS if row.bits <= 16], ids=str)
def test_whole_numbers_round_once_too(source: DType, target: DType) -> None:
    low = -(1 << (source.bits - 1)) if source.kind == "int" else 0
    high = 1 if source.kind == "bool" else (1 << (source.bits - (source.kind == "int"))) - 1
    near = [
        (1 << power) + (1 << shift) + more
        for power in range(64)
        for shift in range(64)
        for more in (-1, 0, 1)
    ]
    integers = sorted(
        {
            sign * value
            for value in [0, 1, 3, high, low, *near]
            for sign in (1, -1)
            if low <= sign * value <= high
        }
    )
    values = numpy.array(integers, source.numpy)
    made, tally = run_cast(values, source, target)
    wanted = [round_exactly(Fraction(value), target) for value in integers]
    found = made.astype(numpy.float64)
    if target.name in NO_INFINITY:
        found = numpy.where(
            numpy.isnan(found), numpy.copysign(numpy.inf, values.astype(numpy.float64)), found
        )
    assert found.tolist() == wanted
    assert (tally.overflowed, tally.flushed) == (sum(map(math.isinf, wanted)), 0)
    exact = all(Fraction(a) == b for a, b in zip(wanted, integers, strict=True) if math.isfinite(a))
    all_held = exact and not any(map(math.isinf, wanted))
    if source.bits <= 16 or not all_held:
        verdict = ops.Cast(target.name).exactness([TensorSpec("x", source, (1,))])
        assert (verdict is Exactness.VALUE_EXACT) == all_held


def round_exactly(value: Fraction, target: DType) -> float:
    """Nearest even by exact arithmetic among the finite values of a short dtype; overflow is infinite."""
    known = ladder(target)
    size = min(abs(value), Fraction(known[-1]))
    above = bisect_left(known, size)
    best = min(
        range(max(above - 1, 0), above + 1), key=lambda index: (abs(Fraction(known[index]) - size), index % 2)
    )
    return math.copysign(math.inf if best == len(known) - 1 else known[best], value)


@cache
def ladder(row: DType) -> list[float]:
    """The finite values of a short dtype from zero up, and the one that would be next."""
    values = finite_values(row).tolist()
    return [*values, 2 * values[-1] - values[-2]]


@pytest.mark.parametrize("source", WHOLE, ids=str)
@pytest.mark.parametrize("target", [dtypes.by_name("F32"), dtypes.by_name("F64")], ids=str)
def test_whole_numbers_to_long_floats(source: DType, target: DType) -> None:
    values = numpy.array([0, 1], source.numpy)
    if source.kind != "bool":
        info = numpy.iinfo(source.numpy)
        values = numpy.random.default_rng(0).integers(info.min, info.max, 5000, source.numpy, endpoint=True)
    made, _ = run_cast(values, source, target)
    for value, found in zip(values.tolist(), made, strict=True):
        off, below, above = (
            abs(Fraction(float(each)) - value)
            for each in (
                found,
                *(numpy.nextafter(found, found.dtype.type(to)) for to in (-numpy.inf, numpy.inf)),
            )
        )
        assert off <= below and off <= above


@pytest.mark.parametrize(("source", "target"), [("C64", "C128"), ("C128", "C64")])
def test_complex_numbers_are_cast_by_their_parts(source: str, target: str) -> None:
    row, goal = dtypes.by_name(source), dtypes.by_name(target)
    with numpy.errstate(all="ignore"):
        values = numpy.array([1 + 2j, complex(1e-60, 1e60), 0.1 - 0.3j]).astype(row.numpy)
        wanted = values.astype(goal.numpy)
    made, tally = run_cast(values, row, goal)
    assert same_bytes(made, wanted)
    assert (tally.flushed, tally.overflowed) == ((1, 1) if target == "C64" else (0, 0))


@pytest.mark.parametrize(
    ("source", "target"),
    [("BOOL", "I64"), ("I8", "I16"), ("U8", "I16"), ("U16", "U64"), ("I64", "I64"), ("F8_E8M0", "F8_E8M0")],
)
def test_casts_that_hold_every_value_may_end_anywhere(source: str, target: str) -> None:
    row, goal = dtypes.by_name(source), dtypes.by_name(target)
    values = (
        numpy.array([0, 1], row.numpy)
        if row.kind == "bool"
        else numpy.arange(256, dtype=numpy.uint8).view(row.numpy)
    )
    made, _ = run_cast(values, row, goal)
    assert same_bytes(made, values.astype(goal.numpy))
    spec = TensorSpec("x", row, (2,))
    assert ops.Cast(target).exactness([spec]) <= Exactness.VALUE_EXACT


def test_a_cast_to_the_same_dtype_keeps_every_bit() -> None:
    for row in (dtypes.by_name("F16"), dtypes.by_name("BF16"), dtypes.by_name("F8_E4M3FNUZ")):
        values = all_codes(row)
        assert same_bytes(run_cast(values, row, row)[0], values)


# ------------------------------------------------------------------------------------------ memory


def peak_of(function: Callable[[], object]) -> int:
    function()  # tables and imports are made once
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    ("source", "target"), [("F32", "BF16"), ("F64", "F8_E4M3"), ("BF16", "F8_E5M2"), ("I64", "BF16")]
)
def test_a_cast_allocates_chunks_only(source: str, target: str) -> None:
    row, goal = dtypes.by_name(source), dtypes.by_name(target)
    count = (16 << 20) // row.itemsize
    values = numpy.zeros(count, row.numpy)
    assert peak_of(lambda: run_cast(values, row, goal)) < count * goal.itemsize + (4 << 20)


@pytest.mark.parametrize(
    "op",
    [
        ops.PermuteAxes((1, 0)),
        ops.Reshape((-1,)),
        ops.Pad(0, 3000, 1),
        ops.Take(1, ((1, 2, 500), (0, 2, 500))),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_moving_allocates_nothing_of_a_block(op: Op, dtype: str) -> None:
    with sources() as source:
        values = numpy.zeros((2000, 1000), dtypes.by_name(dtype).numpy)
        (result,) = apply(op, source.store(values, dtype))
        out = numpy.empty(result.spec.nbytes, numpy.uint8)
        worker = Worker(Settings(32 << 20))
        try:
            assert peak_of(lambda: worker.read(result, 0, out)) < 128 << 10
        finally:
            worker.close()
