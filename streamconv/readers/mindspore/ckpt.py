"""MindSpore's `.ckpt`: records of Protocol Buffers, one after the other, indexed without reading any content.

    0a <length>                                        a parameter, or a slice of one
       0a <length> name   12 <length> { 08 dim ... 12 <length> dtype 1a <length> content }

There is no magic, no header and no index. A parameter of more than 512 MiB is cut into slices: records that follow
each other with the same name, each with the whole parameter's dimensions. Source: mindspore-ai/mindspore:
mindspore/python/mindspore/train/serialization.py, train/checkpoint.proto; what it leaves open was tried with 2.10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, overload

from streamconv.dtypes import BY_NAME
from streamconv.errors import CheckpointError, located
from streamconv.ops import Expression
from streamconv.readers.checkpoint import WeightFile
from streamconv.readers.mindspore.optimizer import COUNTERS
from streamconv.readers.numbers import MAX_DIMENSIONS, shape, values
from streamconv.readers.pickle import describe
from streamconv.readers.window import CUT_OFF, Window
from streamconv.storage.location import Location
from streamconv.storage.protobuf import BYTES, VARINT, Field, fields, integers, text, varint
from streamconv.tensor import Checksum, Extent, Shape, Stored, TensorSpec

NAME = "MindSpore"

DTYPES: dict[str, str] = {
    "Int8": "I8", "Int16": "I16", "Int32": "I32", "Int64": "I64", "UInt8": "U8", "UInt16": "U16", "UInt32": "U32",
    "UInt64": "U64", "Float16": "F16", "Float32": "F32", "Float64": "F64", "BFloat16": "BF16", "Bool": "BOOL",
    "Int4": "I8",
}  # fmt: skip
"""What a record calls its dtype -> ours. `Int4` are pairs in a byte, of which its dimensions count bytes."""

_PACKED = "Int4"
_TEXT = "str"
_SKIPPED = frozenset({"random_op"})

_FOOTER = b"crc_num"
_FOOTER_LENGTH = 17
_CRC_LENGTH = 10
_ENCRYPTED = {
    bytes.fromhex("d85e3a7f"): "AES-GCM",
    bytes.fromhex("d95e3a7f"): "AES-CBC",
    bytes.fromhex("da5e3a7f"): "SM4-CBC",
}

_BLOCK = 4096
_MAX_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class _Record:
    """A parameter, or a slice of one; `start` and `length` are those of its content in the file."""

    name: str
    kind: str
    dims: Shape
    start: int
    length: int


def recognises(head: bytes) -> bool:
    """Whether a file's first bytes are a record, or those of an encrypted file."""
    if head[:4] in _ENCRYPTED:
        return True
    view = memoryview(head)
    try:
        key, at = varint(view, 0, len(view))
        _, at = varint(view, at, len(view))
        inner, at = varint(view, at, len(view))
        length, at = varint(view, at, len(view))
        if key != 1 << 3 | BYTES or inner != 1 << 3 | BYTES or not 0 < length <= len(view) - at:
            return False
        name = bytes(view[at : at + length]).decode()
        return name.isprintable() and _is_tensor(view, at + length)
    except (CheckpointError, UnicodeDecodeError):
        return False


def _is_tensor(view: memoryview, at: int) -> bool:
    """Whether a tensor or a map of tensors begins at a byte, as far as the bytes go."""
    key, at = varint(view, at, len(view))
    if key == 3 << 3 | BYTES:
        return True
    if key != 2 << 3 | BYTES:
        return False
    _, at = varint(view, at, len(view))
    while True:
        key, at = varint(view, at, len(view))
        if key == 1 << 3 | VARINT:
            _, at = varint(view, at, len(view))
            continue
        length, at = varint(view, at, len(view))
        if key == 1 << 3 | BYTES:
            at += length
            continue
        kind = bytes(view[at : at + length]).decode()
        return key == 2 << 3 | BYTES and (kind in DTYPES or kind in _SKIPPED or kind == _TEXT)


def read(file: Location) -> WeightFile:
    """Index a `.ckpt` file; among the metadata are the counters that training keeps beside weights.

    Raises:
        CheckpointError: it is damaged, encrypted, or holds what cannot be converted; says which and where.
    """
    tensors: dict[str, Expression] = {}
    metadata: dict[str, Any] = {}
    notes: list[str] = []
    checksums: tuple[Checksum, ...] = ()
    with located(file.place), _Blocks(file) as window:
        method = _ENCRYPTED.get(window.read(0, min(4, window.length)))
        if method:
            raise CheckpointError(
                f"it is encrypted ({method})",
                hint="load it with mindspore.load_checkpoint(..., dec_key=..., dec_mode=...) and save it without a key",
            )
        end = window.length - _FOOTER_LENGTH
        if end > 0 and window.read(end, len(_FOOTER)) == _FOOTER:
            checksums = (_checksum(window, end),)
        else:
            end = window.length
        for name, group in groupby(_records(window, end), attrgetter("name")):
            slices = list(group)
            shown = describe(name, quote="")
            if name in tensors or name in metadata:
                raise CheckpointError(
                    "it occurs again after other parameters; MindSpore takes the last, without a word",
                    tensor=shown,
                    hint="two files were put together: leave one of them out",
                )
            with located(tensor=shown):
                found, note = _parameter(slices, window)
            if isinstance(found, Stored):
                tensors[name] = found
            elif found is not None:
                metadata[name] = found
            notes += [f"{shown}: {note}"] if note else []
    if not tensors and not metadata:
        raise CheckpointError("it holds no parameter", file=file.place, hint=CUT_OFF)
    return WeightFile(file.place, NAME, tensors, metadata, tuple(notes), checksums)


