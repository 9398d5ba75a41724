"""Quantised weights against the libraries that defined them: blocks, codes of a few bits, tables."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import Array, as_codes, same_bytes, same_values
from test_ops_numeric import Case, any_bits, from_torch, gaussian, to_torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from streamconv import dtypes, ops
from streamconv.errors import ConversionError
from streamconv.ops import Tally
from streamconv.ops.layout import Box
from streamconv.tensor import TensorSpec

# Not-a-numbers and overflows are among what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

seeds = st.integers(0, 1 << 32)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
every_target = pytest.mark.parametrize("target", sorted(TORCH))
every_float8 = pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])


def spread(scales: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """The scale of each element."""
    tall = numpy.repeat(numpy.repeat(scales, block[0], axis=-2), block[1], axis=-1)
    return tall[..., : shape[-2], : shape[-1]]


def float8(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """Finite bit patterns."""
    values = any_bits(seed, name, shape)
    return (
        numpy.where(numpy.isfinite(values.astype(numpy.float32)), as_codes(values), 1)
        .astype(numpy.uint8)
        .view(values.dtype)
    )


# ----------------------------------------------------------------------------- dequant_blocks


def dequantised(
    name: str, weight: Array, scale: str, scales: Array, target: str, block: tuple[int, int]
) -> Array:
    return Case(ops.DequantBlocks(block, target), ((name, weight), (scale, scales))).whole()


@every_target
@every_float8
@pytest.mark.parametrize("shape", [(576, 7168), (128, 128), (1, 1), (129, 127), (3, 200, 300)])
def test_every_value_is_weight_times_scale_of_its_block(
    name: str, shape: tuple[int, ...], target: str
) -> None:
    weight = any_bits(0, name, shape)
    grid = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    scales = numpy.abs(gaussian(1, "F32", grid, 1e-3))
    made = dequantised(name, weight, "F32", scales, target, (128, 128))
    exact = to_torch(weight, name).float() * torch.from_numpy(spread(scales, (128, 128), shape).copy())
    assert same_values(made, from_torch(exact.to(TORCH[target]), target))


def test_576_rows_have_five_rows_of_scales_and_the_last_block_is_short() -> None:
    weight = numpy.full((576, 256), 1, numpy.float32).astype(dtypes.by_name("F8_E4M3").numpy)
    scales = numpy.arange(1, 11, dtype=numpy.float32).reshape(5, 2)
    made = dequantised("F8_E4M3", weight, "F32", scales, "F32", (128, 128))
    assert made[[0, 127, 128, 511, 512, 575], 0].tolist() == [1, 1, 3, 7, 9, 9]
    assert made[575, [127, 128]].tolist() == [9, 10]


@every_float8
@pytest.mark.parametrize("scale", ["F32", "BF16", "U8"])
@pytest.mark.parametrize("target", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)])
def test_divisible_shapes_come_out_as_in_transformers(
    name: str, scale: str, target: str, shape: tuple[int, ...]
) -> None:
    weight = float8(2, name, shape)
    grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    scales = (
        any_bits(3, "U8", grid) % 40 + 100
        if scale == "U8"
        else numpy.abs(gaussian(3, scale, grid).astype(numpy.float32)).astype(dtypes.by_name(scale).numpy)
    )
    there = torch.from_numpy(scales) if scale == "U8" else to_torch(scales, scale)
    theirs = Fp8Dequantize(None)._dequantize_one(to_torch(weight, name), there, TORCH[target])
    made = dequantised(name, weight, scale, scales, target, (128, 128))
    assert same_bytes(made, from_torch(theirs, target))


def test_scales_that_are_powers_of_two_are_read_from_e8m0_and_from_its_bytes() -> None:
    weight = numpy.full((1, 5), 3, numpy.float32).astype(dtypes.by_name("F8_E4M3").numpy)
    raw = numpy.array([[0, 1, 127, 200, 255]], numpy.uint8)
    exact = [3 * 2.0**-127, 3 * 2.0**-126, 3.0, 3 * 2.0**73]
    for name, scales in (("U8", raw), ("F8_E8M0", raw.view(dtypes.by_name("F8_E8M0").numpy))):
        made = dequantised("F8_E4M3", weight, name, scales, "F32", (1, 1))
        assert made[0, :4].tolist() == exact and math.isnan(made[0, 4])


@pytest.mark.parametrize(
    ("target", "codes", "scale", "overflowed", "flushed"),
    [
        ("F16", [448, 1, 0], 1000.0, 1, 0),
        ("F16", [448, 2**-9, 0], 1e-7, 0, 1),
        ("BF16", [448, 2**-9, 0], 1e-3, 0, 0),
        ("F32", [448, 1, math.nan], 1e38, 1, 0),
        ("F32", [448, 2**-9, 0], 1e-44, 0, 1),
        ("F32", [448, 2**-9, 0], 0.0, 0, 0),
        ("BF16", [448, 2**-9, 0], math.inf, 0, 0),
    ],
)
def test_dequantising_counts_what_is_lost(
    target: str, codes: list[float], scale: float, overflowed: int, flushed: int
) -> None:
    weight = numpy.array([codes], numpy.float32).astype(dtypes.by_name("F8_E4M3").numpy)
    case = Case(
        ops.DequantBlocks((128, 128), target),
        (("F8_E4M3", weight), ("F32", numpy.array([[scale]], numpy.float32))),
    )
    tally = Tally()
    case.whole(tally=tally)
    assert (tally.overflowed, tally.flushed) == (overflowed, flushed)


def specs(*operands: tuple[str, tuple[int, ...]]) -> list[TensorSpec]:
    return [
        TensorSpec(f"x{index}", dtypes.by_name(name), shape) for index, (name, shape) in enumerate(operands)
    ]


def test_a_box_asks_for_the_scales_of_the_blocks_it_touches() -> None:
    op, operands = ops.DequantBlocks((128, 64), "BF16"), specs(("F8_E4M3", (4, 576, 200)), ("F32", (4, 5, 4)))
    box: Box = ((1, 3), (100, 257), (64, 65))
    assert op.rows(0, box, operands) == (box, ((1, 3), (0, 3), (1, 2)))


def test_only_f32_scales_are_made_again() -> None:
    op = ops.DequantBlocks((128, 64), "BF16")
    assert op.inverse(specs(("F8_E5M2", (8, 8)), ("F32", (1, 1)))) == ops.QuantBlocks((128, 64), "F8_E5M2")
    assert op.inverse(specs(("F8_E4M3", (8, 8)), ("U8", (1, 1)))) is None


# ------------------------------------------------------------------------------- quant_blocks


def quantised(
    op: ops.QuantBlocks, name: str, values: Array, tally: Tally | None = None
) -> tuple[Array, Array]:
    case = Case(op, ((name, values),))
    return case.whole(0, tally), case.whole(1, tally)


@every_float8
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((576, 300), (128, 128)), ((2, 130, 70), (64, 32)), ((5, 9), (2, 2)), ((300, 700), (1000, 1000))],
)
def test_every_block_is_divided_by_its_largest_value(
    name: str, source: str, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    """DeepSeek's kernel, written out with torch, a block at a time."""
    values = gaussian(4, source, shape, 0.02)
    weight, scales = quantised(ops.QuantBlocks(block, name), source, values)
    float8_dtype = getattr(torch, str(dtypes.by_name(name).torch_name))
    there = to_torch(values, source).float().reshape(-1, *shape[-2:])
    flat_weight, flat_scales = weight.reshape(there.shape), scales.reshape(-1, *scales.shape[-2:])
    for matrix, made, found in zip(there, flat_weight, flat_scales, strict=True):
        for row in range(scales.shape[-2]):
            for column in range(scales.shape[-1]):
                part = (
                    slice(row * block[0], (row + 1) * block[0]),
                    slice(column * block[1], (column + 1) * block[1]),
                )
                scale = matrix[part].abs().max() / torch.finfo(float8_dtype).max
                assert found[row, column] == scale.item()
                wanted = from_torch((matrix[part] / scale).to(float8_dtype), name)
                assert same_bytes(numpy.ascontiguousarray(as_codes(made[part])).view(made.dtype), wanted)


