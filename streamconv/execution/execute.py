"""One work item: put a range of bytes of one target tensor into its place, or compare it.

    1. `Worker.run` gets a batch of items (from any engine, in any order, any number of times).
    2. Where an item's table says long runs of stored bytes, the kernel copies them; Python sees none.
    3. Otherwise its blocks are evaluated into the worker's arena (`evaluate`), hashed, and written.

Contract of the hot path: any item, any number of times, by anyone, gives the same bytes; all block
buffers come out of one arena that is allocated once; nothing else of a block's size is allocated.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy
import xxhash

from streamconv.dtypes import DType
from streamconv.errors import ConversionError, StreamconvError
from streamconv.execution.evaluate import Array, Evaluator
from streamconv.ops import Expression, Tally, leaves
from streamconv.ops import layout as table
from streamconv.ops.layout import FILL
from streamconv.ops.tiles import steps
from streamconv.storage import files as storage
from streamconv.tensor import Stored

PART = 64 << 20
"""Bytes of a tensor in one work item and one checksum; a multiple of every item size."""

# Runs at least this long go through the kernel; shorter ones cost more in calls than in copying.
_KERNEL_RUN = 64 << 10

# The widest element, in bytes (C128).
_LARGEST_ITEM = 16

# Bytes that are compared at once: what says which of them differ takes memory of its own.
_COMPARED = 256 << 10


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


@dataclass(slots=True)
class Worker:
    """Runs work items. One a process; not for several threads at once."""

    settings: Settings
    files: storage.Files = field(default_factory=storage.Files)
    _evaluator: Evaluator = field(init=False)

    def __post_init__(self) -> None:
        self._evaluator = Evaluator(self.settings.arena, self.files)

    def run(self, items: Sequence[WorkItem]) -> list[Receipt]:
        """Do a batch of items.

        Raises:
            ConversionError: names the tensor, the file and the byte; also for a fault of this program.
        """
        self._evaluator.forget()
        task = {"write": self._write, "compare": self._compare_all}[self.settings.task]
        try:
            return task(items)
        except StreamconvError:
            raise
        except MemoryError as error:
            raise ConversionError(
                "a worker got no more memory from the system",
                hint="lower --memory or --workers; run the same command again, it goes on",
            ) from error
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ConversionError(
                f"a worker failed in a way it should not: {type(error).__name__}: {error}",
                hint=f"in {place.name}, line {place.lineno} of {place.filename}; please report it",
            ) from error

    def read(self, expression: Expression, start: int, out: Array) -> None:
        """Fill `out`, of bytes, with an expression's bytes from `start` on."""
        self._evaluator.forget()
        with _naming(expression.spec.name):
            self._evaluator.read(expression, start, out)

    def close(self) -> None:
        """Close every file."""
        self.files.close()

    # ------------------------------------------------------------------------------- writing

    def _write(self, items: Sequence[WorkItem]) -> list[Receipt]:
        receipts: list[Receipt] = []
        copies: list[tuple[str, int, str, int, int]] = []
        for item in items:
            with _naming(item.name):
                runs = self._kernel_runs(item)
                if runs is not None:
                    copies.extend(runs)
                    receipts.append(Receipt(item.index, item.stop - item.start, copied=True))
                else:
                    receipts.append(self._compute(item))
        for copy in _joined(copies):
            try:
                self._copy(copy)
            except ConversionError:
                self._copy_by_item(copy, items)
            source, offset, _, _, length = copy
            if self.settings.forget:
                storage.forget_pages(self.files, source, offset, length)
        if self.settings.checksum:
            receipts = [
                self._hashed(receipt, item) if receipt.copied else receipt
                for receipt, item in zip(receipts, items, strict=True)
            ]
        return receipts

    def _copy(self, copy: tuple[str, int, str, int, int]) -> None:
        storage.copy_range(self.files, *copy, self._evaluator.scratch.data)

    def _copy_by_item(self, failed: tuple[str, int, str, int, int], items: Sequence[WorkItem]) -> None:
        """Repeat a copy that failed item by item, so that the failure says which tensor it is about."""
        _, _, path, first, length = failed
        for item in items:
            begin, end = item.offset + item.start, item.offset + item.stop
            if item.path == path and begin < first + length and end > first:
                with _naming(item.name):
                    for copy in self._kernel_runs(item) or ():
                        self._copy(copy)

    def _kernel_runs(self, item: WorkItem) -> list[tuple[str, int, str, int, int]] | None:
        """The item as (file, offset, file, offset, length) copies, or None where it needs blocks."""
        if isinstance(item.expression, Stored):
            return _copies(item, item.expression, item.start, item.start, item.stop - item.start)
        fused = self._evaluator.fused(item.expression)
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
                for to, come_from in steps(move.loops[: len(move.loops) - len(inner)]):
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
        for start, block in self._evaluator.blocks(item.expression, item.start, item.stop, tally):
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
        for start in range(item.start, item.stop, len(self._evaluator.scratch)):
            part = self._evaluator.scratch[: min(item.stop - start, len(self._evaluator.scratch))].data
            with _naming(item.name):
                storage.read_into(self.files, item.path, part, item.offset + start)
            hasher.update(part)
        return Receipt(receipt.index, receipt.nbytes, hasher.hexdigest(), copied=True)

    # ----------------------------------------------------------------------------- comparing

    def _compare_all(self, items: Sequence[WorkItem]) -> list[Receipt]:
        receipts = []
        for item in items:
            with _naming(item.name):
                receipts.append(self._compare(item))
        return receipts

    def _compare(self, item: WorkItem) -> Receipt:
        """Evaluate an item and hold it against what its file has in its place."""
        difference: Difference | None = None
        for start, block in self._evaluator.blocks(item.expression, item.start, item.stop, Tally()):
            difference = difference or self._first_difference(item, start, block)
        if self.settings.forget:
            self._forget(item)
            storage.forget_pages(self.files, item.path, item.offset + item.start, item.stop - item.start)
        return Receipt(item.index, item.stop - item.start, difference=difference)

    def _first_difference(self, item: WorkItem, start: int, block: Array) -> Difference | None:
        """The first difference of a block, which begins at byte `start` of the item's tensor, and its file."""
        scratch = self._evaluator.scratch
        step = len(scratch) // _LARGEST_ITEM * _LARGEST_ITEM
        for at in range(0, len(block), step):
            expected = block[at : at + step]
            found = scratch[: len(expected)]
            storage.read_into(self.files, item.path, found.data, item.offset + start + at)
            difference = _difference(item.expression.spec.dtype, start + at, expected, found)
            if difference is not None:
                return difference
        return None

    def prove_equal(self, left: Expression, right: Expression, meaning: str, tolerance: float = 0.0) -> None:
        """Evaluate two expressions of one spec side by side.

        Args:
            left: one of the two.
            right: the other, of the same dtype and shape.
            meaning: what their difference would mean.
            tolerance: by how much, relative to themselves, floating-point elements may differ.

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
            if tolerance and _close(left.spec.dtype, wanted, found, tolerance):
                continue
            first = _difference(left.spec.dtype, start, wanted, found)
            if first:
                raise ConversionError(
                    f"{meaning}: element {first.element} is {first.expected}, not {first.found}",
                    tensor=left.spec.name,
                    hint="the plan took for granted that they are equal; nothing was finished",
                )

    def _forget(self, item: WorkItem) -> None:
        """Let go of the source pages that the item read: as far into each leaf as it is into its tensor.

        Where runs are short, every item of the tensor comes back to the same pages; the last one goes.
        """
        total = item.expression.spec.nbytes
        start, stop = item.start, item.stop
        if self._evaluator.is_scattered(item.expression):
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


@contextmanager
def _naming(tensor: str) -> Iterator[None]:
    """Have a failure of what is done inside say which tensor it was for."""
    try:
        yield
    except ConversionError as error:
        at = error.headline
        if at.tensor is not None:
            raise
        raise ConversionError(at.message, file=at.file, tensor=tensor, hint=at.hint) from error


def _close(dtype: DType, expected: Array, found: Array, tolerance: float) -> bool:
    """Whether two blocks hold the same numbers, but for rounding."""
    wanted, other = (side.view(dtype.numpy).astype(numpy.float64) for side in (expected, found))
    return numpy.allclose(wanted, other, rtol=tolerance, atol=0.0)


def _difference(dtype: DType, start: int, expected: Array, found: Array) -> Difference | None:
    """The first difference of two byte blocks, in elements; `start` is the byte that they begin at."""
    position = next(
        (
            at + int(numpy.argmax(found[at : at + _COMPARED] != expected[at : at + _COMPARED]))
            for at in range(0, len(expected), _COMPARED)
            if not numpy.array_equal(found[at : at + _COMPARED], expected[at : at + _COMPARED])
        ),
        None,
    )
    if position is None:
        return None
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
