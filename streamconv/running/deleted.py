"""What runs have deleted of a source: what says so, and what may not be done then.

`freed.json` in the destination names the files, each before it goes. A destination may be a stranger's: what it says counts
where the source has a mark of the same plan and place, which is made before the journal of such a run is believed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from streamconv.errors import CheckpointError, DestinationError, Problem, UsageError, listed, shortened
from streamconv.execution.execute import Item, Receipt
from streamconv.plans import Plan, fingerprint
from streamconv.running import state
from streamconv.running.destination import FREED, RECORD, Destination
from streamconv.running.items import by_files_read
from streamconv.storage import writing
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import sink_of
from streamconv.storage.roles import Held

# In the source: while it is being deleted, and from then on.
_LOCK, _MARK = ".streamconv-deleting", ".streamconv-deleted"

# In both `freed.json` and the mark.
_FILES = "files"

# Bytes of a mark, which names a place and the files of a source.
_LARGEST = 64 << 20

_ONLY_COPY = "give the command that began it again, which completes it; or remove the destination yourself"


@contextmanager
def locked(plan: Plan) -> Iterator[None]:
    """Keep other runs from deleting the same source, which would leave each with a part of it.

    Raises:
        UsageError: one is at it.
    """
    held = _in_source(plan, _LOCK)
    try:
        lock = sink_of(held.place).lock(held.place, f"process {os.getpid()} on {socket.gethostname()}")
    except Held as holder:
        raise UsageError(
            f"another run is deleting this source ({holder})", file=plan.source, hint="wait for it to end"
        ) from holder
    except OSError as error:
        raise UsageError(f"it cannot be locked: {error.strerror or error}", file=held.place) from error
    with lock:
        yield


def freed(destination: Destination) -> frozenset[str]:
    """The source files that runs have deleted; one that is there all the same is none of them.

    Beside the record of a conversion that is whole, what cannot be read is taken for nothing.

    Raises:
        DestinationError: that cannot be known, and the destination may be the only copy of something.
    """
    try:
        named = _named(destination)
    except DestinationError:
        if not (destination.own / RECORD).exists():
            raise
        return frozenset()
    return frozenset(path for path in named if not locate(path).exists())


def _in_source(plan: Plan, name: str) -> Location:
    """A file of ours in the source, or beside one that is a file itself."""
    return _beside(locate(plan.source), name)


def _beside(source: Location, name: str) -> Location:
    return source / name if source.is_directory() else source.parent / f"{name}-{source.name}"


def written_to(source: Location) -> str | None:
    """Where runs have written what they deleted of a source, as its mark says; None where it has none."""
    match _read_mark(_beside(source, _MARK)):
        case {"destination": str(where)}:
            return where
    return None


def is_marked(plan: Plan, destination: Destination) -> bool:
    """Whether the source says that it is deleted for this plan into this destination, which may be a stranger's."""
    found = _read_mark(_in_source(plan, _MARK))
    return isinstance(found, dict) and found.items() >= _marking(plan, destination).items()


def mark(plan: Plan, destination: Destination, files: Iterable[str]) -> None:
    """Have the source say so, and which files may go, before a run whose journal is to be believed from then on."""
    place = _in_source(plan, _MARK)
    above = f"{place.parent.place}/"
    inside = sorted(path.removeprefix(above) for path in files if path.startswith(above))
    document = {**_marking(plan, destination), _FILES: inside}
    if _read_mark(place) != document:
        # Not by orjson: a place may have bytes that are no UTF-8.
        writing.write_whole(place, json.dumps(document).encode())


