"""`conversion.json`: what a finished run records beside its output."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import orjson
import xxhash

from streamconv.errors import CheckpointError, DestinationError, UsageError
from streamconv.execution.execute import PART, Receipt, WorkItem
from streamconv.plans import Plan, fingerprint
from streamconv.plans.forms import Forms
from streamconv.running import __version__, contents
from streamconv.running.destination import RECORD, Destination
from streamconv.storage import writing
from streamconv.storage.location import Location

# The plan of a very large model is tens of MiB; what is larger was not written by a run.
_MAX_JSON = 1 << 30

_SEAL = "xxh3_128"

_State = TypeVar("_State")


@dataclass(frozen=True, slots=True)
class Loss:
    """What a cast lost in one tensor, in elements."""

    name: str
    overflowed: int
    flushed: int


def losses(items: Sequence[WorkItem], done: Mapping[int, Receipt]) -> tuple[Loss, ...]:
    """What casts lost, for each tensor that lost anything."""
    totals: dict[str, tuple[int, int]] = {}
    for item in items:
        receipt = done[item.index]
        if receipt.overflowed or receipt.flushed:
            overflowed, flushed = totals.get(item.name, (0, 0))
            totals[item.name] = (overflowed + receipt.overflowed, flushed + receipt.flushed)
    return tuple(Loss(name, *counts) for name, counts in totals.items())


def record(
    plan: Plan,
    destination: Destination,
    items: Sequence[WorkItem],
    paths: Sequence[str],
    done: Mapping[int, Receipt],
    *,
    checksum: bool,
) -> dict[str, Any]:
    """Everything needed to reproduce or audit a conversion whose files have their final names.

    Two runs of one plan differ in nothing but the versions of what is installed.
    """
    return {
        "streamconv": __version__,
        "versions": {name: version(name) for name in ("numpy", "ml_dtypes", "safetensors")},
        "python": platform.python_version(),
        "source": plan.source,
        "source_format": plan.source_format,
        "target_format": plan.target_format,
        "arguments": dict(plan.arguments),
        "fingerprint": fingerprint(plan),
        "sources": states(plan),
        **({"source_checksums": "held"} if checksum and plan.checksums else {}),
        "checksum_part_bytes": PART,
        "losses": [
            {"tensor": loss.name, "overflowed": loss.overflowed, "flushed": loss.flushed}
            for loss in losses(items, done)
        ],
        **contents.described(plan, destination, items, paths, done),
    }


def states(plan: Plan) -> list[list[Any]]:
    """Size and time of every file that a plan reads."""
    return [
        *([file.path, file.size, file.identity] for file in plan.files),
        *([side.source, side.size, side.identity] for side in plan.side_files),
    ]


@dataclass(frozen=True, slots=True)
class _Head:
    """What a record says besides what is in the files."""

    arguments: Mapping[str, Any]
    fingerprint: str
    sources: tuple[tuple[str, int, int | str], ...]


def read(destination: Destination) -> dict[str, Any] | None:
    """The record of a finished conversion, or None where there is none. It is outside data, and was checked.

    Raises:
        DestinationError: it is damaged.
    """
    place = destination.own / RECORD

    def made(document: Any) -> dict[str, Any]:
        Forms().table(_Head)[1](document)
        contents.read(document, place)
        return dict(document)

    return read_state(place, made)


def write(destination: Destination, document: Mapping[str, Any]) -> None:
    """Write the record of a finished conversion."""
    text = orjson.dumps(sealed(document), option=orjson.OPT_INDENT_2) + b"\n"
    writing.write_whole(destination.own / RECORD, text)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with a digest of all else that it says, in any layout, so that none of it changes unnoticed."""
    said = {name: value for name, value in document.items() if name != _SEAL}
    return {**said, _SEAL: xxhash.xxh3_128_hexdigest(orjson.dumps(said, option=orjson.OPT_SORT_KEYS))}


def read_state(place: Location, made: Callable[[Any], _State]) -> _State | None:
    """What a run keeps in a file of its own, `sealed`, or None where there is none. It is outside data.

    Raises:
        DestinationError: it cannot be read, or `made` finds it damaged.
    """
    if not (place.exists() or place.is_link()):
        return None
    try:
        document = orjson.loads(place.read(_MAX_JSON))
        if not isinstance(document, dict) or document != sealed(document):
            raise ValueError("it does not say what was written there")
        del document[_SEAL]
        return made(document)
    except (CheckpointError, DestinationError, UsageError) as error:
        what = error.headline.message
    except KeyError as error:
        what = f"the record lacks {error}"
    except (ValueError, RecursionError, MemoryError) as error:
        what = f"it is damaged: {str(error) or type(error).__name__}"
    raise DestinationError(
        f"it cannot be used: {what}",
        file=str(place),
        hint="--restart and --overwrite start over without it",
    )
