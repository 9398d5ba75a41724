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

# Lists and objects within one another; orjson reads 1024 and writes 254.
_DEEPEST = 200


def read_json(file: Location, limit: int = SETTINGS) -> Any:
    """The document in a JSON file, which can be written again.

    Raises:
        CheckpointError: there is none, or it is larger than that, or deeper than any that there is.
    """
    try:
        return parsed(file.read(limit))
    except ValueError as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}", file=file.place, hint="download it again"
        ) from error


def parsed(text: bytes) -> Any:
    """A document of JSON that can be written again. Raises ValueError where it is none, or too deep."""
    document = orjson.loads(text)
    if text.count(b"[") + text.count(b"{") > _DEEPEST and _depth(document) > _DEEPEST:
        raise ValueError(f"it is more than {_DEEPEST} levels deep")
    return document


def read_config(file: Location) -> dict[str, Any] | None:
    """The object in a model's config; None where it holds something else.

    Raises:
        CheckpointError: as `read_json`, or what says which model it is are not names.
    """
    config = read_json(file)
    if not isinstance(config, dict):
        return None
    for key in ("model_type", "_class_name", "architectures"):
        said = config.get(key)
        is_list = key == "architectures"
        names = said if is_list and isinstance(said, list) else [said]
        if said is not None and (
            is_list != isinstance(said, list) or not all(isinstance(each, str) for each in names)
        ):
            wanted = "a list of names" if is_list else "a name"
            raise CheckpointError(
                f"'{key}' is {str(said)[:40]}, not {wanted}", file=file.place, hint="correct it"
            )
    return config


def _depth(document: Any) -> int:
    """How many lists and objects are within one another."""
    depth, level = 0, [document]
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def read_toml(file: Location, what: str) -> dict[str, Any]:
    """The table in a TOML file of the user's. Raises UsageError where there is none; `what` it should be."""
    try:
        return tomllib.loads(file.read_text(SETTINGS))
    except CheckpointError as error:
        raise UsageError(f"cannot read the {what}: {error.headline.message}", file=file.place) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"cannot read the {what}: {error}", file=file.place) from error


def latest(file: Location) -> str | None:
    """The content of a file that names the last save; None where there is no such file.

    The text is not to be trusted: it becomes a part of a path.
    """
    if not file.is_file() or file.state().size > NAME:
        return None
    return file.read(NAME).decode(errors="replace").strip()
