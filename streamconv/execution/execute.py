"""One work item: put a range of bytes of one target tensor into its place, or check one.

    1. `Worker.run` gets a batch of items (from any engine, in any order, any number of times).
    2. Where an item's table says long runs of stored bytes, storage copies them; Python sees none.
    3. Otherwise its blocks are evaluated into the worker's arena (`evaluate`), hashed, and written.
    4. Two tensors that are to be equal are evaluated side by side: what the plan relies on, or a file and
       the plan.
    5. Where the coordinator asks for it, what was written is synced. Only then are there receipts.

Contract of the hot path: any item, any number of times, by anyone, gives the same bytes; all blocks that
are written come out of one arena that is allocated once. Besides it a worker has two buffers of `_PROVEN` bytes
for the sides of checks, allocated once too, and takes up to 16 MiB for a moment to say where two blocks differ.
"""

from __future__ import annotations

import math
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy
import xxhash

from streamconv.errors import ConversionError, StreamconvError
from streamconv.execution.difference import Difference, first_difference
from streamconv.execution.evaluate import Evaluator
from streamconv.execution.node import node
from streamconv.ops import Expression, Node, Numeric, Rounding, Tally, leaves
from streamconv.ops import layout as table
from streamconv.ops.arrays import Array
from streamconv.ops.layout import FILL
from streamconv.ops.tiles import steps
from streamconv.storage import writing
from streamconv.storage.files import Copy, Files, spans
from streamconv.storage.location import locate
from streamconv.storage.roles import State
from streamconv.tensor import Checksum, Stored

PART = 64 << 20
"""Bytes of a tensor in one work item and one checksum; a multiple of every item size."""

# Runs at least this long go through the kernel; shorter ones cost more in calls than in copying.
_KERNEL_RUN = 64 << 10

# The widest element, in bytes (C128).
_LARGEST_ITEM = 16

# Bytes of two expressions that are compared at once.
_PROVEN = 1 << 20

# Bytes of one of several operands that are expected before those of the next.
_STRIDE = 1 << 20


# Items are independent and idempotent. The index of one is its position in the run's list; receipts name it.


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Bytes [start, stop) of one target tensor.

    Attributes:
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
class CheckItem:
    """Bytes [start, stop) of two expressions of one spec that must be equal.

    Attributes:
        meaning: what a difference would mean.
        left, right: the two.
        start, stop: bytes within the row-major tensors; a multiple of the item size.
        tolerance: the relative difference that floating-point elements may have.
    """

    index: int
    meaning: str
    left: Expression
    right: Expression
    start: int
    stop: int
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """The tensor that a failure is about."""
        return self.left.spec.name


@dataclass(frozen=True, slots=True)
class ChecksumItem:
    """All bytes that a checksum is of, in their order, and the tensor that they are of, where it is one."""

    index: int
    checksum: Checksum
    name: str | None = None
    start: int = field(init=False, default=0)

    @property
    def meaning(self) -> str:
        """What another checksum would mean."""
        return self.checksum.meaning

    @property
    def stop(self) -> int:
        """Bytes in all extents."""
        return sum(extent.length for extent in self.checksum.extents)


Item = WorkItem | CheckItem | ChecksumItem


@dataclass(frozen=True, slots=True)
class Receipt:
    """The result of an item.

    Attributes:
        index: the item's.
        nbytes: bytes that are in place; 0 for a check.
        digest: xxh3-128 of the bytes in hexadecimal, or None where only storage saw them.
        copied: whether storage copied them.
        overflowed, flushed: elements that casts lost (see `ops.Tally`).
        rounding: how far codes are from what they are of.
        durable: whether the writer has synced the bytes, so that they survive a crash of any machine.
        node: where they were written, see `node`: until synced, they are lost with that machine's page cache.
        difference: for a check, the first one, or None where all is equal.
    """

    index: int
    nbytes: int
    digest: str | None = None
    copied: bool = False
    overflowed: int = 0
    flushed: int = 0
    rounding: Rounding = field(default_factory=Rounding)
    durable: bool = False
    node: str | None = None
    difference: Difference | None = None

    def holds_on(self, here: str | None) -> bool:
        """Whether the coordinator can rely on it: a sync on its node reaches the bytes, or none is needed."""
        return self.durable or (self.node is not None and self.node == here)


