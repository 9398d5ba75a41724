"""What a run has done, so that the next one can resume: `.streamconv/journal`.

One line per entry: the CRC-32 of what follows, a blank, JSON. A run begins with a line that names the boot of the machine
and the part size, which give an item's index its meaning: entries under another part size are ignored. An item that is
done is written at once, which survives a crash of the process. Other lines say what survives a crash of the machine:

    {"syncing": [[a, b], ...]}  the data of items a to b - 1 is about to be synced
    {"synced": n}               that is done, and the data of this run's first n items is on the disk
    {"whole": [a, b]}           so is that of items a to b - 1: they fill a file, or are all that reads a source file
                                which is to be deleted
    {"failed": true}            a sync was not done, and only what is on the disk is trusted from now on
    {"lost": [[a, b], ...]}     what was said of items is taken back: their file is made again

Other entries are trusted only until the next boot, unless the writer has synced the bytes itself (`Receipt.durable`); and
not where a sync was begun and not ended: a sync that fails is told once, and what it was to write is gone from the page
cache.

The journal is outside data by the next run. A line that is not as it was written ends what its run says, and an entry
must fit the item that it is about.
"""

from __future__ import annotations

import contextlib
import re
import threading
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from streamconv.errors import ConversionError
from streamconv.execution.execute import PART, Item, Receipt, WorkItem
from streamconv.execution.node import node
from streamconv.ops import Rounding
from streamconv.storage import writing
from streamconv.storage.files import Files
from streamconv.storage.location import Location

# A line has some 60 bytes, and a hundred million items are 6 PB of tensors.
_LARGEST = 8 << 30

# An xxh3-128.
_DIGEST = re.compile("[0-9a-f]{32}")


