"""The numeric operations: each against its formula, and all in any blocks, at any seams, under any memory."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import Array, as_codes, same_bytes, sources

from streamconv import dtypes, ops
from streamconv.errors import PlanError
from streamconv.ops import Block, Exactness, Op, Tally, apply
from streamconv.ops.layout import Box, boxes, whole
from streamconv.plans import fingerprint, from_json, to_json
from streamconv.plans.plan import OutputFile, Plan, PlannedTensor, SourceFile
from streamconv.tensor import Extent, Stored, TensorSpec
from streamconv.writers.layout import FileLayout

# Not-a-numbers and overflows are among what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---------------------------------------------------------------------------------- the pieces


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation and its operands: dtype names and arrays."""

    op: ops.Numeric
    operands: tuple[tuple[str, Array], ...]

    def __repr__(self) -> str:
        return f"{self.op} of {[(name, array.shape) for name, array in self.operands]}"

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(f"operand{index}", dtypes.by_name(name), array.shape)
            for index, (name, array) in enumerate(self.operands)
        ]

    def results(self) -> tuple[TensorSpec, ...]:
        return self.op.spec(self.specs())

    def block(self, result: int, box: Box, tally: Tally | None = None) -> Array:
        """A block of a result by `rows` and `compute` alone."""
        specs = self.specs()
        spec = self.op.spec(specs)[result]
        needed = self.op.rows(result, box, specs)
        inputs = [
            numpy.ascontiguousarray(as_codes(array)[tuple(slice(*span) for span in part)]).view(array.dtype)
            for (_, array), part in zip(self.operands, needed, strict=True)
        ]
        shape = tuple(stop - start for start, stop in box)
        # No value of any test: what compute leaves out shows.
        out = numpy.full(math.prod(shape) * spec.dtype.itemsize, 0xA5, numpy.uint8)
        out = out.view(spec.dtype.numpy).reshape(shape)
        with numpy.errstate(all="ignore"):
            self.op.compute(
                Block(result, box, out, specs, needed, inputs, Tally() if tally is None else tally)
            )
        return out

    def whole(self, result: int = 0, tally: Tally | None = None) -> Array:
        return self.block(result, whole(self.results()[result].shape), tally)


def to_torch(array: Array, name: str) -> torch.Tensor:
    raw = torch.from_numpy(array.view(f"i{array.itemsize}").copy())
    return raw.view(getattr(torch, str(dtypes.by_name(name).torch_name)))


def from_torch(tensor: torch.Tensor, name: str) -> Array:
    row = dtypes.by_name(name)
    return tensor.contiguous().view(getattr(torch, f"int{row.bits}")).numpy().view(row.numpy)


def gaussian(seed: int, name: str, shape: tuple[int, ...], size: float = 1.0) -> Array:
    values = numpy.random.default_rng(seed).standard_normal(shape) * size
    return numpy.asarray(values.astype(numpy.float32)).astype(dtypes.by_name(name).numpy)


def any_bits(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    row = dtypes.by_name(name)
    raw = numpy.random.default_rng(seed).integers(0, 256, math.prod(shape) * row.itemsize, numpy.uint8)
    return raw.view(row.numpy).reshape(shape)


# ----------------------------------------------------------------------------------- the cases

# Some below a chunk of 64 Ki elements, some above it, along either axis.
matrices = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    st.sampled_from([(300, 500), (3, 70_001), (70_001, 3), (1100, 130)]),
)
stacks = st.one_of(
    matrices,
    st.builds(lambda front, last: (front, *last), st.integers(1, 3), matrices),
    st.just((2, 2, 3, 40)),
)
seeds = st.integers(0, 1 << 32)
float_names = st.sampled_from(["BF16", "F16", "F32", "F64"])


def draw_float(draw: st.DrawFn, name: str, shape: tuple[int, ...]) -> Array:
    make = gaussian if draw(st.booleans()) else any_bits
    return make(draw(seeds), name, shape)