@dataclass(frozen=True, slots=True)
class Settings:
    """What every worker of a run is given.

    Attributes:
        arena: bytes of block buffers.
        checksum: hash also what storage copies, by reading it back.
        forget: tell the kernel that source pages will not be read again.
        sync: sync what was written before a receipt says so: a sync by the coordinator would not reach it.
        releasing: source files are to be deleted: hash every byte on its way from them, so that none goes past Python, and
            keep no file open between batches, as that would keep the space of a deleted one.
        known: what the plan says of files of storages other than the local disk.
        ahead: bytes of what is read ahead of distant files.
    """

    arena: int
    checksum: bool = False
    forget: bool = False
    sync: bool = False
    releasing: bool = False
    known: Mapping[str, State] = field(default_factory=dict)
    ahead: int = 0


@dataclass(slots=True)
class Worker:
    """Runs work items. One per process or thread; not thread-safe."""

    settings: Settings
    files: Files = field(init=False)
    _evaluator: Evaluator = field(init=False)
    _node: str | None = field(init=False, default_factory=node)
    _proven: tuple[Array, Array] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Of what a worker may take, a half is for blocks where the other is for what is on its way.
        self.files = Files(self.settings.known, self.settings.ahead)
        self._evaluator = Evaluator(self.settings.arena - self.settings.ahead, self.files)

    def run(self, items: Sequence[Item]) -> list[Receipt]:
        """Do a batch of items; returns a receipt for each, in order.

        Raises:
            ConversionError: names the tensor, the file and the byte; also for a bug in this program.
        """
        self._evaluator.forget()
        try:
            return self._done(items)
        except StreamconvError:
            raise
        except MemoryError as error:
            raise ConversionError(
                "a worker could not get more memory from the system",
                hint="lower the memory budget (--memory) or the number of workers; run the same command again to resume",
            ) from error
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ConversionError(
                f"internal error in a worker: {type(error).__name__}: {error}",
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

    def _done(self, items: Sequence[Item]) -> list[Receipt]:
        receipts: list[Receipt] = []
        copies: list[Copy] = []
        if self.settings.ahead:
            self.files.expect([each for item in items for each in self._wanted(item)])
        for item in items:
            with _naming(item.name):
                if isinstance(item, CheckItem):
                    receipts.append(self._prove(item))
                elif isinstance(item, ChecksumItem):
                    receipts.append(self._sum(item))
                elif not self._passes_through(item) and (runs := self._kernel_runs(item)) is not None:
                    copies += runs
                    receipts.append(Receipt(item.index, item.stop - item.start, copied=True, node=self._node))
                else:
                    receipts.append(self._compute(item))
        written = [item for item in items if isinstance(item, WorkItem)]
        self._copy_all(copies, written)
        if self.settings.checksum:
            by_index = {item.index: item for item in written}
            receipts = [
                replace(receipt, digest=self._digest(by_index[receipt.index])) if receipt.copied else receipt
                for receipt in receipts
            ]
        if self.settings.sync:
            for path in sorted({item.path for item in written}):
                writing.sync(locate(path))
            receipts = [replace(receipt, durable=True) for receipt in receipts]
        if self.settings.releasing:
            self.files.close()
        return receipts

    # ------------------------------------------------------------------------------- writing

    def _copy_all(self, copies: Iterable[Copy], items: Sequence[WorkItem]) -> None:
        for copy in _joined(copies):
            try:
                self.files.copy(copy, self._evaluator.scratch.data)
            except ConversionError:
                self._copy_by_item(copy, items)
            if self.settings.forget:
                self.files.forget(copy.source, copy.source_offset, copy.length)

    def _copy_by_item(self, failed: Copy, items: Sequence[WorkItem]) -> None:
        """Repeat a failed copy item by item, so that the error names the tensor."""
        for item in items:
            begin, end = item.offset + item.start, item.offset + item.stop
            inside = begin < failed.target_offset + failed.length and end > failed.target_offset
            if item.path == failed.target and inside:
                with _naming(item.name):
                    for copy in self._kernel_runs(item) or ():
                        self.files.copy(copy, self._evaluator.scratch.data)

    def _passes_through(self, item: WorkItem) -> bool:
        """Whether all bytes of an item have to go past Python, which hashes them on their way."""
        return self.settings.releasing or any(
            self.files.is_distant(extent.file) for leaf in leaves(item.expression) for extent in leaf.extents
        )

    def _wanted(self, item: Item) -> Iterator[tuple[str, int, int]]:
        """The ranges of distant files that an item reads, about in the order in which it does."""
        if isinstance(item, ChecksumItem):
            yield from (
                each for each in spans(item.checksum.extents, 0, item.stop) if self.files.is_distant(each[0])
            )
            return
        sides = (item.expression,) if isinstance(item, WorkItem) else (item.left, item.right)
        found = [each for side in sides for each in self._operands(side, item.start, item.stop)]
        parts = [
            (at / max(sum(length for _, _, length in ranges), 1), number, (place, offset + inner, taken))
            for number, ranges in enumerate(found)
            for at, inner, (place, offset, length) in _strides(ranges)
            for taken in (min(_STRIDE, length - inner),)
        ]
        # Several operands are read side by side.
        yield from (part for _, _, part in sorted(parts))

    def _operands(
        self, expression: Expression, start: int, stop: int
    ) -> Iterator[Sequence[tuple[str, int, int]]]:
        """The ranges of distant files that bytes [start, stop) of an expression are made of, for each operand.

        Those of which that is not plain are left out.
        """
        if isinstance(expression, Node) and isinstance(expression.op, Numeric):
            size, shape = expression.spec.dtype.itemsize, expression.spec.shape
            for operand in expression.operands:
                if operand.spec.shape == shape and not operand.spec.dtype.packed:
                    width = operand.spec.dtype.itemsize
                    yield from self._operands(operand, start // size * width, stop // size * width)
            return
        runs = self._kernel_runs(WorkItem(0, expression.spec.name, expression, start, stop, "", 0)) or ()
        yield [
            (run.source, run.source_offset, run.length) for run in runs if self.files.is_distant(run.source)
        ]

    def _kernel_runs(self, item: WorkItem) -> list[Copy] | None:
        """The item as copies, or None where it needs blocks."""
        if isinstance(item.expression, Stored):
            return _copies(item, item.expression, item.start, item.start, item.stop - item.start)
        fused = self._evaluator.fused(item.expression)
        if not fused.moves_bytes_only:
            return None
        size = item.expression.spec.dtype.itemsize
        runs: list[Copy] = []
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
            self.files.write(item.path, block.data, item.offset + start)
        if self.settings.forget:
            self._forget(item.expression, item)
        return Receipt(
            item.index,
            item.stop - item.start,
            hasher.hexdigest(),
            overflowed=tally.overflowed,
            flushed=tally.flushed,
            rounding=tally.rounding,
            node=self._node,
        )

    def _digest(self, item: WorkItem) -> str:
        """The digest of what a copy has put in place."""
        hasher = xxhash.xxh3_128()
        with _naming(item.name):
            for part in self._read(item.path, item.offset + item.start, item.stop - item.start):
                hasher.update(part)
        return hasher.hexdigest()

    def _read(self, path: str, first: int, length: int) -> Iterator[memoryview]:
        """Bytes of a file in parts, each valid until the next."""
        for at in range(first, first + length, len(self._evaluator.scratch)):
            part = self._evaluator.scratch[: first + length - at].data
            self.files.read_into(path, part, at)
            yield part

    # ------------------------------------------------------------------------------ checking

    def _prove(self, item: CheckItem) -> Receipt:
        """Evaluate both sides of a check in step, up to the first difference."""
        dtype = item.left.spec.dtype
        found = (first_difference(dtype, *sides, item.tolerance) for sides in self._sides(item))
        difference = next(filter(None, found), None)
        if self.settings.forget:
            self._forget(item.left, item)
            self._forget(item.right, item)
        return Receipt(item.index, 0, durable=True, difference=difference)  # there are no bytes to lose

    def _sides(self, item: CheckItem) -> Iterator[tuple[int, Array, Array]]:
        """Bytes of both sides of a check, and the byte of the tensors that they begin at."""
        if isinstance(item.right, Stored):
            scratch = self._evaluator.scratch
            step = len(scratch) // _LARGEST_ITEM * _LARGEST_ITEM
            for start, block in self._evaluator.blocks(item.left, item.start, item.stop, Tally()):
                for at in range(0, len(block), step):
                    left = block[at : at + step]
                    right = scratch[: len(left)]
                    self.files.read_extents(item.right.extents, start + at, right.data)
                    yield start + at, left, right
            return
        if self._proven is None:
            self._proven = numpy.empty(_PROVEN, numpy.uint8), numpy.empty(_PROVEN, numpy.uint8)
        for start in range(item.start, item.stop, _PROVEN):
            left, right = (side[: min(_PROVEN, item.stop - start)] for side in self._proven)
            self._evaluator.read(item.left, start, left)
            self._evaluator.read(item.right, start, right)
            yield start, left, right

    def _sum(self, item: ChecksumItem) -> Receipt:
        """Compare bytes with their checksum."""
        crc, hasher = 0, xxhash.xxh3_128()
        for path, first, length in spans(item.checksum.extents, 0, item.stop):
            for part in self._read(path, first, length):
                if item.checksum.kind == "CRC-32":
                    crc = zlib.crc32(part, crc)
                else:
                    hasher.update(part)
            if self.settings.forget:
                self.files.forget(path, first, length)
        said = item.checksum.value
        found = f"{crc:08x}" if item.checksum.kind == "CRC-32" else hasher.hexdigest()
        difference = None if found == said else Difference(0, said, found)
        return Receipt(item.index, 0, durable=True, difference=difference)

    def _forget(self, expression: Expression, item: WorkItem | CheckItem) -> None:
        """Tell the kernel to drop the cached source pages that the item read of an expression.

        An item that covers the first third of its tensor is taken to have read the first third of each source
        tensor. Where runs are short, as in a transpose, every item reads pages from all over the source:
        they are dropped after the tensor's last item.
        """
        total = expression.spec.nbytes
        start, stop = item.start, item.stop
        if self._evaluator.is_scattered(expression):
            if stop < total:
                return
            start = 0
        for leaf in leaves(expression):
            first, last = leaf.spec.nbytes * start // total, leaf.spec.nbytes * stop // total
            for path, offset, length in spans(leaf.extents, first, last - first):
                self.files.forget(path, offset, length)


# ------------------------------------------------------------------------------------ helpers


def _copies(item: WorkItem, source: Stored, start: int, to: int, length: int) -> list[Copy]:
    """Bytes [start, ...) of a stored tensor to byte `to` of the item's tensor, one copy per extent."""
    result = []
    for path, offset, count in spans(source.extents, start, length):
        result.append(Copy(path, offset, item.path, item.offset + to, count))
        to += count
    return result


def _strides(ranges: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, int, tuple[str, int, int]]]:
    """Where each stride of some ranges begins: in all of them, in its own, and which that is."""
    before = 0
    for each in ranges:
        for at in range(0, each[2], _STRIDE):
            yield before + at, at, each
        before += each[2]


def _joined(copies: Iterable[Copy]) -> Iterator[Copy]:
    """Copies in target order; those adjacent on both sides are merged, so that many small tensors are one call."""
    first: Copy | None = None
    length = 0
    for copy in sorted(copies, key=lambda each: (each.target, each.target_offset)):
        if first is not None:
            if (
                copy.target_offset == first.target_offset + length
                and copy.source_offset == first.source_offset + length
                and copy.source == first.source
                and copy.target == first.target
            ):
                length += copy.length
                continue
            yield replace(first, length=length)
        first, length = copy, copy.length
    if first is not None:
        yield replace(first, length=length)


@contextmanager
def _naming(tensor: str | None) -> Iterator[None]:
    """Add a tensor's name, if given, to any ConversionError raised inside that names none."""
    try:
        yield
    except ConversionError as error:
        at = error.headline
        if at.tensor is not None:
            raise
        raise ConversionError(at.message, file=at.file, tensor=tensor, hint=at.hint) from error
