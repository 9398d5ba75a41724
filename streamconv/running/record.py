"""`conversion.json`: what a finished run records beside its output."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, cast

from streamconv.execution.execute import PART, Receipt, WorkItem
from streamconv.ops import STEPS, Rounding
from streamconv.options.fields import fields, from_record
from streamconv.options.records import PlanOptions, is_name
from streamconv.plans import Plan, fingerprint
from streamconv.plans.forms import Forms
from streamconv.running import __version__, contents, state
from streamconv.running.destination import RECORD, Destination
from streamconv.storage.location import locate
from streamconv.storage.resolve import scheme

# How many directories above a destination may be gone up to, to a place on record; further up are a machine's own names.
_NEAR = 2

_ELSEWHERE = "/.../"


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


@dataclass(frozen=True, slots=True)
class Figure:
    """How far the codes of one tensor are from what they are of: relative errors of elements that are not zero."""

    name: str
    largest: float
    mean: float


def figures(items: Sequence[WorkItem], done: Mapping[int, Receipt]) -> tuple[Figure, ...]:
    """How far codes are from what they are of, for each tensor of codes that were made."""
    found: dict[str, Rounding] = {}
    for item in items:
        made = done[item.index].rounding
        if made.count:
            found[item.name] = found.get(item.name, Rounding()).with_(made)
    return tuple(
        Figure(name, each.largest / STEPS, each.total / STEPS / each.count) for name, each in found.items()
    )


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
    rounded = figures(items, done)
    return {
        "streamconv": __version__,
        "versions": {name: version(name) for name in ("numpy", "ml_dtypes", "safetensors")},
        "python": platform.python_version(),
        "source": plan.source if scheme(plan.source) else locate(plan.source).name,
        "source_format": plan.source_format,
        "target_format": plan.target_format,
        "arguments": told(plan.arguments, destination),
        "fingerprint": fingerprint(plan),
        "sources": states(plan),
        **({"source_checksums": "held"} if checksum and plan.checksums else {}),
        "checksum_part_bytes": PART,
        "losses": [
            {"tensor": loss.name, "overflowed": loss.overflowed, "flushed": loss.flushed}
            for loss in losses(items, done)
        ],
        **(
            {
                "rounding": [
                    {"tensor": each.name, "largest": each.largest, "mean": each.mean} for each in rounded
                ]
            }
            if rounded
            else {}
        ),
        **contents.described(plan, destination, items, paths, done),
    }


def states(plan: Plan) -> list[list[Any]]:
    """Size and time of every file that a plan reads, by its place in the source; of one from elsewhere, its name."""

    def place(path: str) -> str:
        above = (f"{plan.source}/", f"{locate(plan.source).parent}/")
        return next((path.removeprefix(each) for each in above if path.startswith(each)), locate(path).name)

    return [
        *([place(file.path), file.size, file.identity] for file in plan.files),
        *([place(side.source), side.size, side.identity] for side in plan.side_files),
    ]


def told(arguments: Mapping[str, Any], destination: Destination) -> dict[str, Any]:
    """Options as a record holds them: what is uploaded with a result says nothing of the machine's directories.

    A place near the destination is one relative to it, so that both can be moved; of another one, only the name stays.
    """

    def tell(place: str) -> str:
        if not place.startswith("/"):
            return place  # a URL
        here = destination.directory.local()
        relative = os.path.relpath(place, here) if here else "../" * (_NEAR + 1)
        return (
            _ELSEWHERE + PurePosixPath(place).name
            if relative.startswith("../" * (_NEAR + 1))
            else f"./{relative}"
        )

    return _places(arguments, tell)


def grounded(arguments: Mapping[str, Any], destination: Destination) -> dict[str, Any]:
    """Options as they were before they were `told`, but for what is not near the destination.

    A record is outside data: where it names another place, nothing is looked for there, and no server is asked.
    """

    def ground(place: str) -> str:
        if not place.startswith("./") or os.path.normpath(place).startswith("../" * (_NEAR + 1)):
            return _ELSEWHERE + PurePosixPath(place).name
        storage, mark, path = str(destination.directory).rpartition("://")
        return f"{storage}{mark}{os.path.normpath(f'{path}/{place}')}"

    return _places(arguments, ground)


def arguments(destination: Destination) -> PlanOptions:
    """The options of the conversion that a destination records; none where there is no record.

    Raises:
        DestinationError: it is damaged.
        UsageError: they are not options of this version.
    """
    options = from_record(PlanOptions, (read(destination) or {}).get("arguments", {}))
    return cast(PlanOptions, grounded(cast(Mapping[str, Any], options), destination))


def _places(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Options with other places in those that name places; a recipe by name is none."""
    known = fields(PlanOptions)

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [changed(name, each) for each in value]
        return (
            change(value) if isinstance(value, str) and not (name == "recipe" and is_name(value)) else value
        )

    return {
        name: changed(name, value) if name in known and Path in known[name].types else value
        for name, value in values.items()
    }


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

    return state.read(
        place,
        made,
        hint="to convert, --overwrite or --restart does without it; to verify, the options of the conversion do: "
        "streamconv verify SRC DST OPTIONS",
    )


def write(destination: Destination, document: Mapping[str, Any]) -> None:
    """Write the record of a finished conversion."""
    state.write(destination.own / RECORD, document, readable=True)
