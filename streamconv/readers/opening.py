"""A path in, a `Checkpoint` out: the table of formats, and the first of them that finds its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv.errors import CheckpointError, StreamconvError, UsageError, listed
from streamconv.options.fields import filled
from streamconv.options.records import ReadingOptions
from streamconv.readers import (
    averages,
    dcp,
    deepspeed,
    diffusers,
    huggingface,
    sat,
    sentence_transformers,
    side_files,
)
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.readers.files import open_file
from streamconv.readers.format import Format, OneOfMany
from streamconv.readers.mindspore import ranks, sharded
from streamconv.shard import STEMS
from streamconv.storage.first_seen import watched
from streamconv.storage.location import Location, sought

FORMATS: list[Format[Any]] = [
    sat.FORMAT,
    deepspeed.FORMAT,
    ranks.FORMAT,
    sharded.FORMAT,
    dcp.FORMAT,
    diffusers.FORMAT,
    sentence_transformers.FORMAT,
    huggingface.FORMAT,
]
"""What is read; the first that finds its own takes it. Files alone: `files.FORMATS`."""

Identify = Callable[[Checkpoint], Checkpoint]
"""Functions that identify the model of a checkpoint without a config, by names, shapes and files beside it.

It gives names and configs to the components of its own model's checkpoints, and all others back as they are. Tensors
that cannot be read are handed on with their component, or refused: else they would be lost in silence.
"""

_identities: dict[Identify, None] = {}


def register(*identities: Identify) -> None:
    """Let these identify what is opened, in this order; a repeated call changes nothing."""
    _identities.update(dict.fromkeys(identities))


def open_checkpoint(path: str | Path | Location, reading: ReadingOptions | None = None) -> Checkpoint:
    """Open a checkpoint of any format: one file, or a directory.

    Args:
        path: the file or directory.
        reading: options for what the reader cannot find out by itself.

    Raises:
        UsageError: there is nothing at `path`, or only a part of a checkpoint.
        CheckpointError: what is there is damaged, or not a checkpoint.
    """
    told = filled(ReadingOptions, reading or ReadingOptions())
    try:
        checkpoint = averages.settled(_opened(watched(sought(path)), told), ema=told["ema"])
        for identify in _identities:
            checkpoint = identify(checkpoint)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", file=str(error.filename or path)
        ) from error
    return checkpoint


def open_model(path: str | Path | Location) -> Checkpoint:
    """Open what a conversion is to be like: a checkpoint, or a directory with no weights, only a config and the like.

    Raises:
        UsageError: there is nothing at `path`.
        CheckpointError: what is there is damaged, or neither.
    """
    directory = sought(path)
    config = huggingface.read_config(directory) if directory.is_directory() else None
    if config is None or any(huggingface.is_model(entry.name) for entry in directory.entries()):
        return open_checkpoint(directory)
    empty = Component("", STEMS[0], {}, config=config)
    return Checkpoint(directory, "config", (empty,), (), side_files.of_directory(directory, ())[0])


def _opened(path: Location, reading: ReadingOptions) -> Checkpoint:
    if not path.is_file() and not path.is_directory():
        raise UsageError("there is no such file or directory", file=str(path))
    part = _part(path)
    if part is not None:
        hint = part.remedy.format(directory=path.parent)
        raise UsageError(f"this is {part.what}, and not a checkpoint by itself", file=str(path), hint=hint)
    if path.is_file():
        return _of_file(path, reading)
    for form in FORMATS:
        found = form.find(path, reading)
        if found is not None:
            return form.read(found, reading)
    raise CheckpointError("no weights are in this directory", file=str(path), hint=_hint(path))


def _part(path: Location) -> OneOfMany | None:
    """What a path is that makes a checkpoint only together with others."""
    parts = (part for form in FORMATS for part in form.parts if part.directories or path.is_file())
    return next((part for part in parts if part.takes(path)), None)


def _of_file(path: Location, reading: ReadingOptions) -> Checkpoint:
    file = open_file(path, reading)
    alone = (form.alone(file, reading) for form in FORMATS if form.alone)
    return next(checkpoint for checkpoint in alone if checkpoint is not None)


def _hint(path: Location) -> str:
    """What the user may have meant by a directory in which nothing was found."""
    signs = {name: what for form in FORMATS for name, what in form.signs.items()}
    for name, what in signs.items():
        if (path / name).exists():
            return f"it looks like {what}"
    inside: list[str] = []
    for entry in path.entries():
        if entry.is_directory() and not entry.name.startswith("."):
            part = _part(entry)
            if part is not None:
                return f"in it is {part.what}; {part.remedy.format(directory=path)}"
            if _holds_one(entry):
                inside.append(entry.name)
    if inside:
        return f"there are checkpoints one level down, give one of them: {listed(reversed(inside))}"
    return "safetensors files and files of torch.save are what is looked for"


def _holds_one(directory: Location) -> bool:
    """Whether a directory holds a checkpoint of any format, whole or not."""
    names = {entry.name for entry in directory.entries()}
    if any(not names.isdisjoint(form.signs) for form in FORMATS):
        return True
    try:
        return any(
            form.find(directory, filled(ReadingOptions, ReadingOptions())) is not None for form in FORMATS
        )
    except StreamconvError:
        return True