@every_float8
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_weights_that_came_from_it_come_back(name: str, seed: int) -> None:
    """Codes do, bit by bit; a scale may be off by its last digit. Each block has its largest code."""
    shape, block = (70, 90), (32, 16)
    weight = float8(seed, name, shape)
    as_codes(weight)[:: block[0], :: block[1]] = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}[name]
    scales = numpy.abs(gaussian(seed + 1, "F32", (3, 6))) + numpy.float32(1e-3)
    wide = dequantised(name, weight, "F32", scales, "F32", block)
    codes, found = quantised(ops.QuantBlocks(block, name), "F32", wide)
    assert same_bytes(codes, weight)
    assert (numpy.abs(found - scales) <= numpy.spacing(scales)).all()


@every_float8
def test_what_is_lost_is_half_a_step(name: str) -> None:
    values = gaussian(5, "F32", (300, 300))
    weight, scales = quantised(ops.QuantBlocks((128, 128), name), "F32", values)
    back = dequantised(name, weight, "F32", scales, "F32", (128, 128))
    digits, least = {"F8_E4M3": (4, 2.0**-9), "F8_E5M2": (3, 2.0**-16)}[name]
    steps = spread(scales, (128, 128), values.shape)
    allowed = numpy.maximum(numpy.abs(values) * 2.0**-digits, steps * least / 2) * (1 + 1e-5)
    assert (numpy.abs(back - values) <= allowed).all()


