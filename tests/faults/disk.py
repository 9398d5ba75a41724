"""What a run's log says of the disk: which bytes and names a crash of the machine, or a failed sync, may take away."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

PAGE = 4096

Marks = numpy.ndarray[Any, numpy.dtype[numpy.bool_]]


def _none() -> Marks:
    return numpy.zeros(0, numpy.bool_)


@dataclass(slots=True)
class _File:
    """Marks of each byte of a file.

    Attributes:
        dirty: it was written since the last sync that went well.
        synced: it was on the disk at some time; whoever writes it again writes the same.
        doomed: a sync of it has failed, and it was not written again.
    """

    dirty: Marks = field(default_factory=_none)
    synced: Marks = field(default_factory=_none)
    doomed: Marks = field(default_factory=_none)

    def grow(self, size: int) -> None:
        for name in ("dirty", "synced", "doomed"):
            marks = getattr(self, name)
            if len(marks) < size:
                setattr(self, name, numpy.concatenate([marks, numpy.zeros(size - len(marks), numpy.bool_)]))


class Disk:
    """The state of each file of a destination after the calls in a log."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._begun: dict[tuple[int, str], Marks] = {}
        self._renamed: list[tuple[str, str]] = []
        self._read = 0

    def follow(self, log: Path) -> None:
        """Take what was logged since the last time."""
        with log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        for line in data.splitlines():
            entry = json.loads(line)
            if entry["side"] == "destination":
                self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        event, place = entry["event"], entry["place"]
        file = self._files.setdefault(place, _File())
        if event == "create":
            self._files[place] = _File()
        elif event in ("pwrite", "copy_file_range") and "length" in entry:
            start, stop = entry["offset"], entry["offset"] + entry["length"]
            file.grow(stop)
            file.dirty[start:stop] = True
            file.doomed[start:stop] = False
        elif event == "sync-begins":
            self._begun[entry["pid"], place] = file.dirty.copy()
        elif event == "fsync":
            begun = self._begun.get((entry["pid"], place), _none())
            size = min(len(begun), len(file.dirty))
            file.synced[:size] |= begun[:size]
            file.dirty[:size] &= ~begun[:size]
            self._renamed = [names for names in self._renamed if str(Path(names[1]).parent) != place]
        elif event == "sync-failed":
            file.doomed |= file.dirty
        elif event == "replace":
            self._files[entry["to"]] = self._files.pop(place)
            self._renamed.append((place, entry["to"]))
        elif event == "unlink":
            self._files.pop(place, None)

    def drop_unsynced(self, randomly: random.Random, share: float) -> int:
        """The machine went off: take that share of the pages that were not synced; returns how many bytes."""
        count = 0
        for place, file in self._files.items():
            count += _drop(Path(place), file.dirty & ~file.synced, randomly, share)
            file.synced |= file.dirty
            file.dirty = numpy.zeros(len(file.dirty), numpy.bool_)
        return count

    def drop_doomed(self, randomly: random.Random, share: float) -> int:
        """A sync failed: take that share of the pages that it was to write; returns how many bytes."""
        count = 0
        for place, file in self._files.items():
            count += _drop(Path(place), file.doomed & ~file.synced, randomly, share)
            file.doomed = numpy.zeros(len(file.doomed), numpy.bool_)
        return count

    def undo_names(self, randomly: random.Random) -> int:
        """The machine went off: undo some of the renames that were not synced; returns how many."""
        count = 0
        for before, after in reversed(self._renamed):
            if randomly.random() < 0.5 and Path(after).is_file() and not Path(before).exists():
                Path(after).rename(before)
                self._files[before] = self._files.pop(after, _File())
                count += 1
        self._renamed.clear()
        return count


def _drop(path: Path, marks: Marks, randomly: random.Random, share: float) -> int:
    """Make zeros of a share of the marked bytes, by pages."""
    at = numpy.flatnonzero(marks)
    gone = [page for page in numpy.unique(at // PAGE).tolist() if randomly.random() < share]
    if not gone or not path.is_file():
        return 0
    with path.open("r+b") as file:
        data = bytearray(file.read())
        lost = at[numpy.isin(at // PAGE, gone) & (at < len(data))]
        numpy.frombuffer(data, numpy.uint8)[lost] = 0
        file.seek(0)
        file.write(data)
    return len(lost)
