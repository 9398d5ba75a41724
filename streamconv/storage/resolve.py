"""Which storage a place belongs to: the scheme before `://`, or the local disk."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote

from streamconv.errors import UsageError
from streamconv.storage import hub, objects, web
from streamconv.storage.hub import HubSource
from streamconv.storage.local import LocalSink, LocalSource
from streamconv.storage.objects import ObjectSource
from streamconv.storage.roles import Sink, Source
from streamconv.storage.web import WebSource

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")

# What people type for a place that is not on this machine, and what `pathlib` makes of a URL (`s3:/bucket`): a part
# that ends in a colon before the first slash. `s3:bucket` and Windows' `C:\\x` are meant so, too.
_ELSEWHERE = re.compile(r"([\w][\w+.@-]*):[/\\]|(?:s3|gs|az|hf|https?|file|hdfs|ftp|sftp):", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Storage:
    """How to make the two roles of a storage.

    Attributes:
        source: what reads.
        sink: what writes; None where it is only read.
        shared: whether other processes on this machine see the same files there.
        named: the place that a name means, as it is to be kept; a UsageError where it is none.
    """

    source: Callable[[], Source]
    sink: Callable[[], Sink] | None = None
    shared: bool = True
    named: Callable[[str], str] = str


STORAGES: dict[str, Storage] = {
    "": Storage(LocalSource, LocalSink),
    **dict.fromkeys(("s3", "gs", "az"), Storage(ObjectSource, named=objects.named)),
    **dict.fromkeys(("http", "https"), Storage(WebSource, named=web.named)),
    "hf": Storage(HubSource, named=hub.named),
}
"""Scheme -> storage. A new one is a module with its roles, and a row here."""


def scheme(place: str) -> str:
    """The scheme that a place names, empty for a local path.

    Raises:
        UsageError: there is no such storage.
    """
    if place.startswith("/"):
        return ""
    match = _SCHEME.match(place)
    if match and match[1] in STORAGES:
        return match[1]
    elsewhere = match or _ELSEWHERE.match(place)
    if elsewhere is None:
        return ""
    known = ["local paths", "file:///", *(f"{each}://" for each in STORAGES if each)]
    raise UsageError(
        f"there is no storage for {elsewhere[0]}",
        file=place,
        hint=f"what can be read and written: {', '.join(known)}; a local path that begins so is written ./{place}",
    )


def unquoted(text: str) -> str:
    """The local path that a `file:` URL means (RFC 8089), or any other text as it is.

    Raises:
        UsageError: it is on another machine, or not absolute.
    """
    if text[:5].lower() != "file:":
        return text
    rest = text[5:].removeprefix("//localhost") if text[5:].startswith("//localhost/") else text[5:]
    path = rest[2:] if rest.startswith("//") else rest
    if not path.startswith("/"):
        raise UsageError("a file: URL is of this machine, and absolute", file=text, hint="write file:///PATH")
    return unquote(path, errors="surrogateescape")


def source_of(place: str) -> Source:
    """The source for a place. Raises UsageError where there is none."""
    return STORAGES[scheme(place)].source()


def sink_of(place: str) -> Sink:
    """The sink for a place. Raises UsageError where there is none, or no file can be called so."""
    if "\0" in place:
        raise UsageError(f"no path holds a NUL, as {place!r} does", hint="choose another destination")
    sink = STORAGES[scheme(place)].sink
    if sink is None:
        raise UsageError(
            f"{scheme(place)}:// is read, and cannot be written to",
            file=place,
            hint="convert into a directory, and copy that there",
        )
    return sink()


def portable() -> dict[str, bytes]:
    """Pickles, by scheme, of the storages that other packages have added, for workers in other processes.

    A pickle names the modules to import. Storages that are not shared, or not importable by name, are left out.
    """
    pickles = {}
    for name, storage in STORAGES.items():
        with suppress(pickle.PicklingError, AttributeError, TypeError):
            pickles[name] = pickle.dumps(storage) if name and storage.shared else b""
    return {name: data for name, data in pickles.items() if data and b"__main__" not in data}
