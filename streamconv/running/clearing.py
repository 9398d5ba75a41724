"""Making room in a destination for a run, and removing an unfinished one that is not to be resumed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from streamconv import shard
from streamconv.errors import DestinationError, listed
from streamconv.plans import Plan
from streamconv.running.apart import check_no_source
from streamconv.running.destination import (
    FREED,
    JOURNAL,
    PLAN,
    RECORD,
    Destination,
    check_space,
    output_names,
)
from streamconv.storage import writing
from streamconv.storage.location import Location


def clear(
    plan: Plan,
    record: Mapping[str, Any] | None,
    destination: Destination,
    needed: int,
    *,
    overwrite: bool,
    restarted: bool = False,
) -> None:
    """Check that nothing is in the way and `needed` bytes are free; with `overwrite`, remove the model that is.

    What an earlier conversion wrote is removed. So are weights in the directories that the plan writes in, which
    would be loaded beside the new ones, or instead of them. Everything else is kept.

    Raises:
        DestinationError: the destination holds something that may not be removed.
        PlanError: there is not enough room even so.
    """
    foreign = sorted(_foreign(destination))
    names = output_names(plan)
    written = {*(record or {}).get("files", {}), *names, *map(_partial, names)}
    directories = {PurePosixPath(name).parent for name in names}
    gone = [
        destination / name
        for name in foreign
        if name in written or (not destination.file and _is_weights(name, directories))
    ]
    # Where a run was discarded, the destination was found fit for it: what came beside it since may stay.
    replaced = [each for each in gone if not each.name.endswith(writing.PARTIAL)]
    others = [each.relative_to(destination.directory) for each in replaced] if restarted else foreign
    if others and not overwrite:
        what = "a file is there" if destination.file else f"the destination is not empty: {listed(others)}"
        raise DestinationError(
            what,
            file=str(destination),
            hint="--overwrite replaces a model that is there; or choose another destination",
        )
    in_the_way = next((path for path in gone if path.is_directory() and not path.is_link()), None)
    if in_the_way is not None:
        raise DestinationError(
            "a directory is where a file is to be written", file=str(in_the_way), hint="remove it"
        )
    check_space(destination, needed, freed=sum(map(writing.allocated, gone)))
    check_no_source(plan, gone, destination)
    # The record goes first: it must not describe files that are gone. A plan that is left without it would be resumed.
    if (destination.own / FREED).exists():
        writing.remove_durably([destination.own / PLAN, destination.own / FREED])
    if record is not None:
        writing.remove_durably([destination.own / RECORD])
    held = {*(record or {}).get("tensors", {}), *(output.path for output in plan.outputs)}
    _remove_model(gone, held, destination)


def discard(earlier: Plan, plan: Plan, destination: Destination) -> None:
    """Remove what an unfinished run left. Its plan was read from a file: only what is found in the destination goes.

    Raises:
        DestinationError: something of it is the source of `plan`.
    """
    names = output_names(earlier)
    written = {*names, *map(_partial, names)}
    gone = [destination / name for name in _foreign(destination) if name in written]
    check_no_source(plan, gone, destination)
    # The plan goes last: without it, what is left would be anybody's.
    _remove_model(gone, {output.path for output in earlier.outputs}, destination)
    _forget(destination, PLAN, JOURNAL, FREED)


def scrap(destination: Destination) -> None:
    """Remove what a run keeps for itself, whatever stands there instead."""
    for name in (PLAN, JOURNAL, FREED, RECORD):
        for place in (destination.own / name, destination.own / writing.partial_name(name)):
            _remove_all(place)


def forget_run(destination: Destination) -> None:
    """Remove the files that a run keeps for itself until it ends; of a deleted source, the plan cannot be made again."""
    # The plan first: a plan without its journal would look like a run that has done nothing.
    kept = (destination.own / FREED).exists()
    _forget(destination, *[PLAN] * (not kept), JOURNAL)


def _forget(destination: Destination, *names: str) -> None:
    for name in names:
        _remove_all(destination.own / name)


def _remove_model(gone: Sequence[Location], held: Collection[str], destination: Destination) -> None:
    """Remove files, those that may hold tensors last: what says that a model is whole is not there without it."""
    weights = [
        place for place in gone if place.relative_to(destination.directory) in held or _holds(place.name)
    ]
    writing.remove_durably(place for place in gone if place not in weights)
    writing.remove_durably(weights)


def _holds(name: str) -> bool:
    """Whether a file has the name of weights, and not that of their index."""
    found = shard.parse_weight_name(name)
    return found is not None and found.kind != "index"


def _partial(name: str) -> str:
    """The path of a file that is not complete yet, relative as its own."""
    path = PurePosixPath(name)
    return str(path.with_name(writing.partial_name(path.name)))


def _remove_all(place: Location) -> None:
    if place.is_directory() and not place.is_link():
        for entry in place.entries():
            _remove_all(entry)
        writing.remove_directory(place)
    else:
        writing.remove(place)


def _is_weights(name: str, directories: Collection[PurePosixPath]) -> bool:
    """Whether a file would be loaded as weights, in one of the directories."""
    path = PurePosixPath(name.removesuffix(writing.PARTIAL))
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
