"""What a run has done, so that the next one goes on from there: `.streamconv/journal`.

A line an entry, JSON. A run begins with a line that names the boot of the machine and the size of parts,
without which an item's number says nothing: entries of runs with another one do not count. A done item is
written at once, which survives the death of the process. What survives the death of the machine is said
by two more kinds of line: `{"synced": n}`, the data of this run's first n items is on the disk, and
`{"whole": [a, b]}`, that of items a to b - 1, which are a whole file. Other entries count only while
the boot that wrote them lasts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from streamconv.execution.execute import PART, Receipt
from streamconv.storage.files import failing

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The journal of a run, open for appending. Use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with failing(path, "open"):
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            self._file: IO[bytes] = path.open("ab", buffering=0)
        self._noted = 0
        self._append([b""] * torn + [orjson.dumps({"boot": _boot(), "part": PART})])

    def done(self, receipts: Sequence[Receipt]) -> int:
        """Note items whose bytes are written; returns how many this run has noted so far."""
        self._append(
            [orjson.dumps([r.index, r.nbytes, r.digest, r.copied, r.overflowed, r.flushed]) for r in receipts]
        )
        self._noted += len(receipts)
        return self._noted

    def synced(self, count: int) -> None:
        """Note that the data of the first `count` items of this run is on the disk."""
        self._append([orjson.dumps({"synced": count})])
        self._sync()

    def whole(self, first: int, stop: int) -> None:
        """Note that the data of items [first, stop), which fill a file, is on the disk."""
        self._append([orjson.dumps({"whole": [first, stop]})])
        self._sync()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _append(self, lines: list[bytes]) -> None:
        with failing(self._path, "write"):
            data = memoryview(b"".join(line + b"\n" for line in lines))
            while data:
                data = data[self._file.write(data) :]

    def _sync(self) -> None:
        with failing(self._path, "sync"):
            os.fsync(self._file.fileno())


def read(path: Path) -> dict[int, Receipt]:
    """The receipts that can be relied on, by item index. A torn last line counts for nothing."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    here = _boot()
    noted: dict[int, Receipt] = {}
    trusted: dict[int, Receipt] = {}
    run: list[Receipt] = []
    ours = lasting = False
    for line in lines:
        entry = _entry(line)
        if isinstance(entry, dict) and "boot" in entry:
            run, ours, lasting = [], entry.get("part") == PART, entry["boot"] == here
        elif not ours:
            continue
        elif isinstance(entry, list):
            receipt = Receipt(*entry)
            run.append(receipt)
            noted[receipt.index] = receipt
            if lasting:
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


def _boot() -> str:
    """The machine's boot, or nothing that is ever equal to another run's where that is not known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"unknown {os.getpid()} {os.urandom(8).hex()}"
