"""Safetensors files, by extent: every rule of the format is checked, and nothing but the header is read.

Rules (huggingface/safetensors: safetensors/src/tensor.rs, `read_metadata` and `validate`): eight bytes of
header length, a JSON object of at most 100,000,000 bytes, then the data. Sorted by offset, tensors follow each
other without gap or overlap from byte 0 of the data to the end of the file, and each is exactly as long as
its shape and dtype say. Two rules are ours: no name may occur twice (the library takes the last), and no
number may be so large that a product of it leaves 64 bits.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import orjson

from streamconv.dtypes import BY_NAME
from streamconv.errors import CheckpointError, located
from streamconv.readers.checkpoint import WeightFile
from streamconv.readers.numbers import naturals
from streamconv.readers.window import Window
from streamconv.storage.location import Location
from streamconv.tensor import Extent, Shape, Stored, TensorSpec

NAME = "safetensors"
MAX_HEADER = 100_000_000

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_BITS = 1 << 64
# Bytes of a header that are parsed at once: what they become takes many times as much.
_PART = 1 << 18
_OPENS = re.compile(rb"[ \t\r\n]*\{")
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_ENTRY = re.compile(rb"\s*%b\s*:\s*\{(?:[^{}\"]++|%b)*+\}\s*," % (_TEXT, _TEXT), re.DOTALL)
_DAMAGED = "the file is damaged, or was written by a faulty program"


def read(file: Location, offset: int = 0, length: int | None = None) -> WeightFile:
    """Read and check the header of a safetensors file; tensors are in the order of their bytes.

    Args:
        file: what holds it.
        offset: where in the file it begins.
        length: how long it is; to the end of the file by default.

    Raises:
        CheckpointError: a rule of the format is broken; says which, where, and what was expected.
    """
    path = file.place
    with located(path, hint=_DAMAGED), Window(file, offset, length) as window:
        size = window.length
        if size < 8:
            raise CheckpointError(
                f"{size} bytes are too few for a safetensors file", hint="download it again"
            )
        count = int.from_bytes(window.read(0, 8), "little")
        if count > MAX_HEADER:
            raise CheckpointError(
                f"a header of {count} bytes, more than the {MAX_HEADER} that the format allows",
                hint="this is not a safetensors file, or it is damaged",
            )
        if 8 + count > size:
            raise CheckpointError(
                f"the header should have {count} bytes and the file ends after {size - 8} of them",
                hint="the file is cut off: download it again",
            )
        start = offset + 8 + count
        begins, specs, metadata = _entries(window.read(8, count))
        tensors = _tensors(begins, specs, path, start, size - 8 - count)
    parted = metadata.get("remove_redundancy") == "True"
    note = "one rank of MindSpore, without what other ranks hold too; give the directory with all"
    return WeightFile(path, NAME, tensors, metadata, (note,) if parted else ())


def _entries(text: bytes) -> tuple[array[int], list[TensorSpec], dict[str, str]]:
    """The first byte and the spec of every entry of a header, and the metadata.

    A header is read part by part, and nothing is kept of a part but what it means: parsed, it takes many times as much.
    """
    begins, specs = array("Q"), list[TensorSpec]()
    metadata: dict[str, object] = {}
    shapes: dict[Shape, Shape] = {}
    for part in _parts(text):
        header = _parsed(part)
        if _METADATA in header:
            if metadata:
                raise CheckpointError("the header has this key twice", tensor=_METADATA)
            metadata[_METADATA] = header.pop(_METADATA)
        elif not header and specs:
            raise CheckpointError("the header is not JSON: it ends with a comma")
        _refuse_duplicates(part, header)
        for name, entry in header.items():
            begin, spec = _checked(name, entry, shapes)
            begins.append(begin)
            specs.append(spec)
    return begins, specs, _metadata(metadata.get(_METADATA))


def _parts(text: bytes) -> Iterator[bytes]:
    """A header as objects of some of its entries each; where it cannot be cut, as it is."""
    starts = [found.end() - 1] if (found := _OPENS.match(text)) else []
    at = starts[0] + 1 if starts else 0
    while len(text) - at > _PART and (found := _ENTRY.match(text, at)):
        at = found.end()
        if at - starts[-1] > _PART:
            starts.append(at - 1)
    if len(starts) < 2:
        yield text
        return
    for start, stop in pairwise((*starts, len(text))):
        # Between parts is a comma, which belongs to neither.
        yield b"{%b%b" % (text[start + 1 : stop], b"}" if stop < len(text) else b"")


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object")
    return header


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{_METADATA} is not an object of text")
    return value


def _refuse_duplicates(text: bytes, header: dict[str, Any]) -> None:
    """Refuse a header in which a key occurs twice; the parser keeps the last without a word.

    Where no character is escaped, as in all headers but the oddest, counting the fields of entries
    tells: a second entry, or a second field in one, makes one more than there are tensors.
    """
    counts = {text.count(b'"%s"' % field.encode()) for field in _FIELDS}
    if b"\\" not in text and counts <= {len(header)} and text.count(_METADATA.encode()) <= 1:
        return

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError("the header has this key twice", tensor=key)
            found[key] = value
        return found

    try:
        json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not plain JSON: {error}") from error


def _tensors(
    begins: array[int], specs: list[TensorSpec], path: str, start: int, size: int
) -> dict[str, Stored]:
    """All entries as stored tensors; `start` is the data's first byte in the file, `size` its length."""
    order: Iterable[int] = range(len(specs))
    if any(first > second for first, second in pairwise(begins)):
        order = sorted(order, key=lambda at: (begins[at], begins[at] + specs[at].nbytes, specs[at].name))
    tensors: dict[str, Stored] = {}
    name, at = "", 0
    for number in order:
        begin, spec = begins[number], specs[number]
        name, length = spec.name, spec.nbytes
        if begin != at:
            raise CheckpointError(
                f"its data begins at byte {begin}, and the data before it ends at byte {at}",
                tensor=name,
                hint=f"tensors may neither overlap nor leave gaps; {_DAMAGED}",
            )
        if name in tensors:
            raise CheckpointError("the header has this key twice", tensor=name)
        tensors[name] = Stored(spec, (Extent(path, start + begin, length),) if length else ())
        at = begin + length
    if at > size:
        raise CheckpointError(
            f"{at - size} of {at} bytes of tensor data are missing at the end",
            tensor=name,
            hint="the file is cut off: download it again",
        )
    if at < size:
        raise CheckpointError(f"{size - at} bytes follow the last tensor's data")
    return tensors


