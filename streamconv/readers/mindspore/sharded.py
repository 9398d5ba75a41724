"""MindFormers' sharded safetensors (its checkpoint format from r1.7 on), which say themselves how they fit together.

    DIR/latest_checkpointed_iteration.txt
    DIR/iteration_00000070/metadata.json          chunks of each parameter, and the file of each chunk
    DIR/iteration_00000070/model-0000000-0000004.safetensors, opt-0000000-0000004.safetensors ...

Source: mindspore-lab/mindformers: mindformers/checkpoint/metadata.py, utils.py, checkpoint.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CheckpointError, Problems, listed
from streamconv.ops import Expression
from streamconv.options.records import ReadingOptions
from streamconv.readers import numbers, safetensors, small, training
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.chunks import Part, assemble
from streamconv.readers.format import Format, OneOfMany
from streamconv.readers.mindspore import optimizer
from streamconv.readers.mindspore.optimizer import COUNTERS
from streamconv.readers.paths import stays_inside
from streamconv.readers.pickle import under
from streamconv.readers.together import APART, read_together
from streamconv.readers.training import TrainedModel
from streamconv.storage.location import Location
from streamconv.tensor import Shape, TensorSpec

METADATA = "metadata.json"
_LATEST = "latest_checkpointed_iteration.txt"
_SHARD = re.compile(r"(?:model|opt)-\d{7}-(?P<count>\d{7})\.safetensors")


@dataclass(frozen=True, slots=True)
class Found:
    """A sharded checkpoint that was found: the directory given, the iteration's, its metadata, and what was decided."""

    root: Location
    path: Location
    document: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def find(path: Location, _: ReadingOptions) -> Found | None:
    """The sharded checkpoint in a directory or in the iteration that it names as its latest; None without one.

    Raises:
        CheckpointError: the iteration is not there, or its metadata cannot be read.
    """
    document = _metadata(path)
    if document is not None:
        return Found(path, path, document)
    text = small.latest(path / _LATEST)
    iterations = [entry for entry in path.glob("iteration_*") if (entry / METADATA).is_file()]
    if not iterations:
        return None
    chosen = iterations[-1]
    if text is not None:
        named = path / f"iteration_{text.zfill(8)}"
        if not text.isdecimal() or named not in iterations:
            raise CheckpointError(
                f"'{_LATEST}' says '{text}', which is not there",
                file=str(path),
                hint=f"give one of the directories: {listed(entry.name for entry in reversed(iterations))}",
            )
        chosen = named
    document = _metadata(chosen)
    return None if document is None else Found(path, chosen, document, (f"{chosen.name} is taken",))


def read(found: Found, reading: ReadingOptions) -> Checkpoint:
    """The whole tensors, and their optimizer state.

    Raises:
        CheckpointError: files are missing, or chunks do not fit together; all problems at once.
    """
    return training.checkpoint(found.root, _model(found), FORMAT.name, reading)


def _model(found: Found) -> TrainedModel:
    problems = Problems()
    places = _places(found, problems)
    names = sorted(set(places.values()))
    opened = read_together({name: found.path / name for name in names}, _tensors, problems)
    problems.report("the checkpoint is not complete")
    tensors: dict[str, Expression] = {}
    for name, meta in found.document["state_dict_metadata"].items():
        with problems.collecting(tensor=name):
            tensors[name] = _whole(name, meta, places, opened)
        if name in COUNTERS:
            tensors.pop(name, None)
    problems.report("the chunks of parameters do not fit together")
    files = (*(str(found.path / name) for name in names), str(found.path / METADATA))
    notes = (*found.notes, f"{len(names)} files are joined")
    return TrainedModel(*optimizer.apart(tensors), files=files, notes=notes)


def _tensors(path: Location) -> Mapping[str, Expression]:
    if not path.is_file():
        raise CheckpointError(
            f"it is named in {METADATA} and is not there",
            hint=APART,
        )
    return safetensors.read(path).tensors


def _metadata(path: Location) -> dict[str, Any] | None:
    file = path / METADATA
    if not file.is_file():
        return None
    try:
        document = small.read_json(file, small.METADATA)
    except CheckpointError:
        document = None
    parts = ("state_dict_metadata", "storage_data")
    if isinstance(document, dict) and all(isinstance(document.get(part), dict) for part in parts):
        return document
    if any(_SHARD.fullmatch(entry.name) for entry in path.entries()):
        raise CheckpointError(
            "it does not say how the shards beside it fit together",
            file=str(file),
            hint="the save was not finished, or the copy is not whole",
        )
    return None  # another program's


_Chunk = tuple[str, Shape]


def _places(found: Found, problems: Problems) -> dict[_Chunk, str]:
    """(parameter, first element) of a chunk -> its file."""
    result: dict[_Chunk, str] = {}
    for identifier, stored in found.document["storage_data"].items():
        chunk = _identified(identifier)
        file = under(stored[0], "file_name") if isinstance(stored, list) and stored else None
        with problems.collecting(str(found.path / METADATA)):
            if chunk is None or not isinstance(file, str):
                raise CheckpointError(f"{identifier[:100]!r} is not understood")
            if not stays_inside(file):
                raise CheckpointError(
                    f"it is said to be in {file[:100]!r}, outside of the checkpoint",
                    tensor=chunk[0],
                    hint="do not trust this checkpoint",
                )
            result[chunk] = file
    return result


def _identified(text: str) -> _Chunk | None:
    """A chunk's identifier, which is a Python tuple as text: `('name', (0, 0))`."""
    try:
        value = ast.literal_eval(text) if len(text) < 1 << 14 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    match value:
        case (str(name), tuple(offsets)) if numbers.naturals(offsets) is not None:
            return name, offsets
    return None


def _whole(
    name: str, meta: Any, places: Mapping[_Chunk, str], opened: Mapping[str, Mapping[str, Expression]]
) -> Expression:
    shape, chunks = numbers.shape(under(meta, "global_shape")), under(meta, "chunk")
    if shape is None or not isinstance(chunks, list) or not chunks:
        raise CheckpointError("its metadata is not understood")
    parts = []
    for chunk in chunks:
        offsets, sizes = (numbers.shape(under(chunk, key)) for key in ("global_offset", "local_shape"))
        if offsets is None or sizes is None:
            raise CheckpointError("a shape in its metadata is impossible")
        file = places.get((name, offsets))
        tensor = opened.get(file or "", {}).get(name)
        if tensor is None:
            raise CheckpointError(
                f"its chunk {list(sizes)} at {list(offsets)} is nowhere",
                hint="files of ranks are missing, or of another save",
            )
        if tensor.spec.shape != sizes:
            raise CheckpointError(
                f"the metadata has {list(sizes)} at {list(offsets)}, the file {list(tensor.spec.shape)}",
                file=file,
            )
        parts.append(Part(offsets, tensor))
    return assemble(TensorSpec(name, parts[0].tensor.spec.dtype, shape), parts)


FORMAT = Format(
    "MindSpore",
    "MindFormers' `metadata.json` with shards",
    find,
    read,
    signs={_LATEST: "a Megatron checkpoint, which is not read; a weight file in it may be"},
    parts=(OneOfMany(_SHARD, "one shard of several"),),
)
