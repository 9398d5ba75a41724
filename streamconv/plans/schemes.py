"""The schemes of quantised weights: by which tensors each is known, and what its weights are.

Of a layer, a part is called by what its name ends in: nothing for `X.weight` itself, `scale` for `X.weight_scale`,
`qweight` for `X.qweight`.

One rule of rounding holds for all: code less zero point is exact, its product with the scale is made in F32 and rounded
once to the dtype that is wanted. Owners that multiply in the dtype of their scales make the same bytes where that is the
dtype wanted; another one they then round a second time.

Sources: the layouts of compressed-tensors 0.20, transformers 5.24 (fp8, mxfp4), GPTQModel 7.7, AutoRound 0.16, AutoAWQ 0.2.9,
bitsandbytes 0.50, torchao 0.18, modelopt 0.47, ComfyUI (QUANTIZATION.md) and the kernels of the models that pack by themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from streamconv.errors import PlanError, StreamconvError
from streamconv.ops import (
    Affine,
    DequantBlocks,
    Expression,
    Gather,
    PermuteAxes,
    ScaleAll,
    Truncate,
    Unpack,
    apply,
    fill,
    reshaped,
    turned,
)
from streamconv.plans.told import Told
from streamconv.readers.window import Window
from streamconv.storage.location import locate
from streamconv.tensor import Shape, Stored

FLOATS = ("BF16", "F16", "F32")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
_POWERS = ("F8_E8M0", "U8")
_WORD = 32

# What `checkpoint_format` says of files whose codes are a stream of bits; the first where it says nothing.
_STREAMS = ("gptq", "gptq_v2")

# Bytes of a tensor that holds a setting.
_LONGEST_SETTING = 1 << 16


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantised weight.

    Attributes:
        name: of the plain weight.
        parts: by what their names end in.
        told: see there.
        dtype: that is wanted.
        notes: what a user should know is added, once for all layers.
        checks: pairs that the run must find equal, and what a difference would mean.
    """

    name: str
    parts: Mapping[str, Expression]
    told: Told
    dtype: str
    notes: dict[str, None]
    checks: list[tuple[str, Expression, Expression]]

    @property
    def module(self) -> str:
        """The layer's own name."""
        return self.name.removesuffix(".weight")

    def __getitem__(self, part: str) -> Expression:
        return self.parts[part]

    def shape(self, part: str) -> Shape:
        """The shape of a part; empty where there is none."""
        return self.parts[part].spec.shape if part in self.parts else ()

    def sizes(self, part: str, axes: int) -> Shape:
        """The shape of a part that has so many axes.

        Raises:
            PlanError: it has others.
        """
        shape = self.shape(part)
        if len(shape) != axes:
            raise self.wrong(f"'{self[part].spec.name}' is {list(shape)}, and should have {axes} axes")
        return shape

    def width(self, part: str) -> int:
        """How long the last axis of a part is.

        Raises:
            PlanError: it has none.
        """
        return (self.shape(part) or self.sizes(part, 1))[-1]

    def wrong(self, message: str, hint: str | None = None) -> PlanError:
        """An error about the layer."""
        return PlanError(message, tensor=self.name, hint=hint)

    def read(self, part: str, first: int | None = None) -> bytes:
        """The bytes of a part that says how others are to be read: a shape, a setting; or only its `first` ones."""
        tensor = self.parts[part]
        if not isinstance(tensor, Stored) or (first is None and tensor.spec.nbytes > _LONGEST_SETTING):
            raise self.wrong(
                f"'{tensor.spec.name}' says how it is quantised, and is not stored as it should be"
            )
        made = b""
        for extent in tensor.extents if first is None else tensor.extents[:1]:
            with Window(locate(extent.file), extent.offset, extent.length) as window:
                made += window.read(0, extent.length if first is None else min(first, extent.length))
        return made

    def settings(self, part: str) -> Mapping[str, Any]:
        """The JSON document in a part's bytes."""
        try:
            made = orjson.loads(self.read(part))
        except orjson.JSONDecodeError as error:
            raise self.wrong(
                f"'{self[part].spec.name}' is not the JSON that it should be: {error}"
            ) from error
        if not isinstance(made, dict):
            raise self.wrong(f"'{self[part].spec.name}' is no JSON object")
        return made


