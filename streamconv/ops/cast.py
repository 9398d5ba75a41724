"""`cast`: values in another dtype, rounded to nearest even, with what was lost counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.ops.expression import Exactness, Op, Tally
from streamconv.ops.layout import Box
from streamconv.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy

    from streamconv.ops.expression import Array

# Elements at a time: operand, result and the counting passes over both stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Cast(Op):
    """Each value as the nearest one of `dtype` (ties to even).

    Values beyond the target's range become infinite, or not a number where it has no infinity
    (`F8_E4M3`), as torch does it; they are counted in the tally, and so are values flushed to zero.
    """

    name: ClassVar[str] = "cast"
    dtype: str

    @property
    def target(self) -> DType:
        """The row of the dtype table."""
        return dtypes.parse(self.dtype)

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The operand with another dtype."""
        (operand,) = operands
        for dtype in (operand.dtype, self.target):
            if dtype.packed:
                raise PlanError(
                    f"{dtype} cannot be cast: its elements share bytes and its scales are other tensors",
                    tensor=operand.name,
                )
        if operand.dtype.kind == "complex" and self.target.kind != "complex":
            raise PlanError(f"a cast from {operand.dtype} to {self.target} drops a part", tensor=operand.name)
        return (replace(operand, dtype=self.target),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The same box."""
        del result, operands
        return (box,)

    def compute(
        self,
        result: int,
        box: Box,
        out: Array,
        operands: Sequence[TensorSpec],
        needed: Sequence[Box],
        blocks: Sequence[Array],
        tally: Tally,
    ) -> None:
        """A chunk at a time, counting while the chunk is in cache."""
        del result, box, needed
        import numpy

        (block,) = blocks
        source, target = block.reshape(-1), out.reshape(-1)
        before, after = _classifier(operands[0].dtype), _classifier(self.target)
        lossless = _holds(self.target, operands[0].dtype)
        with numpy.errstate(over="ignore", invalid="ignore"):
            for start in range(0, source.size, _CHUNK):
                piece, made = source[start : start + _CHUNK], target[start : start + _CHUNK]
                numpy.copyto(made, piece, casting="unsafe")
                if lossless or before is None or after is None:
                    continue
                zeros, bad = after(made)
                if zeros or bad:
                    zeros_before, bad_before = before(piece)
                    tally.flushed += max(zeros - zeros_before, 0)
                    tally.overflowed += max(bad - bad_before, 0)

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """Back, where every value came through unchanged."""
        (operand,) = operands
        return Cast(operand.dtype.name) if _holds(self.target, operand.dtype) else None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Value-exact where the target holds every value of the source dtype."""
        source = operands[0].dtype
        if source == self.target:
            return Exactness.BIT_EXACT
        return Exactness.VALUE_EXACT if _holds(self.target, source) else Exactness.ROUNDING


@cache
def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` is a value of `wide`."""
    import ml_dtypes
    import numpy

    if wide == narrow:
        return True
    if "float" in (wide.kind, narrow.kind) and {wide.kind, narrow.kind} <= {"float"}:
        a, b = ml_dtypes.finfo(wide.numpy), ml_dtypes.finfo(narrow.numpy)
        # Scale dtypes (F8_E8M0) have no sign and no zero; they hold nothing else's values.
        if wide.name == "F8_E8M0":
            return False
        return bool(
            a.nmant >= b.nmant
            and a.maxexp >= b.maxexp
            and float(a.smallest_subnormal) <= float(b.smallest_subnormal)
        )
    return bool(numpy.can_cast(narrow.numpy, wide.numpy, "safe"))


@cache
def _classifier(dtype: DType) -> Any:
    """A function from an array of `dtype` to its counts of (zeros, non-finite values), or None."""
    import numpy

    if dtype.kind != "float":
        return None
    if dtype.bits == 8:
        codes = numpy.arange(256, dtype=numpy.uint8).view(dtype.numpy).astype(numpy.float32)
        is_zero, is_bad = codes == 0, ~numpy.isfinite(codes)

        def by_code(values: Array) -> tuple[int, int]:
            counts = numpy.bincount(values.view(numpy.uint8), minlength=256)
            return int(counts[is_zero].sum()), int(counts[is_bad].sum())

        return by_code
    bits: numpy.dtype[Any] = numpy.dtype(f"u{dtype.itemsize}")
    (infinity,) = numpy.array([numpy.inf]).astype(dtype.numpy).view(bits)
    magnitude = bits.type((1 << (dtype.bits - 1)) - 1)

    def by_bits(values: Array) -> tuple[int, int]:
        # A sign-free bit pattern is 0 for zero, and at least infinity's for what is not finite.
        found = values.view(bits) & magnitude
        return found.size - int(numpy.count_nonzero(found)), int(numpy.count_nonzero(found >= infinity))

    return by_bits