def test_blocks_of_zeros_have_a_scale_of_one() -> None:
    values = numpy.zeros((4, 4), numpy.float32)
    values[2:, 2:], values[0, 0] = 7, -0.0
    weight, scales = quantised(ops.QuantBlocks((2, 2)), "F32", values)
    assert scales.tolist() == [[1, 1], [1, 1 / 64]]
    assert weight.astype(numpy.float32)[2:, 2:].tolist() == [[448] * 2] * 2
    assert as_codes(weight)[0].tolist() == [0x80, 0, 0, 0]


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-36, 3e38, 447.99999, 465.0])
def test_no_value_leaves_the_range(value: float) -> None:
    values = numpy.array([[value, -value, value / 3, 0]], numpy.float32)
    weight, scales = quantised(ops.QuantBlocks((1, 4)), "F32", values)
    assert scales[0, 0] >= numpy.finfo(numpy.float32).tiny
    held = weight.astype(numpy.float64)
    assert numpy.isfinite(held).all()
    assert numpy.abs(held * scales - values).max() <= max(value / 16, 2.0**-136)


@every_float8
def test_infinities_saturate_and_not_a_number_stays(name: str) -> None:
    values = numpy.array([[math.inf, -math.inf, math.nan, 2, 1]], numpy.float32)
    tally = Tally()
    weight, scales = quantised(ops.QuantBlocks((1, 5), name), "F32", values, tally)
    largest = {"F8_E4M3": 448, "F8_E5M2": 57344}[name]
    held = weight.astype(numpy.float32)[0]
    assert scales[0, 0] == numpy.float32(2) / numpy.float32(largest)
    assert held[[0, 1, 3]].tolist() == [largest, -largest, largest] and math.isnan(held[2])
    assert (tally.overflowed, tally.flushed) == (0, 0)


def test_a_block_of_nothing_finite() -> None:
    weight, scales = quantised(ops.QuantBlocks((2, 2)), "F32", numpy.full((1, 1), math.inf, numpy.float32))
    assert (weight.astype(numpy.float32).item(), scales.item()) == (448, 1)


def test_values_that_become_zero_are_counted_once() -> None:
    tally = Tally()
    quantised(ops.QuantBlocks((1, 4)), "F32", numpy.array([[448, 2**-10, 2**-9, 0]], numpy.float32), tally)
    assert (tally.overflowed, tally.flushed) == (0, 1)


def test_a_box_of_either_result_asks_for_whole_blocks() -> None:
    op, operands = ops.QuantBlocks((128, 64)), specs(("BF16", (4, 576, 200)))
    assert op.rows(0, ((1, 3), (130, 140), (190, 200)), operands) == (((1, 3), (128, 256), (128, 200)),)
    assert op.rows(0, ((0, 1), (570, 576), (0, 65)), operands) == (((0, 1), (512, 576), (0, 128)),)
    assert op.rows(1, ((0, 4), (4, 5), (1, 4)), operands) == (((0, 4), (512, 576), (64, 200)),)


def test_the_inverse_multiplies_again() -> None:
    assert ops.QuantBlocks((128, 64)).inverse(specs(("F16", (8, 8)))) == ops.DequantBlocks((128, 64), "F16")


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_the_scale_of_scales_is_torchs_formula_whatever_the_chunks(name: str) -> None:
    values = gaussian(4, name, (40, 300), 0.3)
    values[0, :2] = math.nan, -math.inf  # neither counts
    peak = (
        to_torch(
            numpy.where(numpy.isfinite(values.astype("f4")), as_codes(values), 0).view(values.dtype), name
        )
        .abs()
        .max()
    )
    op, spec = ops.GlobalScale(), TensorSpec("x", dtypes.by_name(name), values.shape)
    wanted = (448.0 * 6.0 * peak.reciprocal()).float().item()
    for height in (1, 7, 40):
        kept = op.fold((values[at : at + height] for at in range(0, 40, height)), spec)
        out = numpy.empty(1, numpy.float32)
        op.place(kept, ((0, 1),), out, spec)
        assert out.item() == wanted
    assert op.fold([numpy.zeros_like(values)], spec).tolist() == [1]


