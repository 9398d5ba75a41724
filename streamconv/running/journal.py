"""What a run has done, so that the next one can resume: `.streamconv/journal`.

One line of JSON per entry. A run begins with a line that names the boot of the machine and the part size, which
give an item's index its meaning: entries under another part size are ignored. An item that is done is written at
once, which survives a crash of the process. Two more kinds of line say what survives a crash of the machine:
`{"synced": n}`, the data of this run's first n items is on the disk, and `{"whole": [a, b]}`, the data of items a to
b - 1, which fill a file. Other entries are trusted only until the next boot, unless the writer has synced the bytes
itself (`Receipt.durable`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import orjson

from streamconv.execution.execute import PART, Receipt
from streamconv.execution.node import node
from streamconv.storage import writing
from streamconv.storage.files import Files
from streamconv.storage.location import Location

# A line has some 60 bytes, and a hundred million items are 6 PB of tensors.
_LARGEST = 8 << 30


class Journal:
    """The journal of a run, open for appending by several threads. Use it in a `with`."""

    def __init__(self, place: Location) -> None:
        self._place = place
        if not place.exists():
            writing.create(place, 0)
        self._files = Files()
        self._end = place.state().size
        self._noted = 0
        self._lock = threading.Lock()
        torn = self._end > 0 and self._last_byte() != b"\n"
        self._append([b""] * torn + [orjson.dumps({"boot": node(), "part": PART})])

    def done(self, receipts: Sequence[Receipt]) -> int:
        """Note items whose bytes are written; returns how many this run has noted so far."""
        self._append(
            [
                orjson.dumps(
                    [r.index, r.nbytes, r.digest, r.copied, r.overflowed, r.flushed, *[True] * r.durable]
                )
                for r in receipts
            ]
        )
        self._noted += len(receipts)
        return self._noted

    def synced(self, count: int) -> None:
        """Note that the data of the first `count` items of this run is on the disk."""
        self._append([orjson.dumps({"synced": count})])
        writing.sync(self._place)

    def whole(self, first: int, stop: int) -> None:
        """Note that the data of items [first, stop), which fill a file, is on the disk."""
        self._append([orjson.dumps({"whole": [first, stop]})])
        writing.sync(self._place)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _append(self, lines: list[bytes]) -> None:
        data = b"".join(line + b"\n" for line in lines)
        # The finisher writes here too. Two entries at one offset would destroy each other, and `synced` counts entries.
        with self._lock:
            self._files.write(self._place.place, data, self._end)
            self._end += len(data)

    def _last_byte(self) -> bytes:
        byte = bytearray(1)
        self._files.read_into(self._place.place, memoryview(byte), self._end - 1)
        return bytes(byte)


def read(place: Location) -> dict[int, Receipt]:
    """The receipts that can be trusted, by item index. A torn last line is ignored."""
    lines = place.read(_LARGEST).split(b"\n") if place.exists() else []
    here = node()
    noted: dict[int, Receipt] = {}
    trusted: dict[int, Receipt] = {}
    run: list[Receipt] = []
    ours = lasting = False
    for line in lines:
        entry = _entry(line)
        if isinstance(entry, dict) and "boot" in entry:
            run, ours = [], entry.get("part") == PART
            lasting = here is not None and entry["boot"] == here
        elif not ours:
            continue
        elif isinstance(entry, list):
            receipt = Receipt(*entry)
            run.append(receipt)
            noted[receipt.index] = receipt
            if lasting or receipt.durable:
                trusted[receipt.index] = receipt
        elif isinstance(entry, dict) and "synced" in entry:
            trusted.update((receipt.index, receipt) for receipt in run[: entry["synced"]])
        elif isinstance(entry, dict) and "whole" in entry:
            trusted.update((index, noted[index]) for index in range(*entry["whole"]) if index in noted)
    return trusted


def _entry(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
