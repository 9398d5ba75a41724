"""`.metadata` of torch.distributed.checkpoint: which part of which tensor is where in which file.

It is a pickle of a `Metadata` record; here it is decoded as data. Source: pytorch/pytorch:
torch/distributed/checkpoint/metadata.py (records), filesystem.py (`_StorageInfo`, `.metadata`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from streamconv.dtypes import BY_TORCH_NAME, DType
from streamconv.errors import CheckpointError, Problem, Problems, located
from streamconv.readers import numbers, pickle
from streamconv.readers.paths import stays_inside
from streamconv.readers.pickle import Global, Record, describe, under
from streamconv.readers.together import APART
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
        unreadable: names of tensors of a dtype that is not read -> why.
        objects: where pickled values are, by name.
        paths: name -> its keys in the state that was saved; empty where the version did not say.
    """

    tensors: Mapping[str, Entry]
    unreadable: Mapping[str, str]
    objects: Mapping[str, Extent]
    paths: Mapping[str, tuple[str, ...]]


def read(directory: Location) -> Metadata:
    """Decode and check a checkpoint's metadata.

    Raises:
        CheckpointError: it is damaged, or its files are not there or too short; all problems at once.
    """
    path = directory / FILE
    top = pickle.decode(path.read(pickle.MAX_PICKLE), file=str(path))
    listed, stored = under(top, "state_dict_metadata"), under(top, "storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise CheckpointError("it has no list of tensors and where they are", file=str(path), hint=_DAMAGED)
    problems = Problems()
    places = _places(stored, directory, problems)
    tensors: dict[str, Entry] = {}
    unreadable: dict[str, str] = {}
    objects: dict[str, Extent] = {}
    for name, record in listed.items():
        with problems.collecting(str(path), describe(name, quote="")):
            if not isinstance(name, str) or not isinstance(record, Record):
                raise CheckpointError("an entry is not understood")
            if record.cls.name != "BytesStorageMetadata":
                dtype = _dtype(record)
                if isinstance(dtype, DType):
                    tensors[name] = _entry(name, dtype, record, places)
                else:
                    unreadable[name] = dtype
            elif place := places.get((name, None)):
                objects[name] = place
    problems += _file_problems(places)
    problems.report("the checkpoint is not complete", file=str(directory))
    return Metadata(tensors, unreadable, objects, _paths(under(top, "planner_data")))


_Key = tuple[str, Shape | None]


def _places(stored: Mapping[object, object], directory: Location, problems: Problems) -> dict[_Key, Extent]:
    """(name, offsets of a chunk, or None of an object) -> where it is."""
    result: dict[_Key, Extent] = {}
    known: dict[str, str | None] = {}
    for index, info in stored.items():
        name, relative = under(index, "fqn"), under(info, "relative_path")
        offset, length = (numbers.natural(under(info, key)) for key in ("offset", "length"))
        if not isinstance(name, str) or not isinstance(relative, str) or offset is None or length is None:
            problems.append(
                Problem("an entry of 'storage_data' is not understood", file=str(directory / FILE))
            )
            continue
        if relative not in known:
            known[relative] = str(directory / relative) if stays_inside(relative) else None
        file = known[relative]
        if under(info, "transform_descriptors"):
            message = "its bytes went through an extension (compression, encryption), which is not undone"
            problems.append(Problem(message, relative, name, "save without extensions"))
        elif file is None:
            message = f"it is said to be in {describe(relative)}, outside of the checkpoint"
            problems.append(Problem(message, str(directory / FILE), name, "do not trust this checkpoint"))
        else:
            result[name, numbers.naturals(under(index, "offset"))] = Extent(file, offset, length)
    return result


def _dtype(record: Record) -> DType | str:
    """The dtype of a tensor, or why it is not read."""
    properties = under(record, "properties")
    named = under(properties, "dtype")
    if isinstance(properties, Record) and isinstance(properties.state, tuple) and properties.state:
        named = properties.state[0]
    if not isinstance(named, Global) or named.module != "torch":
        raise CheckpointError(f"its dtype {describe(named)} is not known", hint=_DAMAGED)
    return BY_TORCH_NAME.get(named.name) or f"its dtype is {describe(named)}"


def _entry(name: str, dtype: DType, record: Record, places: Mapping[_Key, Extent]) -> Entry:
    shape, listed = numbers.shape(under(record, "size")), under(record, "chunks")
    with located(hint=_DAMAGED):
        if shape is None or not isinstance(listed, list):
            raise CheckpointError("its shape or its list of chunks is not understood")
        chunks = []
        for each in listed:
            offsets, sizes = numbers.shape(under(each, "offsets")), numbers.shape(under(each, "sizes"))
            if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
                raise CheckpointError("one of its chunks is not understood")
            if not prod(sizes):
                continue
            place = places.get((name, offsets))
            if place is None:
                raise CheckpointError(f"its chunk {list(sizes)} at {list(offsets)} is nowhere")
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
                        hint=APART)
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
