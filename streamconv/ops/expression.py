"""Expressions: what a target tensor is, said as operations over stored tensors, evaluated by nobody here.

An operation turns n tensors into m. It has four faces:

- **spec**: the result's names, dtypes and shapes from the operands' alone, or a clear error;
- **rows**: which boxes of its operands a box of one result needs;
- **compute**: fill a caller-owned block from operand blocks;
- **inverse**: the operation that undoes it, where there is one.

A structural operation gives one face, `layout`, from which rows and compute follow (`ops.layout`); the
engine fuses chains of them. A numeric operation gives rows and compute itself. Either may add `checks`:
pairs of expressions whose bytes must be equal for the operation to be right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.errors import PlanError
from streamconv.ops.layout import FILL, Box, Layout, identity, moves, reach, relocated
from streamconv.tensor import Shape, Stored, TensorSpec

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

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


@dataclass(slots=True)
class Tally:
    """What numeric operations lost, in elements."""

    overflowed: int = 0
    """Finite values that became infinite or not a number."""
    flushed: int = 0
    """Non-zero values that became zero."""

    def add(self, other: Tally) -> None:
        """Count the other's losses too."""
        self.overflowed += other.overflowed
        self.flushed += other.flushed


class Op(ABC):
    """What every operation has. Subclasses are frozen dataclasses of plain values, so a plan is data.

    Every method may count on `spec` having accepted the operands.
    """

    name: ClassVar[str]
    arity: ClassVar[int | None] = 1
    """How many operands it takes; None: any number, but at least one. `apply` checks it."""

    @abstractmethod
    def spec(self, operands: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The results' specs. Raises PlanError that says which operand does not fit and why."""

    @abstractmethod
    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """For each operand, the box that block `box` of result `result` needs (perhaps empty)."""

    @abstractmethod
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
        """Fill `out`, block `box` of result `result`, from the blocks that `rows` named.

        `out` and `blocks` are C-contiguous arrays of their boxes' shapes; nothing of their size may be
        allocated. May be called for any blocks in any order, from several threads at once.
        """

    @abstractmethod
    def inverse(self, operands: Sequence[TensorSpec]) -> Op | None:
        """The operation that gives `operands` back from the results, or None."""

    def checks(self, operands: Sequence[Expression]) -> tuple[tuple[Expression, Expression], ...]:
        """Pairs whose bytes must be equal for this operation to be right on these operands."""
        del operands
        return ()

    def exactness(self, operands: Sequence[TensorSpec]) -> Exactness:
        """What the operation does to values."""
        del operands
        return Exactness.BIT_EXACT

    def __str__(self) -> str:
        fields = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{self.name}({fields})" if fields else self.name


class Structural(Op):
    """An operation that only says where elements go. Operands and results share one dtype."""

    @abstractmethod
    def layout(self, operands: Sequence[Layout]) -> tuple[Layout, ...]:
        """The results' layouts from the operands' (see `ops.layout`)."""

    @abstractmethod
    def shapes(self, operands: Sequence[TensorSpec]) -> tuple[tuple[int, ...], ...]:
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

    def rows(self, result: int, box: Box, operands: Sequence[TensorSpec]) -> tuple[Box, ...]:
        """See `layout.reach`."""
        shapes = tuple(spec.shape for spec in operands)
        return reach(moves(_tables(self, shapes)[result], box), shapes)

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
        """Move by the table, element runs at a time."""
        del tally
        import numpy

        shapes = tuple(spec.shape for spec in operands)
        for move in moves(_tables(self, shapes)[result], box):
            counts = tuple(count for count, _, _ in move.loops)
            to = tuple(to for _, to, _ in move.loops)
            if move.source == FILL:
                filler = numpy.full(1, move.fill, out.dtype)
                _walked(_bits(out), move.target_start, counts, to)[...] = _bits(filler)
                continue
            local = relocated(move, shapes[move.source], needed[move.source])
            counts = tuple(count for count, _, _ in local.loops)
            to, by = (tuple(loop[side] for loop in local.loops) for side in (1, 2))
            source = _walked(_bits(blocks[move.source]), local.source_start, counts, by)
            _walked(_bits(out), local.target_start, counts, to)[...] = source


@lru_cache(maxsize=16)
def _tables(op: Structural, shapes: tuple[Shape, ...]) -> tuple[Layout, ...]:
    """The results' layouts; kept, because blocks of one tensor are asked for one after the other."""
    return op.layout([identity(shape, index) for index, shape in enumerate(shapes)])


def _walked(block: Array, start: int, counts: Sequence[int], strides: Sequence[int]) -> Array:
    """The view of a C-contiguous block that starts at one element and steps by `strides` elements."""
    from numpy.lib.stride_tricks import as_strided

    return as_strided(block.reshape(-1)[start:], counts, [stride * block.itemsize for stride in strides])


def _bits(block: Array) -> Array:
    """The block as integers where there are such.

    NumPy copies those faster than types it does not know, and cannot make strided views of all of these.
    """
    return block.view(f"u{block.itemsize}") if block.itemsize <= 8 else block


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
        wanted = "at least one" if op.arity is None else op.arity
        raise PlanError(f"{op.name} takes {wanted} of operands, and is given {len(specs)}", tensor=first)
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