def draw_affine(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"]))
    scale, offset = draw(st.sampled_from([(1.0, 0.0), (1.0, 1.0), (-0.3, 0.0), (2.5, -1.25), (0.0, 3.0)]))
    return Case(ops.Affine(scale, offset), ((name, draw_float(draw, name, draw(stacks))),))


def draw_flip_signs(draw: st.DrawFn) -> Case:
    name = draw(float_names)
    return Case(ops.FlipSigns(), ((name, draw_float(draw, name, draw(stacks))),))


def draw_map(draw: st.DrawFn) -> Case:
    name, function = draw(float_names), draw(st.sampled_from(["neg_exp", "log_neg", "reciprocal"]))
    return Case(ops.Map(function), ((name, draw_float(draw, name, draw(stacks))),))


def draw_row_normalize(draw: st.DrawFn) -> Case:
    name, shape = draw(float_names), draw(stacks)
    axis = draw(st.integers(0, len(shape) - 1))
    return Case(ops.RowNormalize(axis, 1e-12), ((name, draw_float(draw, name, shape)),))


def draw_scale_rows(draw: st.DrawFn) -> Case:
    name, other, shape = draw(float_names), draw(float_names), draw(stacks)
    return Case(
        ops.ScaleRows(),
        ((name, draw_float(draw, name, shape)), (other, draw_float(draw, other, shape[:1]))),
    )


def draw_multiply_add(draw: st.DrawFn) -> Case:
    names, shape = [draw(float_names) for _ in range(3)], draw(stacks)
    return Case(
        ops.MultiplyAdd(draw(st.sampled_from([1.0, -0.5]))),
        tuple((name, draw_float(draw, name, shape)) for name in names),
    )


blocks = st.sampled_from([(128, 128), (1, 16), (7, 5), (1000, 3), (1, 100_000)])
wide_names = st.sampled_from(["BF16", "F16", "F32"])


def draw_dequant_blocks(draw: st.DrawFn) -> Case:
    shape, block = draw(stacks), draw(blocks)
    name = draw(st.sampled_from(["F8_E4M3", "F8_E5M2", "I8", "U8", "F32"]))
    scale = draw(st.sampled_from(["F32", "BF16", "F16", "F8_E8M0"]))
    scales = (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    held = any_bits(draw(seeds), "U8", scales) if scale == "F8_E8M0" else draw_float(draw, scale, scales)
    if scale == "F8_E8M0":
        scale, held = draw(st.sampled_from([("U8", held), (scale, held.view(dtypes.by_name(scale).numpy))]))
    zero = draw(st.sampled_from([None, None, "I8", "U8", "BF16"]))
    points = () if zero is None else ((zero, draw_float(draw, zero, scales)),)
    op = ops.DequantBlocks(block, draw(wide_names))
    return Case(op, ((name, any_bits(draw(seeds), name, shape)), (scale, held), *points))


def draw_unpack(draw: st.DrawFn) -> Case:
    order = draw(st.sampled_from(["stream", "words", "high_first"]))
    bits = draw(st.sampled_from([1, 2, 4, 8] if order == "high_first" else range(1, 9)))
    meaning = draw(
        st.sampled_from(["unsigned", "next", "signed", "offset", *(["e2m1"] if bits == 4 else [])])
    )
    *front, count = draw(matrices)
    name = "I32" if order == "words" else draw(st.sampled_from(["U8", "I8", "I16", "I32", "BF16"]))
    a_word = 32 // bits if order == "words" else None
    width = dtypes.by_name(name).bits
    words = -(-count // a_word) if a_word else -(-count * bits // width)
    op = ops.Unpack(bits, count, meaning, order)
    return Case(op, ((name, any_bits(draw(seeds), name, (*front, words))),))


def draw_pack(draw: st.DrawFn) -> Case:
    bits, meaning = draw(
        st.sampled_from([(4, "unsigned"), (4, "signed"), (4, "offset"), (4, "e2m1"), (8, "offset")])
    )
    name = ops.packed.MEANINGS[meaning]
    return Case(
        ops.Pack(bits, draw(st.sampled_from(["U8", "I32"])), meaning),
        ((name, any_bits(draw(seeds), name, draw(stacks))),),
    )


def draw_gather(draw: st.DrawFn) -> Case:
    name, size = draw(st.sampled_from(["F32", "BF16", "U8"])), draw(st.integers(1, 40))
    front = draw(st.sampled_from([(), (3,), (300, 2)]))
    shape = draw(st.sampled_from([(7,), (500,), (70_001,), (40, 30)])) if front != (300, 2) else (300,)
    index = (
        numpy.random.default_rng(draw(seeds))
        .integers(0, size, shape)
        .astype(draw(st.sampled_from(["u1", "i4", "i8"])))
    )
    dtype = {1: "U8", 4: "I32", 8: "I64"}[index.itemsize]
    return Case(ops.Gather(), ((name, any_bits(draw(seeds), name, (*front, size))), (dtype, index)))


def draw_scale_all(draw: st.DrawFn) -> Case:
    names = st.sampled_from(["BF16", "F16", "F32", "F8_E4M3"])
    name, other = draw(names), draw(names)
    scale = draw_float(draw, other, draw(st.sampled_from([(), (1,), (1, 1)])))
    return Case(
        ops.ScaleAll(draw(st.booleans())), ((name, draw_float(draw, name, draw(stacks))), (other, scale))
    )


def draw_quant_blocks(draw: st.DrawFn) -> Case:
    name, rule = draw(wide_names), draw(st.sampled_from(["wide", "own", "power", "global"]))
    op = ops.QuantBlocks(
        draw(blocks), draw(st.sampled_from(["F8_E4M3", "F8_E5M2", "I8", "I4", "E2M1"])), rule
    )
    whole = (("F32", numpy.array([300.0], numpy.float32)),) if rule == "global" else ()
    return Case(op, ((name, draw_float(draw, name, draw(stacks))), *whole))


def draw_lowrank_add(draw: st.DrawFn) -> Case:
    *front, rows, columns = draw(stacks)
    rank = draw(st.sampled_from([1, 2, 8, 33]))
    names = [draw(float_names) for _ in range(3)]
    shapes = [(*front, rows, columns), (*front, rank, columns), (*front, rows, rank)]
    make = gaussian if draw(st.booleans()) else any_bits
    operands = [(name, make(draw(seeds), name, shape)) for name, shape in zip(names, shapes, strict=True)]
    return Case(ops.LowRankAdd(draw(st.sampled_from([1.0, -0.7, 16.0]))), tuple(operands))


CASES: dict[str, Callable[[st.DrawFn], Case]] = {
    "affine": draw_affine,
    "dequant_blocks": draw_dequant_blocks,
    "flip_signs": draw_flip_signs,
    "gather": draw_gather,
    "lowrank_add": draw_lowrank_add,
    "map": draw_map,
    "pack": draw_pack,
    "quant_blocks": draw_quant_blocks,
    "row_normalize": draw_row_normalize,
    "scale_all": draw_scale_all,
    "multiply_add": draw_multiply_add,
    "scale_rows": draw_scale_rows,
    "unpack": draw_unpack,
}
every_op = pytest.mark.parametrize("name", sorted(CASES))


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    return CASES[name](draw)


def test_every_op_of_these_modules_is_here() -> None:
    modules = {
        f"streamconv.ops.{name}" for name in ("blocks", "elementwise", "lowrank", "normalize", "packed")
    }
    assert set(CASES) == {name for name, op in ops.OPS.items() if op.__module__ in modules}
    assert all(ops.OPS[name].name == name for name in CASES)


# ------------------------------------------------------------------------------- in any blocks


@every_op
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_box_has_the_bytes_of_the_whole(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    for result, spec in enumerate(case.results()):
        made = case.whole(result)
        for _ in range(3):
            spans = [
                sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
                for size in spec.shape
            ]
            box = tuple((start, stop) for start, stop in spans)
            assert same_bytes(case.block(result, box), made[tuple(slice(*span) for span in box)])


@every_op
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_blocks_of_any_length_join_to_the_whole_and_lose_as_much(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    for result, spec in enumerate(case.results()):
        together, apart = Tally(), Tally()
        made = case.whole(result, together)
        length = data.draw(st.integers(max(spec.numel // 20, 1), spec.numel + 1))
        parts = [
            case.block(result, box, apart).tobytes()
            for start in range(0, spec.numel, length)
            for box in boxes(spec.shape, start, min(start + length, spec.numel))
        ]
        assert b"".join(parts) == made.tobytes()
        assert apart == together


@every_op
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_worker_gives_the_same_bytes_from_a_file(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    arena, cut = data.draw(st.sampled_from([24 << 20, 96 << 20])), data.draw(st.integers(0, 1 << 30))
    with sources() as source:
        operands = [
            source.store(array, dtype, f"operand{index}")
            for index, (dtype, array) in enumerate(case.operands)
        ]
        for result, expression in enumerate(apply(case.op, *operands)):
            assert same_bytes(source.written(expression, arena, [cut]), case.whole(result))


@every_op
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_several_threads_may_compute_at_once(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    made = case.whole()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: case.whole(), range(8)):
            assert same_bytes(found, made)


def large(name: str) -> Case:
    """Operands of a few megabytes."""
    rows, columns = 2048, 2048
    weight, codes = gaussian(0, "BF16", (rows, columns)), any_bits(0, "U8", (rows, columns)) % 0x70
    f8 = codes.view(dtypes.by_name("F8_E4M3").numpy)
    return {
        "affine": Case(ops.Affine(0.5, 1.0), (("BF16", weight),)),
        "dequant_blocks": Case(
            ops.DequantBlocks((128, 128), "BF16"), (("F8_E4M3", f8), ("F32", gaussian(1, "F32", (16, 16))))
        ),
        "flip_signs": Case(ops.FlipSigns(), (("BF16", weight),)),
        "lowrank_add": Case(
            ops.LowRankAdd(2.0),
            (("BF16", weight), ("BF16", weight[:16].copy()), ("BF16", weight[:, :16].copy())),
        ),
        "gather": Case(ops.Gather(), (("F32", gaussian(1, "F32", (16,))), ("U8", codes % 16))),
        "map": Case(ops.Map("neg_exp"), (("BF16", weight),)),
        "pack": Case(ops.Pack(4, "I32", "offset"), (("I8", numpy.tile(codes.view(numpy.int8), (1, 8))),)),
        "scale_all": Case(ops.ScaleAll(), (("BF16", weight), ("F32", gaussian(1, "F32", ())))),
        "unpack": Case(ops.Unpack(3, 2048, "offset"), (("U8", numpy.tile(codes[:, :768], (1, 1))),)),
        "multiply_add": Case(ops.MultiplyAdd(2.0), (("BF16", weight),) * 3),
        "quant_blocks": Case(ops.QuantBlocks((128, 128)), (("BF16", weight),)),
        "row_normalize": Case(ops.RowNormalize(1, 1e-12), (("BF16", weight),)),
        "scale_rows": Case(ops.ScaleRows(), (("BF16", weight), ("F32", gaussian(1, "F32", (rows,))))),
    }[name]


@every_op
@pytest.mark.parametrize("folded", [False, True], ids=["square", "one long row"])
def test_an_op_allocates_tiles_only(name: str, folded: bool) -> None:
    case = large(name)
    if folded and name in ("affine", "map", "row_normalize", "quant_blocks"):
        ((dtype, weight),) = case.operands
        case = Case(case.op, ((dtype, weight.reshape(1, -1)),))
    specs = case.specs()
    (first, *_) = case.op.spec(specs)
    box = whole(first.shape)
    needed = case.op.rows(0, box, specs)
    arrays = [array for _, array in case.operands]
    out = numpy.empty(first.shape, first.dtype.numpy)

    def run() -> None:
        with numpy.errstate(all="ignore"):
            case.op.compute(Block(0, box, out, specs, needed, arrays, Tally()))

    run()  # tables and imports are made once
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.numel >= 1 << 22
    assert peak < 6 << 20


# -------------------------------------------------------------------------------- plain data


@every_op
def test_an_op_is_plain_data(name: str) -> None:
    op = large(name).op
    assert hash(op) == hash(type(op)(**vars(op))) and op == type(op)(**vars(op))
    assert str(op).startswith(name)


@every_op
def test_a_plan_with_the_op_reads_back_equal(name: str) -> None:
    case = large(name)
    offset, sources = 8, []
    for spec in case.specs():
        sources.append(Stored(spec, (Extent("/model/a.safetensors", offset, spec.nbytes),)))
        offset += spec.nbytes
    tensors = [
        PlannedTensor(tuple(spec.name for spec in case.specs()), result, 0, 0)
        for result in apply(case.op, *sources)
    ]
    plan = Plan(
        source="/model",
        source_format="safetensors",
        target_format="safetensors",
        files=(SourceFile("/model/a.safetensors", offset, 1),),
        tensors=tuple(tensors),
        outputs=(OutputFile("a.safetensors", FileLayout(tensors[0].spec.nbytes, (), ())),),
    )
    back = from_json(orjson.loads(orjson.dumps(to_json(plan))))
    assert back == plan and fingerprint(back) == fingerprint(plan)


# ----------------------------------------------------------------------------------- refusals


def tensor(*shape: int, dtype: str = "F32", name: str = "layer.weight") -> Stored:
    spec = TensorSpec(name, dtypes.by_name(dtype), shape)
    return Stored(spec, (Extent("/source", 0, spec.nbytes),) if spec.nbytes else ())


F8 = tensor(576, 7168, dtype="F8_E4M3")
REFUSED: list[tuple[Op, list[Stored], str]] = [
    (ops.Affine(1, 1), [tensor(2, dtype="I32")], "is I32: it computes with floats"),
    (ops.Affine(1, 1), [tensor(2, dtype="F4")], "is F4"),
    (ops.Affine(1, 1), [tensor(2, dtype="F8_E8M0")], "is F8_E8M0"),
    (ops.Affine(1, 1), [tensor(2, dtype="C64")], "is C64"),
    (ops.Affine(1e39, 1), [tensor(2)], "scale 1e+39, which F32 cannot hold"),
    (ops.Affine(1, 1e-60), [tensor(2)], "offset 1e-60, which F32 cannot hold"),
    (ops.Affine(math.nan, 1), [tensor(2)], "scale nan"),
    (ops.Affine(1, 1), [tensor(2), tensor(2)], "takes 1 operand, and is given 2"),
    (ops.FlipSigns(), [tensor(2, dtype="I32")], "'layer.weight', which is I32"),
    (ops.FlipSigns(imaginary=True), [tensor(2)], "'layer.weight', which is F32"),
    (ops.Map("sin"), [tensor(2)], "'sin', which is not one of its functions"),
    (ops.Map("neg_exp"), [tensor(2, dtype="BOOL")], "is BOOL"),
    (ops.RowNormalize(2), [tensor(2, 3)], "axis 2 of shape [2, 3]"),
    (ops.RowNormalize(-1), [tensor(2, 3)], "axis -1"),
    (ops.RowNormalize(0), [tensor()], "axis 0 of shape []"),
    (ops.RowNormalize(0, 0.0), [tensor(2)], "eps 0.0: above 0 expected"),
    (ops.RowNormalize(0, -1.0), [tensor(2)], "eps -1.0"),
    (ops.RowNormalize(0, math.inf), [tensor(2)], "eps inf"),
    (ops.RowNormalize(0), [tensor(2, dtype="U8")], "is U8"),
    (ops.ScaleRows(), [tensor(2, 3), tensor(3)], "[2] expected"),
    (ops.ScaleRows(), [tensor(2, 3), tensor(2, 1)], "[2] expected"),
    (ops.ScaleRows(), [tensor(), tensor()], "a number for each row"),
    (ops.MultiplyAdd(), [tensor(2, 3), tensor(2, 3), tensor(3, 2)], "one shape expected"),
    (ops.ScaleRows(), [tensor(2), tensor(2, dtype="I64", name="s")], "'s', which is I64"),
    (ops.ScaleRows(), [tensor(2)], "takes 2 operands"),
    (
        ops.DequantBlocks((128, 128), "BF16"),
        [F8, tensor(4, 56)],
        "needs scales [5, 56]: 'layer.weight' is [4, 56]",
    ),
    (ops.DequantBlocks((128, 128), "BF16"), [F8, tensor(5)], "needs scales [5, 56]"),
    (ops.DequantBlocks((0, 128), "BF16"), [F8, tensor(5, 56)], "blocks of [0, 128]"),
    (ops.DequantBlocks((128,), "BF16"), [F8, tensor(5, 56)], "blocks of [128]"),
    (
        ops.DequantBlocks((128, 128), "BF16"),
        [tensor(5, dtype="F8_E4M3"), tensor(1)],
        "[..., out, in] expected",
    ),
    (ops.DequantBlocks((128, 128), "BF16"), [tensor(2, 2, dtype="I32"), tensor(1, 1)], "is I32: F8_E4M3 or"),
    (
        ops.DequantBlocks((128, 128), "BF16"),
        [F8, tensor(5, 56, dtype="I8")],
        "is I8: BF16 or F16 or F32 or F8_E8M0 or U8",
    ),
    (ops.DequantBlocks((128, 128), "F64"), [F8, tensor(5, 56)], "to F64: it makes BF16 or F16 or F32"),
    (ops.DequantBlocks((128, 128), "half a float"), [F8, tensor(5, 56)], "unknown dtype"),
    (ops.DequantBlocks((128, 128), "BF16"), [F8], "takes 2 or 3 operands, and is given 1"),
    (ops.DequantBlocks((128, 128), "BF16"), [F8, tensor(5, 56), tensor(5, 1)], "needs scales [5, 56]"),
    (
        ops.DequantBlocks((128, 128), "BF16"),
        [F8, tensor(5, 56), tensor(5, 56, dtype="F8_E8M0")],
        "is F8_E8M0: I8 or U8",
    ),
    (ops.Unpack(4, 16), [tensor(8, 3, dtype="I32")], "needs 2 I32 in a row: 'layer.weight' is [8, 3]"),
    (ops.Unpack(3, 33), [tensor(8, 3, dtype="I32")], "needs 4 I32"),
    (ops.Unpack(3, 31, "offset", "words"), [tensor(8, 3, dtype="I32")], "needs 4 I32"),
    (ops.Unpack(9, 16), [tensor(8, 3, dtype="I32")], "9 bits"),
    (ops.Unpack(3, 16, "e2m1"), [tensor(8, 3, dtype="I32")], "3 bits as 'e2m1'"),
    (ops.Unpack(3, 16, "unsigned", "high_first"), [tensor(8, 3, dtype="U8")], "3 bits"),
    (ops.Unpack(4, 16, "half"), [tensor(8, 2, dtype="I32")], "of 'half'"),
    (ops.Unpack(4, 1), [tensor(dtype="I32")], "unpack of I32 []"),
    (ops.Pack(3, "I32"), [tensor(8, 3, dtype="U8")], "3 bits"),
    (ops.Pack(4, "I32"), [tensor(8, 3, dtype="I8")], "is I8: U8 expected"),
    (ops.Pack(4, "F32"), [tensor(8, 3, dtype="U8")], "is F32: U8 or I8 or I32 expected"),
    (ops.Gather(), [tensor(8, 3), tensor(3)], "which is F32"),
    (ops.Gather(), [tensor(), tensor(3, dtype="I32")], "a tensor with an axis"),
    (ops.ScaleAll(), [tensor(8, 3), tensor(3)], "one number expected"),
    (ops.ScaleAll(), [tensor(8, 3, dtype="I8"), tensor()], "is I8"),
    (ops.QuantBlocks((128, -1)), [tensor(2, 2)], "blocks of [128, -1]"),
    (ops.QuantBlocks((128, 128)), [tensor(2)], "[..., out, in] expected"),
    (ops.QuantBlocks((128, 128)), [tensor(2, 2, dtype="F64")], "is F64: BF16 or F16 or F32 expected"),
    (ops.QuantBlocks((128, 128), "I7"), [tensor(2, 2)], "to I7 by 'wide': it makes F8_E4M3 or F8_E5M2 or I8"),
    (ops.QuantBlocks((128, 128), "I8", "even"), [tensor(2, 2)], "by 'even'"),
    (ops.QuantBlocks((128, 128), "E2M1", "global"), [tensor(2, 2)], "one number for 'global'"),
    (ops.QuantBlocks((128, 128)), [tensor(2, 2), tensor(1)], "of 2 operands"),
    (
        ops.LowRankAdd(1.0),
        [tensor(4, 6), tensor(2, 6), tensor(2, 4)],
        "needs [4, 2]: 'layer.weight' is [2, 4]",
    ),
    (ops.LowRankAdd(1.0), [tensor(4, 6), tensor(4, 2), tensor(2, 6)], "needs [4, 6]"),
    (ops.LowRankAdd(1.0), [tensor(4, 6), tensor(0, 6), tensor(4, 0)], "rank 0"),
    (ops.LowRankAdd(1.0), [tensor(3, 4, 6), tensor(2, 6), tensor(4, 2)], "A [..., r, n] expected"),
    (ops.LowRankAdd(1.0), [tensor(6), tensor(6), tensor(6)], "W [..., m, n]"),
    (ops.LowRankAdd(1.0), [tensor(4, 6, dtype="U8"), tensor(2, 6), tensor(4, 2)], "is U8"),
    (ops.LowRankAdd(math.inf), [tensor(4, 6), tensor(2, 6), tensor(4, 2)], "scale inf"),
    (ops.LowRankAdd(1.0), [tensor(4, 6), tensor(2, 6)], "takes 3 operands"),
]


@pytest.mark.parametrize(("op", "operands", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_operands_that_do_not_fit_are_refused(op: Op, operands: list[Stored], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        apply(op, *operands)
    assert op.name in caught.value.headline.message
    assert message in caught.value.headline.message
    assert caught.value.headline.tensor == "layer.weight"


def test_every_op_refuses_something() -> None:
    assert {op.name for op, _, _ in REFUSED} == set(CASES)


@pytest.mark.parametrize(
    ("op", "operands", "wanted"),
    [
        (ops.Affine(1, 0), [tensor(2)], Exactness.BIT_EXACT),
        (ops.Affine(1, 1), [tensor(2)], Exactness.ROUNDING),
        (ops.FlipSigns(), [tensor(2)], Exactness.BIT_EXACT),
        (ops.Map("neg_exp"), [tensor(2)], Exactness.ROUNDING),
        (ops.RowNormalize(0), [tensor(2)], Exactness.LOSSY),
        (ops.ScaleRows(), [tensor(2), tensor(2)], Exactness.ROUNDING),
        (ops.DequantBlocks((128, 128), "BF16"), [F8, tensor(5, 56)], Exactness.ROUNDING),
        (ops.DequantBlocks((128, 128), "BF16"), [F8, tensor(5, 56, dtype="U8")], Exactness.VALUE_EXACT),
        (ops.DequantBlocks((128, 128), "F16"), [F8, tensor(5, 56, dtype="U8")], Exactness.ROUNDING),
        (ops.DequantBlocks((2, 2), "F32"), [tensor(2, 2, dtype="I8"), tensor(1, 1)], Exactness.ROUNDING),
        (ops.DequantBlocks((2, 2), "BF16"), [tensor(2, 2), tensor(1, 1, dtype="U8")], Exactness.ROUNDING),
        (ops.Unpack(4, 16), [tensor(8, 2, dtype="I32")], Exactness.VALUE_EXACT),
        (ops.Pack(4, "U8"), [tensor(8, 2, dtype="U8")], Exactness.VALUE_EXACT),
        (ops.Gather(), [tensor(8), tensor(2, dtype="U8")], Exactness.BIT_EXACT),
        (ops.ScaleAll(), [tensor(8), tensor()], Exactness.ROUNDING),
        (ops.QuantBlocks((128, 128)), [tensor(2, 2)], Exactness.LOSSY),
        (ops.LowRankAdd(1.0), [tensor(4, 6), tensor(2, 6), tensor(4, 2)], Exactness.ROUNDING),
    ],
    ids=lambda value: str(value)[:50],
)
def test_exactness_is_said(op: Op, operands: list[Stored], wanted: Exactness) -> None:
    assert op.exactness([operand.spec for operand in operands]) is wanted


# ------------------------------------------------------------------------------------- affine


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1.0), (0.37, 0.0), (-2.5, 0.1)])
def test_affine_is_torchs_formula_rounded_once(name: str, scale: float, offset: float) -> None:
    values = gaussian(1, name, (200, 500))
    there = to_torch(values, name)
    wide = there.double() if name == "F64" else there.float()
    wanted = from_torch((wide * scale + offset).to(there.dtype), name)
    assert same_bytes(Case(ops.Affine(scale, offset), ((name, values),)).whole(), wanted)


@pytest.mark.parametrize("name", ["BF16", "F32"])
def test_affine_one_and_nothing_changes_no_bit(name: str) -> None:
    values = any_bits(3, name, (70_000,))
    assert same_bytes(Case(ops.Affine(1.0, 0.0), ((name, values),)).whole(), values)


def test_affine_without_offset_keeps_the_sign_of_zero() -> None:
    values = numpy.array([-0.0, 0.0], numpy.float32)
    assert numpy.signbit(Case(ops.Affine(2.0, 0.0), (("F32", values),)).whole()).tolist() == [True, False]


@given(st.sampled_from([1.0, -4.0, 0.5]), st.integers(-8, 8), st.lists(st.integers(-64, 64), min_size=1))
def test_affine_comes_back_where_nothing_is_rounded(
    scale: float, offset: int, whole_numbers: list[int]
) -> None:
    values = numpy.array(whole_numbers, numpy.float32)
    forth = ops.Affine(scale, float(offset))
    back = forth.inverse([TensorSpec("x", dtypes.by_name("F32"), values.shape)])
    assert back is not None
    made = Case(forth, (("F32", values),)).whole()
    assert (Case(back, (("F32", made),)).whole() == values).all()


@pytest.mark.parametrize(("scale", "offset"), [(0.0, 3.0), (1e-38, 1e30), (1e-45, 0.0)])
def test_affine_that_cannot_be_undone_has_no_inverse(scale: float, offset: float) -> None:
    assert ops.Affine(scale, offset).inverse([]) is None


def test_affine_undone_twice_is_itself() -> None:
    once = ops.Affine(2.0, 0.0).inverse([])
    assert once == ops.Affine(0.5, 0.0) and str(once) == "affine(scale=0.5, offset=0.0)"
    assert ops.Affine(1.0, 1.0).inverse([]) == ops.Affine(1.0, -1.0)


@pytest.mark.parametrize(
    ("name", "scale", "offset", "values", "overflowed", "flushed"),
    [
        ("F16", 2.0, 0.0, [40_000, 1, 0, math.inf, math.nan, -60_000], 2, 0),
        ("F16", 1e-4, 0.0, [1e-4, 0, 1], 0, 1),
        ("F32", 1e-30, 0.0, [1e-20, 0.0, 1.0], 0, 1),
        ("F32", 0.0, 0.0, [1e-20, 0.0, math.inf], 0, 0),
        ("F16", 1.0, -1.0, [1.0, 2.0], 0, 0),
        ("F8_E4M3", 2.0, 1.0, [448, 1.0, math.nan], 1, 0),
        ("F8_E5M2", 1.0, 1e-7, [0.0, 1.0], 0, 1),
    ],
)
def test_affine_counts_what_is_lost(
    name: str, scale: float, offset: float, values: list[float], overflowed: int, flushed: int
) -> None:
    tally = Tally()
    array = numpy.array(values, numpy.float32).astype(dtypes.by_name(name).numpy)
    Case(ops.Affine(scale, offset), ((name, array),)).whole(tally=tally)
    assert (tally.overflowed, tally.flushed) == (overflowed, flushed)


# ---------------------------------------------------------------------------------------- map

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg_exp": lambda values: -values.exp(),
    "log_neg": lambda values: (-values).log(),
    "reciprocal": torch.reciprocal,
}


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_maps_are_the_nearest_to_torchs_in_f64(function: str, name: str) -> None:
    values = gaussian(2, name, (100_000,), 2.0)  # in range of F16
    made = Case(ops.Map(function), ((name, values),)).whole()
    exact = FUNCTIONS[function](to_torch(values, name).double()).numpy()
    assert (numpy.isnan(made.astype(numpy.float64)) == numpy.isnan(exact)).all()
    off = numpy.abs(made.astype(numpy.float64) - exact)
    # Four last digits of F64 are what libraries allow themselves, NumPy and torch on any processor.
    slack = numpy.abs(exact) * 2 * 4 * 2.0**-52
    if name == "F64":
        assert (off <= slack)[~numpy.isnan(exact)].all()
        return
    for way in (-numpy.inf, numpy.inf):
        neighbour = numpy.nextafter(made, numpy.array(way, made.dtype)).astype(numpy.float64)
        assert not (off > numpy.abs(neighbour - exact) + slack).any()


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_maps_come_back_up_to_rounding(function: str) -> None:
    values = -numpy.abs(gaussian(4, "F32", (1000,))) - numpy.float32(0.1)
    forth = ops.Map(function)
    back = forth.inverse([])
    assert isinstance(back, ops.Map) and back.inverse([]) == forth
    made = Case(forth, (("F32", values),)).whole()
    numpy.testing.assert_allclose(Case(back, (("F32", made),)).whole(), values, rtol=1e-5, atol=1e-6)


def test_reciprocals_of_powers_of_two_come_back_exactly() -> None:
    values = numpy.ldexp(numpy.float32(1), numpy.arange(-100, 100)).astype(numpy.float32)
    once = Case(ops.Map("reciprocal"), (("F32", values),)).whole()
    assert same_bytes(Case(ops.Map("reciprocal"), (("F32", once),)).whole(), values)


@pytest.mark.parametrize(
    ("function", "values", "overflowed", "flushed"),
    [
        ("neg_exp", [0, 12, -30, -math.inf, math.inf, math.nan, -1000], 1, 2),
        ("log_neg", [-1, 0, 1, -math.inf, math.nan], 2, 0),
        ("reciprocal", [0, 1, math.inf, -math.inf, 2.0**-24, math.nan], 2, 0),
    ],
)
def test_maps_count_what_is_lost(function: str, values: list[float], overflowed: int, flushed: int) -> None:
    tally = Tally()
    Case(ops.Map(function), (("F16", numpy.array(values, numpy.float16)),)).whole(tally=tally)
    assert (tally.overflowed, tally.flushed) == (overflowed, flushed)


# ------------------------------------------------------------------------------ row_normalize


@pytest.mark.parametrize(("name", "digits"), [("BF16", 8), ("F16", 11), ("F32", 24), ("F64", 53)])
@pytest.mark.parametrize(
    ("shape", "axis"), [((50, 3000), 1), ((3000, 50), 0), ((3, 400, 70), 1), ((7,), 0), ((2, 70_000), 1)]
)
def test_rows_are_normalised_as_torch_does(name: str, digits: int, shape: tuple[int, ...], axis: int) -> None:
    values = gaussian(5, name, shape)
    made = Case(ops.RowNormalize(axis, 1e-12), ((name, values),)).whole().astype(numpy.float64)
    theirs = torch.nn.functional.normalize(to_torch(values, name).double(), dim=axis, eps=1e-12).numpy()
    # Half a last digit each for the norm and the quotient where computed, and for the result.
    inside = 53 if name == "F64" else 24
    subnormal = 2.0**-25 if name == "F16" else 0
    allowed = numpy.abs(theirs) * (2.0**-digits + 2.0 ** (1 - inside)) + subnormal
    if name == "F64":  # torch's own sums are off by as much as their length
        allowed += numpy.abs(theirs) * shape[axis] * 2.0**-53
    assert (numpy.abs(made - theirs) <= allowed).all()


def test_a_row_of_zeros_stays_and_a_short_one_is_divided_by_eps() -> None:
    values = numpy.array([[0, 0], [3e-13, 4e-13], [3, 4]], numpy.float32)
    made = Case(ops.RowNormalize(1, 1e-12), (("F32", values),)).whole()
    numpy.testing.assert_allclose(made, [[0, 0], [0.3, 0.4], [0.6, 0.8]], rtol=1e-6)


def test_a_norm_beyond_f32_is_none_beyond_f64() -> None:
    values = numpy.full((1, 4), 2.0**120, numpy.float32)
    assert Case(ops.RowNormalize(1), (("F32", values),)).whole().tolist() == [[0.5] * 4]


def test_normalising_counts_what_is_lost() -> None:
    tally = Tally()
    values = numpy.array([[1e30, 1e-30, 0], [math.inf, 1, 0], [math.nan, 0, 1]], numpy.float32)
    made = Case(ops.RowNormalize(1), (("F32", values),)).whole(tally=tally)
    assert made[0].tolist() == [1, 0, 0]
    # 1e-30 and the 1 beside infinity become zero; beside not-a-number everything becomes that.
    assert (tally.flushed, tally.overflowed) == (2, 2)


# --------------------------------------------------------------------------------- scale_rows


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("other", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(300, 500), (5,), (4, 3, 7), (2, 70_000)])
def test_rows_are_scaled_by_torchs_formula_rounded_once(
    name: str, other: str, shape: tuple[int, ...]
) -> None:
    values, scale = gaussian(6, name, shape), gaussian(7, other, shape[:1])
    there = to_torch(values, name)
    wide = torch.float64 if name == "F64" else torch.float32
    factor = to_torch(scale, other).to(wide).reshape(-1, *[1] * (len(shape) - 1))
    wanted = from_torch((there.to(wide) * factor).to(there.dtype), name)
    assert same_bytes(Case(ops.ScaleRows(), ((name, values), (other, scale))).whole(), wanted)


def test_scaling_counts_what_is_lost() -> None:
    tally = Tally()
    values = numpy.array([[60_000, 0, 1], [6e-8, 0, math.inf], [5, 6, 7]], numpy.float16)
    scale = numpy.array([2, 0.25, 0], numpy.float32)
    Case(ops.ScaleRows(), (("F16", values), ("F32", scale))).whole(tally=tally)
    assert (tally.overflowed, tally.flushed) == (1, 1)


# -------------------------------------------------------------------------------- lowrank_add


def lowrank(scale: float, weight: Array, right: Array, left: Array, names: Sequence[str]) -> Case:
    return Case(ops.LowRankAdd(scale), tuple(zip(names, (weight, right, left), strict=True)))


def f64(*arrays: Array) -> list[Array]:
    return [array.astype(numpy.float64) for array in arrays]


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rank", [1, 8, 64, 256])
def test_an_update_of_whole_numbers_is_torchs_formula_rounded_once(name: str, rank: int) -> None:
    generator = numpy.random.default_rng(rank)
    row = dtypes.by_name(name)
    weight = gaussian(8, name, (150, 600))
    right, left = (
        generator.integers(-8, 9, shape).astype(numpy.float32).astype(row.numpy)
        for shape in ((rank, 600), (150, rank))
    )
    there = [to_torch(array, name).float() for array in (weight, right, left)]
    wanted = (there[0] + 0.25 * (there[2] @ there[1])).to(to_torch(weight, name).dtype)
    made = lowrank(0.25, weight, right, left, [name] * 3).whole()
    assert same_bytes(made, from_torch(wanted, name))


@pytest.mark.parametrize("rank", [1, 4, 64, 256, 1000])
def test_an_update_is_as_exact_as_a_sum_in_f32(rank: int) -> None:
    weight = numpy.zeros((120, 700), numpy.float32)
    right, left = gaussian(9, "F32", (rank, 700)), gaussian(10, "F32", (120, rank), 0.01)
    exact = f64(left)[0] @ f64(right)[0]
    off = numpy.abs(lowrank(1.0, weight, right, left, ["F32"] * 3).whole() - exact)
    # A sum in F32 promises no better, in whatever order: half a last digit of what it would be without signs.
    sizes = numpy.abs(f64(left)[0]) @ numpy.abs(f64(right)[0])
    assert numpy.sqrt((off**2).mean()) <= 2.0**-24 * numpy.sqrt((sizes**2).mean())
    # What its docstring promises of the fixed-point factors, and half a last digit.
    bits = (53 - (rank - 1).bit_length()) // 2
    sides = numpy.abs(left).max(axis=1, keepdims=True) * numpy.abs(right).max(axis=0)
    assert (off <= 2.01 * rank * sides * 2.0**-bits + numpy.abs(exact) * 2.0**-24).all()


@pytest.mark.parametrize("rank", [3, 64, 256, 1000])
def test_the_largest_sums_of_an_update_are_exact(rank: int) -> None:
    """All factors next to the largest, of one sign: with a bit more of each, their sums would be rounded."""
    generator = numpy.random.default_rng(rank)
    right, left = (generator.uniform(0.99, 1, shape).astype("f4") for shape in ((rank, 12), (9, rank)))
    bits = (53 - (rank - 1).bit_length()) // 2
    rows, columns = (numpy.rint(numpy.ldexp(side, bits, dtype="f8")).astype("i8") for side in (left, right))
    exact = rows.astype(object) @ columns.astype(object)  # of Python's whole numbers
    assert bits <= 24 or rank == 3
    assert 1 << 50 < exact.max() <= 1 << 53
    made = lowrank(1.0, numpy.zeros((9, 12)), right, left, ["F64", "F32", "F32"]).whole()
    assert same_bytes(made, numpy.ldexp(exact.astype("f8"), -2 * bits))


@given(seed=seeds, rank=st.sampled_from([3, 64, 200]), name=st.sampled_from(["BF16", "F32"]))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_ranks_makes_no_difference(seed: int, rank: int, name: str) -> None:
    weight, names = numpy.zeros((70, 90)), ["F64", name, name]
    right, left = gaussian(seed, name, (rank, 90), 0.1), gaussian(seed + 1, name, (70, rank), 0.1)
    order = numpy.random.default_rng(seed).permutation(rank)
    mixed_right = as_codes(right)[order].view(right.dtype)
    mixed_left = numpy.ascontiguousarray(as_codes(left)[:, order]).view(left.dtype)
    straight = lowrank(1.5, weight, right, left, names).whole()
    assert same_bytes(lowrank(1.5, weight, mixed_right, mixed_left, names).whole(), straight)


@pytest.mark.parametrize(("kernels", "threads"), [("HASWELL", 1), ("NEHALEM", 4)])
@pytest.mark.slow
def test_no_processor_and_no_number_of_threads_makes_a_difference(kernels: str, threads: int) -> None:
    """A product in another process, with kernels for an older processor: the sums are in another order."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_ops_numeric import *\n"
        "sys.stdout.buffer.write(lowrank_sample().tobytes())"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "OPENBLAS_CORETYPE": kernels}
    found = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert found.stdout == lowrank_sample().tobytes()


def lowrank_sample() -> Array:
    """Merged in F64, where every last digit of the product shows."""
    right, left = (gaussian(index, "F32", shape, 0.1) for index, shape in enumerate([(64, 700), (300, 64)]))
    return lowrank(1.0, numpy.zeros((300, 700)), right, left, ["F64", "F32", "F32"]).whole()


def test_experts_are_merged_one_by_one() -> None:
    weight, right, left = (
        gaussian(20 + index, "BF16", shape)
        for index, shape in enumerate([(3, 40, 50), (3, 8, 50), (3, 40, 8)])
    )
    together = lowrank(2.0, weight, right, left, ["BF16"] * 3).whole()
    for index in range(3):
        alone = lowrank(2.0, weight[index], right[index], left[index], ["BF16"] * 3).whole()
        assert same_bytes(together[index], alone)


def test_a_factor_that_is_not_finite_shows() -> None:
    weight, right, left = (numpy.ones(shape, numpy.float32) for shape in ((4, 5), (2, 5), (4, 2)))
    right[0, 1], right[1, 2], left[3, 0] = math.inf, math.nan, -math.inf
    tally = Tally()
    made = lowrank(1.0, weight, right, left, ["F32"] * 3).whole(tally=tally)
    assert made[0, [0, 3, 4]].tolist() == [3, 3, 3]
    assert made[0, 1] == math.inf and math.isnan(made[0, 2]) and made[3, 0] == -math.inf
    assert (tally.overflowed, tally.flushed) == (0, 0)


def test_an_update_that_overflows_is_counted() -> None:
    weight, right, left = (numpy.full(shape, 300.0, numpy.float16) for shape in ((2, 3), (1, 3), (2, 1)))
    tally = Tally()
    made = lowrank(1.0, weight, right, left, ["F16"] * 3).whole(tally=tally)
    assert numpy.isinf(made).all() and tally.overflowed == 6
