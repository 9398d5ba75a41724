"""Operations on single elements: `affine`, `map`, and `scale_rows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import (
    Rounder,
    Widener,
    check_float,
    check_number,
    codes,
    fits,
    multiply,
    tiles,
    working,
)
from streamconv.ops.cast import CHUNK
from streamconv.ops.expression import Exactness, Op, Tally
from streamconv.ops.layout import Box
from streamconv.tensor import TensorSpec

if TYPE_CHECKING:
    from streamconv.ops.expression import Array


@dataclass(frozen=True)
class Affine(Op):
    """A float tensor as scale * x + offset, in F32 (F64 for F64), rounded once to the operand's dtype.

    An offset of 0 is not added, so that -0 times a positive scale stays -0; (1, 0) changes no bit.
    """

    name: ClassVar[str] = "affine"
    scale: float
    offset: float

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The operand's."""
        (operand,) = operands
        check_float(self.name, operand)
        check_number(self.name, self.scale, "scale", operand.name)
        check_number(self.name, self.offset, "offset", operand.name)
        return (operand,)

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
        """A chunk at a time."""
        del result, box, needed
        import numpy

        source, target = blocks[0].reshape(-1), out.reshape(-1)
        if self.exactness(operands) is Exactness.BIT_EXACT:
            numpy.copyto(codes(target), codes(source))
            return
        dtype = operands[0].dtype
        wide = working(dtype)
        scale, offset = wide.numpy.type(self.scale), wide.numpy.type(self.offset)
        size = min(CHUNK, source.size)
        widen, finish = Widener.of(dtype, wide, size), Rounder.of(wide, dtype, tally, size)
        room = numpy.empty(size, wide.numpy)
        with numpy.errstate(all="ignore"):
            for start in range(0, source.size, CHUNK):
                values = widen(source[start : start + CHUNK])
                made = numpy.multiply(values, scale, out=room[: values.size])
                nonzero = [values, scale]
                if self.offset:
                    made += offset
                    nonzero = [made]
                finish(made, target[start : start + CHUNK], nonzero, [values])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """The same with 1 / scale and -offset / scale, up to rounding. None for a scale of 0, or numbers beyond F32."""
        del operands
        if not self.scale:
            return None
        back = Affine(1 / self.scale, -self.offset / self.scale or 0.0)
        return back if fits(back.scale) and fits(back.offset) else None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Rounding, but for (1, 0)."""
        del operands
        return Exactness.BIT_EXACT if (self.scale, self.offset) == (1, 0) else Exactness.ROUNDING


@dataclass(frozen=True, slots=True)
class _Function:
    """A function of F64 arrays: what it is, where its result is not exactly 0, and what undoes it."""

    fill: Callable[[Array, Array], object]
    nonzero: Callable[[Array], Array]
    inverse: str


def _functions() -> dict[str, _Function]:
    import numpy

    def neg_exp(values: Array, out: Array) -> None:
        numpy.negative(numpy.exp(values, out=out), out=out)

    def log_neg(values: Array, out: Array) -> None:
        numpy.log(numpy.negative(values, out=out), out=out)

    def reciprocal(values: Array, out: Array) -> None:
        numpy.divide(1.0, values, out=out)

    return {
        "neg_exp": _Function(neg_exp, lambda values: values != -numpy.inf, "log_neg"),
        "log_neg": _Function(log_neg, lambda values: values != -1, "neg_exp"),
        "reciprocal": _Function(reciprocal, lambda values: ~numpy.isinf(values), "reciprocal"),
    }


@dataclass(frozen=True)
class Map(Op):
    """A function of each element of a float tensor, rounded once to the operand's dtype.

    - `neg_exp`: -exp(x); Mamba's A from its A_log (state-spaces/mamba: mamba_ssm/modules/mamba_simple.py).
    - `log_neg`: log(-x); the other way.
    - `reciprocal`: 1 / x.

    Computed in F64, whatever the operand: an exponential in F32 has errors of its own, which differ from
    one library and processor to the next, and F64's do not show in what is rounded to less.
    """

    name: ClassVar[str] = "map"
    function: str

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The operand's."""
        (operand,) = operands
        known = _functions()
        if self.function not in known:
            raise PlanError(
                f"map of '{self.function}', which is no function it has",
                tensor=operand.name,
                hint="known: " + ", ".join(known),
            )
        check_float(self.name, operand)
        return (operand,)

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
        """A chunk at a time."""
        del result, box, needed
        import numpy

        function, dtype, wide = _functions()[self.function], operands[0].dtype, dtypes.by_name("F64")
        source, target = blocks[0].reshape(-1), out.reshape(-1)
        size = min(CHUNK, source.size)
        widen, finish = Widener.of(dtype, wide, size), Rounder.of(wide, dtype, tally, size)
        room = numpy.empty(size, wide.numpy)
        with numpy.errstate(all="ignore"):
            for start in range(0, source.size, CHUNK):
                values = widen(source[start : start + CHUNK])
                made = room[: values.size]
                function.fill(values, made)
                nonzero = function.nonzero(values).astype(wide.numpy)
                finish(made, target[start : start + CHUNK], [nonzero], [values])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """The function that undoes it, up to rounding."""
        del operands
        return Map(_functions()[self.function].inverse)

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Rounding."""
        del operands
        return Exactness.ROUNDING


@dataclass(frozen=True)
class ScaleRows(Op):
    """Each slice of the first axis times its own number: x [m, ...] and s [m], in F32, rounded once to x's dtype.

    For magnitudes (DoRA) and row-wise scales of floats. F64 is computed with where x or s is F64.
    """

    name: ClassVar[str] = "scale_rows"
    arity: ClassVar[int | None] = 2

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The first operand's."""
        values, scale = operands
        check_float(self.name, values, scale)
        if not values.shape or scale.shape != values.shape[:1]:
            raise PlanError(
                f"scale_rows of {list(values.shape)} by '{scale.name}' {list(scale.shape)}: "
                f"{list(values.shape[:1])} expected, a number for each row",
                tensor=values.name,
            )
        return (values,)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """The same box, and its rows of the scale."""
        del result, operands
        return box, box[:1]

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
        """A tile at a time."""
        del result, box, needed
        import numpy

        values, scale = operands
        wide = working(values.dtype, scale.dtype)
        count = len(blocks[1])
        columns = out.size // max(count, 1)
        source, target = blocks[0].reshape(count, columns), out.reshape(count, columns)
        size = min(CHUNK, out.size)
        widen, widen_scale = Widener.of(values.dtype, wide, size), Widener.of(scale.dtype, wide, size)
        finish = Rounder.of(wide, values.dtype, tally, size)
        room = numpy.empty(size, wide.numpy)
        with numpy.errstate(all="ignore"):
            for down, across in tiles(count, columns):
                tile = widen(source[down, across])
                factor = widen_scale(blocks[1][down])[:, None]
                made = room[: tile.size].reshape(tile.shape)
                multiply(tile, factor, made)
                finish(made, target[down, across], [tile, factor], [tile, factor])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """None: the scale is not in the result."""
        del operands
        return None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """Rounding."""
        del operands
        return Exactness.ROUNDING
