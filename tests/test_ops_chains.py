"""Random chains of operations, run by a worker in odd pieces and little memory, against NumPy.

What a chain should give is worked out beside it with NumPy alone. Values are chosen, and steps taken, so
that every rounding is one that IEEE 754 defines: no library and no processor has a say in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from stored import Array, Sources, same_values, sources

from streamconv import dtypes, ops
from streamconv.errors import ConversionError
from streamconv.ops import Expression, Op, apply
from streamconv.tensor import Stored

# Infinities, and what comes of them, are among the values.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

_MOST = 600  # elements
_LONGEST = 7  # steps
_NARROW = ("F16", "BF16", "F32")


def numpy_type(name: str) -> Any:
    return dtypes.by_name(name).numpy


# ------------------------------------------------------------------------------------ steps


@dataclass
class Chain:
    """An expression, and beside it what NumPy makes of the same values."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    source: Sources
    expression: Expression = field(init=False)
    wanted: Array = field(init=False)
    steps: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = tuple(self.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12]), min_size=1, max_size=4)))
        while math.prod(shape) > _MOST // 2:
            shape = shape[1:]
        self.expression, self.wanted = self.another(shape, self.draw(st.sampled_from([*_NARROW, "F64"])))

    @property
    def name(self) -> str:
        return self.expression.spec.dtype.name

    def another(self, shape: Sequence[int], name: str) -> tuple[Stored, Array]:
        """A stored tensor of small whole numbers, and its values."""
        generator = numpy.random.default_rng(self.draw(st.integers(0, 1 << 32)))
        values = generator.integers(-8, 9, tuple(shape)).astype(numpy.float32).astype(numpy_type(name))
        seams = self.draw(st.lists(st.integers(0, 4 * _MOST), max_size=3))
        return self.source.store(values, name, seams=seams), values

    def take(self, op: Op, wanted: Array, *others: Expression, first: bool = True, result: int = 0) -> None:
        """Apply an operation; `first` says that the chain's own tensor comes before the others."""
        operands = (self.expression, *others) if first else (*others, self.expression)
        self.expression, self.wanted = apply(op, *operands)[result], wanted
        self.steps.append(op)

    def axis(self) -> int:
        return int(self.draw(st.integers(0, self.wanted.ndim - 1)))

    def wide(self, *names: str) -> Any:
        return numpy.float64 if "F64" in (self.name, *names) else numpy.float32

    def rounded(self, values: Array) -> Array:
        """F32 or F64 in the chain's dtype: NumPy and `ml_dtypes` round these once."""
        return values.astype(self.wanted.dtype)

    @property
    def exact(self) -> bool:
        """Whether sums of squares of these values are exact in F64, in whatever order."""
        values = self.wanted.astype(numpy.float64)
        whole = bool((values * 1024 == numpy.rint(values * 1024)).all())
        return whole and values.size > 0 and bool(numpy.abs(values).max() < 1024)


def split(chain: Chain) -> None:
    axis = chain.axis()
    at = chain.draw(st.integers(0, chain.wanted.shape[axis]))
    result = chain.draw(st.integers(0, 1))
    sizes = (at, chain.wanted.shape[axis] - at)
    chain.take(ops.Split(axis, sizes), numpy.split(chain.wanted, [at], axis)[result], result=result)


def concat(chain: Chain) -> None:
    axis, first = chain.axis(), chain.draw(st.booleans())
    if chain.draw(st.booleans()):
        other, values = chain.expression, chain.wanted
    else:
        shape = list(chain.wanted.shape)
        shape[axis] = chain.draw(st.integers(1, 3))
        other, values = chain.another(shape, chain.name)
    parts = [chain.wanted, values] if first else [values, chain.wanted]
    chain.take(ops.Concat(axis), numpy.concatenate(parts, axis), other, first=first)


def stack(chain: Chain) -> None:
    axis = chain.draw(st.integers(0, chain.wanted.ndim))
    other, values = chain.another(chain.wanted.shape, chain.name)
    chain.take(ops.Stack(axis), numpy.stack([chain.wanted, values], axis), other)


def unstack(chain: Chain) -> None:
    axis = chain.axis()
    count = chain.wanted.shape[axis]
    if count and chain.wanted.ndim > 1:
        result = chain.draw(st.integers(0, count - 1))
        chain.take(ops.Unstack(axis, count), chain.wanted.take(result, axis), result=result)


def permute(chain: Chain) -> None:
    axes = tuple(chain.draw(st.permutations(range(chain.wanted.ndim))))
    chain.take(ops.PermuteAxes(axes), chain.wanted.transpose(axes))


def reshape(chain: Chain) -> None:
    size = chain.wanted.size
    rows = chain.draw(st.sampled_from([rows for rows in range(1, size + 1) if size % rows == 0] or [1]))
    shape = chain.draw(st.sampled_from([(rows, -1), (1, rows, -1), (size,)]))
    chain.take(ops.Reshape(shape), numpy.ascontiguousarray(chain.wanted).reshape(shape))


