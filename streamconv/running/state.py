"""What a run keeps in files of its own: JSON, sealed with a digest of itself. To the next run it is outside data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson
import xxhash

from streamconv.errors import CheckpointError, DestinationError, UsageError
from streamconv.storage import writing
from streamconv.storage.location import Location

# The plan of a very large model is tens of MiB; what is larger was not written by a run.
_LARGEST = 1 << 30

_SEAL = "xxh3_128"

_State = TypeVar("_State")


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with a digest of all else that it says, in any layout, so that none of it changes unnoticed."""
    said = {name: value for name, value in document.items() if name != _SEAL}
    return {**said, _SEAL: xxhash.xxh3_128_hexdigest(orjson.dumps(said, option=orjson.OPT_SORT_KEYS))}


def write(place: Location, document: Mapping[str, Any], *, readable: bool = False) -> None:
    """Write a document, sealed and synced, under its name; a `readable` one has a line for each value."""
    text = orjson.dumps(sealed(document), option=orjson.OPT_INDENT_2 if readable else None)
    writing.write_whole(place, text + b"\n")


def read(
    place: Location,
    made: Callable[[Any], _State],
    *,
    wrong: str = "it cannot be used",
    hint: str = "--restart and --overwrite start over without it",
) -> _State | None:
    """What is `made` of a document that was written by `write`; None where there is no file.

    Raises:
        DestinationError: it cannot be read, is not as it was written, or `made` finds it damaged: `wrong`, and why.
    """
    if not (place.exists() or place.is_link()):
        return None
    try:
        document = orjson.loads(place.read(_LARGEST))
        if not _is_sealed(document):
            raise ValueError("it does not say what was written there")
        del document[_SEAL]
        return made(document)
    except (CheckpointError, DestinationError, UsageError) as error:
        what = error.headline.message
    except KeyError as error:
        what = f"it lacks {error}"
    except (ValueError, RecursionError, MemoryError) as error:
        what = f"it is damaged: {str(error) or type(error).__name__}"
    raise DestinationError(f"{wrong}: {what}", file=str(place), hint=hint)


def _is_sealed(document: Any) -> bool:
    try:
        return isinstance(document, dict) and document == sealed(document)
    except TypeError:  # it is nested deeper than orjson writes, though not than it reads
        return False
