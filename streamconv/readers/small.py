"""Small files of a checkpoint, read whole: how large each kind may be, and JSON."""

from __future__ import annotations

import tomllib
from typing import Any

import orjson

from streamconv.errors import CheckpointError, UsageError
from streamconv.storage.location import Location

NAME = 4096
"""Files that hold one name, such as `latest`."""
SETTINGS = 16 << 20
"""Configs and the like."""
TOKENIZER = 64 << 20
"""Vocabularies, with their merges."""
INDEX = 256 << 20
"""What lists tensors: indexes, strategies."""
METADATA = 1 << 30
"""What lists every rank's part of every tensor."""


def read_json(file: Location, limit: int = SETTINGS) -> Any:
    """The document in a JSON file. Raises CheckpointError where there is none, or it is larger than that."""
    try:
        return orjson.loads(file.read(limit))
    except orjson.JSONDecodeError as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}", file=file.place, hint="download it again"
        ) from error


def read_toml(file: Location, what: str) -> dict[str, Any]:
    """The table in a TOML file of the user's. Raises UsageError where there is none; `what` it should be."""
    try:
        return tomllib.loads(file.read_text(SETTINGS))
    except CheckpointError as error:
        raise UsageError(f"cannot read the {what}: {error.headline.message}", file=file.place) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"cannot read the {what}: {error}", file=file.place) from error


def latest(file: Location) -> str | None:
    """The content of a file that names the last save; None where there is no such file.

    The text is not to be trusted: it becomes a part of a path.
    """
    if not file.is_file() or file.state().size > NAME:
        return None
    return file.read(NAME).decode(errors="replace").strip()
