"""Writing to a place as a run does it: each step through the sink of the place, each failure a ConversionError."""

from __future__ import annotations

from streamconv.storage.location import Location
from streamconv.storage.resolve import sink_of
from streamconv.storage.roles import failing

PARTIAL = ".partial"
"""What the name of a file that is not whole ends in."""


def partial(final: Location) -> Location:
    """Where a file grows that is not whole yet."""
    return final.parent / (final.name + PARTIAL)


def create(place: Location, size: int) -> None:
    """Make a file of `size` bytes with its space reserved, and the directories above it."""
    make_directory(place.parent)
    with failing(place, f"create with {size} bytes"):
        sink_of(place.place).create(place.place, size)


def make_directory(place: Location) -> None:
    """Make a directory, and those above it, where they are missing."""
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


def write_whole(final: Location, data: bytes) -> None:
    """Write a small file so that its name only ever means all of it."""
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


def allocated(place: Location) -> int:
    """Bytes that removing what is there would free."""
    return sink_of(place.place).allocated(place.place)
