"""The schemes of quantised weights: by which tensors each is known, and what its weights are (`plain_weights`).

Of a layer, a part is called by what its name ends in: nothing for `X.weight` itself, `scale` for `X.weight_scale`,
`qweight` for `X.qweight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from streamconv.errors import PlanError, StreamconvError
from streamconv.ops import Expression
from streamconv.plans.layer import FLOAT8, FLOATS, POWERS, Layer, Make
from streamconv.plans.plain_weights import (
    awq,
    by_row,
    by_table,
    expert_blocks,
    float8,
    gptq,
    integers,
    mxfp4,
    nvfp4,
    packed_integers,
    torchao,
    two_rows_a_byte,
)


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


# ------------------------------------------------------------------------------------------- the table

_ANY: tuple[str, ...] = ()
_INTEGER = ("I32", "I64")
_AS_OWNER = "bit-equal in the dtype of the scales"
_ONE_ROUNDING = "q * s"

SCHEMES: tuple[Scheme, ...] = (
    Scheme(
        "compressed-tensors pack-quantized, INT2 to INT8",
        {"packed": ("I32",), "scale": FLOATS},
        packed_integers,
        "(q - z) * s; by group, channel or tensor; symmetric or not; words filled (to 0.17) or dense",
        _AS_OWNER,
        {"shape": _INTEGER, "zero_point": ("I32", "I8"), "g_idx": ("I32",)},
    ),
    Scheme(
        "compressed-tensors NVFP4",
        {"packed": ("U8",), "scale": ("F8_E4M3",), "global_scale": ("F32",)},
        nvfp4,
        "fp4 * (s / global), the quotient in F32",
        "bit-equal in BF16",
        {"shape": _INTEGER},
    ),
    Scheme(
        "compressed-tensors MXFP4",
        {"packed": ("U8",), "scale": POWERS},
        mxfp4("packed"),
        "fp4 * 2^(s - 127); 255 is not-a-number, as the format has it",
        "exact",
        {"shape": _INTEGER},
    ),
    Scheme(
        "torchao Int8, Float8, Intx",
        {"_weight_qdata": ("I8", *FLOAT8), "_weight_scale": FLOATS},
        torchao,
        "(q - z) * s",
        "bit-equal in the model's dtype",
        {"_weight_zero_point": ("I8",)},
    ),
    Scheme(
        "bitsandbytes NF4 and FP4",
        {"": _ANY, "absmax": ("F32", "U8"), "quant_map": ("F32",), "quant_state.bitsandbytes__nf4": ("U8",)},
        by_table,
        "table[q] * absmax; scales of scales: nested_map[a] * nested_absmax + offset, each rounded to F32",
        "bit-equal in the dtype that was quantised",
        {"nested_absmax": ("F32",), "nested_quant_map": ("F32",)},
    ),
    Scheme(
        "bitsandbytes INT8",
        {"": ("I8",), "SCB": ("F32",)},
        by_row,
        "(q * SCB) * (1/127), both products in F32",
        "bit-equal in F32",
        {"format": ("U8",)},
    ),
    Scheme(
        "GPTQ and AutoRound, 2, 3, 4, 8 bits",
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
        gptq,
        "(q - z) * s by g_idx; z is stored less one in the first version, which the data of symmetric files tell",
        _AS_OWNER,
        {"g_idx": ("I32",)},
        ("gptq", "auto-round", "auto_round", "intel/auto-round", ""),
    ),
    Scheme(
        "AWQ gemm and gemv",
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
        awq,
        "(q - z) * s, out of words of eight 0 2 4 6 1 3 5 7",
        _AS_OWNER,
        methods=("awq",),
    ),
    Scheme(
        "MXFP4 experts",
        {"blocks": ("U8",), "scales": POWERS},
        expert_blocks,
        "fp4 * 2^(s - 127), as [..., in, out]",
        "exact",
    ),
    Scheme(
        "FP8 by tensor, row, group or block",
        {"": FLOAT8, "scale_inv": (*FLOATS, *POWERS)},
        float8,
        _ONE_ROUNDING,
        "bit-equal",
    ),
    Scheme(
        "FP8 of compressed-tensors, modelopt, FBGEMM; MXFP8",
        {"": FLOAT8, "scale": (*FLOATS, *POWERS)},
        float8,
        _ONE_ROUNDING,
        "bit-equal in the dtype of the scales, and for F32 scales",
        {"comfy_quant": ("U8",)},
    ),
    Scheme(
        "FP8 of a maker's own files",
        {"": FLOAT8, "qscale_weight": FLOATS},
        float8,
        _ONE_ROUNDING,
        "no library does it",
    ),
    Scheme(
        "ComfyUI's scaled FP8",
        {"": FLOAT8, "scale_weight": FLOATS},
        float8,
        _ONE_ROUNDING + "; ComfyUI rounds s to the wanted dtype first",
        "one rounding less",
    ),
    Scheme(
        "modelopt NVFP4",
        {"": ("U8",), "scale": ("F8_E4M3",), "scale_2": ("F32",)},
        nvfp4,
        "fp4 * (s * scale_2), the inner product in F32",
        "bit-equal, but for the sign of zeros",
    ),
    Scheme("modelopt MXFP4", {"": ("U8",), "scale": POWERS}, mxfp4(""), "fp4 * 2^(s - 127)", "exact"),
    Scheme(
        "modelopt INT4",
        {"": ("U8",), "scale": FLOATS},
        two_rows_a_byte,
        "q * s, two rows a byte",
        "no library does it on a CPU",
        methods=("modelopt",),
    ),
    Scheme(
        "FP4 experts in bytes that are called I8",
        {"": ("I8",), "scale": ("F8_E8M0",)},
        mxfp4(""),
        "fp4 * 2^(s - 127)",
        "exact",
    ),
    Scheme(
        "INT8 by tensor, row or group; with `quantization_bit` 4, two codes a byte",
        {"": ("I8",), "scale": FLOATS},
        integers,
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