@pytest.mark.parametrize(
    "values", [[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], [-0.2, -0.0, 0.0, 0.3, -6, 1, 2, 3]]
)
def test_four_bits_are_rounded_to_even_codes(values: list[float]) -> None:
    held = numpy.array([values], numpy.float32)
    made = Case(ops.QuantBlocks((1, 8), "E2M1", "wide"), (("F32", held),)).whole(0)
    wanted = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, -0.2: -0.0, 0.3: 0.5}
    assert made.astype(numpy.float32)[0].tolist() == [wanted.get(value, value) for value in values]


# -------------------------------------------------------------------------------------- mxfp4


def mxfp4(target: str, packed: Array, scales: Array, scale: str = "U8", tally: Tally | None = None) -> Array:
    """The two operations, one after the other."""
    size = 2 * packed.shape[-1] * packed.shape[-2]
    wide = Case(ops.Unpack(4, size, "e2m1"), (("U8", packed.reshape(*packed.shape[:-2], -1)),)).whole()
    return Case(ops.DequantBlocks((1, 32), target), (("F8_E4M3", wide), (scale, scales))).whole(tally=tally)


@pytest.mark.parametrize("target", ["BF16", "F32"])
def test_mxfp4_comes_out_as_in_transformers(target: str) -> None:
    packed = any_bits(6, "U8", (2, 30, 9, 16))
    scales = (numpy.arange(2 * 30 * 9) % 253).astype(numpy.uint8).reshape(2, 30, 9)
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(packed), torch.from_numpy(scales), dtype=TORCH[target]
    )
    assert same_bytes(mxfp4(target, packed, scales), from_torch(theirs.transpose(1, 2), target))


@every_target
def test_every_code_with_every_scale(target: str) -> None:
    """By the definition, in Python's own floats; the first of a byte's values is its low four bits."""
    packed = numpy.repeat(numpy.arange(256, dtype=numpy.uint8), 16).reshape(256, 1, 16)
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    exact_of = [*sizes, *(-size for size in sizes)]
    lost, wanted_lost = Tally(), Tally()
    for scale in range(256):
        made = mxfp4(target, packed, numpy.full((256, 1), scale, numpy.uint8), tally=lost)
        exact = numpy.array(
            [exact_of[byte & 15 if place == 0 else byte >> 4] for byte in range(256) for place in (0, 1)]
        )
        exact = exact.reshape(256, 2) * (2.0 ** (scale - 127) if scale < 255 else math.nan)
        held = torch.from_numpy(exact).float().to(TORCH[target]).double().numpy()
        pairs = made.astype(numpy.float64).reshape(256, 16, 2)
        assert numpy.array_equal(pairs, numpy.broadcast_to(held[:, None], pairs.shape), equal_nan=True)
        wanted_lost.overflowed += 16 * int((numpy.isfinite(exact) & ~numpy.isfinite(held)).sum())
        wanted_lost.flushed += 16 * int(((exact != 0) & (held == 0)).sum())
        if target != "F16" and scale <= 252:
            assert (held == exact).all()
    assert lost == wanted_lost


def test_scales_may_be_e8m0() -> None:
    packed, raw = any_bits(7, "U8", (3, 5, 16)), any_bits(8, "U8", (3, 5))
    e8m0 = raw.view(dtypes.by_name("F8_E8M0").numpy)
    assert same_bytes(mxfp4("F32", packed, e8m0, "F8_E8M0"), mxfp4("F32", packed, raw))


# ------------------------------------------------------------------------------------ integers


@every_target
@pytest.mark.parametrize("scale", ["F16", "F32"])
def test_rows_of_bytes_are_torchs_formula_rounded_once(target: str, scale: str) -> None:
    weight, scales = any_bits(9, "I8", (300, 500)), gaussian(10, scale, (300, 1), 0.01)
    made = Case(ops.DequantBlocks((1, 500), target), (("I8", weight), (scale, scales))).whole()
    exact = torch.from_numpy(weight).float() * to_torch(scales, scale).float()
    assert same_bytes(made, from_torch(exact.to(TORCH[target]), target))


