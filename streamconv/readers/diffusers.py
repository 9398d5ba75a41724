"""A diffusers pipeline: a directory of components, of which those with weights are models of their own."""

from __future__ import annotations

from pathlib import Path

from streamconv.errors import CheckpointError, Problem
from streamconv.readers.huggingface import Model, read_model

INDEX = "model_index.json"
"""The file that makes a directory a pipeline."""


def read_components(directory: Path, root: str | None) -> list[Model]:
    """Every component with weights, in the order of their names.

    Raises:
        CheckpointError: what is wrong with all of them.
    """
    models: list[Model] = []
    problems: list[Problem] = []
    for path in sorted(directory.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            model = read_model(path, path.name, root)
        except CheckpointError as error:
            problems.append(error.headline)
            problems.extend(problem for problem in error.problems if problem != error.headline)
            continue
        if model is not None:
            models.append(model)
    if problems:
        raise CheckpointError(
            "components of the pipeline cannot be read", file=str(directory), problems=problems
        )
    return models