def take(chain: Chain) -> None:
    axis = chain.axis()
    if size := chain.wanted.shape[axis]:
        order = chain.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size))
        chain.take(ops.Take(axis, ops.index_runs(order)), chain.wanted.take(order, axis))


def pad(chain: Chain) -> None:
    axis, more, value = chain.axis(), chain.draw(st.integers(0, 4)), chain.draw(st.sampled_from([0, 1, -2]))
    shape = list(chain.wanted.shape)
    shape[axis] = more
    rest = numpy.full(shape, value, chain.wanted.dtype)
    chain.take(
        ops.Pad(axis, chain.wanted.shape[axis] + more, value), numpy.concatenate([chain.wanted, rest], axis)
    )


def truncate(chain: Chain) -> None:
    axis = chain.axis()
    to = chain.draw(st.integers(1, max(chain.wanted.shape[axis], 1)))
    if chain.wanted.shape[axis]:
        chain.take(ops.Truncate(axis, to), chain.wanted.take(range(to), axis))


def strided(chain: Chain) -> None:
    """A view as torch makes them, of what is stored or computed in one run; it may repeat and overlap."""
    if isinstance(chain.expression, Stored) or isinstance(chain.expression.op, ops.Numeric):
        flat = numpy.ascontiguousarray(chain.wanted).reshape(-1)
        if flat.ndim != chain.wanted.ndim:
            chain.take(ops.Reshape((-1,)), flat)
        offset = chain.draw(st.integers(0, flat.size - 1))
        counts, steps = (
            tuple(chain.draw(st.lists(st.integers(low, 4), min_size=2, max_size=2))) for low in (1, 0)
        )
        index = offset + sum(
            numpy.ix_(*(numpy.arange(count) * step for count, step in zip(counts, steps, strict=True)))
        )
        if index.max() < flat.size:
            chain.take(ops.Strided(counts, steps, offset), flat[index])


def alias(chain: Chain) -> None:
    chain.take(ops.Alias(2), chain.wanted, result=1)


def same(chain: Chain) -> None:
    chain.take(ops.Same(), chain.wanted, chain.expression)


def cast(chain: Chain) -> None:
    name = chain.draw(st.sampled_from([*_NARROW, "F64"]))
    values = chain.wanted
    if chain.name == "F64" and name == "BF16":  # `ml_dtypes` would round twice
        if not numpy.array_equal(values.astype(numpy.float32).astype(numpy.float64), values, equal_nan=True):
            return
        values = values.astype(numpy.float32)
    chain.take(ops.Cast(name), values.astype(numpy_type(name)))


def affine(chain: Chain) -> None:
    scale, offset = chain.draw(st.sampled_from([(1.0, 0.0), (0.5, 3.0), (-2.0, 0.0), (0.3, 0.1)]))
    wide = chain.wide()
    values = chain.wanted.astype(wide) * wide(scale)
    chain.take(ops.Affine(scale, offset), chain.rounded(values + wide(offset) if offset else values))


def reciprocal(chain: Chain) -> None:
    if chain.name != "BF16":
        chain.take(ops.Map("reciprocal"), chain.rounded(1 / chain.wanted.astype(numpy.float64)))


def scale_rows(chain: Chain) -> None:
    other, values = chain.another(chain.wanted.shape[:1], chain.draw(st.sampled_from(["F16", "F32"])))
    wide = chain.wide()
    factor = values.astype(wide).reshape(-1, *[1] * (chain.wanted.ndim - 1))
    chain.take(ops.ScaleRows(), chain.rounded(chain.wanted.astype(wide) * factor), other)


def lowrank_add(chain: Chain) -> None:
    if chain.wanted.ndim < 2:
        return
    *front, rows, columns = chain.wanted.shape
    rank, scale = chain.draw(st.integers(1, 4)), chain.draw(st.sampled_from([1.0, -0.5]))
    right, a = chain.another((*front, rank, columns), "F32")
    left, b = chain.another((*front, rows, rank), "F16")
    wide = chain.wide()
    update = scale * (b.astype(numpy.float64) @ a.astype(numpy.float64))  # a sum of whole numbers
    chain.take(
        ops.LowRankAdd(scale), chain.rounded(chain.wanted.astype(wide) + update.astype(wide)), right, left
    )


def multiply_add(chain: Chain) -> None:
    scale, wide = chain.draw(st.sampled_from([1.0, -0.5])), chain.wide()
    left, a = chain.another(chain.wanted.shape, "F32")
    right, b = chain.another(chain.wanted.shape, "F16")
    product = a.astype(wide) * b.astype(wide) * wide(scale)
    chain.take(ops.MultiplyAdd(scale), chain.rounded(chain.wanted.astype(wide) + product), left, right)


def row_normalize(chain: Chain) -> None:
    if not chain.exact:
        return
    axis, wide = chain.axis(), chain.wide()
    squares = (chain.wanted.astype(numpy.float64) ** 2).sum(axis=axis, keepdims=True)
    norms = numpy.maximum(numpy.sqrt(squares).astype(wide), wide(1e-12))
    chain.take(ops.RowNormalize(axis), chain.rounded(chain.wanted.astype(wide) / norms))


