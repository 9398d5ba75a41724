"""The destination directory: where a run keeps its files, and who may write there.

DST/.streamconv/plan.json        while a run is unfinished: the plan
DST/.streamconv/journal          what of it is done
DST/.streamconv/lock             held by the run that is writing
DST/NAME.partial                 a file that is not whole yet
DST/.streamconv/conversion.json  after the end: versions, arguments, fingerprint, checksums
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from streamconv.errors import DestinationError, Problem
from streamconv.plans import Plan
from streamconv.storage import writing
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import sink_of
from streamconv.storage.roles import Held

OWN = ".streamconv"
PLAN, JOURNAL, RECORD = f"{OWN}/plan.json", f"{OWN}/journal", f"{OWN}/conversion.json"

# Seconds that a run waits for the workers of one that was killed, which end with the batch in hand.
_LOCK_PATIENCE = 5.0


def output_names(plan: Plan) -> tuple[str, ...]:
    """Every file that a plan makes, relative to the destination."""
    return (
        *(output.path for output in plan.outputs),
        *(text.path for text in plan.texts),
        *(side.path for side in plan.side_files),
    )


def places(plan: Plan, destination: Location) -> list[str]:
    """What workers read and write."""
    return [destination.place, *(file.path for file in plan.files)]


def check_apart(source: str | Path | Location, destination: str | Path | Location) -> None:
    """Refuse a destination that is the source, lies in it, or contains it.

    Raises:
        DestinationError: one of these.
    """
    place = locate(destination)
    a, b = locate(source).canonical(), place.canonical()
    directory = a if a.is_directory() else a.parent
    if b.is_relative_to(a) or a.is_relative_to(b) or directory == b:
        raise DestinationError(
            f"one of the destination and the source ({source}) contains the other",
            file=str(destination),
            hint="the source is never written to; choose a directory of its own",
        )
    if place.is_link() and not place.exists():
        raise DestinationError(
            "the destination is a link to nothing",
            file=str(destination),
            hint="make the directory that it leads to, or remove the link",
        )
    if place.exists() and not place.is_directory():
        raise DestinationError("the destination is a file", file=str(destination), hint="name a directory")


def check_sources_apart(plan: Plan, destination: Location) -> None:
    """Refuse a destination through which the source itself would be written to, by whatever links.

    Raises:
        DestinationError: a file of the source lies in the destination, or a directory of the destination
            that is to be written in is a link.
    """
    inside = destination.canonical()
    for path in (*(file.path for file in plan.files), *(side.source for side in plan.side_files)):
        if locate(path).canonical().is_relative_to(inside):
            raise DestinationError(
                f"a file of the source lies in it ({path})",
                file=str(destination),
                hint="the source is never written to; choose a directory of its own",
            )
    parents = (parent for name in output_names(plan) for parent in PurePosixPath(name).parents[:-1])
    for parent in dict.fromkeys(parents):
        if (destination / parent).is_link():
            raise DestinationError(
                "a directory that is to be written in is a link",
                file=str(destination / parent),
                hint="remove the link, or choose another destination",
            )


def space_problem(plan: Plan, destination: str | Path | Location, freed: int = 0) -> Problem | None:
    """The problem where the disk has too little room for what is left to write, or None.

    `freed` bytes of other files will be gone by then.
    """
    place = locate(destination)
    free = free_space(place)
    if free is None:
        return None
    finals = [place / output.path for output in plan.outputs]
    written = sum(writing.allocated(writing.partial(final)) + writing.allocated(final) for final in finals)
    needed, free = plan.bytes_to_write - written, free + freed
    if needed <= free:
        return None
    return Problem(
        f"{needed:,} bytes are needed on the disk, {free:,} are free",
        file=str(destination),
        hint="free some space, or choose another destination",
    )


def free_space(destination: str | Path | Location) -> int | None:
    """Free bytes where a destination is, which need not exist yet; None where there is no limit."""
    place = locate(destination).place
    return sink_of(place).free(place)


@contextmanager
def locked(destination: Location) -> Iterator[None]:
    """Lock the destination against other runs, and against workers that a killed run left behind.

    Workers inherit the lock: it is free when the last of them is gone.

    Raises:
        DestinationError: another run holds it.
    """
    own = destination / OWN
    writing.make_directory(own)
    try:
        with _lock((own / "lock").place, destination):
            yield
    finally:
        with contextlib.suppress(OSError):
            sink_of(own.place).remove_directory(own.place)  # a run that was refused leaves nothing behind


def _lock(place: str, destination: Location) -> contextlib.AbstractContextManager[None]:
    """The lock. Waits a moment for orphaned workers to end."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            return sink_of(place).lock(place, f"process {os.getpid()} on {socket.gethostname()}")
        except Held as holder:
            if time.monotonic() > deadline:
                raise DestinationError(
                    f"another run is writing here ({holder})",
                    file=str(destination),
                    hint="wait for it to end, or stop it",
                ) from holder
            time.sleep(0.1)
        except OSError as error:
            raise DestinationError(
                f"it cannot be locked: {error.strerror or error}",
                file=place,
                hint="choose a destination on another disk",
            ) from error
