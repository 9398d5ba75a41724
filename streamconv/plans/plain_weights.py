"""What the weight of each scheme is, made of the parts of a layer.

One rule of rounding holds for all: code less zero point is exact, its product with the scale is made in F32 and rounded
once to the dtype that is wanted. Owners that multiply in the dtype of their scales make the same bytes where that is the
dtype wanted; another one they then round a second time.

Sources: the layouts of compressed-tensors 0.20, transformers 5.24 (fp8, mxfp4), GPTQModel 7.7, AutoRound 0.16, AutoAWQ 0.2.9,
bitsandbytes 0.50, torchao 0.18, modelopt 0.47, ComfyUI (QUANTIZATION.md) and the kernels of the models that pack by themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from streamconv.ops import (
    Affine,
    DequantBlocks,
    Expression,
    Gather,
    PermuteAxes,
    ScaleAll,
    Truncate,
    apply,
    fill,
    reshaped,
    turned,
)
from streamconv.plans.layer import WORD, Layer, Make, floats, scaled, unpacked

# What `checkpoint_format` says of files whose codes are a stream of bits; the first where it says nothing.
_STREAMS = ("gptq", "gptq_v2")


# ------------------------------------------------------------------------------------------ integers


def packed_integers(layer: Layer) -> Expression:
    """compressed-tensors `pack-quantized`."""
    packed, scale = layer["packed"], layer["scale"]
    rows, width = layer.sizes("packed", 2)
    said = layer.told.weights_of(layer.module)
    fitting = [found for weights in said if (found := _packing(layer, weights, width)) is not None]
    if not fitting:
        known = [(each.get("num_bits"), each.get("group_size")) for each in said]
        raise layer.wrong(
            f"its codes are {list(packed.spec.shape)} with scales {list(scale.spec.shape)}, which is none of the (bits, "
            f"group_size) that quantization_config has: {known}",
        )
    bits, columns, order = fitting[0]
    codes = unpacked(packed, bits, columns, "offset", order)
    zero = None
    if "zero_point" in layer.parts:
        zero = _zero_points(layer, bits, rows, order)
    if scale.spec.shape in ((1,), ()):
        return scaled(layer, codes, scale, zero)
    if "g_idx" in layer.parts:
        return _by_index(layer, codes, scale, zero)
    return scaled(layer, codes, scale, zero)


def _packing(layer: Layer, weights: Mapping[str, Any], width: int) -> tuple[int, int, str] | None:
    """The bits, the columns and the order of codes that fit what a config says; None where that fits not."""
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        return None
    scale = layer.shape("scale")
    if "g_idx" in layer.parts:
        (columns,) = layer.sizes("g_idx", 1)
    elif isinstance(group, int) and group > 0 and len(scale) == 2:
        columns = scale[-1] * group
    elif "shape" in layer.parts:
        size = layer["shape"].spec.dtype.itemsize
        raw = layer.read("shape")
        columns = int.from_bytes(raw[size : 2 * size], "little")
    else:
        columns = width * (WORD // bits)
    whole = -(-columns // (WORD // bits))
    dense = -(-columns * bits // WORD)
    # Until 0.17 words were filled; where both are as wide, and differ, the version says.
    version = re.match(r"0\.(\d+)", str(layer.told.settings.get("version", "")))
    old = version is not None and int(version[1]) <= 17
    if width == dense and not (old and width == whole):
        return bits, columns, "stream"
    return (bits, columns, "words") if width == whole else None


def _zero_points(layer: Layer, bits: int, rows: int, order: str) -> Expression:
    """Zero points that are packed along the rows, as [rows, groups]."""
    zero = layer["zero_point"]
    if zero.spec.dtype.name == "I8":
        return zero
    return turned(unpacked(turned(zero), bits, rows, "offset", order))


def _by_index(layer: Layer, codes: Expression, scale: Expression, zero: Expression | None) -> Expression:
    """Codes [rows, columns] whose group is said for each column."""
    index = layer["g_idx"]
    others = [apply(Gather(), each, index)[0] for each in (scale, zero) if each is not None]
    return apply(DequantBlocks((1, 1), layer.dtype), codes, *others)[0]


def integers(layer: Layer) -> Expression:
    """A byte for each code; of four bits where the config says so, the high ones first."""
    codes = layer[""]
    if layer.told.settings.get("quantization_bit") == 4:
        codes = unpacked(codes, 4, 2 * layer.width(""), "signed", "high_first")
    return scaled(layer, codes, layer["scale"], layer.parts.get("zero_point"))


def two_rows_a_byte(layer: Layer) -> Expression:
    """INT4 of modelopt: the low four bits of a byte are an even row."""
    rows, _ = layer.sizes("", 2)
    codes = turned(unpacked(turned(layer[""]), 4, 2 * rows, "signed"))
    return scaled(layer, codes, layer["scale"])


# ----------------------------------------------------------------------------------------- GPTQ, AWQ


def gptq(layer: Layer) -> Expression:
    """Codes down the input axis, zero points along the output axis."""
    if (
        form := _gptq_form(layer)
    ) not in _STREAMS:  # the same names and shapes, and the bits in another order
        raise layer.wrong(
            f"quantization_config says that its checkpoint_format is {form}; {' and '.join(_STREAMS)} are read",
            "GPTQModel, which made it, may save it unquantised",
        )
    (height, rows), (groups, width), _ = (layer.sizes(part, 2) for part in ("qweight", "qzeros", "scales"))
    bits = _gptq_bits(layer, height, rows, width)
    columns = layer.sizes("g_idx", 1)[0] if "g_idx" in layer.parts else height * WORD // bits
    codes = unpacked(turned(layer["qweight"]), bits, columns)
    stored = unpacked(layer["qzeros"], bits, rows)
    meaning = "next" if _one_less(layer, bits, stored) else "unsigned"
    zero = turned(unpacked(layer["qzeros"], bits, rows, meaning))
    scale = turned(layer["scales"])
    if "g_idx" in layer.parts:
        return _by_index(layer, codes, scale, zero)
    if columns % groups:
        raise layer.wrong(f"{groups} groups do not divide {columns} columns, and there is no g_idx")
    return scaled(layer, codes, scale, zero)


def _gptq_form(layer: Layer) -> str:
    # Older files of the same programs have it under another key, which other methods use for other things.
    said = layer.told.settings.get("checkpoint_format")
    if said is None and layer.told.method == "gptq":
        said = layer.told.settings.get("format")
    return _STREAMS[0] if said is None else str(said).lower()


def _gptq_bits(layer: Layer, height: int, rows: int, width: int) -> int:
    said = layer.told.settings.get("bits")
    fitting = [
        bits
        for bits in (2, 3, 4, 8)
        if -(-rows * bits // WORD) == width
        and ("g_idx" not in layer.parts or -(-layer.sizes("g_idx", 1)[0] * bits // WORD) == height)
    ]
    if len(fitting) > 1 and said in fitting:
        fitting = [int(said)]
    if len(fitting) != 1:
        raise layer.wrong(
            f"its qweight {[height, rows]} and qzeros {list(layer.shape('qzeros'))} fit {fitting or 'no'} bits, and the "
            f"config says {said}"
        )
    return fitting[0]


def _one_less(layer: Layer, bits: int, stored: Expression) -> bool:
    """Whether one is to be added to zero points, as files of GPTQ's first version have it.

    What the config says of the version is wrong often enough; where it says that all are symmetric, the first of the
    first layer's tells, and the run checks all.
    """
    settings, half = layer.told.settings, 1 << (bits - 1)
    packing = str(settings.get("packing_format", ""))
    less = (
        ("gptq" in packing and "gptqmodel" not in packing)
        if packing or layer.told.method == "auto-round"
        else _gptq_form(layer) == _STREAMS[0]
    )
    if settings.get("sym") is not True:
        if less:
            layer.notes[
                "zero points of GPTQ's first version: one that was 0 has been lost when they were packed"
            ] = None
        return less
    first = int.from_bytes(layer.read("qzeros", 4), "little") & (2 * half - 1)
    if first not in (half - 1, half):
        raise layer.wrong(
            f"its first zero point is stored as {first}, and its config says that it is symmetric: {half - 1} or {half} is expected"
        )
    if less != (first == half - 1):
        layer.notes[
            f"zero points are stored {'less one' if not less else 'as they are'}, whatever the config says of the format"
        ] = None
    layer.checks.append((f"all zero points should be stored as {first}", stored, fill(stored.spec, first)))
    return first == half - 1


def awq(layer: Layer) -> Expression:
    """Four bits, as AutoAWQ's gemm packs them or its gemv."""
    version = str(layer.told.settings.get("version", "gemm")).lower()
    if layer.told.method == "awq" and version not in ("gemm", "gemv"):  # its shapes may be those of gemm
        raise layer.wrong(
            f"quantization_config says that its version is {version}; gemm and gemv are read",
            "AutoAWQ, which made it, may save it as gemm",
        )
    (height, width), (groups, points), scales = (
        layer.sizes(part, 2) for part in ("qweight", "qzeros", "scales")
    )
    if scales == (groups, 8 * width) and points == width:
        codes, zero = _by_eights(layer["qweight"]), _by_eights(layer["qzeros"])
        return scaled(layer, codes, turned(layer["scales"]), zero)
    size = layer.told.settings.get("group_size", layer.told.settings.get("q_group_size", 128))
    columns = 8 * width
    size = columns if size == -1 else size
    if (
        groups != height
        or scales != (height, 8 * points)
        or not isinstance(size, int)
        or size < 1
        or columns % size
    ):
        raise layer.wrong(
            f"its qweight {[height, width]}, qzeros {[groups, points]} and scales {list(scales)} are neither AWQ's gemm nor its "
            "gemv",
            "other versions are made for one kind of device",
        )
    zero = apply(Truncate(1, columns // size), unpacked(layer["qzeros"], 4, 8 * points))[0]
    scale = apply(Truncate(1, columns // size), layer["scales"])[0]
    return scaled(layer, unpacked(layer["qweight"], 4, columns), scale, zero)


def _by_eights(packed: Expression) -> Expression:
    """Words [n, m] of eight codes 0 2 4 6 1 3 5 7, as [8 m, n]."""
    rows, words = packed.spec.shape
    codes = reshaped(unpacked(packed, 4, 8 * words), (rows, words, 2, 4))
    return reshaped(apply(PermuteAxes((1, 3, 2, 0)), codes)[0], (8 * words, rows))


# -------------------------------------------------------------------------------------------- floats


def float8(layer: Layer) -> Expression:
    """F8 and its scales, under whatever name they have."""
    (scale,) = (part for part in layer.parts if part and part != "comfy_quant")
    if "comfy_quant" in layer.parts:
        _known_to_comfy(layer, ("float8_e4m3fn", "float8_e5m2"))
    return scaled(layer, layer[""], layer[scale])


def _known_to_comfy(layer: Layer, formats: tuple[str, ...]) -> None:
    said = layer.settings("comfy_quant")
    if said.get("format") not in formats or said.get("convrot"):
        raise layer.wrong(f"'{layer['comfy_quant'].spec.name}' says {dict(said)}, which is not read here")


def nvfp4(layer: Layer) -> Expression:
    """Four bits, a scale in F8 for each 16, and one for all: divided by it, or multiplied."""
    divide = "global_scale" in layer.parts
    scale = apply(ScaleAll(divide), layer["scale"], layer["global_scale" if divide else "scale_2"])[0]
    return _groups_of(16, layer, floats(layer, "packed" if divide else ""), scale)


def _groups_of(size: int, layer: Layer, codes: Expression, scale: Expression) -> Expression:
    return apply(DequantBlocks((1, size), layer.dtype), codes, scale)[0]


def mxfp4(part: str) -> Make:
    """Codes in such a part, with a power of two for each 32 of a row."""
    return lambda layer: _groups_of(32, layer, floats(layer, part), layer["scale"])


def expert_blocks(layer: Layer) -> Expression:
    """Experts as bare parameters, which transformers holds with their last two axes exchanged."""
    shape = layer.shape("blocks")
    if len(shape) < 3 or shape[-1] != 16:
        raise layer.wrong(f"its blocks are {list(shape)}: [..., out, groups, 16] expected")
    *front, rows, groups, size = shape
    packed = reshaped(layer["blocks"], (*front, rows, groups * size))
    codes = unpacked(packed, 4, 2 * groups * size, "e2m1")
    made = _groups_of(32, layer, codes, layer["scales"])
    axes = range(len(made.spec.shape))
    return apply(PermuteAxes((*axes[:-2], axes[-1], axes[-2])), made)[0]


# ------------------------------------------------------------------------------------- bitsandbytes


def by_table(layer: Layer) -> Expression:
    """Four bits by a table, with a scale for each run of elements in row-major order."""
    (state,) = (part for part in layer.parts if part.startswith("quant_state."))
    said = layer.settings(state)
    shape, size = said.get("shape"), said.get("blocksize")
    if (
        not isinstance(shape, list)
        or not all(isinstance(n, int) and n >= 0 for n in shape)
        or not isinstance(size, int)
    ):
        raise layer.wrong(f"'{layer[state].spec.name}' says no shape and blocksize, but {dict(said)}")
    count = math.prod(shape)
    code = layer[""]
    width = code.spec.numel
    codes = unpacked(reshaped(code, (1, width)), 4, count, "unsigned", "high_first") if width else code
    values = apply(Gather(), layer["quant_map"], codes)[0]
    scale = reshaped(layer["absmax"], (1, layer["absmax"].spec.numel))
    if "nested_absmax" in layer.parts:
        nested = said.get("nested_blocksize"), said.get("nested_offset")
        if not isinstance(nested[0], int) or not isinstance(nested[1], int | float):
            raise layer.wrong(f"'{layer[state].spec.name}' says nothing of the scales of scales")
        table = apply(Gather(), layer["nested_quant_map"], scale)[0]
        wide = reshaped(layer["nested_absmax"], (1, layer["nested_absmax"].spec.numel))
        product = apply(DequantBlocks((1, nested[0]), "F32"), table, wide)[0]
        scale = apply(Affine(1.0, float(nested[1])), product)[0]
    made = apply(DequantBlocks((1, size), layer.dtype), values, scale)[0]
    return reshaped(made, tuple(shape))


def by_row(layer: Layer) -> Expression:
    """Integers times the largest value of their row, and then times 1/127: two products in F32."""
    if "format" in layer.parts and int.from_bytes(layer.read("format"), "little"):
        raise layer.wrong(
            "its weight_format is that of one kind of device", "save it again with row-major weights"
        )
    product = scaled(layer, layer[""], layer["SCB"], dtype="F32")
    return apply(Affine(0.007874015718698502, 0.0), product)[0]


def torchao(layer: Layer) -> Expression:
    """What torchao keeps as a tensor of its own kind, in parts that its entry in the header describes."""
    said = layer.told.entries.get(layer.name)
    kind = said.get("_type") if isinstance(said, Mapping) else None
    if kind not in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"):
        raise layer.wrong(
            f"torchao's {kind or 'weight, whose kind no metadata says,'} is not read here",
            "kinds whose layout is that of one kind of device have no other reader than torchao",
        )
    return scaled(
        layer, layer["_weight_qdata"], layer["_weight_scale"], layer.parts.get("_weight_zero_point")
    )
