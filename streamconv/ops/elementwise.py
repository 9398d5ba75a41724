"""Operations on single elements: `affine`, `map`, `scale_rows`, `scale_all` and `multiply_add`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.ops.arithmetic import (
    Buffer,
    FloatOp,
    Product,
    Rounder,
    Widener,
    spread_undefined,
    tiles,
    working,
)
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.cast import CHUNK
from streamconv.ops.checks import check_dtype, check_number, fits
from streamconv.ops.expression import Block, Exactness, Numeric, Op
from streamconv.ops.layout import Box
from streamconv.ops.tiles import codes
from streamconv.tensor import TensorSpec


class _Elementwise(FloatOp):
    """Each element of one tensor by itself: widened, computed, and rounded once, a chunk at a time."""

    def wide(self, dtype: DType) -> DType:
        """The dtype to compute in, for operands of `dtype`."""
        return working(dtype)

    @abstractmethod
    def fill(self, values: Array, out: Array) -> Sequence[Any]:
        """Fill `out` from `values`, both in the wide dtype; gives what `Rounder` takes as `nonzero`."""

    def compute(self, block: Block) -> None:
        dtype = block.specs[0].dtype
        wide = self.wide(dtype)
        source, target = block.inputs[0].reshape(-1), block.out.reshape(-1)
        size = min(CHUNK, source.size)
        widen, finish = Widener(dtype, wide, size), Rounder(wide, dtype, block.tally, size)
        room = numpy.empty(size, wide.numpy)
        for start in range(0, source.size, CHUNK):
            values = widen(source[start : start + CHUNK])
            made = room[: values.size]
            nonzero = self.fill(values, made)
            finish(made, target[start : start + CHUNK], nonzero, [values])


@dataclass(frozen=True)
class Affine(_Elementwise):
    """A float tensor as scale * x + offset, in F32 (F64 for F64), rounded once to the operand's dtype.

    An offset of 0 is not added, so that -0 times a positive scale stays -0; (1, 0) changes no bit.
    """

    name: ClassVar[str] = "affine"
    scale: float
    offset: float

    def check(self, operands: Sequence[TensorSpec]) -> None:
        check_number(self.name, self.scale, "scale", operands[0].name)
        check_number(self.name, self.offset, "offset", operands[0].name)

    def compute(self, block: Block) -> None:
        if self.exactness(block.specs) is Exactness.BIT_EXACT:
            numpy.copyto(codes(block.out), codes(block.inputs[0]))
        else:
            super().compute(block)

    def fill(self, values: Array, out: Array) -> Sequence[Any]:
        scale = values.dtype.type(self.scale)
        numpy.multiply(values, scale, out=out)
        if not self.offset:
            return [values, scale]
        out += values.dtype.type(self.offset)
        return [out]

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """The same with 1 / scale and -offset / scale, up to rounding. None for a scale of 0, or numbers beyond F32."""
        if not self.scale:
            return None
        back = Affine(1 / self.scale, -self.offset / self.scale or 0.0)
        return back if fits(back.scale) and fits(back.offset) else None

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        return Exactness.BIT_EXACT if (self.scale, self.offset) == (1, 0) else Exactness.ROUNDING


class _Function(NamedTuple):
    """A function of F64 arrays: what it is, where its result is not exactly 0, and what undoes it."""

    fill: Callable[[Array, Array], object]
    nonzero: Callable[[Array], Array]
    inverse: str


_FUNCTIONS = {
    "neg_exp": _Function(
        lambda values, out: numpy.negative(numpy.exp(values, out=out), out=out),
        lambda values: values != -numpy.inf,
        "log_neg",
    ),
    "log_neg": _Function(
        lambda values, out: numpy.log(numpy.negative(values, out=out), out=out),
        lambda values: values != -1,
        "neg_exp",
    ),
    "reciprocal": _Function(
        lambda values, out: numpy.divide(1.0, values, out=out),
        lambda values: ~numpy.isinf(values),
        "reciprocal",
    ),
}


@dataclass(frozen=True)
class Map(_Elementwise):
    """A function of each element of a float tensor, rounded once to the operand's dtype.

    - `neg_exp`: -exp(x); Mamba's A from its A_log (state-spaces/mamba: mamba_ssm/modules/mamba_simple.py).
    - `log_neg`: log(-x); the other way.
    - `reciprocal`: 1 / x.

    Computed in F64, whatever the operand: an exponential in F32 has errors of its own, which differ from
    one library and processor to the next, and F64's do not show in what is rounded to less.
    """

    name: ClassVar[str] = "map"
    function: str

    def check(self, operands: Sequence[TensorSpec]) -> None:
        if self.function not in _FUNCTIONS:
            raise PlanError(
                f"map of '{self.function}', which is not one of its functions",
                tensor=operands[0].name,
                hint="known: " + ", ".join(_FUNCTIONS),
            )

    def wide(self, dtype: DType) -> DType:
        """F64 (see the class)."""
        return dtypes.by_name("F64")

    def fill(self, values: Array, out: Array) -> Sequence[Any]:
        function = _FUNCTIONS[self.function]
        function.fill(values, out)
        return [function.nonzero(values).astype(values.dtype)]

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return Map(_FUNCTIONS[self.function].inverse)


@dataclass(frozen=True)
class ScaleRows(FloatOp):
    """Each slice of the first axis times its own number: x [m, ...] and s [m], in F32, rounded once to x's dtype.

    For magnitudes (DoRA) and row-wise scales of floats. F64 is computed with where x or s is F64.
    """

    name: ClassVar[str] = "scale_rows"
    arity: ClassVar[int | None] = 2

    def check(self, operands: Sequence[TensorSpec]) -> None:
        values, scale = operands
        if not values.shape or scale.shape != values.shape[:1]:
            raise PlanError(
                f"scale_rows of {list(values.shape)} by '{scale.name}' {list(scale.shape)}: "
                f"{list(values.shape[:1])} expected, a number for each row",
                tensor=values.name,
            )

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        return box, box[:1]

    def compute(self, block: Block) -> None:
        dtype, scale_dtype = (spec.dtype for spec in block.specs)
        values, scales = block.inputs
        wide = working(dtype, scale_dtype)
        columns = values.size // max(len(scales), 1)
        source, target = (array.reshape(len(scales), columns) for array in (values, block.out))
        size = min(CHUNK, values.size)
        widen, widen_scale = Widener(dtype, wide, size), Widener(scale_dtype, wide, size)
        multiply = Product(wide, dtype, block.tally, size)
        for down, across in tiles(*source.shape):
            multiply(widen(source[down, across]), widen_scale(scales[down])[:, None], target[down, across])


@dataclass(frozen=True)
class ScaleAll(Numeric):
    """Floats times the one number of another tensor, or divided by it: x [...] and s of one element as F32 [...].

    In F32, rounded once. Scales of scales: compressed-tensors divides the scales of NVFP4 by `weight_global_scale`, and
    modelopt multiplies them with `weight_scale_2`.
    """

    name: ClassVar[str] = "scale_all"
    arity: ClassVar[int | None] = 2
    divide: bool = False

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        values, scale = operands
        for operand in operands:
            check_dtype(self.name, operand, ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32"), values.name)
        if scale.numel != 1:
            raise PlanError(
                f"scale_all by '{scale.name}', which is {list(scale.shape)}: one number expected",
                tensor=values.name,
            )
        return (TensorSpec(values.name, dtypes.by_name("F32"), values.shape),)

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        return box, ((0, 1),) * len(operands[1].shape)

    def compute(self, block: Block) -> None:
        wide = working()
        source, target = block.inputs[0].reshape(-1), block.out.reshape(-1)
        widen = Widener(block.specs[0].dtype, wide, min(CHUNK, max(source.size, 1)))
        factor = Widener(block.specs[1].dtype, wide, 1)(block.inputs[1].reshape(-1))
        for start in range(0, source.size, CHUNK):
            values = widen(source[start : start + CHUNK])
            made = (numpy.divide if self.divide else numpy.multiply)(
                values, factor, out=target[start : start + CHUNK]
            )
            finite = numpy.isfinite(made)
            if not finite.all():
                block.tally.overflowed += int(numpy.count_nonzero(~finite & numpy.isfinite(values)))
            block.tally.flushed += int(numpy.count_nonzero((made == 0) & (values != 0) & (factor != 0)))


@dataclass(frozen=True)
class MultiplyAdd(FloatOp):
    """A float tensor plus a product of two others, element by element: w + scale * x * y, all of one shape.

    For updates that are products of products (LoHa, HiRA). Computed in F32 (F64 where an operand is F64), rounded once to
    w's dtype.
    """

    name: ClassVar[str] = "multiply_add"
    arity: ClassVar[int | None] = 3
    scale: float = 1.0

    def check(self, operands: Sequence[TensorSpec]) -> None:
        weight, *factors = operands
        check_number(self.name, self.scale, "scale", weight.name)
        for factor in factors:
            if factor.shape != weight.shape:
                raise PlanError(
                    f"multiply_add to {list(weight.shape)}: '{factor.name}' is {list(factor.shape)}; one shape expected",
                    tensor=weight.name,
                )

    def compute(self, block: Block) -> None:
        dtype = block.specs[0].dtype
        wide = working(*(spec.dtype for spec in block.specs))
        target = block.out.reshape(-1)
        sources = [array.reshape(-1) for array in block.inputs]
        size = min(CHUNK, target.size)
        widen = [Widener(spec.dtype, wide, size) for spec in block.specs]
        finish, product, total = (
            Rounder(wide, dtype, block.tally, size),
            Buffer(wide, size),
            Buffer(wide, size),
        )
        for start in range(0, target.size, CHUNK):
            values, left, right = (
                widener(source[start : start + CHUNK]) for widener, source in zip(widen, sources, strict=True)
            )
            made, whole = product.shaped(values.size), total.shaped(values.size)
            numpy.multiply(left, right, out=made)
            made *= wide.numpy.type(self.scale)
            numpy.add(values, made, out=whole)
            for operand in (values, left, right, made):
                spread_undefined(operand, whole)
            finish(whole, target[start : start + CHUNK], [whole], [values, made])


_SIGNED = ("F64", "F32", "F16", "BF16", "C128", "C64")


@dataclass(frozen=True)
class FlipSigns(Numeric):
    """Every number with the other sign, or, of complex ones, every imaginary part: no other bit changes.

    It is what torch notes on a tensor instead of doing it: `resolve_neg` and `resolve_conj`.
    """

    name: ClassVar[str] = "flip_signs"
    loss: ClassVar[Exactness] = Exactness.BIT_EXACT
    imaginary: bool = False

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        (operand,) = operands
        check_dtype(self.name, operand, _SIGNED[-2:] if self.imaginary else _SIGNED, operand.name)
        return (operand,)

    def compute(self, block: Block) -> None:
        dtype = block.specs[0].dtype
        parts = 2 if dtype.kind == "complex" else 1
        width = dtype.itemsize // parts
        source, target = (
            array.reshape(-1).view(f"u{width}").reshape(-1, parts) for array in (block.inputs[0], block.out)
        )
        if self.imaginary:
            target[:, 0] = source[:, 0]
        first = 1 if self.imaginary else 0
        numpy.bitwise_xor(source[:, first:], source.dtype.type(1 << (8 * width - 1)), out=target[:, first:])

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        return self
