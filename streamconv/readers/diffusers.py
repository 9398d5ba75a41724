"""A diffusers pipeline: a directory of components, of which those with weights are models of their own."""

from __future__ import annotations

from streamconv.options.records import ReadingOptions
from streamconv.readers import huggingface
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.format import Format
from streamconv.storage.location import Location

INDEX = "model_index.json"
"""The file that makes a directory a pipeline."""


def find(path: Location, _: ReadingOptions) -> Location | None:
    """The directory, where it is a pipeline."""
    return path if (path / INDEX).is_file() else None


def read(found: Location, reading: ReadingOptions) -> Checkpoint:
    """Every component with weights, in the order of their names.

    Raises:
        CheckpointError: what is wrong with all of them.
    """
    paths = (path for path in found.entries() if path.is_directory() and not path.name.startswith("."))
    return huggingface.several(found, {path.name: path for path in paths}, reading, FORMAT.name)


FORMAT = Format(
    "diffusers pipeline", "a directory with `model_index.json`; all components in one run", find, read
)
