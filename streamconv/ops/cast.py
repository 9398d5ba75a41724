"""`cast`: values in another dtype, rounded to nearest even, with what was lost counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Protocol

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import ConversionError, PlanError
from streamconv.ops.arrays import Array, ml_dtypes, numpy
from streamconv.ops.checks import POWERS_OF_TWO, parsed
from streamconv.ops.expression import Block, Exactness, Numeric, Op
from streamconv.tensor import TensorSpec

CHUNK = 1 << 16
"""Elements at a time: operand, result and the passes over both stay in a core's cache."""

OVERFLOW = ("inf", "saturate", "error")
"""What `cast` can do with values beyond the target's range."""

# Floats without infinities or a negative zero.
_UNSIGNED_ZERO = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True)
class Cast(Numeric):
    """Each value as the nearest one of `dtype`, ties to even, rounded once.

    - To a float: from floats, integers and booleans. To anything else: only where it holds every value
      of the source dtype, as from I32 to I64. The rest is refused, and so are casts to `F8_E8M0`, which
      holds powers of two only.
    - Values beyond the target's range become, by `overflow`: `inf`: infinite, or not a number where the
      target has no infinity (`F8_E4M3` and the FNUZ dtypes); `saturate`: the largest finite value, which
      is what an infinity becomes too where the target has none; `error`: a ConversionError. They are
      counted in the tally, as are values flushed to zero.
    - Not-a-number stays so; its payload is not kept.

    Where this differs from torch 2.13 (`Tensor.to` on a CPU; all pairs were compared):

    - torch rounds F64 to F32 first and then again to F16, BF16 or F8, so that a value next to a tie can
      come out one step off. `ml_dtypes` does so too for BF16 and F8; `_odd_float32` is the way around it.
    - torch saturates to 448 in `F8_E4M3`, also from infinity; before, it gave not-a-number, as this does.
      An overflow must not pass for a weight.
    """

    name: ClassVar[str] = "cast"
    dtype: str
    overflow: str = "inf"

    @property
    def target(self) -> DType:
        """The row of the dtype table. Raises UsageError for a name that has none."""
        return dtypes.parse(self.dtype)

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        (operand,) = operands
        source, target = operand.dtype, parsed("cast to", self.dtype, operand.name)
        for dtype in (source, target):
            if dtype.packed:
                raise PlanError(
                    f"cast from {source} to {target}: elements of {dtype} share bytes, and their scales are "
                    "other tensors",
                    tensor=operand.name,
                )
        if not _allowed(source, target):
            raise PlanError(
                f"cast from {source} to {target}, which does not hold all values of {source}",
                tensor=operand.name,
                hint="only a cast to a float may round",
            )
        if self.overflow not in OVERFLOW:
            raise PlanError(
                f"cast to {target} with the overflow policy '{self.overflow}'",
                tensor=operand.name,
                hint="known: " + ", ".join(OVERFLOW),
            )
        return (replace(operand, dtype=target),)

    def compute(self, block: Block) -> None:
        """A chunk at a time, counting while the chunk is in cache.

        Raises:
            ConversionError: the policy is `error`, and finite values of this block are beyond the range.
        """
        source_dtype, target_dtype = _real(block.specs[0].dtype), _real(self.target)
        source = block.inputs[0].reshape(-1).view(source_dtype.numpy)
        target = block.out.reshape(-1).view(target_dtype.numpy)
        convert = converter(source_dtype, target_dtype)
        before, after = counter(source_dtype), counter(target_dtype)
        lossless = holds(target_dtype, source_dtype)
        overflowed = 0
        for start in range(0, source.size, CHUNK):
            piece, made = source[start : start + CHUNK], target[start : start + CHUNK]
            convert(piece, made)
            if lossless:
                continue
            zeros, unbound = after(made)
            if zeros:
                block.tally.flushed += zeros - before(piece, unbounded=False)[0]
            if unbound:
                overflowed += unbound - before(piece, zero=False)[1]
                if self.overflow == "saturate":
                    _saturate(piece, made, target_dtype)
        if overflowed and self.overflow == "error":
            raise ConversionError(
                f"cast to {target_dtype}: {overflowed} of {source.size} values in a block are beyond its range",
                tensor=block.specs[0].name,
                hint="choose a dtype with more range, or another overflow policy: inf, saturate",
            )
        block.tally.overflowed += overflowed

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Back, where every value came through unchanged (but for the payload of not-a-number)."""
        source, target = operands[0].dtype, self.target
        return Cast(source.name) if holds(target, source) and _allowed(target, source) else None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        source = operands[0].dtype
        if source == self.target:
            return Exactness.BIT_EXACT
        return Exactness.VALUE_EXACT if holds(self.target, source) else Exactness.ROUNDING

    def __str__(self) -> str:
        # The policy shows only where somebody chose one.
        return f"cast(dtype={self.dtype})" if self.overflow == "inf" else super().__str__()


def _real(dtype: DType) -> DType:
    """The dtype itself, or that of both parts of a complex one, which are cast as floats side by side."""
    return dtypes.by_name({"C64": "F32", "C128": "F64"}.get(dtype.name, dtype.name))


def _allowed(source: DType, target: DType) -> bool:
    """Whether `cast` does it: round to a float, or both parts to floats, or else keep every value."""
    if "complex" in (source.kind, target.kind):
        return source.kind == target.kind
    return (target.kind == "float" and target.name != POWERS_OF_TWO) or holds(target, source)


@cache
def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` is a value of `wide`."""
    if wide == narrow:
        return True
    if "complex" in (wide.kind, narrow.kind):
        return wide.kind == narrow.kind and wide.bits >= narrow.bits
    if wide.kind != "float":
        return narrow.kind != "float" and numpy.can_cast(narrow.numpy, wide.numpy, "safe")
    if wide.name == POWERS_OF_TWO or (wide.name in _UNSIGNED_ZERO and narrow.kind == "float"):
        return False
    a = ml_dtypes.finfo(wide.numpy)
    if narrow.kind != "float":
        digits = {"bool": 1, "uint": narrow.bits, "int": narrow.bits - 1}[narrow.kind]
        return bool(digits <= a.nmant + 1)
    b = ml_dtypes.finfo(narrow.numpy)
    finest = float(a.smallest_subnormal) <= float(b.smallest_subnormal)
    return bool(a.nmant >= b.nmant and a.maxexp >= b.maxexp and finest)


