"""That a destination and its source are apart, by whatever name or mount either is reached.

Names are compared with all links followed, and so is what stands there: a directory that is mounted in a second place
has one inode in both.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from streamconv.errors import DestinationError
from streamconv.plans import Plan
from streamconv.running.destination import Destination, output_names
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import sink_of

_ELSEWHERE = "the source is never written to; choose a directory of its own"


def check_apart(source: str | Path | Location, destination: Destination) -> None:
    """Refuse a destination that is the source, lies in it, or contains it, and one that cannot be made.

    Raises:
        DestinationError: one of these.
    """
    place = destination.place
    a, b = locate(source).canonical(), place.canonical()
    directory = a if a.is_directory() else a.parent
    # A file may lie beside another.
    if b.is_relative_to(a) or a.is_relative_to(b) or directory == b or _one_within_the_other(a, destination):
        raise DestinationError(
            f"one of the destination and the source ({source}) contains the other",
            file=str(destination),
            hint=_ELSEWHERE,
        )
    if place.is_link() and not place.exists():
        raise DestinationError(
            "the destination is a link to nothing",
            file=str(destination),
            hint="make what it leads to, or remove the link",
        )
    if place.exists() and not (place.is_file() if destination.file else place.is_directory()):
        what = "no regular file" if destination.file else "a file"
        raise DestinationError(
            f"the destination is {what}", file=str(destination), hint="choose another destination"
        )
    for own in _own(destination):
        if own.is_link() or (own.exists() and not own.is_directory()):
            raise DestinationError(
                "it is a link" if own.is_link() else "it is no directory",
                file=str(own),
                hint="a run keeps its own files there; remove it, or choose another destination",
            )
    try:
        sink_of(place.place).check_writable(destination.directory.place)
    except OSError as error:
        raise DestinationError(
            f"nothing can be written there: {error.strerror or error}",
            file=error.filename or str(destination),
            hint="choose another destination",
        ) from error


def check_sources_apart(plan: Plan, destination: Destination) -> None:
    """Refuse a destination through which the source would be written to.

    Raises:
        DestinationError: a file of the source is inside the destination, or a directory of the destination
            that is to be written to is a link, or one of the source's under another name.
    """
    inside = destination.place.canonical()
    for path in _read(plan):
        if locate(path).canonical().is_relative_to(inside):
            raise DestinationError(
                f"a file of the source is inside it ({path})", file=str(destination), hint=_ELSEWHERE
            )
    parents = (parent for name in output_names(plan) for parent in PurePosixPath(name).parents[:-1])
    below = [destination / parent for parent in dict.fromkeys(parents)]
    for directory in below:
        if directory.is_link():
            raise DestinationError(
                "a directory to be written to is a link",
                file=str(directory),
                hint="remove the link, or choose another destination",
            )
    held = {directory.place: directory for path in _read(plan) for directory in _directories(path)}
    above: dict[Hashable, str] = {}
    for directory in held.values():
        above |= dict.fromkeys(_chain(directory), str(directory))
    # One file may be written beside the source's.
    beside = [] if destination.file else [destination.directory]
    for directory in (*beside, *_own(destination), *below):
        if (inode := directory.inode()) in above and inode is not None:
            raise DestinationError(
                f"it is, or contains, a directory of the source under another name ({above[inode]})",
                file=str(directory),
                hint=_ELSEWHERE,
            )
    root = locate(plan.source).canonical()
    within = _chain(destination.directory.canonical())
    for directory in held.values():
        if root.is_directory() and directory.is_relative_to(root) and directory.inode() in within:
            raise DestinationError(
                f"it lies in a directory of the source under another name ({directory})",
                file=str(destination),
                hint=_ELSEWHERE,
            )


def check_no_source(plan: Plan, places: Iterable[Location], destination: Destination) -> None:
    """Refuse to remove, or to write into, a file of the source under a second name, or what is beside one.

    Raises:
        DestinationError: one of these places is one.
    """
    files = {inode: path for path in _read(plan) if (inode := locate(path).inode()) is not None}
    # One file may be written beside the source's.
    read = () if destination.file else _read(plan)
    held = {directory.place: directory.inode() for path in read for directory in _directories(path)}
    beside = {inode: place for place, inode in held.items() if inode is not None}
    parents: dict[str, Hashable | None] = {}
    for place in places:
        above = place.parent
        inode = None if place.is_link() else place.inode()
        around = parents.setdefault(above.place, above.inode())
        known = files.get(inode) or beside.get(around)
        if known is not None:
            raise DestinationError(
                f"it is a file of the source, or beside one, under another name ({known})",
                file=str(place),
                hint="a conversion would replace it; remove it, or choose another destination",
            )


def _one_within_the_other(source: Location, destination: Destination) -> bool:
    """Whether a source and a destination are one directory, or one contains the other, under other names."""
    directory = destination.directory.canonical()
    if source.is_directory() and source.inode() in _chain(directory):
        return True
    return not destination.file and directory.inode() in _chain(source)


def _chain(place: Location) -> Collection[Hashable]:
    """What is at a place and above it."""
    found = {place.inode()}
    while (above := place.parent) != place:
        place = above
        found.add(place.inode())
    return found - {None}


def _own(destination: Destination) -> Iterator[Location]:
    """The directories that hold a run's own files."""
    if destination.file:
        yield destination.own.parent
    yield destination.own


def _read(plan: Plan) -> Iterator[str]:
    """Every file that a plan reads."""
    yield from (file.path for file in plan.files)
    yield from (side.source for side in plan.side_files)


def _directories(path: str) -> Iterator[Location]:
    """Where a file is, by the name that it is read by, and where that leads."""
    place = locate(path)
    yield place.parent.canonical()
    yield place.canonical().parent