def _checked(name: str, entry: object, shapes: dict[Shape, Shape]) -> tuple[int, TensorSpec]:
    """First byte and spec of an entry whose own numbers agree with each other. Equal shapes are one, from `shapes`."""

    def wrong(message: str) -> CheckpointError:
        return CheckpointError(message, tensor=name)

    if not isinstance(entry, dict):
        raise wrong("its entry in the header is not an object")
    missing = [field for field in _FIELDS if field not in entry]
    if missing:
        raise wrong(f"its entry in the header lacks {', '.join(missing)}")
    dtype = BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None or dtype.rank is None:
        raise wrong(f"safetensors has no dtype {str(entry['dtype'])[:40]!r}")
    shape = naturals(entry["shape"], _MAX_BITS - 1)
    offsets = naturals(entry["data_offsets"], _MAX_BITS - 1)
    if shape is None:
        raise wrong(f"its shape {_shown(entry['shape'])} is not a list of sizes")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"its data_offsets {_shown(entry['data_offsets'])} are not a first byte and an end")
    bits = dtype.bits
    for count in shape:
        bits *= count
        if bits >= _MAX_BITS:
            raise wrong(f"its shape {_shown(list(shape))} is beyond 64-bit sizes")
    if bits % 8:
        raise wrong(f"its shape {_shown(list(shape))} of {dtype} does not fill whole bytes")
    begin, end = offsets
    if end - begin != bits // 8:
        raise wrong(
            f"its shape {_shown(list(shape))} of {dtype} takes {bits // 8} bytes, its data_offsets span {end - begin}"
        )
    return begin, TensorSpec(name, dtype, shapes.setdefault(shape, shape))


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
