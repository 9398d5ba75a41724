"""What a reader is: one record per format.

A format is a module or a package with the same members in the same order:

    Found             what of it is at a path
    find(path, ...)   -> Found, or None where something else is there
    read(found, ...)  -> Checkpoint; what the source has that options apply to is in its `reported`
    FORMAT            the record of it, a row of `opening.FORMATS`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from streamconv.options.records import ReadingOptions
from streamconv.readers.checkpoint import Checkpoint, WeightFile
from streamconv.readers.together import numbered
from streamconv.storage.location import Location

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class OneOfMany:
    """A file that is one of several that make a checkpoint, by its name.

    Attributes:
        names: matches the file's name. A group `count` says how many files there are, `rank` which one it is: one
            file, or the first where no other is beside it, may be all there is.
        what: what such a file is.
        remedy: what to do instead, `{directory}` being the one that it lies in.
        directories: whether the names are those of directories, each with the files of one rank.
    """

    names: re.Pattern[str]
    what: str
    remedy: str = "give the directory: {directory}"
    directories: bool = False

    def takes(self, path: Location) -> bool:
        """Whether a file, or a directory, is a part and no checkpoint by itself."""
        if self.directories and path.is_file():
            path = path.parent
        match = self.names.fullmatch(path.name)
        if match is None:
            return False
        said = match.groupdict()
        if "count" in said:
            return int(said["count"]) > 1
        return "rank" not in said or int(said["rank"]) > 0 or len(numbered(path.parent, self.names)) > 1


@dataclass(frozen=True, slots=True)
class Format(Generic[Found]):
    """How checkpoints of one format are recognised and read.

    Attributes:
        name: what `Checkpoint.format` says.
        forms: in which forms it is read, in words.
        find: what of it is in a directory, by its files; None where there is nothing of it. Raises CheckpointError
            where it is one and cannot be read.
        read: opens what was found. Raises CheckpointError with all problems.
        alone: the checkpoint in a single file, recognised by the names of its tensors; None where it is another's.
        signs: file name -> what a directory with such a file most likely is; for the error where no checkpoint is
            found in it.
        parts: files that are not checkpoints by themselves.
    """

    name: str
    forms: str
    find: Callable[[Location, ReadingOptions], Found | None]
    read: Callable[[Found, ReadingOptions], Checkpoint]
    alone: Callable[[WeightFile, ReadingOptions], Checkpoint | None] | None = None
    signs: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[OneOfMany, ...] = ()