def mean_rows(chain: Chain) -> None:
    """More rows, each the mean of those there are, as vocabularies are padded."""
    if not chain.exact or chain.name not in ("F16", "F32", "F64"):
        return
    count, (rows, *rest) = chain.draw(st.integers(1, 3)), chain.wanted.shape
    mean = chain.rounded(chain.wanted.astype(numpy.float64).sum(axis=0) / rows)
    (new,) = apply(ops.MeanRows(count), chain.expression)
    wanted = numpy.concatenate([chain.wanted, numpy.broadcast_to(mean, (count, *rest))])
    chain.take(ops.Concat(0), wanted, new)


def quantised(goal: str) -> Callable[[Chain], None]:
    """By blocks: the weight goes on, or the scales, or the product of both, which one operand was made into."""

    def step(chain: Chain) -> None:
        if chain.wanted.ndim < 2 or chain.name not in _NARROW or not chain.exact:
            return
        block = chain.draw(st.sampled_from([(1, 4), (3, 2), (128, 128)]))
        *front, rows, columns = chain.wanted.shape
        down, across = (numpy.arange(size) // step for size, step in zip((rows, columns), block, strict=True))
        values = chain.wanted.astype(numpy.float32)
        peaks = numpy.zeros((*front, down[-1] + 1, across[-1] + 1), numpy.float32)
        numpy.maximum.at(peaks, (..., down[:, None], across[None, :]), numpy.abs(values))
        scales = numpy.where(peaks == 0, numpy.float32(1), peaks / numpy.float32(448))
        spread = scales[..., down[:, None], across[None, :]]
        weight = (values / spread).astype(ml_dtypes.float8_e4m3fn)
        held_scales = apply(ops.QuantBlocks(block), chain.expression)[1]
        if goal == "scales":
            chain.take(ops.QuantBlocks(block), scales, result=1)
            return
        chain.take(ops.QuantBlocks(block), weight)
        if goal == "product":
            product = weight.astype(numpy.float32) * spread
            chain.take(ops.DequantBlocks(block, "BF16"), product.astype(ml_dtypes.bfloat16), held_scales)

    return step


STRUCTURAL: list[Callable[[Chain], None]] = [
    split, concat, stack, unstack, permute, reshape, take, pad, truncate, strided, alias, same,
]  # fmt: skip
NUMERIC: list[Callable[[Chain], None]] = [
    cast, affine, reciprocal, scale_rows, lowrank_add, multiply_add, row_normalize, mean_rows, *map(quantised, ("weight", "scales", "product")),
]  # fmt: skip


def draw_chain(draw: Callable[[st.SearchStrategy[Any]], Any], source: Sources) -> Chain:
    chain = Chain(draw, source)
    # As many of the one kind as of the other: structural ones between numeric ones are what is hard.
    step = st.one_of(st.sampled_from(STRUCTURAL), st.sampled_from(NUMERIC))
    length = draw(st.integers(2, _LONGEST))
    for each in draw(st.lists(step, min_size=length, max_size=length)):
        if chain.wanted.size and chain.wanted.size <= _MOST:
            each(chain)
    return chain


# ------------------------------------------------------------------------------------ chains


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_chain_gives_what_numpy_gives(data: st.DataObject) -> None:
    with sources() as source:
        chain = draw_chain(data.draw, source)
        spec = chain.expression.spec
        assert spec.shape == chain.wanted.shape and spec.dtype.numpy == chain.wanted.dtype
        arena = data.draw(st.integers(1_000, 30_000))
        cuts, order = data.draw(st.lists(st.integers(0, 1 << 20), max_size=5)), data.draw(st.integers(0, 9))
        while True:
            try:
                found = source.written(chain.expression, arena, cuts, order)
                break
            except ConversionError as error:  # too little for one element: refused, never wrong
                assert "needs more buffers" in error.headline.message and arena < 1 << 20
                arena *= 3
        event(f"{len(chain.steps)} steps")
        assert same_values(found, chain.wanted), [str(step) for step in chain.steps]


def test_chains_have_every_operation_that_has_operands() -> None:
    """But for those of packed codes, which begin a chain and have tests of their own; and for `drop`."""
    taken: set[str] = set()

    def names(expression: Expression) -> None:
        if not isinstance(expression, Stored):
            taken.add(expression.op.name)
            for operand in expression.operands:
                names(operand)

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(data=st.data())
    def collect(data: st.DataObject) -> None:
        with sources() as source:
            names(draw_chain(data.draw, source).expression)

    collect()
    elsewhere = {
        "constant",
        "flip_signs",
        "gather",
        "global_scale",
        "pack",
        "unpack",
        "scale_all",
        "drop",
        "fill",
        "frequencies",
    }
    assert taken == set(ops.OPS) - elsewhere
