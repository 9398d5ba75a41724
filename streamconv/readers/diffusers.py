"""A diffusers pipeline: a directory of components, of which those with weights are models of their own."""

from __future__ import annotations

from streamconv.errors import CheckpointError, Problems
from streamconv.options import ReadingOptions
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
    models: list[Checkpoint] = []
    problems = Problems()
    for path in found.entries():
        if not path.is_directory() or path.name.startswith("."):
            continue
        try:
            component = huggingface.find(path, reading)
            if component is not None:
                models.append(huggingface.read_model(component, reading, path.name))
        except CheckpointError as error:
            problems += dict.fromkeys((error.headline, *error.problems))
    problems.report("components of the pipeline cannot be read", file=str(found))
    if not models:
        raise CheckpointError("no weights are in this directory", file=str(found))
    kinds = ", ".join(dict.fromkeys(model.format for model in models))
    return huggingface.united(found, models, f"{FORMAT.name} ({kinds})")


FORMAT = Format(
    "diffusers pipeline", "a directory with `model_index.json`; all components in one run", find, read
)
