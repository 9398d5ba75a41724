"""The destination: where a run keeps its files, and which run may write to it.

DST/.streamconv/plan.json        while a run is unfinished: the plan
DST/.streamconv/journal          what of it is done
DST/.streamconv/lock             held by the run that is writing
DST/NAME.partial                 a file that is not whole yet
DST/.streamconv/conversion.json  after the end: versions, arguments, fingerprint, checksums
DST/.streamconv/freed.json       where the source is deleted: of which files; it stays, and so does the plan

A destination that is one file, DIRECTORY/NAME, has the same in DIRECTORY/.streamconv/NAME/, and nothing else in that
directory is touched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from streamconv.errors import DestinationError, PlanError, Problem, UsageError
from streamconv.plans import Plan
from streamconv.storage import writing
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import sink_of
from streamconv.storage.roles import Held, failing
from streamconv.writers.formats import ALONE, near

OWN = ".streamconv"
"""The directory of a run's own files."""
PLAN, JOURNAL, RECORD = "plan.json", "journal", "conversion.json"
FREED = "freed.json"

# Seconds that a run waits for the workers of one that was killed, which end with the batch in hand.
_LOCK_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a conversion goes.

    Attributes:
        place: the directory, or the file.
        file: the name of the one file that it is, or None for a directory.
    """

    place: Location
    file: str | None = None

    def __str__(self) -> str:
        return str(self.place)

    def __truediv__(self, name: str | PurePosixPath) -> Location:
        return self.directory / name

    @property
    def directory(self) -> Location:
        """What the paths of a plan's files are relative to."""
        return self.place.parent if self.file else self.place

    @property
    def own(self) -> Location:
        """The directory of a run's own files."""
        return self.directory / OWN / self.file if self.file else self.directory / OWN


def destination_at(target: str | Path | Location | Destination) -> Destination:
    """What a user names: one file where it ends as weight files do, and is no directory that is there already.

    Raises:
        UsageError: no storage writes there.
    """
    if isinstance(target, Destination):
        return target
    sink_of(locate(target).place)
    return _named(target)


def written_at(target: str | Path | Location | Destination) -> Destination:
    """What a user names that is there already, to be read: as `destination_at`, wherever it is."""
    return target if isinstance(target, Destination) else _named(target)


def unfinished(target: str | Path | Location | Destination) -> Problem | None:
    """The problem where a run into a place has not ended; None where there is none, or no run writes there."""
    place = target.place if isinstance(target, Destination) else locate(target)
    if place.local() is None:
        return None
    goal = target if isinstance(target, Destination) else _named(place)
    if not (goal.own / PLAN).exists() or (goal.own / RECORD).exists():
        return None
    return Problem(
        "an unfinished conversion stands here", file=str(goal), hint="give its command again to complete it"
    )


def _named(target: str | Path | Location) -> Destination:
    place = locate(target)
    suffix = place.suffix.lower()
    is_file = (suffix in ALONE or near(suffix) is not None) and not (
        str(target).endswith("/") or place.is_directory()
    )
    return Destination(place, place.name if is_file else None)


def output_names(plan: Plan) -> tuple[str, ...]:
    """Every file that a plan writes, relative to the destination."""
    return (
        *(output.path for output in plan.outputs),
        *(text.path for text in plan.texts),
        *(side.path for side in plan.side_files),
    )


def places(plan: Plan, destination: Destination) -> list[str]:
    """The places that workers read and write."""
    return [destination.place.place, *(file.path for file in plan.files)]


def check_fits(plan: Plan, destination: Destination) -> None:
    """Refuse to write a plan to one file that was made for a directory, or for another file.

    Raises:
        UsageError: it was.
    """
    if destination.file and output_names(plan) != (destination.file,):
        raise UsageError(
            "the plan is not one of this file alone",
            file=str(destination),
            hint="make the plan with this destination, or name a directory",
        )


def left_to_write(plan: Plan, destination: Destination) -> int:
    """Bytes of the output for which no room is taken yet."""
    finals = [destination / output.path for output in plan.outputs]
    written = sum(writing.allocated(writing.partial(final)) + writing.allocated(final) for final in finals)
    return plan.bytes_to_write - written


def check_space(destination: Destination, needed: int, freed: int = 0) -> None:
    """Raise PlanError where the disk has less room than is needed, even after `freed` bytes are freed."""
    free = free_space(destination.place)
    if free is None:
        return
    free += freed
    if needed > free:
        raise PlanError(
            f"{needed:,} bytes are needed on the disk, {free:,} are free",
            file=str(destination),
            hint="free some space, or choose another destination",
        )


def free_space(destination: str | Path | Location) -> int | None:
    """Free bytes where a destination is, which need not exist yet; None where there is no limit."""
    place = locate(destination).place
    with failing(place, "see how much is free at"):
        return sink_of(place).free(place)


@contextmanager
def locked(destination: Destination) -> Iterator[None]:
    """Lock the destination against other runs, and against workers that a killed run left behind.

    Workers inherit the lock: it is free when the last of them is gone.

    Raises:
        DestinationError: another run holds it, or it cannot be made.
    """
    own = destination.own
    try:
        sink_of(own.place).make_directory(own.place)
    except OSError as error:
        raise DestinationError(
            f"the directory cannot be made: {error.strerror or error}",
            file=str(own),
            hint="choose another destination",
        ) from error
    try:
        with _lock((own / "lock").place, destination):
            yield
    finally:
        with contextlib.suppress(OSError):  # a run that was refused leaves nothing behind
            for directory in (own, own.parent) if destination.file else (own,):
                sink_of(own.place).remove_directory(directory.place)


def _lock(place: str, destination: Destination) -> contextlib.AbstractContextManager[None]:
    """Take the lock, waiting a moment for orphaned workers to end."""
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
