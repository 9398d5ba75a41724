"""Making room in a destination for a run, and removing an unfinished one that is not to be resumed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from streamconv import shard
from streamconv.errors import DestinationError, listed
from streamconv.plans import Plan
from streamconv.running.destination import JOURNAL, PLAN, RECORD, Destination, check_space, output_names
from streamconv.storage import writing
from streamconv.storage.location import Location


def clear(plan: Plan, record: Mapping[str, Any] | None, destination: Destination, *, overwrite: bool) -> None:
    """Check that nothing is in the way; with `overwrite`, remove the model that is.

    What an earlier conversion wrote is removed. So are weights in the directories that the plan writes in, which
    would be loaded beside the new ones, or instead of them. Everything else is kept.

    Raises:
        DestinationError: the destination holds something that may not be removed.
        PlanError: there is not enough room even so.
    """
    foreign = sorted(_foreign(destination))
    if foreign and not overwrite:
        what = "a file is there" if destination.file else f"the destination is not empty: {listed(foreign)}"
        raise DestinationError(
            what,
            file=str(destination),
            hint="--overwrite replaces a model that is there; or choose another destination",
        )
    names = output_names(plan)
    written = {*(record or {}).get("files", {}), *names, *map(_partial, names)}
    directories = {PurePosixPath(name).parent for name in names}
    gone = [
        destination / name
        for name in foreign
        if name in written or (not destination.file and _is_weights(name, directories))
    ]
    in_the_way = next((path for path in gone if path.is_directory() and not path.is_link()), None)
    if in_the_way is not None:
        raise DestinationError(
            "a directory is where a file is to be written", file=str(in_the_way), hint="remove it"
        )
    check_space(plan, destination, freed=sum(map(writing.allocated, gone)))
    # The record goes first: it must not describe files that are gone.
    if record is not None:
        writing.remove(destination.own / RECORD)
        writing.sync(destination.own)
    for path in gone:
        writing.remove(path)


def discard(plan: Plan, destination: Destination) -> None:
    """Remove what an unfinished run of `plan` wrote."""
    for name in output_names(plan):
        writing.remove(destination / name)
        writing.remove(writing.partial(destination / name))
    forget_run(destination)


def forget_run(destination: Destination) -> None:
    """Remove the files that a run keeps for itself until it ends."""
    # The plan first: a plan without its journal would look like a run that has done nothing.
    writing.remove(destination.own / PLAN)
    writing.remove(destination.own / JOURNAL)


def _partial(name: str) -> str:
    """The path of a file that is not complete yet, relative as its own."""
    path = PurePosixPath(name)
    return str(path.with_name(writing.partial_name(path.name)))


def _is_weights(name: str, directories: Collection[PurePosixPath]) -> bool:
    """Whether a file would be loaded as weights, in one of the directories."""
    path = PurePosixPath(name)
    return path.parent in directories and shard.parse_weight_name(path.name) is not None


def _foreign(destination: Destination) -> Iterator[str]:
    """Every file and link in a destination but a run's own, relative to it; of one file, what would be replaced."""

    def walk(directory: Location) -> Iterator[str]:
        for entry in directory.entries():
            if not entry.is_directory() or entry.is_link():
                yield entry.relative_to(destination.directory)
            elif entry != destination.own:
                yield from walk(entry)

    if destination.file:
        names = (destination.file, _partial(destination.file))
        yield from (name for name in names if (destination / name).exists() or (destination / name).is_link())
    elif destination.place.is_directory():
        yield from walk(destination.place)