# ------------------------------------------------------------------------------- converting


@cache
def converter(source: DType, target: DType) -> Callable[[Array, Array], None]:
    """A function that fills one array of `target` from one of `source`, rounding once, ties to even.

    Both are C-contiguous and of at most `CHUNK` elements or so: it allocates as much.

    NumPy's own loops where they round once; they are slow or missing for F8, where a table is faster.
    """

    def plain(values: Array, out: Array) -> None:
        numpy.copyto(out, values, casting="unsafe")

    def through_float32(values: Array, out: Array) -> None:
        numpy.copyto(out, _odd_float32(values), casting="unsafe")

    def by_code(values: Array, out: Array) -> None:
        numpy.take(table, values.view(codes), out=out.view(table.dtype), mode="clip")

    def by_upper_half(values: Array, out: Array) -> None:
        numpy.take(table, _odd_upper_half(_odd_float32(values)), out=out.view(table.dtype), mode="clip")

    if source == target:
        return plain
    if source.kind == "float" and source.bits <= 16 and not (source.name == "BF16" and target.bits > 16):
        table, codes = _table(source, target), numpy.dtype(f"u{source.itemsize}")
        return by_code
    if target.kind == "float" and target.bits == 8:
        table = _table(dtypes.by_name("BF16"), target)
        return by_upper_half
    if target.name == "BF16" and source.name != "F32":
        return through_float32
    return plain


@cache
def _table(source: DType, target: DType) -> Array:
    """For each bit pattern of a `source` of at most 16 bits, that of the nearest value of `target`."""
    codes = numpy.arange(1 << source.bits, dtype=f"u{source.itemsize}")
    with numpy.errstate(all="ignore"):
        values = codes.view(source.numpy).astype(numpy.float32).astype(target.numpy)
    return values.view(f"u{target.itemsize}")


