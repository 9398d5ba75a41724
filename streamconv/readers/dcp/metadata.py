"""`.metadata` of torch.distributed.checkpoint: which part of which tensor is where in which file.

It is a pickle of a `Metadata` record; here it is decoded as data. Source: pytorch/pytorch:
torch/distributed/checkpoint/metadata.py (records), filesystem.py (`_StorageInfo`, `.metadata`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from streamconv.dtypes import BY_TORCH_NAME
from streamconv.errors import CheckpointError, Problem
from streamconv.readers import numbers, pickle
from streamconv.readers.paths import stays_inside
from streamconv.readers.pickle import Global, Record, describe
from streamconv.storage.location import Location, locate
from streamconv.tensor import Extent, Shape, TensorSpec

FILE = ".metadata"

_DAMAGED = "the checkpoint is damaged, or was written by another version: copy it again"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor: the rectangle of `sizes` from `offsets`, in an entry at `place`."""

    offsets: Shape
    sizes: Shape
    place: Extent


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in parts."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a checkpoint holds.

    Attributes:
        tensors: by name.
        objects: where pickled values are, by name.
        paths: name -> its keys in the state that was saved; empty where the version did not say.
    """

    tensors: Mapping[str, Entry]
    objects: Mapping[str, Extent]
    paths: Mapping[str, tuple[str, ...]]


def read(directory: Location) -> Metadata:
    """Decode and check a checkpoint's metadata.

    Raises:
        CheckpointError: it is damaged, or its files are not there or too short; all problems at once.
    """
    path = directory / FILE
    top = pickle.decode(path.read(pickle.MAX_PICKLE), file=str(path))
    fields = top.fields if isinstance(top, Record) else {}
    listed, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise CheckpointError("it has no list of tensors and where they are", file=str(path), hint=_DAMAGED)
    problems: list[Problem] = []
    places = _places(stored, directory, problems)
    tensors: dict[str, Entry] = {}
    objects: dict[str, Extent] = {}
    for name, record in listed.items():
        if not isinstance(name, str) or not isinstance(record, Record):
            problems.append(
                Problem("an entry is not understood", file=str(path), tensor=describe(name, quote=""))
            )
        elif record.cls.name == "BytesStorageMetadata":
            place = places.get((name, None))
            if place is not None:
                objects[name] = place
        elif isinstance(entry := _entry(name, record, places, str(path)), Problem):
            problems.append(entry)
        else:
            tensors[name] = entry
    problems += _file_problems(places)
    if problems:
        raise CheckpointError("the checkpoint is not complete", file=str(directory), problems=problems)
    return Metadata(tensors, objects, _paths(fields.get("planner_data")))


_Key = tuple[str, Shape | None]


def _places(
    stored: Mapping[object, object], directory: Location, problems: list[Problem]
) -> dict[_Key, Extent]:
    """(name, offsets of a chunk, or None of an object) -> where it is."""
    result: dict[_Key, Extent] = {}
    known: dict[str, str | None] = {}
    for index, info in stored.items():
        key = index.fields if isinstance(index, Record) else {}
        where = info.fields if isinstance(info, Record) else {}
        name, offsets = key.get("fqn"), key.get("offset")
        relative = where.get("relative_path")
        offset, length = numbers.natural(where.get("offset")), numbers.natural(where.get("length"))
        if not isinstance(name, str) or not isinstance(relative, str) or offset is None or length is None:
            problems.append(
                Problem("an entry of 'storage_data' is not understood", file=str(directory / FILE))
            )
            continue
        if where.get("transform_descriptors"):
            problems.append(
                Problem("its bytes went through an extension (compression, encryption), which is not undone",
                        file=relative, tensor=name, hint="save without extensions")
            )  # fmt: skip
            continue
        if relative not in known:
            known[relative] = str(directory / relative) if stays_inside(relative) else None
        file = known[relative]
        if file is None:
            problems.append(
                Problem(f"it is said to be in {describe(relative)}, outside of the checkpoint",
                        file=str(directory / FILE), tensor=name, hint="do not trust this checkpoint")
            )  # fmt: skip
            continue
        result[name, numbers.naturals(offsets)] = Extent(file, offset, length)
    return result


def _entry(name: str, record: Record, places: Mapping[_Key, Extent], file: str) -> Entry | Problem:
    fields = record.fields
    properties = fields.get("properties")
    named = (
        properties.state[0]
        if isinstance(properties, Record) and isinstance(properties.state, tuple)
        else None
    )
    if isinstance(properties, Record) and named is None:
        named = properties.fields.get("dtype")
    dtype = BY_TORCH_NAME.get(named.name) if isinstance(named, Global) and named.module == "torch" else None
    shape = numbers.shape(fields.get("size"))
    listed = fields.get("chunks")
    if dtype is None:
        return Problem(f"its dtype {describe(named)} is not known", file=file, tensor=name)
    if shape is None or not isinstance(listed, list):
        return Problem(
            "its shape or its list of chunks is not understood", file=file, tensor=name, hint=_DAMAGED
        )
    chunks = []
    for each in listed:
        own = each.fields if isinstance(each, Record) else {}
        offsets, sizes = numbers.shape(own.get("offsets")), numbers.shape(own.get("sizes"))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            return Problem("one of its chunks is not understood", file=file, tensor=name, hint=_DAMAGED)
        if not prod(sizes):
            continue
        place = places.get((name, offsets))
        if place is None:
            return Problem(
                f"its chunk {list(sizes)} at {list(offsets)} is nowhere",
                file=file,
                tensor=name,
                hint=_DAMAGED,
            )
        chunks.append(Chunk(offsets, sizes, place))
    return Entry(TensorSpec(name, dtype, shape), tuple(chunks))


def _file_problems(places: Mapping[_Key, Extent]) -> list[Problem]:
    """A problem for each file that is missing or too short."""
    ends: dict[str, int] = {}
    for place in places.values():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    problems = []
    for file, end in sorted(ends.items()):
        path = locate(file)
        if not path.is_file():
            problems.append(
                Problem("it is named in the metadata and is not there", file=file,
                        hint="each node keeps its own ranks' files: bring them together")
            )  # fmt: skip
        elif path.state().size < end:
            message = f"it has {path.state().size} bytes, and entries up to byte {end}"
            problems.append(Problem(message, file=file, hint="it is cut off: copy it again"))
    return problems


def _paths(planner: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(planner, dict):
        return {}
    return {
        name: tuple(str(key) for key in keys)
        for name, keys in planner.items()
        if isinstance(name, str) and isinstance(keys, (list, tuple))
    }
