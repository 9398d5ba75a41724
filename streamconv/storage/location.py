"""A place in a storage with the grammar of `pathlib`, so that readers need not know which storage it is in."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Self

from streamconv.errors import CheckpointError
from streamconv.storage import hub
from streamconv.storage.resolve import STORAGES, scheme, source_of, unquoted
from streamconv.storage.roles import Entry, OpenSource, Source, State


@dataclass(frozen=True, slots=True)
class Location:
    """A place to read from. Equal, hashed and sorted by its string.

    Attributes:
        place: an absolute local path, or `SCHEME://...`; what `Extent.file` holds.
        source: what reads it.
        entry: what is known of it from the listing that it came from.
    """

    place: str
    source: Source = field(compare=False, repr=False)
    entry: Entry | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.place

    def __lt__(self, other: Location) -> bool:
        return self.place.split("/") < other.place.split("/")

    # ------------------------------------------------------------------------------------ names

    def __truediv__(self, name: str | PurePosixPath) -> Self:
        if isinstance(name, str) and "/" not in name and name not in ("", ".") and self.place[-1] != "/":
            return type(self)(f"{self.place}/{name}", self.source)
        return self._at(self._path / name)

    @property
    def name(self) -> str:
        """Its last part."""
        # Readers look at all names of large directories, many times over; parsing each path would show.
        last = self.place.rpartition("/")[2]
        return last if last not in ("", ".") else self._path.name

    @property
    def stem(self) -> str:
        """Its last part without the suffix."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """The last dotted part of its name, with the dot; empty where there is none."""
        name = self.name
        dot = name.rfind(".")
        return name[dot:] if 0 < dot < len(name) - 1 else ""

    @property
    def parent(self) -> Self:
        """The directory that it is in."""
        return self._at(self._path.parent)

    def relative_to(self, above: Location) -> str:
        """The path from a directory above, with `/`. Raises ValueError where that is not above."""
        return self._path.relative_to(above._path).as_posix()

    def is_relative_to(self, above: Location) -> bool:
        """Whether it is that directory or inside it, by name."""
        return (self._prefix, *self._path.parts)[: len(above._path.parts) + 1] == (
            above._prefix,
            *above._path.parts,
        )

    def canonical(self) -> Self:
        """The same with all links followed."""
        with _named(self.place):
            return type(self)(self.source.canonical(self.place), self.source)

    def inode(self) -> Hashable | None:
        """What it is under any of its names; see `Source.inode`."""
        return self.source.inode(self.place)

    # -------------------------------------------------------------------------------- what it is

    def state(self) -> State:
        """Kind, size and identity. Raises FileNotFoundError where nothing is there."""
        state = self._state()
        if state is None:
            raise FileNotFoundError(2, "No such file or directory", self.place)
        return state

    def exists(self) -> bool:
        """Whether anything is there, links followed."""
        return self._state() is not None

    def is_file(self) -> bool:
        """Whether it is, or leads to, a regular file."""
        return self._kind() == "file"

    def is_directory(self) -> bool:
        """Whether it is, or leads to, a directory."""
        return self._kind() == "directory"

    def is_link(self) -> bool:
        """Whether it is a link, even a dangling one."""
        if self.entry:
            return self.entry.link
        with _named(self.place):
            return self.source.is_link(self.place)

    # --------------------------------------------------------------------------------- contents

    def entries(self) -> list[Self]:
        """What is in a directory, sorted by name. Raises OSError where it is not one."""
        with _named(self.place):
            found = self.source.entries(self.place)
        return [type(self)((self / entry.name).place, self.source, entry) for entry in found]

    def glob(self, pattern: str) -> list[Self]:
        """The entries whose names match `pattern` (`*`, `?`, `[...]`), sorted; none where it is not a directory."""
        if not self.is_directory():
            return []
        return [entry for entry in self.entries() if fnmatch.fnmatchcase(entry.name, pattern)]

    def open(self) -> OpenSource:
        """Open the file. Raises OSError where it is not a regular file, or cannot be opened."""
        state = self.entry.state if self.entry else None
        with _named(self.place):
            return self.source.reopen(self.place, state) if state else self.source.open(self.place)

    def head(self, length: int) -> bytes:
        """The first bytes of a file. Raises OSError as `open` does."""
        with self.open() as file, _named(self.place):
            return file.read(0, length)

    def read(self, limit: int) -> bytes:
        """All of a small file.

        Raises:
            CheckpointError: it has more than `limit` bytes, is not a regular file, or cannot be read.
        """
        try:
            with self.open() as file:
                if file.size > limit:
                    raise CheckpointError(
                        f"it has {file.size:,} bytes; at most {limit:,} are expected", file=self.place
                    )
                return file.read(0, file.size)
        except OSError as error:
            raise CheckpointError(
                f"the file cannot be read: {error.strerror or error}", file=self.place
            ) from error

    def read_text(self, limit: int) -> str:
        """All of a small text file.

        Raises:
            CheckpointError: as `read`, or it is not UTF-8.
        """
        try:
            return self.read(limit).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"the file is not UTF-8: {error.reason}", file=self.place) from error

    def local(self) -> Path | None:
        """The path by which other programs can open it, or None where they cannot."""
        return self.source.local(self.place)

    # ---------------------------------------------------------------------------------- helpers

    @property
    def _prefix(self) -> str:
        head, mark, _ = self.place.partition("://")
        return head + mark if mark and scheme(self.place) else ""

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(self.place.removeprefix(self._prefix))

    def _at(self, path: PurePosixPath) -> Self:
        text = str(path)
        return type(self)(self._prefix + ("" if text == "." and self._prefix else text), self.source)

    def _state(self) -> State | None:
        if self.entry and self.entry.state:
            return self.entry.state
        with _named(self.place):
            return self.source.state(self.place)

    def _kind(self) -> str | None:
        if self.entry:
            return self.entry.kind
        state = self._state()
        return state.kind if state else None


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Have an OSError say where it happened, as far as it does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = place
        raise


def locate(place: str | Path | Location) -> Location:
    """The location of a path or URL; local paths become absolute.

    Raises:
        UsageError: there is no storage for its scheme.
    """
    if isinstance(place, Location):
        return place
    text = unquoted(str(place))
    if found := scheme(text):
        text = STORAGES[found].named(text)
    return Location(text if scheme(text) else str(Path(text).absolute()), source_of(text))


def sought(place: str | Path | Location) -> Location:
    """The location of what a user wants read: as `locate`; and what a hub calls OWNER/REPO, where no path can be meant.

    The cache of Hugging Face's libraries is looked into first. A model's directory in it stands for its snapshot.

    Raises:
        UsageError: as `locate`, or no hub has it.
    """
    if isinstance(place, Location):
        return place
    text = str(place)
    if hub.NAME.fullmatch(text) and not Path(text).parent.exists():
        text = f"hf://{text}"
    if text.startswith("hf://"):
        return locate(hub.cached(text) or text)
    found = locate(text)
    local = found.local()
    whole = None if local is None else hub.snapshot(local)
    return found if whole == local or whole is None else locate(whole)
