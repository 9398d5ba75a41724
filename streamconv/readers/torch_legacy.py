"""Files of `torch.save` before torch 1.6, and since with `_use_new_zipfile_serialization=False`.

Layout (pytorch/pytorch: torch/serialization.py, `_legacy_save`): five pickles, back to back, then the
storages without any padding:

1. a magic number; 2. the protocol version 1001; 3. the writer's byte order;
4. the object; 5. the keys of the storages, in the order in which they follow;
then, for each key, the number of elements (int64) and the bytes.

Where a storage lies follows only from the fifth pickle and the classes that the fourth one mentions, so
the fourth is decoded twice: for the classes, and for the object.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

from streamconv.errors import CheckpointError, located
from streamconv.readers import pickle
from streamconv.readers.pickle import describe
from streamconv.readers.torch_rebuild import (
    CALLS,
    Storage,
    StorageClass,
    TorchFile,
    storage_class,
    storage_length,
)
from streamconv.readers.window import CUT_OFF, Window
from streamconv.storage.location import Location
from streamconv.tensor import Extent

if TYPE_CHECKING:
    import mmap

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_TAR_MAGIC = slice(257, 262)
_COUNT = 8  # bytes of a storage's number of elements


class _Reference(NamedTuple):
    """What a persistent id says of a storage, and the part of it that is meant: (key, start, elements)."""

    cls: StorageClass
    key: str
    numel: int
    view: tuple[str, int, int] | None


def load(file: Location) -> TorchFile:
    """The object in a legacy torch file, its tensors as expressions over extents of that file.

    Raises:
        CheckpointError: the file is damaged, hostile, or of another kind.
    """
    with Window(file) as window:
        if not window.length:
            raise CheckpointError("the file is empty", file=file.place, hint="copy it again")
        # Only the pickles at the start are touched. Where all of a buffer is fetched, they are most likely in the first.
        for length in window.prefixes(pickle.MAX_PICKLE):
            last = length == min(window.length, pickle.MAX_PICKLE)
            with (
                suppress(*() if last else (CheckpointError,)),
                window.mapped(length) as data,
                located(file.place),
            ):
                return _load(window, data)
        raise AssertionError


def _load(window: Window, data: bytes | mmap.mmap) -> TorchFile:
    path, size = window.path, window.length
    if data[_TAR_MAGIC] == b"ustar":
        raise CheckpointError(
            "this is a tar archive, as torch before 0.1.10 saved",
            hint="load it with a torch that still can (weights_only=False) and save it again",
        )
    magic, position = pickle.decode_prefix(data, file=path)
    if magic != _MAGIC:
        raise CheckpointError("this is a pickle, but not a file of torch.save")
    protocol, position = pickle.decode_prefix(data, position, file=path)
    if protocol != _PROTOCOL:
        raise CheckpointError(f"torch's file protocol is {describe(protocol)}, not {_PROTOCOL}")
    system, position = pickle.decode_prefix(data, position, file=path)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(
            "its numbers are big-endian, or it does not say what they are",
            hint="load and save it with torch on a little-endian machine",
        )
    start = position
    first: dict[str, _Reference] = {}

    def note(identifier: object) -> object:
        reference = _parsed(identifier)
        if not isinstance(reference, _Reference):
            return reference
        first.setdefault(reference.key, reference)
        return None

    nothing = dict.fromkeys(CALLS, lambda *_: None)  # tensors whose storages are not located yet
    _, position = pickle.decode_prefix(data, start, file=path, calls=nothing, persistent_load=note)
    keys, position = pickle.decode_prefix(data, position, file=path)
    extents, end = _extents(window, position, keys, first)
    storage = cache(partial(_storage, extents=extents))

    def resolve(identifier: object) -> object:
        reference = _parsed(identifier)
        return storage(reference) if isinstance(reference, _Reference) else reference

    content, _ = pickle.decode_prefix(data, start, file=path, calls=CALLS, persistent_load=resolve)
    notes = (
        (f"{size - end} bytes after the last storage belong to nothing and are left alone",)
        if end < size
        else ()
    )
    return TorchFile(content, notes)


def _parsed(identifier: object) -> object:
    """The `_Reference` of a persistent id; for the source of a module, the class that it belongs to.

    A storage is ('storage', class, key, location, elements, view). The view is a part of a storage that is a storage
    itself, as torch before 0.4 wrote: (key, start, elements).
    """
    match identifier:
        case ("module" | b"module", cls, _, _):
            return cls
        case ("storage" | b"storage", cls, str(key), _, int(numel), None):
            return _Reference(_checked(cls, key, numel), key, numel, None)
        case ("storage" | b"storage", cls, str(key), _, int(numel), (str(name), int(first), int(count))):
            kind = _checked(cls, key, numel, first, count)
            return _Reference(kind, key, numel, (name, first, count))
        case ("storage" | b"storage", _, str(key), _, int(), _):
            raise CheckpointError(f"storage {describe(key)} is a view that makes no sense")
    raise CheckpointError("the pickle refers to something that is not a storage")


def _checked(cls: object, key: str, *counts: int) -> StorageClass:
    kind = storage_class(cls)
    for count in counts:
        storage_length(kind, count, key)
    return kind


def _storage(reference: _Reference, extents: Mapping[str, Extent]) -> Storage:
    cls, key, numel, view = reference
    whole = extents.get(key)
    if whole is None:
        raise CheckpointError(f"the file lacks the data of storage {describe(key)}")
    name, first, count = view or (key, 0, numel)
    start, length = first * cls.width, count * cls.width
    if start + length > whole.length:
        raise CheckpointError(
            f"storage {describe(name)} reaches byte {start + length} of {describe(key)}, which has {whole.length}"
        )
    return Storage(name, Extent(whole.file, whole.offset + start, length), cls)


def _extents(
    window: Window, position: int, keys: object, first: dict[str, _Reference]
) -> tuple[dict[str, Extent], int]:
    """Key -> where the storage's bytes are, and where the last one ends."""
    path, size = window.path, window.length
    if not isinstance(keys, list):
        raise CheckpointError(f"the list of storages is {describe(keys)}")
    extents: dict[str, Extent] = {}
    for key in keys:
        reference = first.get(key) if isinstance(key, str) else None
        if reference is None:
            raise CheckpointError(f"storage {describe(key)} is in the file, and no tensor mentions it")
        if key in extents:
            raise CheckpointError(f"two storages are called {describe(key)}")
        count = window.read(position, min(_COUNT, size - position))
        length = storage_length(reference.cls, int.from_bytes(count, "little", signed=True), key)
        position += _COUNT
        if len(count) < _COUNT or length > size - position:
            raise CheckpointError(
                f"storage {describe(key)} should have {length} bytes from byte {position}, beyond the end at {size}",
                hint=CUT_OFF,
            )
        if length != reference.numel * reference.cls.width:
            raise CheckpointError(
                f"storage {describe(key)} has {length} bytes, and the pickle says "
                f"{reference.numel * reference.cls.width}"
            )
        extents[key] = Extent(path, position, length)
        position += length
    return extents, position