Make = Callable[[Layer], Expression]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise weights.

    Attributes:
        name: what it is called.
        parts: the dtypes of those that a layer has.
        make: its plain weight. Raises PlanError.
        value: what that is, in words.
        exact: how it compares with what its owner makes.
        more: the dtypes of parts that it may have.
        methods: the `quant_method` that it is for; any, where none is named.
    """

    name: str
    parts: Mapping[str, tuple[str, ...]]
    make: Make
    value: str
    exact: str
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    methods: tuple[str, ...] = ()

    def fits(self, parts: Mapping[str, Expression], method: str) -> bool:
        """Whether a layer is of this scheme."""
        if not self.parts.keys() <= parts.keys() <= self.parts.keys() | self.more.keys():
            return False
        dtypes = {**self.more, **self.parts}
        known = all(not dtypes[part] or each.spec.dtype.name in dtypes[part] for part, each in parts.items())
        return known and (not self.methods or method in self.methods)


# ---------------------------------------------------------------------------------------- the pieces


def _unpacked(
    tensor: Expression, bits: int, count: int, meaning: str = "unsigned", order: str = "stream"
) -> Expression:
    return apply(Unpack(bits, count, meaning, order), tensor)[0]


def _floats(layer: Layer, part: str) -> Expression:
    """Codes of four bits, two a byte, as floats with twice as many columns."""
    return _unpacked(layer[part], 4, 2 * layer.width(part), "e2m1")


def _scaled(
    layer: Layer, codes: Expression, scale: Expression, zero: Expression | None = None, dtype: str = ""
) -> Expression:
    """Codes times scales whose shape says what each is for."""
    block, shape = _grid(layer, codes.spec.shape, scale.spec.shape)
    others = [reshaped(each, shape) for each in (scale, zero) if each is not None]
    return apply(DequantBlocks(block, dtype or layer.dtype), codes, *others)[0]


def _grid(layer: Layer, weight: Shape, scale: Shape) -> tuple[tuple[int, int], Shape]:
    """The size of blocks, and the shape of their scales, for a weight [..., rows, columns].

    One scale for all, for each row, for each group of columns; else for blocks of the size that the config says, or of
    128 x 128.
    """
    *front, rows, columns = weight if len(weight) > 1 else (0, 0)
    held = list(scale)
    if 4 <= len(held) == len(weight) + 2 and held[-1] == held[-3] == 1:
        held = [*held[:-4], held[-4], held[-2]]  # [rows, 1, columns, 1]
    if math.prod(held) == 1 and not front:
        held = [1, 1]
    elif len(held) == len(weight) - 1 and held[-1:] == [rows]:
        held = [*held, 1]
    elif held == front and front:
        held = [*front, 1, 1]
    size = layer.told.blocks(layer.module)[0]
    by_block = [*front, -(-rows // size[0]), -(-columns // size[1])]
    wrong = layer.wrong(
        f"its scales are {list(scale)}, for a weight {list(weight)}: {by_block} expected for blocks of {list(size)}, or one "
        "for all, for each row or for each group",
        "check weight_block_size or group_size in the config's quantization_config",
    )
    if len(held) != len(weight) or len(weight) < 2 or held[:-2] != front:
        raise wrong
    down, across = held[-2:]
    for block in layer.told.blocks(layer.module) if (down, across) != (1, 1) else ():
        if (-(-rows // block[0]), -(-columns // block[1])) == (down, across) and (down != rows or rows == 1):
            return block, (*front, down, across)
    # One for each column is what experts have that were transposed; of a matrix it is another layer's, or not whole.
    by_column = down == 1 and across > 1 and rows > 1 and not front
    if down not in (1, rows) or by_column or not across or columns % across:
        raise wrong
    return (max(rows // down, 1), max(columns // across, 1)), (*front, down, across)


# ------------------------------------------------------------------------------------------ integers


def _packed_integers(layer: Layer) -> Expression:
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
    codes = _unpacked(packed, bits, columns, "offset", order)
    zero = None
    if "zero_point" in layer.parts:
        zero = _zero_points(layer, bits, rows, order)
    if scale.spec.shape in ((1,), ()):
        return _scaled(layer, codes, scale, zero)
    if "g_idx" in layer.parts:
        return _by_index(layer, codes, scale, zero)
    return _scaled(layer, codes, scale, zero)


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
        columns = width * (_WORD // bits)
    whole = -(-columns // (_WORD // bits))
    dense = -(-columns * bits // _WORD)
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
    return turned(_unpacked(turned(zero), bits, rows, "offset", order))


def _by_index(layer: Layer, codes: Expression, scale: Expression, zero: Expression | None) -> Expression:
    """Codes [rows, columns] whose group is said for each column."""
    index = layer["g_idx"]
    others = [apply(Gather(), each, index)[0] for each in (scale, zero) if each is not None]
    return apply(DequantBlocks((1, 1), layer.dtype), codes, *others)[0]


def _integers(layer: Layer) -> Expression:
    """A byte for each code; of four bits where the config says so, the high ones first."""
    codes = layer[""]
    if layer.told.settings.get("quantization_bit") == 4:
        codes = _unpacked(codes, 4, 2 * layer.width(""), "signed", "high_first")
    return _scaled(layer, codes, layer["scale"], layer.parts.get("zero_point"))


def _two_rows_a_byte(layer: Layer) -> Expression:
    """INT4 of modelopt: the low four bits of a byte are an even row."""
    rows, _ = layer.sizes("", 2)
    codes = turned(_unpacked(turned(layer[""]), 4, 2 * rows, "signed"))
    return _scaled(layer, codes, layer["scale"])


# ----------------------------------------------------------------------------------------- GPTQ, AWQ


def _gptq(layer: Layer) -> Expression:
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
    columns = layer.sizes("g_idx", 1)[0] if "g_idx" in layer.parts else height * _WORD // bits
    codes = _unpacked(turned(layer["qweight"]), bits, columns)
    stored = _unpacked(layer["qzeros"], bits, rows)
    meaning = "next" if _one_less(layer, bits, stored) else "unsigned"
    zero = turned(_unpacked(layer["qzeros"], bits, rows, meaning))
    scale = turned(layer["scales"])
    if "g_idx" in layer.parts:
        return _by_index(layer, codes, scale, zero)
    if columns % groups:
        raise layer.wrong(f"{groups} groups do not divide {columns} columns, and there is no g_idx")
    return _scaled(layer, codes, scale, zero)


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
        if -(-rows * bits // _WORD) == width
        and ("g_idx" not in layer.parts or -(-layer.sizes("g_idx", 1)[0] * bits // _WORD) == height)
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


def _awq(layer: Layer) -> Expression:
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
        return _scaled(layer, codes, turned(layer["scales"]), zero)
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
    zero = apply(Truncate(1, columns // size), _unpacked(layer["qzeros"], 4, 8 * points))[0]
    scale = apply(Truncate(1, columns // size), layer["scales"])[0]
    return _scaled(layer, _unpacked(layer["qweight"], 4, columns), scale, zero)


def _by_eights(packed: Expression) -> Expression:
    """Words [n, m] of eight codes 0 2 4 6 1 3 5 7, as [8 m, n]."""
    rows, words = packed.spec.shape
    codes = reshaped(_unpacked(packed, 4, 8 * words), (rows, words, 2, 4))
    return reshaped(apply(PermuteAxes((1, 3, 2, 0)), codes)[0], (8 * words, rows))


# -------------------------------------------------------------------------------------------- floats


def _float8(layer: Layer) -> Expression:
    """F8 and its scales, under whatever name they have."""
    (scale,) = (part for part in layer.parts if part and part != "comfy_quant")
    if "comfy_quant" in layer.parts:
        _known_to_comfy(layer, ("float8_e4m3fn", "float8_e5m2"))
    return _scaled(layer, layer[""], layer[scale])


def _known_to_comfy(layer: Layer, formats: tuple[str, ...]) -> None:
    said = layer.settings("comfy_quant")
    if said.get("format") not in formats or said.get("convrot"):
        raise layer.wrong(f"'{layer['comfy_quant'].spec.name}' says {dict(said)}, which is not read here")


def _nvfp4(layer: Layer) -> Expression:
    """Four bits, a scale in F8 for each 16, and one for all: divided by it, or multiplied."""
    divide = "global_scale" in layer.parts
    scale = apply(ScaleAll(divide), layer["scale"], layer["global_scale" if divide else "scale_2"])[0]
    return _groups_of(16, layer, _floats(layer, "packed" if divide else ""), scale)


def _groups_of(size: int, layer: Layer, codes: Expression, scale: Expression) -> Expression:
    return apply(DequantBlocks((1, size), layer.dtype), codes, scale)[0]


def _mxfp4(part: str) -> Make:
    return lambda layer: _groups_of(32, layer, _floats(layer, part), layer["scale"])


def _expert_blocks(layer: Layer) -> Expression:
    """Experts as bare parameters, which transformers holds with their last two axes exchanged."""
    shape = layer.shape("blocks")
    if len(shape) < 3 or shape[-1] != 16:
        raise layer.wrong(f"its blocks are {list(shape)}: [..., out, groups, 16] expected")
    *front, rows, groups, size = shape
    packed = reshaped(layer["blocks"], (*front, rows, groups * size))
    codes = _unpacked(packed, 4, 2 * groups * size, "e2m1")
    made = _groups_of(32, layer, codes, layer["scales"])
    axes = range(len(made.spec.shape))
    return apply(PermuteAxes((*axes[:-2], axes[-1], axes[-2])), made)[0]


# ------------------------------------------------------------------------------------- bitsandbytes


def _by_table(layer: Layer) -> Expression:
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
    codes = _unpacked(reshaped(code, (1, width)), 4, count, "unsigned", "high_first") if width else code
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


def _by_row(layer: Layer) -> Expression:
    """Integers times the largest value of their row, and then times 1/127: two products in F32."""
    if "format" in layer.parts and int.from_bytes(layer.read("format"), "little"):
        raise layer.wrong(
            "its weight_format is that of one kind of device", "save it again with row-major weights"
        )
    product = _scaled(layer, layer[""], layer["SCB"], dtype="F32")
    return apply(Affine(0.007874015718698502, 0.0), product)[0]


def _torchao(layer: Layer) -> Expression:
    said = layer.told.entries.get(layer.name)
    kind = said.get("_type") if isinstance(said, Mapping) else None
    if kind not in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"):
        raise layer.wrong(
            f"torchao's {kind or 'weight, whose kind no metadata says,'} is not read here",
            "kinds whose layout is that of one kind of device have no other reader than torchao",
        )
    return _scaled(
        layer, layer["_weight_qdata"], layer["_weight_scale"], layer.parts.get("_weight_zero_point")
    )


# ------------------------------------------------------------------------------------------- the table

_ANY: tuple[str, ...] = ()
_INTEGER = ("I32", "I64")
_AS_OWNER = "bit-equal in the dtype of the scales"
_ONE_ROUNDING = "q * s"

SCHEMES: tuple[Scheme, ...] = (
    Scheme(
        "compressed-tensors pack-quantized, INT2 to INT8",
        {"packed": ("I32",), "scale": FLOATS},
        _packed_integers,
        "(q - z) * s; by group, channel or tensor; symmetric or not; words filled (to 0.17) or dense",
        _AS_OWNER,
        {"shape": _INTEGER, "zero_point": ("I32", "I8"), "g_idx": ("I32",)},
    ),
    Scheme(
        "compressed-tensors NVFP4",
        {"packed": ("U8",), "scale": ("F8_E4M3",), "global_scale": ("F32",)},
        _nvfp4,
        "fp4 * (s / global), the quotient in F32",
        "bit-equal in BF16",
        {"shape": _INTEGER},
    ),
    Scheme(
        "compressed-tensors MXFP4",
        {"packed": ("U8",), "scale": _POWERS},
        _mxfp4("packed"),
        "fp4 * 2^(s - 127); 255 is not-a-number, as the format has it",
        "exact",
        {"shape": _INTEGER},
    ),
    Scheme(
        "torchao Int8, Float8, Intx",
        {"_weight_qdata": ("I8", *FLOAT8), "_weight_scale": FLOATS},
        _torchao,
        "(q - z) * s",
        "bit-equal in the model's dtype",
        {"_weight_zero_point": ("I8",)},
    ),
    Scheme(
        "bitsandbytes NF4 and FP4",
        {"": _ANY, "absmax": ("F32", "U8"), "quant_map": ("F32",), "quant_state.bitsandbytes__nf4": ("U8",)},
        _by_table,
        "table[q] * absmax; scales of scales: nested_map[a] * nested_absmax + offset, each rounded to F32",
        "bit-equal in the dtype that was quantised",
        {"nested_absmax": ("F32",), "nested_quant_map": ("F32",)},
    ),
    Scheme(
        "bitsandbytes INT8",
        {"": ("I8",), "SCB": ("F32",)},
        _by_row,
        "(q * SCB) * (1/127), both products in F32",
        "bit-equal in F32",
        {"format": ("U8",)},
    ),
    Scheme(
        "GPTQ and AutoRound, 2, 3, 4, 8 bits",
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
        _gptq,
        "(q - z) * s by g_idx; z is stored less one in the first version, which the data of symmetric files tell",
        _AS_OWNER,
        {"g_idx": ("I32",)},
        ("gptq", "auto-round", "auto_round", "intel/auto-round", ""),
    ),
    Scheme(
        "AWQ gemm and gemv",
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
        _awq,
        "(q - z) * s, out of words of eight 0 2 4 6 1 3 5 7",
        _AS_OWNER,
        methods=("awq",),
    ),
    Scheme(
        "MXFP4 experts",
        {"blocks": ("U8",), "scales": _POWERS},
        _expert_blocks,
        "fp4 * 2^(s - 127), as [..., in, out]",
        "exact",
    ),
    Scheme(
        "FP8 by tensor, row, group or block",
        {"": FLOAT8, "scale_inv": (*FLOATS, *_POWERS)},
        _float8,
        _ONE_ROUNDING,
        "bit-equal",
    ),
    Scheme(
        "FP8 of compressed-tensors, modelopt, FBGEMM; MXFP8",
        {"": FLOAT8, "scale": (*FLOATS, *_POWERS)},
        _float8,
        _ONE_ROUNDING,
        "bit-equal in the dtype of the scales, and for F32 scales",
        {"comfy_quant": ("U8",)},
    ),
    Scheme(
        "FP8 of a maker's own files",
        {"": FLOAT8, "qscale_weight": FLOATS},
        _float8,
        _ONE_ROUNDING,
        "no library does it",
    ),
    Scheme(
        "ComfyUI's scaled FP8",
        {"": FLOAT8, "scale_weight": FLOATS},
        _float8,
        _ONE_ROUNDING + "; ComfyUI rounds s to the wanted dtype first",
        "one rounding less",
    ),
    Scheme(
        "modelopt NVFP4",
        {"": ("U8",), "scale": ("F8_E4M3",), "scale_2": ("F32",)},
        _nvfp4,
        "fp4 * (s * scale_2), the inner product in F32",
        "bit-equal, but for the sign of zeros",
    ),
    Scheme("modelopt MXFP4", {"": ("U8",), "scale": _POWERS}, _mxfp4(""), "fp4 * 2^(s - 127)", "exact"),
    Scheme(
        "modelopt INT4",
        {"": ("U8",), "scale": FLOATS},
        _two_rows_a_byte,
        "q * s, two rows a byte",
        "no library does it on a CPU",
        methods=("modelopt",),
    ),
    Scheme(
        "FP4 experts in bytes that are called I8",
        {"": ("I8",), "scale": ("F8_E8M0",)},
        _mxfp4(""),
        "fp4 * 2^(s - 127)",
        "exact",
    ),
    Scheme(
        "INT8 by tensor, row or group; with `quantization_bit` 4, two codes a byte",
        {"": ("I8",), "scale": FLOATS},
        _integers,
        "(q - z) * s",
        _AS_OWNER,
        {"zero_point": ("I8",)},
    ),
)
"""In the order in which they are tried."""


def scheme_of(parts: Mapping[str, Expression], method: str) -> Scheme | None:
    """The scheme of a layer, by its parts and what the config calls the method."""
    known = {_alike(part): tensor for part, tensor in parts.items()}
    return next((scheme for scheme in SCHEMES if scheme.fits(known, method)), None)


def _alike(part: str) -> str:
    return part.replace("bitsandbytes__fp4", "bitsandbytes__nf4")


def plain(layer: Layer) -> Expression:
    """The plain weight of a layer.

    Raises:
        PlanError: it is of no scheme, or not as its scheme has it.
    """
    scheme = scheme_of(layer.parts, layer.told.method)
    if scheme is None:
        found = ", ".join(f"{part or 'weight'} ({each.spec.dtype})" for part, each in layer.parts.items())
        raise layer.wrong(
            f"it is quantised in a way that is not read here: {found}",
            "docs/quantised.md has what is read; the library that made it may save it unquantised",
        )
    try:
        return scheme.make(layer)
    except StreamconvError as error:
        problem = error.problems[0].at(tensor=layer.name)
        raise PlanError(f"{problem.message} ({scheme.name})", tensor=layer.name, hint=problem.hint) from error


def kinds() -> Iterator[tuple[str, str, str, str]]:
    """A row for each scheme: name, tensors, value, exactness."""
    for scheme in SCHEMES:
        tensors = [_shown(part) for part in scheme.parts] + [f"[{_shown(part)}]" for part in scheme.more]
        yield scheme.name, " ".join(tensors), scheme.value, scheme.exact


def _shown(part: str) -> str:
    own = part in (
        "qweight",
        "qzeros",
        "scales",
        "SCB",
        "qscale_weight",
        "scale_weight",
        "comfy_quant",
        "blocks",
    )
    if part.startswith("_") or own or part == "g_idx":
        return part
    return "weight" + (
        ("." if part.startswith(("absmax", "quant_", "nested")) else "_") + part if part else ""
    )
