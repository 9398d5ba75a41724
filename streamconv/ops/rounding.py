"""What codes and scales a block of numbers is given: how those who quantise without data choose and round them.

- `wide`: DeepSeek's own kernels (deepseek-ai/DeepSeek-V3: inference/kernel.py, `act_quant` and `weight_quant`), in F32.
- `own`: llm-compressor 0.14 without data (compressed-tensors 0.20: quantization/utils/helpers.py), in the weight's own dtype:
  the scale, and the quotient before it becomes a code.
- `power`: the same for MX formats, whose scales are powers of two (quantization/utils/mxfp_utils.py).
- `global`: the same for NVFP4, whose scales are F8 and have a scale for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.ops.arithmetic import Buffer, Rounder, Widener, working
from streamconv.ops.arrays import Array, ml_dtypes, numpy
from streamconv.ops.cast import converter
from streamconv.ops.expression import STEPS, Rounding, Tally
from streamconv.ops.tiles import codes as patterns


@dataclass(frozen=True, slots=True)
class Codes:
    """A kind of codes.

    Attributes:
        dtype: that has their values.
        divisor: what the largest value of a block becomes; whole numbers use the negative end, too.
        least, most: the range.
        octaves: how many powers of two the largest is above one.
    """

    dtype: str
    divisor: float
    least: float
    most: float
    octaves: int


CODES = {
    "F8_E4M3": Codes("F8_E4M3", 448, -448, 448, 8),
    "F8_E5M2": Codes("F8_E5M2", 57344, -57344, 57344, 15),
    "I8": Codes("I8", 127.5, -128, 127, 6),
    "I4": Codes("I8", 7.5, -8, 7, 2),
    "E2M1": Codes("F8_E4M3", 6, -6, 6, 2),
}
"""Four bits take a byte each here, and are packed by `pack`."""

_Made = tuple[Array, Array]
"""The scales as they are stored, and as F32 to divide by."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How scales are chosen.

    Attributes:
        scales: from the largest absolute values of blocks (in the weight's dtype, finite), that dtype, the codes, and the
            scale of scales or None.
        dtype: of the scales; None: the weight's.
        own: whether a quotient is rounded to the weight's dtype before it is one to a code.
    """

    scales: Callable[[Array, DType, Codes, Array | None], _Made]
    dtype: str | None
    own: bool


def _near(values: Array, dtype: DType) -> Array:
    """F32 values that `dtype` has: rounded once."""
    if dtype.name == "F32":
        return values
    made, back = numpy.empty(values.shape, dtype.numpy), numpy.empty(values.shape, numpy.float32)
    converter(working(), dtype)(numpy.ascontiguousarray(values), made)
    converter(dtype, working())(made, back)
    return back


def _wide(peaks: Array, source: DType, kind: Codes, _: Array | None) -> _Made:  # noqa: ARG001 - rules share it
    scales = peaks.astype(numpy.float32) / numpy.float32(kind.most)
    numpy.maximum(scales, numpy.finfo(numpy.float32).tiny, out=scales)
    scales[peaks == 0] = 1
    return scales, scales


def _own(peaks: Array, source: DType, kind: Codes, _: Array | None) -> _Made:
    scales = _near(peaks.astype(numpy.float32) / numpy.float32(kind.divisor), source)
    scales[scales == 0] = float(ml_dtypes.finfo(source.numpy).eps)
    return scales.astype(source.numpy), scales


def _power(peaks: Array, source: DType, kind: Codes, _: Array | None) -> _Made:
    """The exponent of the largest value, one more from 1.75 on; 2^-127 at the least, but where the dtype lacks that."""
    digits = int(ml_dtypes.finfo(source.numpy).nmant)
    field = (patterns(peaks).astype(numpy.int64) + (1 << (digits - 2))) >> digits
    bias = 15 if source.name == "F16" else 127
    exponents = numpy.where(field == 0, 0, numpy.clip(field - bias + 127 - kind.octaves, 0, 254))
    scales = _near(numpy.ldexp(numpy.float32(1), (exponents - 127).astype(numpy.int32)), source)
    exponents[scales == 0] = 127
    scales[scales == 0] = 1
    return exponents.astype(numpy.uint8), scales


# What compressed-tensors takes for a scale in F8 that would be 0.
_LEAST = 0.125


def _by_global(peaks: Array, source: DType, kind: Codes, whole: Array | None) -> _Made:
    assert whole is not None
    each = _near(peaks.astype(numpy.float32) / numpy.float32(kind.divisor), source)
    float8 = dtypes.by_name("F8_E4M3")
    held = _near(numpy.clip(whole * each, -448, 448), float8)
    held[held == 0] = _LEAST
    stored = numpy.empty(held.shape, float8.numpy)
    converter(working(), float8)(held, stored)
    return stored, held / whole


RULES = {
    "wide": Rule(_wide, "F32", own=False),
    "own": Rule(_own, None, own=True),
    "power": Rule(_power, "U8", own=True),
    "global": Rule(_by_global, "F8_E4M3", own=False),
}


class Encoder:
    """Quotients in F32 as codes, tile by tile."""

    def __init__(self, kind: Codes, rule: Rule, source: DType, tally: Tally) -> None:
        self._kind, self._source, wide = kind, source, working()
        self._four = kind is CODES["E2M1"]
        self._rounder = Rounder(wide, dtypes.by_name(kind.dtype), tally)
        self._own = rule.own and source.name != "F32"
        self._held, self._widen = Buffer(source), Widener(source, wide)

    def __call__(self, quotients: Array, values: Array, out: Array) -> None:
        """Fill `out`, a part of a block, from quotients, which are overwritten, of these values."""
        if self._own:
            held = self._held.shaped(*quotients.shape)
            converter(working(), self._source)(quotients, held)
            quotients = self._widen(held)
        numpy.clip(quotients, self._kind.least, self._kind.most, out=quotients)
        if self._four:
            numpy.copyto(patterns(out), numpy.take(_four_bits(), _nearest(quotients)))
        elif self._kind.dtype == "I8":
            numpy.nan_to_num(numpy.rint(quotients, out=quotients), copy=False)
            numpy.copyto(out, quotients, casting="unsafe")
        else:
            self._rounder(quotients, out, [values], [values])


def errors(values: Array, back: Array) -> Rounding:
    """How far `back`, which is overwritten, is from F32 values; zeros and what is not finite do not count."""
    known = (values != 0) & numpy.isfinite(values) & numpy.isfinite(back)
    numpy.subtract(back, values, out=back)
    numpy.divide(back, values, out=back, where=known)
    numpy.abs(back, out=back)
    back[~known] = 0
    steps = (numpy.minimum(back, _MOST) * numpy.float32(STEPS)).astype(numpy.int64)
    return Rounding(int(steps.max(initial=0)), int(steps.sum()), int(numpy.count_nonzero(known)))


# Relative errors that are counted as no more than this.
_MOST = 1024.0

# Up to these, the code is the one before; from the others on, the one after: ties go to even codes.
_BOUNDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def _nearest(values: Array) -> Array:
    """The nearest code of four bits: one that is negative becomes -0, and -0 becomes 0."""
    found = (values < 0).astype(numpy.uint8) << numpy.uint8(3)
    sizes = numpy.abs(values)
    for bound, tie in _BOUNDS:
        found += sizes >= bound if tie else sizes > bound
    return found


@cache
def _four_bits() -> Array:
    """By code: the pattern of its value in F8_E4M3."""
    values = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], numpy.float32)
    return numpy.concatenate([values, -values]).astype(dtypes.by_name("F8_E4M3").numpy).view(numpy.uint8)
