"""Entries inside a `.distcp` file: each a stream of torch.save of its own, or all in one safetensors blob.

Source: pytorch/pytorch: torch/distributed/checkpoint/filesystem.py (`_write_item`, `_write_files_from_queue`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from streamconv.errors import CheckpointError, Problems
from streamconv.ops import Expression
from streamconv.readers import safetensors, torch_zip
from streamconv.readers.chunks import Part, assemble
from streamconv.readers.dcp.metadata import Chunk, Entry
from streamconv.readers.pickle import describe
from streamconv.readers.together import read_together
from streamconv.readers.torch_rebuild import unsupported
from streamconv.readers.window import Window
from streamconv.storage.location import Location, locate
from streamconv.tensor import Extent

_MAX_OBJECT = 1 << 20
_MAX_OBJECTS = 20_000
_ZIP = b"PK\x03\x04"


def tensors(entries: Mapping[str, Entry]) -> dict[str, Expression | str]:
    """The tensors of entries by name, or why one cannot be read.

    Raises:
        CheckpointError: files are damaged or disagree with the metadata; all problems at once.
    """
    by_file: dict[str, list[tuple[Entry, Chunk]]] = {}
    for entry in entries.values():
        for chunk in entry.chunks:
            by_file.setdefault(chunk.place.file, []).append((entry, chunk))
    problems = Problems()
    found = read_together(
        {file: locate(file) for file in by_file}, lambda file: _parts(file, by_file[file.place]), problems
    )
    problems.report("the parts of tensors do not fit together")
    parts: dict[str, list[Part]] = {name: [] for name in entries}
    result: dict[str, Expression | str] = {}
    for name, part in chain.from_iterable(found.values()):
        if isinstance(part, str):
            result[name] = part
        else:
            parts[name].append(part)
    for name, entry in entries.items():
        if name in result:
            continue
        with problems.collecting():
            result[name] = assemble(entry.spec, parts[name])
    problems.report("the parts of tensors do not fit together")
    return result


def objects(places: Mapping[str, Extent]) -> dict[str, object]:
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


def _parts(file: Location, wanted: Sequence[tuple[Entry, Chunk]]) -> list[tuple[str, Part | str]]:
    """What is wanted of one file, by the names of tensors, or why a part cannot be read."""
    found: list[tuple[str, Part | str]] = []
    problems = Problems()
    blobs = _blobs(file, {chunk.place.offset for _, chunk in wanted})
    for entry, chunk in wanted:
        name, dtype = entry.spec.name, entry.spec.dtype
        with problems.collecting(file.place, name):
            tensor = _tensor(name, chunk.place, blobs.get(chunk.place.offset))
            if isinstance(tensor, str):
                found.append((name, tensor))
                continue
            if tensor.spec.dtype is not dtype or tensor.spec.shape != chunk.sizes:
                raise CheckpointError(
                    f"the metadata has {dtype} {list(chunk.sizes)} at {list(chunk.offsets)}, the file "
                    f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
                    hint="files of two saves are mixed",
                )
            found.append((name, Part(chunk.offsets, tensor)))
    problems.report("the file does not hold what the metadata says")
    return found


def _tensor(name: str, place: Extent, blob: Mapping[str, Expression] | None) -> Expression | str:
    if blob is not None:
        if name not in blob:
            raise CheckpointError("the safetensors part of the file does not have it")
        return blob[name]
    content = torch_zip.load(locate(place.file), place.offset, place.length).content
    if isinstance(content, Expression):
        return content
    problem = unsupported(content)
    if problem is None:
        raise CheckpointError(f"it is {describe(content)}, not a tensor")
    return problem.reason


def _blobs(file: Location, offsets: Iterable[int]) -> dict[int, Mapping[str, Expression]]:
    """Offset -> tensors, of all places in a file that begin with safetensors instead of a zip archive."""
    with Window(file) as window:
        starts = {
            offset: window.read(offset, min(len(_ZIP), window.length - offset)) for offset in sorted(offsets)
        }
    return {offset: safetensors.read(file, offset).tensors for offset, head in starts.items() if head != _ZIP}
