"""Expressions: what a target tensor is, said as operations over stored tensors, evaluated by nobody here.

An operation turns n tensors into m. All have two faces, `spec` (the results' names, dtypes and shapes from
the operands' alone, or a clear error) and, where there is one, `inverse`. How a result is made depends on
the kind:

- A **structural** operation says where elements go, by rewriting layouts (`layout`, see `ops.layout`). The
  evaluator fuses chains of them.
- A **numeric** operation says which boxes of its operands a box of a result needs (`rows`), and fills a
  caller-owned block from operand blocks (`compute`).
- A **fold** needs a pass over all of its operand (`fold`), of which it makes any block (`place`).

Any may add `checks`: pairs of expressions whose bytes must be equal for the operation to be right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar

from streamconv.errors import PlanError
from streamconv.ops.arrays import Array
from streamconv.ops.layout import Box, Layout
from streamconv.tensor import Shape, Stored, TensorSpec

# The largest file offset there is, and so the most bytes a tensor can have.
_MAX_BYTES = (1 << 63) - 1


class Exactness(IntEnum):
    """How much of the source survives, worst last."""

    BIT_EXACT = 0
    """The bytes are the source's bytes, perhaps in another order."""
    VALUE_EXACT = 1
    """Every value is the source's value in another dtype."""
    ROUNDING = 2
    """Values are rounded to the nearest the target dtype has."""
    LOSSY = 3
    """More than rounding is lost."""

    @property
    def label(self) -> str:
        """The word for tables: `bit-exact`, `value-exact`, `rounding`, `lossy`."""
        return self.name.lower().replace("_", "-")


STEPS = 1 << 20
"""In which relative errors are counted: whole numbers have the same sum in any order."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """Relative errors of elements that are not zero, in steps of 2^-20, each rounded down.

    Attributes:
        largest: of any element.
        total: of all.
        count: how many.
    """

    largest: int = 0
    total: int = 0
    count: int = 0

    def with_(self, other: Rounding) -> Rounding:
        """Those of both."""
        return Rounding(max(self.largest, other.largest), self.total + other.total, self.count + other.count)


@dataclass(slots=True)
class Tally:
    """What numeric operations lost, in elements."""

    overflowed: int = 0
    """Finite values that became infinite or not a number."""
    flushed: int = 0
    """Non-zero values that became zero."""

    rounding: Rounding = field(default_factory=lambda: Rounding())
    """How far codes are from what they are of."""

    def add(self, other: Tally) -> None:
        """Count the other's losses too."""
        self.overflowed += other.overflowed
        self.flushed += other.flushed
        self.rounding = self.rounding.with_(other.rounding)


class Op(ABC):
    """What every operation has. Subclasses are frozen dataclasses of plain values, so a plan is data.

    Every method may count on `spec` having accepted the operands.
    """

    name: ClassVar[str]
    arity: ClassVar[int | None] = 1
    """How many operands it takes; None: any number, but at least one. `apply` checks it."""

    loss: ClassVar[Exactness] = Exactness.BIT_EXACT
    """What it does to values, at the worst."""

    @abstractmethod
    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The results' specs. Raises PlanError that says which operand does not fit and why."""

    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """The operation that gives `operands` back from the results, or None where something is lost."""
        return None

    def checks(self, operands: Sequence[Expression]) -> tuple[tuple[Expression, Expression], ...]:
        """Pairs whose bytes must be equal for this operation to be right on these operands."""
        return ()

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """What it does to values of these operands."""
        return self.loss

    def __str__(self) -> str:
        fields = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{self.name}({fields})" if fields else self.name