def _odd_float32(values: Array) -> Array:
    """F32 rounded to odd: cut off, with the last bit set where anything was lost.

    Rounding that to nearest even in a dtype at least two bits shorter gives the same as rounding the
    exact value would: the last bit still says on which side of a tie it was (Boldo and Melquiond,
    "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    if values.dtype == numpy.float32:
        return values
    wide = _odd_float64(values)
    near = wide.astype(numpy.float32)
    bits = near.view(numpy.int32)
    lost = near != wide
    bits -= numpy.abs(near) > numpy.abs(wide)
    bits |= lost
    return near


def _odd_float64(values: Array) -> Array:
    """F64 of integers and floats; long integers end in a bit for what does not fit, as above."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return values.astype(numpy.float64)
    low = values & values.dtype.type(0xFFF)
    short = values - low + (low != 0) * values.dtype.type(0x800)
    near = values.astype(numpy.float64)
    return numpy.where(numpy.abs(near) < 2.0**52, near, short.astype(numpy.float64))


def _odd_upper_half(values: Array) -> Array:
    """The bit patterns of BF16 rounded to odd from F32."""
    bits = values.view(numpy.uint32)
    codes = bits & numpy.uint32(0xFFFF)
    codes += numpy.uint32(0xFFFF)  # carries where anything is lost
    codes |= bits
    codes >>= numpy.uint32(16)
    return codes


def _saturate(values: Array, made: Array, target: DType) -> None:
    """Give the largest finite value, with its sign, to what of `values` became unbounded in `made`."""
    has_infinity = bool(numpy.isinf(numpy.array(numpy.inf).astype(target.numpy).astype(numpy.float64)))
    wide, result = values.astype(numpy.float64), made.astype(numpy.float64)
    known = numpy.isfinite(wide) if has_infinity else ~numpy.isnan(wide)
    largest = numpy.array([ml_dtypes.finfo(target.numpy).max, ml_dtypes.finfo(target.numpy).min])
    codes = largest.astype(target.numpy).view(f"u{target.itemsize}")
    numpy.copyto(
        made.view(codes.dtype), codes[(wide < 0).astype(numpy.intp)], where=known & ~numpy.isfinite(result)
    )


# --------------------------------------------------------------------------------- counting


class Counter(Protocol):
    """What `counter` makes."""

    def __call__(self, values: Array, *, zero: bool = True, unbounded: bool = True) -> tuple[int, int]:
        """How many values are zero and how many are not finite; 0 for what is not asked for."""


@cache
def counter(dtype: DType) -> Counter:
    """The counter for arrays of `dtype`, which count a chunk or so at a time: they allocate as much."""
    bits: numpy.dtype[Any] = numpy.dtype(f"u{dtype.itemsize}")

    def count_whole_numbers(values: Array, *, zero: bool = True, **_: bool) -> tuple[int, int]:
        return values.size - int(numpy.count_nonzero(values)) if zero else 0, 0

    def count_codes(values: Array, *, zero: bool = True, unbounded: bool = True) -> tuple[int, int]:
        codes = values.view(bits)
        zeros = int(numpy.count_nonzero(codes == 0)) if zero and has_zero else 0
        return zeros, int(numpy.count_nonzero(codes == nan)) if unbounded else 0

    def count_sizes(values: Array, *, zero: bool = True, unbounded: bool = True) -> tuple[int, int]:
        # Without the sign, zero is the least pattern, and no finite value reaches that of infinity.
        sizes = values.view(bits) & unsigned
        zeros = unbound = 0
        if zero and numpy.minimum.reduce(sizes) == 0:
            zeros = sizes.size - int(numpy.count_nonzero(sizes))
        if unbounded and numpy.maximum.reduce(sizes) >= infinity:
            unbound = int(numpy.count_nonzero(sizes >= infinity))
        return zeros, unbound

    if dtype.kind != "float":
        return count_whole_numbers
    unsigned = bits.type((1 << (dtype.bits - 1)) - 1)
    with numpy.errstate(all="ignore"):
        infinity, nan = numpy.array([numpy.inf, numpy.nan]).astype(dtype.numpy).view(bits)
    has_zero = dtype.name != POWERS_OF_TWO
    return count_codes if dtype.name in (POWERS_OF_TWO, *_UNSIGNED_ZERO) else count_sizes
