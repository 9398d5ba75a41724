"""The steps of writing to a place, through its sink; every failure is a ConversionError."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from streamconv.storage.location import Location
from streamconv.storage.resolve import sink_of
from streamconv.storage.roles import failing

PARTIAL = ".partial"
"""The suffix of a file that is not complete."""

# Bytes of a name, on every file system of Linux but a few that allow more.
_LONGEST_NAME = 255


def partial(final: Location) -> Location:
    """The place of a file that is not complete yet."""
    return final.parent / partial_name(final.name)


def partial_name(name: str) -> str:
    """The name of a file that is not complete yet: shortened, and told apart by a digest, where it would be too long."""
    whole = name.encode(errors="surrogateescape")
    if len(whole) + len(PARTIAL) <= _LONGEST_NAME:
        return name + PARTIAL
    end = f"~{hashlib.sha256(whole).hexdigest()[:16]}{PARTIAL}"
    return whole[: _LONGEST_NAME - len(end)].decode(errors="ignore") + end


def create(place: Location, size: int, *, reserve: bool = True) -> None:
    """Create a file of `size` bytes, its space reserved unless told otherwise, and its parent directories."""
    if not place.parent.is_directory():
        make_directory(place.parent)
    with failing(place, f"create with {size} bytes"):
        sink_of(place.place).create(place.place, size, reserve=reserve)


def make_directory(place: Location) -> None:
    """Create a directory and its parents, where missing, durably."""
    with failing(place, "create"):
        sink_of(place.place).make_directory(place.place)


def sync(place: Location, *, forget: bool = False) -> None:
    """Wait until a file, or a directory's names, are on the disk; see `Sink.sync`."""
    with failing(place, "sync"):
        sink_of(place.place).sync(place.place, forget=forget)


def publish(final: Location) -> None:
    """Give a synced file, which grew as `partial(final)`, its final name, durably."""
    with failing(final, "rename into place"):
        sink_of(final.place).publish(partial(final).place, final.place)


def rename(place: Location, other: Location) -> None:
    """Give a file another name in its directory, durably."""
    with failing(place, "rename"):
        sink_of(place.place).publish(place.place, other.place)


def write_whole(final: Location, data: bytes) -> None:
    """Write a small file atomically."""
    growing = partial(final)
    create(growing, len(data))
    with failing(final, "write"), sink_of(growing.place).open(growing.place) as file:
        file.write(data, 0)
    sync(growing)
    publish(final)


def remove(place: Location) -> None:
    """Remove a file or a link, where there is one."""
    with failing(place, "remove"):
        sink_of(place.place).remove(place.place)


def remove_durably(places: Iterable[Location]) -> None:
    """Remove files and links: no disk that holds what comes after has them any more."""
    gone = list(places)
    for place in gone:
        remove(place)
    for directory in dict.fromkeys(place.parent for place in gone):
        if directory.is_directory():
            sync(directory)


def remove_directory(place: Location) -> None:
    """Remove a directory that is empty."""
    with failing(place, "remove"):
        sink_of(place.place).remove_directory(place.place)


def allocated(place: Location) -> int:
    """Bytes that removing what is there would free."""
    with failing(place, "look at"):
        return sink_of(place.place).allocated(place.place)