class Journal:
    """The journal of a run, open for appending by several threads. Use it in a `with`."""

    def __init__(self, place: Location) -> None:
        self._place = place
        if not place.exists():
            writing.create(place, 0)
            writing.sync(place.parent)
        self._files = Files()
        self._end = place.state().size
        self._noted = 0
        self._lock = threading.Lock()
        if self._end > 0 and self._last_byte() != b"\n":  # a line that was torn
            self._files.write(place.place, b"\n", self._end)
            self._end += 1
        self._append([orjson.dumps({"boot": node(), "part": PART})])

    def done(self, receipts: Sequence[Receipt]) -> int:
        """Note items whose bytes are written; returns how many this run has noted so far."""
        self._append(
            [
                orjson.dumps(
                    [
                        r.index,
                        r.nbytes,
                        r.digest,
                        r.copied,
                        r.overflowed,
                        r.flushed,
                        *_rounding(r),
                        *[True] * r.durable,
                    ]
                )
                for r in receipts
            ]
        )
        self._noted += len(receipts)
        return self._noted

    def syncing(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Note, before a sync, of which items [first, stop) the data is to be on the disk after it."""
        self._append([orjson.dumps({"syncing": [*ranges]})])

    def failed(self) -> None:
        """Note that a sync failed. Where that fails too, `syncing` has said enough."""
        with contextlib.suppress(ConversionError):
            self._append([orjson.dumps({"failed": True})])

    def synced(self, count: int) -> None:
        """Note that the data of the first `count` items of this run is on the disk."""
        self._append([orjson.dumps({"synced": count})])
        writing.sync(self._place)

    def whole(self, *ranges: tuple[int, int]) -> None:
        """Note that the data of items [first, stop) of each range is on the disk."""
        self._append([orjson.dumps({"whole": each}) for each in ranges])
        writing.sync(self._place)

    def lost(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Note, before files are made again, that nothing noted so far of items [first, stop) is in place."""
        if ranges:
            self._append([orjson.dumps({"lost": ranges})])
            writing.sync(self._place)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _append(self, lines: list[bytes]) -> None:
        data = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
        # The finisher writes here too. Two entries at one offset would destroy each other, and `synced` counts entries.
        with self._lock:
            self._files.write(self._place.place, data, self._end)
            self._end += len(data)

    def _last_byte(self) -> bytes:
        byte = bytearray(1)
        self._files.read_into(self._place.place, memoryview(byte), self._end - 1)
        return bytes(byte)


def read(place: Location, items: Sequence[Item]) -> dict[int, Receipt]:
    """The receipts of these items that can be trusted, by item index."""
    lines = place.read(_LARGEST).split(b"\n") if place.exists() else []
    standing = _Standing(items)
    for line in filter(None, lines):
        standing.add(_entry(line))
    return standing.trusted()


class _Standing:
    """What a journal says, line by line."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._here = node()
        self._noted: dict[int, Receipt] = {}
        self._kept: dict[int, Receipt] = {}
        """On the disk."""
        self._cached: dict[int, Receipt] = {}
        """In the page cache of this machine."""
        self._run: list[Receipt | None] = []
        self._ours = self._lasting = self._damaged = False
        self._begun: list[int] = []

    def add(self, entry: Any) -> None:
        """Take the next line; None for one that cannot be read."""
        kind, value = next(iter(entry.items()), ("", None)) if isinstance(entry, dict) else ("", None)
        if kind == "boot":
            self._end_run()
            self._run, self._ours, self._damaged = [], entry.get("part") == PART, False
            self._lasting = self._here is not None and value == self._here
        elif self._damaged:
            # Not a line that was torn when its run ended: what it said, of a sync perhaps, is not known.
            self._cached.clear()
        elif entry is None:
            self._damaged = True
        elif not self._ours:
            return
        elif isinstance(entry, list):
            receipt = _receipt(entry, self._items)
            self._run.append(receipt)
            if receipt is not None:
                self._noted[receipt.index] = receipt
                if receipt.durable:
                    self._kept[receipt.index] = receipt
                elif self._lasting:
                    self._cached[receipt.index] = receipt
        elif kind == "syncing":
            self._begun = _indexes(value, self._items)
        elif kind == "synced" and type(value) is int and value >= 0:
            self._begun = []
            self._kept.update((receipt.index, receipt) for receipt in self._run[:value] if receipt)
        elif kind == "whole":
            self._begun = []
            self._kept.update(
                (at, self._noted[at]) for at in _indexes([value], self._items) if at in self._noted
            )
        elif kind == "failed":
            self._cached.clear()
            self._lasting = False
        elif kind == "lost":
            for at in _indexes(value, self._items):
                for receipts in (self._noted, self._kept, self._cached):
                    receipts.pop(at, None)

    def trusted(self) -> dict[int, Receipt]:
        """What counts after the last line."""
        self._end_run()
        return self._cached | self._kept

    def _end_run(self) -> None:
        """Forget what a sync was to write that did not end well."""
        for at in self._begun:
            self._cached.pop(at, None)
        self._begun = []


def _entry(line: bytes) -> Any:
    """What a line says; None where it is not as it was written."""
    crc, _, text = line.partition(b" ")
    try:
        return orjson.loads(text) if crc == b"%08x" % zlib.crc32(text) else None
    except orjson.JSONDecodeError:
        return None


def _indexes(ranges: Any, items: Sequence[Item]) -> list[int]:
    """Items [first, stop) of all ranges."""
    found: list[int] = []
    for each in ranges if isinstance(ranges, list) else ():
        match each:
            case [int(first), int(stop)] if 0 <= first <= stop <= len(items):
                found += range(first, stop)
    return found


def _receipt(entry: list[Any], items: Sequence[Item]) -> Receipt | None:
    """The receipt of an entry, or None where it cannot be one of the item that it names."""
    match entry:
        case [
            int(index),
            int(nbytes),
            str() | None as digest,
            bool(copied),
            int(overflowed),
            int(flushed),
            *rest,
        ]:
            rounding = Rounding()
            match rest:
                case [[int(largest), int(total), int(number)], *rest]:
                    rounding = Rounding(largest, total, number)
            receipt = Receipt(index, nbytes, digest, copied, overflowed, flushed, rounding, rest == [True])
            return receipt if 0 <= index < len(items) and _fits(receipt, items[index]) else None
    return None


def _rounding(receipt: Receipt) -> list[list[int]]:
    """How far codes are from what they are of, where there are codes."""
    made = receipt.rounding
    return [[made.largest, made.total, made.count]] if made.count else []


def _fits(receipt: Receipt, item: Item) -> bool:
    if not isinstance(item, WorkItem):
        return receipt.nbytes == 0 and receipt.digest is None
    size, digest = item.stop - item.start, receipt.digest
    elements = size * 8 // item.expression.spec.dtype.bits
    return (
        receipt.nbytes == size
        and (receipt.copied if digest is None else _DIGEST.fullmatch(digest) is not None)
        and 0 <= receipt.overflowed <= elements
        and 0 <= receipt.flushed <= elements
    )
