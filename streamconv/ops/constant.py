"""A small tensor that the plan itself holds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.ops.arrays import Array, numpy
from streamconv.ops.checks import parsed
from streamconv.ops.expression import Block, Exactness, Expression, Numeric, apply
from streamconv.tensor import Shape, TensorSpec

MOST_BYTES = 1 << 22
"""Of one such tensor: it is text in the plan."""


@dataclass(frozen=True)
class Constant(Numeric):
    """A tensor whose row-major little-endian bytes are `data`, in Base64: what lies nowhere as such bytes."""

    name: ClassVar[str] = "constant"
    arity: ClassVar[int | None] = 0
    loss: ClassVar[Exactness] = Exactness.BIT_EXACT
    dtype: str
    shape: Shape
    data: str

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        spec = TensorSpec("", parsed("constant of", self.dtype), self.shape)
        if spec.dtype.packed or spec.nbytes > MOST_BYTES or len(_decoded(self.data)) != spec.nbytes:
            raise PlanError(f"constant of {spec.dtype} {list(self.shape)} from {len(self.data)} characters")
        return (spec,)

    def compute(self, block: Block) -> None:
        values: Array = numpy.frombuffer(_decoded(self.data), dtypes.by_name(self.dtype).numpy)
        block.out[...] = values.reshape(self.shape)[tuple(slice(*span) for span in block.box)]


def constant(spec: TensorSpec, data: bytes) -> Expression:
    """A tensor from its bytes. Raises PlanError where they are not as many, or too many for a plan."""
    (made,) = apply(Constant(spec.dtype.name, spec.shape, base64.b64encode(data).decode()))
    return made


@lru_cache(maxsize=4)
def _decoded(data: str) -> bytes:
    return base64.b64decode(data)
