"""Rotary frequencies, made without operands: what checkpoints hold as `inv_freq` buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.checks import parsed
from streamconv.ops.expression import Block, Exactness, Numeric
from streamconv.tensor import TensorSpec

# No model has heads of more channels; it bounds what one block computes.
_MAX_DIM = 1 << 16


@dataclass(frozen=True)
class Frequencies(Numeric):
    """`1 / base ** (arange(0, dim, 2) / dim)`, every step rounded to `computed`, the result to `dtype`.

    ChatGLM computes its buffer in the model's own dtype, others in F32; the bytes differ. It has no inverse;
    recipes say what such a tensor must equal instead.
    """

    name: ClassVar[str] = "frequencies"
    arity: ClassVar[int | None] = 0
    loss: ClassVar[Exactness] = Exactness.BIT_EXACT
    base: float
    dim: int
    dtype: str
    computed: str = "F32"

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        dtype, computed = (parsed("frequencies of", text) for text in (self.dtype, self.computed))
        if not 0 < self.dim <= _MAX_DIM or self.dim % 2 or self.base <= 0:
            raise PlanError(f"frequencies of {self.dim} channels to the base {self.base}")
        if (
            dtype.kind != "float"
            or computed.kind != "float"
            or dtype.bits < 16
            or computed.bits not in (16, 32)
        ):
            raise PlanError(f"frequencies in {dtype}, computed in {computed}")
        return (TensorSpec("", dtype, (self.dim // 2,)),)

    def compute(self, block: Block) -> None:
        """Step by step, as the models' own code does."""
        ((start, stop),) = block.box
        working = dtypes.parse(self.computed).numpy

        def rounded(values: Array) -> Array:
            return values.astype(working)

        # Arithmetic in a longer dtype, rounded, is what torch does in a shorter one; it rounds the base too.
        steps = rounded(numpy.arange(2 * start, 2 * stop, 2, dtype=numpy.float32))
        exponents = rounded(steps.astype(numpy.float32) / numpy.float32(self.dim))
        base = rounded(numpy.array([self.base])).astype(numpy.float64)
        # In F64: NumPy's power in F32 is not correctly rounded.
        powers = rounded((base ** exponents.astype(numpy.float64)).astype(numpy.float32))
        made = rounded(numpy.float32(1) / powers.astype(numpy.float32))
        block.out[...] = made.astype(block.out.dtype)