def require_whole(plan: Plan, destination: Destination, gone: Collection[str]) -> None:
    """Refuse a source of which a run has deleted a part: what is left may look like a whole one.

    It lacks a file that its mark names, and that is none of the `gone` ones that this destination knows of. Whether
    the destination of that run is there does not matter: it may have been moved, or its disk is not mounted.

    Raises:
        UsageError: it is so.
    """
    here = destination.place.canonical().place
    for place in _marks(locate(plan.source), _in_source(plan, _MARK)):
        match _read_mark(place):
            case {"destination": str(other), "files": list(names)}:
                paths = [f"{place.parent.place}/{name}" for name in names if _is_inside(name)]
                lacking = [path for path in paths if not locate(path).exists()]
                if other == here:
                    lacking = [path for path in lacking if path not in gone]
                if lacking:
                    raise UsageError(
                        f"a part of it was deleted as it was converted into {listed([other])}",
                        file=place.parent.place,
                        hint="complete that conversion by the command that began it, and convert its output; if it was "
                        f"moved, move it back first; if what is here is whole even so, remove {place}",
                        problems=shortened([Problem("is gone", file=path) for path in lacking], 5),
                    )


def _is_inside(name: Any) -> bool:
    """Whether this names a file in a directory: a mark is outside data."""
    return (
        isinstance(name, str)
        and "\0" not in name
        and not name.startswith("/")
        and ".." not in PurePosixPath(name).parts
    )


def _marks(source: Location, own: Location) -> Iterator[Location]:
    """Where a mark may be that tells of the same files: it may be of a part of the source, or of what that is a part of."""
    yield own
    yield source.parent / _MARK
    # Elsewhere nothing is deleted, and each question takes its time.
    if source.local() and source.is_directory():
        for entry in source.entries():
            if entry.name.startswith(f"{_MARK}-"):
                yield entry
            elif entry.is_directory():
                yield entry / _MARK


def _read_mark(place: Location) -> Any:
    try:
        return json.loads(place.read(_LARGEST)) if place.is_file() else None
    except (CheckpointError, PermissionError, ValueError, RecursionError):
        return None


def _marking(plan: Plan, destination: Destination) -> dict[str, str]:
    return {"plan": fingerprint(plan), "destination": destination.place.canonical().place}


def note(destination: Destination, paths: Iterable[str]) -> None:
    """Note, before source files are deleted, that they may be."""
    state.write(destination.own / FREED, {_FILES: sorted({*_named(destination), *paths})})


def _named(destination: Destination) -> list[str]:
    """What `note` has noted."""

    def made(document: Any) -> list[str]:
        found = document[_FILES]
        # Only of this machine's disks is anything deleted; and no server is asked because a file of ours names it.
        if not isinstance(found, list) or not all(
            isinstance(path, str) and path.startswith("/") and "\0" not in path for path in found
        ):
            raise ValueError("it has no list of files")
        return found

    found = state.read(
        destination.own / FREED,
        made,
        wrong="what a run has deleted of its source cannot be known",
        hint="the destination may hold the only copy, and is left as it is; remove it yourself if it does not",
    )
    return found or []


def require_no_only_copy(destination: Destination, gone: Collection[str]) -> None:
    """Refuse to give up what a destination holds where it is the only copy.

    Raises:
        DestinationError: it is.
    """
    if gone:
        raise DestinationError(
            "parts of a source were deleted as they were written here: this is the only copy of them",
            file=str(destination),
            hint=_ONLY_COPY,
            problems=shortened([Problem("was deleted", file=path) for path in sorted(gone)], 5),
        )


def require_kept(items: Sequence[Item], done: Mapping[int, Receipt], gone: Collection[str]) -> None:
    """Refuse to go on where something would have to be made again out of files that are deleted.

    Raises:
        DestinationError: it would.
    """
    if not gone:
        return
    lost = [
        Problem("is not whole any more, and was made of files that are deleted", item.path, item.name)
        for kind, group in by_files_read(items).items()
        if not kind.isdisjoint(gone)
        for item in group
        if item.index not in done
    ]
    if lost:
        raise DestinationError(
            "the destination lacks parts that cannot be made again; nothing in it was changed",
            hint=f"put these back as they were, and give the command again: {listed(sorted(gone))}",
            problems=shortened(lost),
        )