@every_target
def test_zero_points_go_before_the_scale(target: str) -> None:
    weight, points = any_bits(9, "U8", (30, 64)), any_bits(2, "U8", (30, 2))
    scales = gaussian(10, "F16", (30, 2), 0.01)
    operands = (("U8", weight), ("F16", scales), ("U8", points))
    made = Case(ops.DequantBlocks((1, 32), target), operands).whole()
    spread_out = (
        torch.from_numpy(each.astype(numpy.float32)).repeat_interleave(32, 1) for each in (points, scales)
    )
    point, factor = spread_out
    exact = (torch.from_numpy(weight).float() - point) * factor
    assert same_bytes(made, from_torch(exact.to(TORCH[target]), target))


@pytest.mark.parametrize("order", ["stream", "high_first"])
def test_half_bytes_are_torchs_shifts(order: str) -> None:
    weight = any_bits(11, "I8", (300, 250))
    made = Case(ops.Unpack(4, 500, "signed", order), (("I8", weight),)).whole()
    there = torch.from_numpy(weight)
    high, low = there >> 4, (there << 4) >> 4  # arithmetic shifts
    both = torch.stack([low, high] if order == "stream" else [high, low], dim=-1).reshape(300, 500)
    assert numpy.array_equal(made, both.numpy())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("order", ["stream", "words"])
def test_codes_of_any_width_are_bits_of_a_number(bits: int, order: str) -> None:
    """By Python's own whole numbers: a row is one, or each of its words is."""
    count = 77
    words = -(-count // (32 // bits)) if order == "words" else -(-count * bits // 32)
    packed = any_bits(12, "I32", (5, words))
    made = Case(ops.Unpack(bits, count, "unsigned", order), (("I32", packed),)).whole()
    for row, found in zip(packed, made, strict=True):
        chunks = [row[i : i + 1].tobytes() for i in range(words)] if order == "words" else [row.tobytes()]
        each = 32 // bits if order == "words" else count
        numbers = [int.from_bytes(chunk, "little") for chunk in chunks]
        wanted = [number >> (bits * k) & ((1 << bits) - 1) for number in numbers for k in range(each)]
        assert found.tolist() == wanted[:count]


@pytest.mark.parametrize(
    ("bits", "meaning"), [(4, "offset"), (4, "signed"), (4, "e2m1"), (8, "offset"), (4, "unsigned")]
)
@pytest.mark.parametrize("name", ["U8", "I32"])
def test_what_is_packed_comes_back(bits: int, meaning: str, name: str) -> None:
    width, size = dtypes.by_name(name).bits // bits, 37
    packed = any_bits(13, name, (40, -(-size // width)))
    out = ops.Unpack(bits, size, meaning)
    values = Case(out, ((name, packed),)).whole()
    back = out.inverse(specs((name, packed.shape)))
    assert back == ops.Pack(bits, name, meaning)
    again = Case(back, ((ops.packed.MEANINGS[meaning], values),)).whole()
    assert same_bytes(Case(out, ((name, again),)).whole(), values)


def test_an_index_that_is_none_is_an_error() -> None:
    values = numpy.arange(4, dtype=numpy.float32)
    for bad in (4, -1):
        with pytest.raises(ConversionError, match=f"the number {bad}, of 4"):
            Case(ops.Gather(), (("F32", values), ("I32", numpy.array([0, bad], numpy.int32)))).whole()


def test_a_box_asks_for_the_words_it_touches() -> None:
    operands = specs(("I32", (9, 20)))
    assert ops.Unpack(4, 160).rows(0, ((2, 5), (9, 17)), operands) == (((2, 5), (1, 3)),)
    assert ops.Unpack(3, 213).rows(0, ((2, 5), (31, 33)), operands) == (((2, 5), (0, 6)),)
    assert ops.Unpack(3, 213).rows(0, ((2, 5), (200, 213)), operands) == (((2, 5), (18, 20)),)


def test_integers_that_overflow_are_counted() -> None:
    weight, scale = (
        numpy.array([[127, 1, 0], [127, 1, 0]], numpy.int8),
        numpy.array([[1000], [1e-8]], numpy.float32),
    )
    tally = Tally()
    Case(ops.DequantBlocks((1, 3), "F16"), (("I8", weight), ("F32", scale))).whole(tally=tally)
    assert (tally.overflowed, tally.flushed) == (1, 1)