class Structural(Op):
    """An operation that only says where elements go. Operands and results share one dtype."""

    @abstractmethod
    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        """The results' layouts from the operands' (see `ops.layout`)."""

    @abstractmethod
    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[Shape, ...]:
        """The results' shapes, checked against the operands'."""

    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The results take name and dtype from the first operand."""
        first = operands[0]
        for other in operands:
            if other.dtype != first.dtype:
                raise PlanError(
                    f"{self.name} needs one dtype: '{first.name}' is {first.dtype}, '{other.name}' is {other.dtype}",
                    tensor=first.name,
                    hint="cast them first, for example with --dtype",
                )
        if first.dtype.packed:
            raise PlanError(
                f"{self.name} cannot run on {first.dtype}, whose elements share bytes; it can only be copied",
                tensor=first.name,
            )
        return tuple(replace(first, shape=shape) for shape in self.shapes(operands))


class Fold(Op):
    """An operation of one operand that needs a pass over all of it before the first block of its result."""

    @abstractmethod
    def height(self, operand: TensorSpec) -> int:
        """Rows of the operand to fold at once: by its shape alone, so that blocks do not change the result."""

    @abstractmethod
    def fold(self, chunks: Iterable[Array], operand: TensorSpec) -> Array:
        """What is kept of the operand, whose rows come `height` at a time; a chunk lasts until the next."""

    @abstractmethod
    def place(self, kept: Array, box: Box, out: Array, operand: TensorSpec) -> None:
        """Fill a block of the result from what is kept."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of one result that a numeric operation is to fill.

    Attributes:
        result: which of the results it is part of.
        box: where in that result.
        out: what is to be filled, a C-contiguous array of the box's shape.
        specs: the operands'.
        needed: for each operand, the box that `rows` named.
        inputs: for each operand, its elements in that box, a C-contiguous array.
        tally: where losses are counted.
    """

    result: int
    box: Box
    out: Array
    specs: Sequence[TensorSpec]
    needed: Sequence[Box]
    inputs: Sequence[Array]
    tally: Tally


class Numeric(Op):
    """An operation that computes: element by element, unless it has a `rows` of its own."""

    loss: ClassVar[Exactness] = Exactness.ROUNDING

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """For each operand, the box that block `box` of result `result` needs (perhaps empty)."""
        return (box,) * len(operands)

    @abstractmethod
    def compute(self, block: Block) -> None:
        """Fill `block.out`. NumPy's floating-point warnings are off.

        Nothing of a block's size may be allocated. May be called for any blocks in any order, from several
        threads at once.
        """


@dataclass(frozen=True, slots=True)
class Node:
    """One result of an operation over operands. Make them with `apply`."""

    op: Op
    operands: tuple[Expression, ...]
    result: int
    spec: TensorSpec


Expression = Stored | Node


def apply(op: Op, *operands: Expression) -> tuple[Expression, ...]:
    """All results of an operation.

    Raises:
        PlanError: the operands do not fit.
    """
    specs = [operand.spec for operand in operands]
    first = specs[0].name if specs else None
    if len(specs) != op.arity if op.arity is not None else not specs:
        wanted = "at least one operand" if op.arity is None else f"{op.arity} operand{'s'[: op.arity != 1]}"
        raise PlanError(f"{op.name} takes {wanted}, and is given {len(specs)}", tensor=first)
    results = op.spec(specs)
    for spec in results:
        if spec.numel * spec.dtype.bits // 8 > _MAX_BYTES:
            raise PlanError(
                f"{op.name} makes {spec.dtype} {list(spec.shape)}, more bytes than a file can have",
                tensor=first,
            )
    return tuple(Node(op, operands, index, spec) for index, spec in enumerate(results))


def renamed(expression: Expression, name: str) -> Expression:
    """The same tensor under another name."""
    if expression.spec.name == name:
        return expression
    return replace(expression, spec=replace(expression.spec, name=name))


def exactness(expression: Expression) -> Exactness:
    """The worst of all operations in an expression."""
    if isinstance(expression, Stored):
        return Exactness.BIT_EXACT
    own = expression.op.exactness([operand.spec for operand in expression.operands])
    return max([own, *(exactness(operand) for operand in expression.operands)])


def leaves(expression: Expression) -> list[Stored]:
    """Every stored tensor that an expression reads, left to right, repeats included."""
    if isinstance(expression, Stored):
        return [expression]
    return [leaf for operand in expression.operands for leaf in leaves(operand)]