def _checksum(window: Window, end: int) -> Checksum:
    """The checksum in the footer, which begins at byte `end`, of all bytes before it."""
    said = int.from_bytes(window.read(window.length - _CRC_LENGTH, _CRC_LENGTH), "big")
    return Checksum((Extent(window.path, 0, end),), f"{said:08x}", f"its end says {said:08x}; {CUT_OFF}")


class _Blocks(Window):
    """A file by position, as a `protobuf.Buffer`; small neighbouring reads are served from one block."""

    _start, _block = 0, b""

    def read(self, start: int, length: int) -> bytes:
        """As `Window.read`."""
        if length > _BLOCK or start + length > self.length:
            return super().read(start, length)
        if not self._start <= start <= start + length <= self._start + len(self._block):
            self._start, self._block = start, super().read(start, min(_BLOCK, self.length - start))
        return self._block[start - self._start : start - self._start + length]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, key: int, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes: ...
    def __getitem__(self, key: int | slice, /) -> int | bytes:
        if isinstance(key, int):
            return self.read(key, 1)[0]
        return self.read(key.start, key.stop - key.start)


def _records(window: _Blocks, end: int) -> Iterator[_Record]:
    with located(hint=CUT_OFF):
        for field in fields(window, 0, end):
            if field.number != 1 or field.wire_type != BYTES:
                raise CheckpointError(
                    f"field {field.number} before byte {field.start} is none of a checkpoint"
                )
            yield _record(window, field)


def _record(window: _Blocks, record: Field) -> _Record:
    name: str | None = None
    inside: Field | None = None
    for field in fields(window, record.start, record.stop):
        if field.wire_type != BYTES:
            continue
        if field.number == 1:
            name = text(window, field)
        elif field.number == 2:
            inside = field
        elif field.number == 3:
            raise CheckpointError(
                "it is a map parameter, an embedding's hash table, which no other format has",
                tensor=name,
                hint="leave it out of the save, or export it with MindSpore",
            )
    if name is None or inside is None:
        raise CheckpointError(f"the record at byte {record.start} has no name or no tensor")
    dims: list[int] = []
    kind, content = "", None
    for field in fields(window, inside.start, inside.stop):
        if field.number == 1:  # other programs pack them
            dims += islice(integers(window, field), MAX_DIMENSIONS + 1)
        elif field.number == 2 and field.wire_type == BYTES:
            kind = text(window, field)
        elif field.number == 3 and field.wire_type == BYTES:
            content = (field.start, field.stop - field.start)
        if len(dims) > MAX_DIMENSIONS:
            raise CheckpointError(f"it has more than {MAX_DIMENSIONS} dimensions", tensor=name)
    if content is None:
        raise CheckpointError("it has no content", tensor=name)
    sizes = shape(dims)
    if sizes is None:
        raise CheckpointError(f"its dimensions {dims} are impossible", tensor=name)
    return _Record(name, kind, sizes, *content)


def _parameter(slices: list[_Record], window: _Blocks) -> tuple[Stored | str | float | None, str | None]:
    """A tensor, text or counter, of which these are all slices, or None where it is left out; and a note on it."""
    first = slices[0]
    if any((each.kind, each.dims) != (first.kind, first.dims) for each in slices):
        raise CheckpointError("its slices have several dtypes or dimensions")
    if first.kind == _TEXT:
        if len(slices) > 1 or first.length > _MAX_TEXT:
            return None, None
        return window.read(first.start, first.length).decode("utf-32-le", "replace"), None
    if first.kind in _SKIPPED:
        return None, f"a random state ({first.kind}), which is left out"
    if first.kind not in DTYPES:
        raise CheckpointError(f"its dtype is {describe(first.kind)}", hint=f"known: {', '.join(DTYPES)}")
    extents = tuple(Extent(window.path, each.start, each.length) for each in slices if each.length)
    held = sum(each.length for each in slices)
    # Files of MindSpore 1 have one dimension of 0 for a scalar.
    sizes = () if first.dims == (0,) and held else first.dims
    spec = TensorSpec(first.name, BY_NAME[DTYPES[first.kind]], sizes)
    if held != spec.nbytes:
        raise CheckpointError(
            f"{first.kind} {list(sizes)} takes {spec.nbytes} bytes, and its records hold {held}; MindSpore fills "
            "up with zeros, without a word",
            hint=CUT_OFF,
        )
    tensor = Stored(spec, extents)
    if first.name in COUNTERS and sizes == ():
        return (values(tensor) or (None,))[0], None
    return tensor, "Int4, two in a byte, carried through as bytes" if first.kind == _PACKED else None
