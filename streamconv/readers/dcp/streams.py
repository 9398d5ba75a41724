"""Entries inside a `.distcp` file: each a stream of torch.save of its own, or all in one safetensors blob.

Source: pytorch/pytorch: torch/distributed/checkpoint/filesystem.py (`_write_item`, `_write_files_from_queue`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from streamconv.errors import CheckpointError, Problem
from streamconv.ops import Expression
from streamconv.readers import safetensors, torch_zip
from streamconv.readers.chunks import Part, assemble
from streamconv.readers.dcp.metadata import Chunk, Entry, Place
from streamconv.readers.pickle import describe
from streamconv.readers.window import Window
from streamconv.storage.location import locate
from streamconv.tensor import Stored, TensorSpec

_READ_AT_ONCE = 8
_MAX_OBJECT = 1 << 20
_MAX_OBJECTS = 20_000
_ZIP = b"PK\x03\x04"


def tensors(entries: Mapping[str, Entry]) -> dict[str, Expression]:
    """The tensors of entries, by name.

    Raises:
        CheckpointError: files are damaged or disagree with the metadata; all problems at once.
    """
    by_file: dict[str, list[tuple[str, Entry, Chunk]]] = {}
    for name, entry in entries.items():
        for chunk in entry.chunks:
            by_file.setdefault(chunk.place.file, []).append((name, entry, chunk))
    parts: dict[str, list[Part]] = {name: [] for name in entries}
    problems: list[Problem] = []
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        for found, wrong in pool.map(_of_file, by_file, by_file.values()):
            problems += wrong
            for name, part in found:
                parts[name].append(part)
    result: dict[str, Expression] = {}
    for name, entry in entries.items() if not problems else ():
        try:
            empty = TensorSpec(name, entry.dtype, entry.shape)
            result[name] = assemble(name, entry.shape, parts[name], empty=empty)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError("the parts of tensors do not fit together", problems=problems)
    return result


def objects(places: Mapping[str, Place]) -> dict[str, object]:
    """The small values that are saved beside tensors, decoded as data; large ones and those of no use left out."""
    wanted = [
        (name, place)
        for name, place in places.items()
        if place.length <= _MAX_OBJECT and "_extra_state" not in name and "rng_state" not in name
    ]
    result = {}
    for name, place in wanted[:_MAX_OBJECTS]:
        try:
            result[name] = torch_zip.load(locate(place.file), place.offset, place.length).content
        except CheckpointError:
            continue  # not needed for any tensor
    return result


def _of_file(
    file: str, wanted: Sequence[tuple[str, Entry, Chunk]]
) -> tuple[list[tuple[str, Part]], list[Problem]]:
    found: list[tuple[str, Part]] = []
    problems: list[Problem] = []
    blobs = _blobs(file, (chunk.place for _, _, chunk in wanted))
    for name, entry, chunk in wanted:
        try:
            tensor = _tensor(name, chunk.place, blobs.get(chunk.place.offset))
        except CheckpointError as error:
            problems += (problem.at(file, name) for problem in error.problems)
            continue
        if tensor.spec.dtype is not entry.dtype or tensor.spec.shape != chunk.sizes:
            message = (
                f"the metadata has {entry.dtype} {list(chunk.sizes)} at {list(chunk.offsets)}, the file "
                f"{tensor.spec.dtype} {list(tensor.spec.shape)}"
            )
            problems.append(Problem(message, file=file, tensor=name, hint="files of two saves are mixed"))
            continue
        found.append((name, Part(chunk.offsets, tensor)))
    return found, problems


def _tensor(name: str, place: Place, blob: Mapping[str, Stored] | None) -> Expression:
    if blob is not None:
        if name not in blob:
            raise CheckpointError(
                "the safetensors part of the file does not have it", file=place.file, tensor=name
            )
        return blob[name]
    content = torch_zip.load(locate(place.file), place.offset, place.length).content
    if not isinstance(content, Expression):
        raise CheckpointError(f"it is {describe(content)}, not a tensor", file=place.file, tensor=name)
    return content


def _blobs(file: str, places: Iterable[Place]) -> dict[int, Mapping[str, Stored]]:
    """Offset -> tensors, of all places in a file that begin with safetensors instead of a zip archive."""
    with Window(locate(file)) as window:
        starts = {
            offset: window.read(offset, min(len(_ZIP), window.length - offset))
            for offset in sorted({place.offset for place in places})
        }
    return {
        offset: safetensors.read(locate(file), offset).tensors
        for offset, head in starts.items()
        if head != _ZIP
    }
