"""Files of `torch.save` since torch 1.6: a zip archive of a pickle and one stored record a storage.

Layout (pytorch/pytorch: torch/serialization.py, caffe2/serialize/inline_container.cc):
`S/data.pkl` the object, `S/data/K` the bytes of storage K, `S/byteorder`, `S/version` and smaller ones.
S is what the file was called when it was saved, so it is found, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from streamconv.errors import CheckpointError
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
from streamconv.readers.zip_directory import Archive, records
from streamconv.storage.location import Location
from streamconv.tensor import Extent

_OBJECT = "/data.pkl"


def load(file: Location, offset: int = 0, length: int | None = None) -> TorchFile:
    """The object in a torch zip file, its tensors as expressions over extents of that file.

    Args:
        file: what holds it.
        offset: where in the file the archive begins.
        length: how long it is; to the end of the file by default.

    Raises:
        CheckpointError: the archive or the pickle is damaged, hostile, or of another kind.
    """
    path = file.place
    with Archive(file, offset, length) as archive:
        extents = records(archive)
        stem = _stem(extents, path)
        order = _content(archive, extents.get(f"{stem}/byteorder"), 16, b"little")
        if order != b"little":
            raise CheckpointError(
                "its numbers are big-endian: it was saved on a big-endian machine"
                if order == b"big"
                else "its byte order is unknown",
                file=path,
                hint="load and save it with torch on a little-endian machine",
            )
        data = _content(archive, extents[stem + _OBJECT], pickle.MAX_PICKLE)
    content = pickle.decode(data, file=path, calls=CALLS, persistent_load=_storages(extents, stem, path))
    return TorchFile(content)


def _stem(extents: Mapping[str, Extent], path: str) -> str:
    """S of all record names. Raises CheckpointError for archives of other kinds."""
    stems = [
        name.removesuffix(_OBJECT) for name in extents if name.endswith(_OBJECT) and name.count("/") == 1
    ]
    if len(stems) != 1:
        raise CheckpointError(
            f"the zip archive holds {len(stems) or 'no'} records called data.pkl",
            file=path,
            hint="files of torch.save hold one; if this is a package or an application, unpack it first",
        )
    (stem,) = stems
    if f"{stem}/constants.pkl" in extents:
        raise CheckpointError(
            "this is a TorchScript program, not a file of torch.save",
            file=path,
            hint="save the state_dict() of torch.jit.load(file) with torch.save, and convert that",
        )
    return stem


def _content(archive: Archive, extent: Extent | None, limit: int, absent: bytes = b"") -> bytes:
    """The bytes of a small record."""
    if extent is None:
        return absent
    if extent.length > limit:
        archive.fail(f"a record of {extent.length} bytes is too long to be what it is called")
    return archive.read(extent.offset - archive.offset, extent.length)


def _storages(extents: Mapping[str, Extent], stem: str, path: str) -> Callable[[object], Storage]:
    """What the pickle's persistent ids mean: ('storage', class, key, location, elements)."""

    @cache
    def storage(key: str, kind: StorageClass, length: int) -> Storage:
        extent = extents.get(f"{stem}/data/{key}")
        if extent is None:
            raise CheckpointError(f"the archive lacks the data of storage {describe(key)}")
        if length > extent.length:
            raise CheckpointError(
                f"storage {describe(key)} should have {length} bytes, and its record has {extent.length}"
            )
        return Storage(f"data/{key}", Extent(path, extent.offset, length), kind)

    def persistent_load(identifier: object) -> Storage:
        match identifier:
            case ("storage" | b"storage", cls, str(key), _, numel):
                kind = storage_class(cls)
                return storage(key, kind, storage_length(kind, numel, key))
            case ("storage" | b"storage", _, key, _, _):
                raise CheckpointError(f"a storage is called {describe(key)}")
        raise CheckpointError("the pickle refers to something that is not a storage")

    return persistent_load
