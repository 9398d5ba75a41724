"""One work item: evaluate a range of bytes of one target tensor, and write or compare it.

    1. `Worker.run` gets a batch of items (from any engine, in any order, any number of times).
    2. The item's expression is fused: its structural chain becomes one table (`ops.layout`).
    3. Where the table says long runs of stored bytes, the kernel copies them; Python sees none.
    4. Otherwise blocks of the item are evaluated into the worker's arena, hashed, and written.

Contract of the hot path: any item, any number of times, by anyone, gives the same bytes; all block
buffers come out of one arena that is allocated once; nothing else of a block's size is allocated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy
import xxhash
from numpy.lib.stride_tricks import as_strided

from streamconv import dtypes, storage
from streamconv.errors import ConversionError
from streamconv.ops import Expression, Node, Structural, Tally, leaves
from streamconv.ops import layout as table
from streamconv.ops.layout import FILL, Box, Layout, Move
from streamconv.tensor import Stored

Array = numpy.ndarray[Any, numpy.dtype[Any]]

PART = 64 << 20
"""Bytes of a tensor in one work item and one checksum; a multiple of every item size."""

# Blocks of this many bytes keep the processor's caches and the disk's queue both busy.
_BLOCK = 8 << 20

# Runs at least this long go through the kernel; shorter ones cost more in calls than in copying.
_KERNEL_RUN = 64 << 10

# Runs shorter than this go through scratch; together with the gaps between them where these are so narrow
# that reading them takes no longer than another call.
_SHORT_RUN = 4 << 10
_NARROW_GAP = 8 << 10


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Bytes [start, stop) of one target tensor. Independent and idempotent.

    Attributes:
        index: position in the run's list of items; receipts name it.
        name: the target tensor.
        expression: what its bytes are.
        start, stop: bytes within the row-major tensor; a multiple of the item size.
        path: the file the bytes belong in.
        offset: where in that file the tensor's byte 0 belongs.
    """

    index: int
    name: str
    expression: Expression
    start: int
    stop: int
    path: str
    offset: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a tensor first is not what it should be: element position, and both values as text."""

    element: int
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of an item.

    Attributes:
        index: the item's.
        nbytes: bytes that are in place (or were compared).
        digest: xxh3-128 of the bytes in hexadecimal, or None where only the kernel saw them.
        copied: whether the kernel copied them.
        overflowed, flushed: elements that casts lost (see `ops.Tally`).
        difference: for comparisons, the first one, or None where all is equal.
    """

    index: int
    nbytes: int
    digest: str | None = None
    copied: bool = False
    overflowed: int = 0
    flushed: int = 0
    difference: Difference | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What every worker of a run is told.

    Attributes:
        arena: bytes of block buffers.
        checksum: hash also what the kernel copies, by reading it back.
        forget: tell the kernel that source pages will not be read again.
        task: write the items, or compare them with what their files hold.
    """

    arena: int
    checksum: bool = False
    forget: bool = False
    task: Literal["write", "compare"] = "write"


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
        self.used += -(-length // 64) * 64  # each on a cache line of its own
        return part.view(dtype).reshape(shape)


class ArenaFull(Exception):  # noqa: N818 - a signal to try a smaller block, never an error a user sees
    """The block under evaluation needs more buffers than there are."""


@dataclass(slots=True)
class Worker:
    """Runs work items. One a process; not for several threads at once."""

    settings: Settings
    files: storage.Files = field(default_factory=storage.Files)
    _arena: Arena = field(init=False)
    _scratch: Array = field(init=False)
    _fused: dict[int, tuple[Expression, Fused]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        memory = numpy.empty(self.settings.arena, numpy.uint8)
        quarter = self.settings.arena // 4
        self._scratch, self._arena = memory[:quarter], Arena(memory[quarter:])

    def run(self, items: Sequence[WorkItem]) -> list[Receipt]:
        """Do a batch of items.

        Raises:
            ConversionError: names the tensor, the file and the byte.
        """
        self._fused.clear()
        task: Callable[[Sequence[WorkItem]], list[Receipt]] = {
            "write": self._write,
            "compare": lambda batch: [self._compare(item) for item in batch],
        }[self.settings.task]
        return task(items)

    def close(self) -> None:
        """Close every file."""
        self.files.close()

    # ------------------------------------------------------------------------------- writing

    def _write(self, items: Sequence[WorkItem]) -> list[Receipt]:
        receipts: list[Receipt] = []
        copies: list[tuple[str, int, str, int, int]] = []
        for item in items:
            runs = self._kernel_runs(item)
            if runs is not None:
                copies.extend(runs)
                receipts.append(Receipt(item.index, item.stop - item.start, copied=True))
            else:
                receipts.append(self._compute(item))
        for source, source_offset, target, target_offset, length in _joined(copies):
            storage.copy_range(
                self.files, source, source_offset, target, target_offset, length, self._scratch.data
            )
            if self.settings.forget:
                storage.forget_pages(self.files, source, source_offset, length)
        if self.settings.checksum:
            receipts = [
                self._hashed(receipt, item) if receipt.copied else receipt
                for receipt, item in zip(receipts, items, strict=True)
            ]
        return receipts

    def _kernel_runs(self, item: WorkItem) -> list[tuple[str, int, str, int, int]] | None:
        """The item as (file, offset, file, offset, length) copies, or None where it needs blocks."""
        if isinstance(item.expression, Stored):
            return _copies(item, item.expression, item.start, item.start, item.stop - item.start)
        fused = self._fuse(item.expression)
        if not fused.moves_bytes_only:
            return None
        size = item.expression.spec.dtype.itemsize
        runs: list[tuple[str, int, str, int, int]] = []
        at = item.start
        for box in table.boxes(fused.layout.shape, item.start // size, item.stop // size):
            for move in table.moves(fused.layout, box):
                if move.source == FILL or (move.run * size < _KERNEL_RUN and move.run < move.numel):
                    return None
                source = fused.sources[move.source]
                assert isinstance(source, Stored)
                inner = move.loops[-1:] if move.run > 1 else ()
                for to, come_from in _steps(move.loops[: len(move.loops) - len(inner)]):
                    runs += _copies(
                        item,
                        source,
                        (move.source_start + come_from) * size,
                        at + (move.target_start + to) * size,
                        move.run * size,
                    )
            at += math.prod(stop - start for start, stop in box) * size
        return runs

    def _compute(self, item: WorkItem) -> Receipt:
        hasher = xxhash.xxh3_128()
        tally = Tally()
        for start, block in self._blocks(item, tally):
            hasher.update(block.data)
            storage.write_from(self.files, item.path, block.data, item.offset + start)
        if self.settings.forget:
            self._forget(item)
        return Receipt(
            item.index,
            item.stop - item.start,
            hasher.hexdigest(),
            overflowed=tally.overflowed,
            flushed=tally.flushed,
        )

    def _hashed(self, receipt: Receipt, item: WorkItem) -> Receipt:
        """The receipt of a kernel copy with the digest of what is now in place."""
        hasher = xxhash.xxh3_128()
        for start in range(item.start, item.stop, len(self._scratch)):
            part = self._scratch[: min(item.stop - start, len(self._scratch))].data
            storage.read_into(self.files, item.path, part, item.offset + start)
            hasher.update(part)
        return Receipt(receipt.index, receipt.nbytes, hasher.hexdigest(), copied=True)

    # ----------------------------------------------------------------------------- comparing

    def _compare(self, item: WorkItem) -> Receipt:
        """Evaluate an item and hold it against what its file has in its place."""
        difference: Difference | None = None
        for start, block in self._blocks(item, Tally()):
            found = self._arena.take(block.shape, block.dtype)
            storage.read_into(self.files, item.path, found.data, item.offset + start)
            if difference is None and not numpy.array_equal(found, block):
                difference = _describe(item.expression.spec.dtype, start, block, found)
        return Receipt(item.index, item.stop - item.start, difference=difference)

    def prove_equal(self, left: Expression, right: Expression, meaning: str) -> None:
        """Evaluate two expressions of one spec side by side.

        Raises:
            ConversionError: they differ; says where.
        """
        step = 1 << 20
        expected, other = numpy.empty(step, numpy.uint8), numpy.empty(step, numpy.uint8)
        for start in range(0, left.spec.nbytes, step):
            stop = min(start + step, left.spec.nbytes)
            wanted, found = expected[: stop - start], other[: stop - start]
            self.read(left, start, wanted)
            self.read(right, start, found)
            if not numpy.array_equal(wanted, found):
                first = _describe(left.spec.dtype, start, wanted, found)
                raise ConversionError(
                    f"{meaning}: element {first.element} is {first.expected}, not {first.found}",
                    tensor=left.spec.name,
                    hint="the plan took for granted that they are equal; nothing was finished",
                )

    # ---------------------------------------------------------------------------- evaluating

    def read(self, expression: Expression, start: int, out: Array) -> None:
        """Fill `out`, of bytes, with an expression's bytes from `start` on."""
        self._fused.clear()
        item = WorkItem(0, expression.spec.name, expression, start, start + out.size, "", 0)
        for at, block in self._blocks(item, Tally()):
            out[at - start : at - start + block.size] = block

    def _blocks(self, item: WorkItem, tally: Tally) -> Iterator[tuple[int, Array]]:
        """The item's bytes as (first byte, bytes); a block that does not fit is halved."""
        expression = item.expression
        if expression.spec.dtype.packed:
            yield from self._raw_blocks(item)
            return
        dtype = expression.spec.dtype.numpy
        size = dtype.itemsize
        # A third of the arena leaves as much for operands, and as much for a comparison.
        length = max(min(self._block_bytes(expression), len(self._arena.memory) // 3), size) // size
        first, stop = item.start // size, item.stop // size
        while first < stop:
            count = min(length, stop - first)
            self._arena.used = 0
            try:
                block = self._arena.take((count,), dtype)
                at = 0
                for box in table.boxes(expression.spec.shape, first, first + count):
                    shape = tuple(high - low for low, high in box)
                    numel = math.prod(shape)
                    self._evaluate(expression, box, block[at : at + numel].reshape(shape), tally)
                    at += numel
            except ArenaFull:
                if length == 1:
                    raise ConversionError(
                        "one element needs more buffers than the memory budget has",
                        tensor=item.name,
                        hint="raise --memory or lower --workers",
                    ) from None
                length = max(length // 2, 1)
                continue
            yield first * size, block.view(numpy.uint8)
            first += count

    def _raw_blocks(self, item: WorkItem) -> Iterator[tuple[int, Array]]:
        """Bytes of a packed tensor, which can only be stored, as they are."""
        assert isinstance(item.expression, Stored)
        for start in range(item.start, item.stop, _BLOCK):
            self._arena.used = 0
            length = min(_BLOCK, item.stop - start, len(self._arena.memory) // 2)
            block = self._arena.take((length,), numpy.dtype(numpy.uint8))
            storage.read_extents(self.files, item.expression.extents, start, block.data)
            yield start, block

    def _block_bytes(self, expression: Expression) -> int:
        """Blocks are larger where the table has short runs: a taller block makes them longer."""
        current = expression
        while isinstance(current, Node) and not isinstance(current.op, Structural) and current.operands:
            current = current.operands[0]
        fused = self._fuse(current)
        short = any(
            _run_bytes(move, current.spec.dtype) < _SHORT_RUN
            for move in table.moves(fused.layout, table.whole(fused.layout.shape))
        )
        return PART if short else _BLOCK

    def _evaluate(self, expression: Expression, box: Box, out: Array, tally: Tally) -> None:
        """Fill `out`, which is C-contiguous, with block `box` of an expression."""
        if isinstance(expression, Node) and not isinstance(expression.op, Structural):
            self._evaluate_numeric(expression, box, out, tally)
            return
        fused = self._fuse(expression)
        flat = _plain(out.reshape(-1))
        for move in table.moves(fused.layout, box):
            if move.source == FILL:
                filler = _plain(numpy.full(1, move.fill, out.dtype))
                _strided(flat, move.target_start, move.loops, side=1)[...] = filler
                continue
            source = fused.sources[move.source]
            if isinstance(source, Stored):
                self._gather(move, source, flat)
            else:
                self._gather_computed(move, source, flat, tally)

    def _evaluate_numeric(self, node: Node, box: Box, out: Array, tally: Tally) -> None:
        mark = self._arena.used
        specs = [operand.spec for operand in node.operands]
        needed = node.op.rows(node.result, box, specs)
        blocks = []
        for operand, rows in zip(node.operands, needed, strict=True):
            shape = tuple(stop - start for start, stop in rows)
            block = self._arena.take(shape, operand.spec.dtype.numpy)
            self._evaluate(operand, rows, block, tally)
            blocks.append(block)
        node.op.compute(node.result, box, out, specs, needed, blocks, tally)
        self._arena.used = mark

    def _gather_computed(self, move: Move, source: Expression, flat: Array, tally: Tally) -> None:
        """A move out of a computed tensor: evaluate the box that it reads, then move."""
        mark = self._arena.used
        alone = replace(move, source=0)
        shape = source.spec.shape
        (box,) = table.reach([alone], [shape])
        block = self._arena.take(tuple(stop - start for start, stop in box), source.spec.dtype.numpy)
        self._evaluate(source, box, block, tally)
        local = table.relocated(alone, shape, box)
        _strided(flat, local.target_start, local.loops, side=1)[...] = _strided(
            _plain(block.reshape(-1)), local.source_start, local.loops, side=2
        )
        self._arena.used = mark

    def _gather(self, move: Move, source: Stored, flat: Array) -> None:
        """Read a move's elements into their places: runs directly, what is scattered through scratch."""
        size = flat.itemsize
        if move.run * size >= _SHORT_RUN or move.run == move.numel:
            inner = move.loops[-1:] if move.run > 1 else ()
            for to, come_from in _steps(move.loops[: len(move.loops) - len(inner)]):
                at = move.target_start + to
                self._read(source, (move.source_start + come_from) * size, flat[at : at + move.run])
            return
        *outer, (many, many_to, many_from), (run, run_to, run_from) = ((1, 0, 0), (1, 0, 0), *move.loops)
        if run_from != 1:
            outer, many, many_to, many_from = [*outer, (many, many_to, many_from)], run, run_to, run_from
            run, run_to = 1, 1
        together = (many_from - run) * size <= _NARROW_GAP
        pitch = max(many_from, run) if together else run
        scratch = self._scratch[: len(self._scratch) // size * size].view(flat.dtype)
        at_once = max(min(many, (len(scratch) - run) // max(pitch, 1) + 1), 1)
        for to, come_from in _steps(tuple(outer)):
            for first in range(0, many, at_once):
                count = min(at_once, many - first)
                begin = move.source_start + come_from + first * many_from
                if together:
                    span = (count - 1) * many_from + run
                    self._read(source, begin * size, scratch[:span])
                    found = as_strided(scratch, (count, run), (many_from * size, size))
                else:
                    found = scratch[: count * run].reshape(count, run)
                    raw = found.reshape(-1).view(numpy.uint8).data
                    storage.read_runs(
                        self.files, source.extents, begin * size, many_from * size, run * size, raw
                    )
                target = flat[move.target_start + to + first * many_to :]
                as_strided(target, (count, run), (many_to * size, run_to * size), writeable=True)[...] = found

    def _read(self, source: Stored, start: int, out: Array) -> None:
        storage.read_extents(self.files, source.extents, start, out.view(numpy.uint8).data)

    def _fuse(self, expression: Expression) -> Fused:
        # Keyed by identity, with the expression kept alive beside its table for as long as the key lives.
        known = self._fused.get(id(expression))
        if known is None:
            known = self._fused[id(expression)] = (expression, fuse(expression))
        return known[1]

    def _forget(self, item: WorkItem) -> None:
        """Let go of the source pages that the item read: as far into each leaf as it is into its tensor.

        Where runs are short, every item of the tensor comes back to the same pages; the last one goes.
        """
        total = item.expression.spec.nbytes
        start, stop = item.start, item.stop
        if self._block_bytes(item.expression) > _BLOCK:
            if stop < total:
                return
            start = 0
        for leaf in leaves(item.expression):
            first, last = leaf.spec.nbytes * start // total, leaf.spec.nbytes * stop // total
            for path, offset, length in storage.spans(leaf.extents, first, last - first):
                storage.forget_pages(self.files, path, offset, length)


# ------------------------------------------------------------------------------------ helpers


def _copies(
    item: WorkItem, source: Stored, start: int, to: int, length: int
) -> list[tuple[str, int, str, int, int]]:
    """Bytes [start, ...) of a stored tensor to byte `to` of the item's tensor, one copy an extent."""
    result = []
    for path, offset, count in storage.spans(source.extents, start, length):
        result.append((path, offset, item.path, item.offset + to, count))
        to += count
    return result


def _joined(copies: Iterable[tuple[str, int, str, int, int]]) -> Iterator[tuple[str, int, str, int, int]]:
    """Copies in target order, neighbours on both sides as one: many small tensors are one call."""
    last: tuple[str, int, str, int, int] | None = None
    for copy in sorted(copies, key=lambda each: (each[2], each[3])):
        if last is not None:
            source, source_offset, target, target_offset, length = last
            if copy[:4] == (source, source_offset + length, target, target_offset + length):
                last = (source, source_offset, target, target_offset, length + copy[4])
                continue
            yield last
        last = copy
    if last is not None:
        yield last


def _steps(loops: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Every (target, source) displacement that a nest of loops visits."""
    for indices in itertools.product(*(range(count) for count, _, _ in loops)):
        yield (
            sum(index * to for index, (_, to, _) in zip(indices, loops, strict=True)),
            sum(index * by for index, (_, _, by) in zip(indices, loops, strict=True)),
        )


def _plain(array: Array) -> Array:
    """An array's elements as integers of their width: NumPy cannot walk all of `ml_dtypes`' in strides."""
    return array.view(f"u{array.itemsize}") if array.itemsize <= 8 else array


def _strided(flat: Array, start: int, loops: Sequence[tuple[int, int, int]], side: int) -> Array:
    """The elements of a flat block that loops visit; side 1 is the target's strides, 2 the source's."""
    return as_strided(
        flat[start:],
        tuple(loop[0] for loop in loops),
        tuple(loop[side] * flat.itemsize for loop in loops),
    )


def _run_bytes(move: Move, dtype: dtypes.DType) -> int:
    whole = move.run == move.numel or move.source == FILL
    return PART if whole else move.run * dtype.itemsize


def _describe(dtype: dtypes.DType, start: int, expected: Array, found: Array) -> Difference:
    """The first difference of two unequal byte blocks, in elements."""
    position = int(numpy.argmax(found != expected))
    if dtype.packed:
        return Difference(
            (start + position) * 8 // dtype.bits, f"{expected[position]:#x}", f"{found[position]:#x}"
        )
    first = position // dtype.itemsize
    return Difference(
        start // dtype.itemsize + first,
        str(expected.view(dtype.numpy)[first]),
        str(found.view(dtype.numpy)[first]),
    )
