"""Evaluating expressions a block at a time, inside one arena.

    1. The structural chain at the top of an expression is fused into one table (`ops.layout`).
    2. A block's moves are read straight into place where they have long runs, through scratch where not.
    3. Numeric operations get blocks of their operands, evaluated the same way, and fill their own.

All buffers come out of memory that is allocated once; a block that does not fit is halved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from streamconv.errors import ConversionError
from streamconv.execution.gather import gather, is_scattered
from streamconv.ops import Block, Expression, Fold, Node, Numeric, Structural, Tally
from streamconv.ops import layout as table
from streamconv.ops.arrays import Array
from streamconv.ops.layout import FILL, Box, Layout, Move
from streamconv.ops.tiles import codes, transfer
from streamconv.storage.files import Files
from streamconv.tensor import Stored, row_major_strides

# Every buffer begins on a cache line of its own, so that elements of any dtype are aligned.
_CACHE_LINE = 64

# Blocks of this many bytes keep the processor's caches and the disk's queue both busy; where a table is
# scattered, the source's runs are as long as a block is tall.
_BLOCK = 8 << 20
_TALL_BLOCK = 64 << 20

# A block may grow by this part at either end to hold whole rows.
_GROWTH = 16


# Results of folds that are kept: more than the embedding's and the head's are never wanted at once.
_FOLDS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Fused:
    """An expression whose structural chains are one table over stored tensors and numeric nodes."""

    layout: Layout
    sources: tuple[Expression, ...]

    @property
    def moves_bytes_only(self) -> bool:
        """Whether nothing is computed."""
        return all(isinstance(source, Stored) for source in self.sources)


def fuse(expression: Expression) -> Fused:
    """Compose the structural operations at the top of an expression into one table."""
    sources: list[Expression] = []

    def walk(current: Expression) -> Layout:
        if isinstance(current, Node) and isinstance(current.op, Structural):
            return current.op.layout([walk(operand) for operand in current.operands])[current.result]
        sources.append(current)
        return table.identity(current.spec.shape, len(sources) - 1)

    return Fused(walk(expression), tuple(sources))


@dataclass(slots=True)
class Arena:
    """Buffers handed out and taken back like a stack; allocated once."""

    memory: Array
    used: int = 0

    def take(self, shape: Sequence[int], dtype: numpy.dtype[Any]) -> Array:
        """An uninitialised array. Raises ArenaFull where it does not fit."""
        length = math.prod(shape) * dtype.itemsize
        if self.used + length > len(self.memory):
            raise ArenaFull
        part = self.memory[self.used : self.used + length]
        self.used += -(-length // _CACHE_LINE) * _CACHE_LINE
        return part.view(dtype).reshape(shape)


class ArenaFull(Exception):  # noqa: N818 - a signal to try a smaller block, never an error a user sees
    """The block under evaluation needs more buffers than there are."""


@dataclass(slots=True)
class Evaluator:
    """Evaluates the bytes of expressions. Not thread-safe.

    Attributes:
        nbytes: of memory for blocks; a quarter of it is scratch for scattered reads.
        files: where stored tensors are read from.
        scratch: free for a caller between blocks.
    """

    nbytes: int
    files: Files
    arena: Arena = field(init=False)
    scratch: Array = field(init=False)
    _fused: dict[int, tuple[Expression, Fused]] = field(default_factory=dict)
    _folds: dict[tuple[Fold, Expression], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            memory = numpy.empty(self.nbytes, numpy.uint8)
        except MemoryError as error:
            raise ConversionError(
                f"the system has no {self.nbytes:,} bytes for the buffers of a worker",
                hint="lower the memory budget (--memory, memory_budget) or the number of workers; run the same command again to resume",
            ) from error
        quarter = self.nbytes // 4 // _CACHE_LINE * _CACHE_LINE
        self.scratch, self.arena = memory[:quarter], Arena(memory[quarter:])

    def forget(self) -> None:
        """Drop the tables of expressions seen so far."""
        self._fused.clear()

    def fused(self, expression: Expression) -> Fused:
        """The expression's table; kept until `forget`."""
        # Keyed by identity, with the expression kept alive beside its table for as long as the key lives.
        known = self._fused.get(id(expression))
        if known is None:
            known = self._fused[id(expression)] = (expression, fuse(expression))
        return known[1]

    def is_scattered(self, expression: Expression) -> bool:
        """Whether some of its runs are short, so that every part of it reads from all over the source."""
        current = expression
        while isinstance(current, Node) and not isinstance(current.op, Structural) and current.operands:
            current = current.operands[0]
        layout = self.fused(current).layout
        itemsize = 1 if current.spec.dtype.packed else current.spec.dtype.itemsize
        return is_scattered(table.moves(layout, table.whole(layout.shape)), itemsize)

    def blocks(
        self, expression: Expression, start: int, stop: int, tally: Tally
    ) -> Iterator[tuple[int, Array]]:
        """Bytes [start, stop) of an expression as (first byte, bytes), in order.

        Each array is valid only until the next.

        Raises:
            ConversionError: one element needs more memory than there is, or a file cannot be read.
        """
        dtype = expression.spec.dtype
        if dtype.packed:
            yield from self._raw_blocks(expression, start, stop)
            return
        size = dtype.itemsize
        scattered = self.is_scattered(expression)
        # A third of the arena leaves room for operands; a tall block takes what it can get.
        wanted = min(_TALL_BLOCK, stop - start) if scattered else min(_BLOCK, len(self.arena.memory) // 3)
        length = max(wanted, size) // size
        whole_rows = scattered and self.fused(expression).moves_bytes_only
        first, end = start // size, stop // size
        while first < end:
            count = min(length, end - first)
            self.arena.used = 0
            lost = Tally()
            try:
                block = self._block(expression, first, count, lost, whole_rows=whole_rows)
            except ArenaFull:
                if length == 1:
                    raise ConversionError(
                        "one element needs more buffers than the memory budget has",
                        tensor=expression.spec.name,
                        hint="raise the memory budget (--memory) or lower the number of workers",
                    ) from None
                length = -(-count // 2)
                continue
            tally.add(lost)
            yield first * size, block.view(numpy.uint8)
            first += count

    def read(self, expression: Expression, start: int, out: Array) -> None:
        """Fill `out`, of bytes, with an expression's bytes from `start` on."""
        for at, block in self.blocks(expression, start, start + out.size, Tally()):
            out[at - start : at - start + block.size] = block

    def _block(
        self, expression: Expression, first: int, count: int, tally: Tally, *, whole_rows: bool
    ) -> Array:
        """Elements [first, first + count) in row-major order; as part of whole rows, if they may be more.

        The ends of a row of a transpose are read an element at a time, which takes as long as all of it.
        """
        shape = expression.spec.shape
        rows = [row for row in row_major_strides(shape) if row <= count // _GROWTH] if whole_rows else []
        row = max(rows, default=1)
        begin, stop = first // row * row, -(-(first + count) // row) * row
        block = self.arena.take((stop - begin,), expression.spec.dtype.numpy)
        at = 0
        for box in table.boxes(shape, begin, stop):
            lengths = tuple(high - low for low, high in box)
            numel = math.prod(lengths)
            self._evaluate(expression, box, block[at : at + numel].reshape(lengths), tally)
            at += numel
        return block[first - begin : first - begin + count]

    def _raw_blocks(self, expression: Expression, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Bytes of a packed tensor, which can only be stored, as they are."""
        assert isinstance(expression, Stored)
        step = max(min(_BLOCK, len(self.arena.memory) // 3), 1)
        for at in range(start, stop, step):
            self.arena.used = 0
            block = self.arena.take((min(step, stop - at),), numpy.dtype(numpy.uint8))
            self.files.read_extents(expression.extents, at, block.data)
            yield at, block

    def _evaluate(self, expression: Expression, box: Box, out: Array, tally: Tally) -> None:
        """Fill `out`, which is C-contiguous, with block `box` of an expression."""
        if isinstance(expression, Node) and not isinstance(expression.op, Structural):
            self._evaluate_numeric(expression, box, out, tally)
            return
        fused = self.fused(expression)
        flat = codes(out.reshape(-1))
        for move in table.moves(fused.layout, box):
            if move.source == FILL:
                transfer(flat, move.target_start, codes(numpy.full(1, move.fill, out.dtype)), 0, move.loops)
                continue
            source = fused.sources[move.source]
            if isinstance(source, Stored):
                gather(self.files, source, move, flat, self.scratch)
            else:
                self._gather_computed(move, source, flat, tally)

    def _evaluate_numeric(self, node: Node, box: Box, out: Array, tally: Tally) -> None:
        if isinstance(node.op, Fold):
            node.op.place(self._folded(node.op, node.operands[0], tally), box, out, node.operands[0].spec)
            return
        assert isinstance(node.op, Numeric)
        mark = self.arena.used
        specs = [operand.spec for operand in node.operands]
        needed = node.op.rows(node.result, box, specs)
        inputs = []
        for operand, rows in zip(node.operands, needed, strict=True):
            shape = tuple(stop - start for start, stop in rows)
            block = self.arena.take(shape, operand.spec.dtype.numpy)
            self._evaluate(operand, rows, block, tally)
            inputs.append(block)
        with numpy.errstate(all="ignore"):
            node.op.compute(Block(node.result, box, out, specs, needed, inputs, tally))
        self.arena.used = mark

    def _folded(self, op: Fold, operand: Expression, tally: Tally) -> Array:
        """What an operation keeps of its operand; cached, because the next work item may need it too."""
        key = (op, operand)
        if key not in self._folds:
            folded = op.fold(self._chunks(operand, op.height(operand.spec), tally), operand.spec)
            if len(self._folds) >= _FOLDS_KEPT:
                self._folds.clear()
            self._folds[key] = folded
        return self._folds[key]

    def _chunks(self, expression: Expression, height: int, tally: Tally) -> Iterator[Array]:
        """All rows of an expression, `height` at a time; each chunk is valid only until the next."""
        rows, *rest = expression.spec.shape
        for first in range(0, rows, height):
            mark = self.arena.used
            box = ((first, min(first + height, rows)), *((0, size) for size in rest))
            block = self.arena.take((box[0][1] - first, *rest), expression.spec.dtype.numpy)
            self._evaluate(expression, box, block, tally)
            yield block
            self.arena.used = mark

    def _gather_computed(self, move: Move, source: Expression, flat: Array, tally: Tally) -> None:
        """A move out of a computed tensor: evaluate the box that it reads, then move."""
        mark = self.arena.used
        box, local = table.cropped(move, source.spec.shape)
        block = self.arena.take(tuple(stop - start for start, stop in box), source.spec.dtype.numpy)
        self._evaluate(source, box, block, tally)
        transfer(flat, local.target_start, codes(block.reshape(-1)), local.source_start, local.loops)
        self.arena.used = mark
