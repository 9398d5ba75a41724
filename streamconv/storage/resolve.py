"""Which storage a place belongs to: the scheme before `://`, or the local disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from streamconv.errors import UsageError
from streamconv.storage.local import LocalSink, LocalSource
from streamconv.storage.roles import Sink, Source

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Storage:
    """How to make the roles of one storage; `sink` is None where it is only read."""

    source: Callable[[], Source]
    sink: Callable[[], Sink] | None = None


STORAGES: dict[str, Storage] = {"": Storage(LocalSource, LocalSink)}
"""Scheme -> storage. A new one is a module with its roles, and a row here."""


def scheme(place: str) -> str:
    """The scheme that a place names, empty for a local path.

    Raises:
        UsageError: there is no such storage.
    """
    match = _SCHEME.match(place)
    name = match[1] if match else ""
    if name not in STORAGES:
        known = ", ".join(f"{each}://" for each in STORAGES if each) or "none"
        raise UsageError(
            f"there is no storage for {name}://", file=place, hint=f"local paths are; of others: {known}"
        )
    return name


def source_of(place: str) -> Source:
    """What reads a place. Raises UsageError where no storage does."""
    return STORAGES[scheme(place)].source()


def sink_of(place: str) -> Sink:
    """What writes a place. Raises UsageError where no storage does."""
    sink = STORAGES[scheme(place)].sink
    if sink is None:
        raise UsageError("nothing can be written there", file=place, hint="choose another destination")
    return sink()
