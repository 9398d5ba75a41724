"""MindSpore's `.ckpt`: records of Protocol Buffers, one after the other, indexed without reading any content.

    0a <length>                                        a parameter, or a slice of one
       0a <length> name   12 <length> { 08 dim ... 12 <length> dtype 1a <length> content }

There is no magic, no header and no index. A parameter of more than 512 MiB is cut into slices: records that follow
each other with the same name, each with the whole parameter's dimensions. Source: mindspore-ai/mindspore:
mindspore/python/mindspore/train/serialization.py, train/checkpoint.proto; what it leaves open was tried with 2.10.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from streamconv.dtypes import BY_NAME, DType
from streamconv.errors import CheckpointError, located
from streamconv.readers.mindspore.optimizer import COUNTERS
from streamconv.readers.numbers import MAX_DIMENSIONS, shape
from streamconv.readers.pickle import describe
from streamconv.readers.window import CUT_OFF, Window
from streamconv.storage.location import Location
from streamconv.storage.protobuf import BYTES, VARINT, signed, varint
from streamconv.tensor import Checksum, Extent, Shape, Stored, TensorSpec

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
_MAX_NAME = 4096
_MAX_TEXT = 1 << 20
_SCALARS = {"I64": "<q", "I32": "<i", "F32": "<f", "F64": "<d", "BOOL": "<?"}


@dataclass(slots=True)
class CkptFile:
    """What a `.ckpt` holds.

    Attributes:
        tensors: in the file's order.
        metadata: texts, and the counters that training keeps beside weights.
        notes: what a user should know, one line each.
        checksum: what the file's end says of the rest, where it has one.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checksum: Checksum | None = None


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


def read(file: Location) -> CkptFile:
    """Index a `.ckpt` file.

    Raises:
        CheckpointError: it is damaged, encrypted, or holds what cannot be converted; says which and where.
    """
    found = CkptFile()
    slices: list[_Record] = []
    with located(file.place), _Blocks(file) as window:
        method = _ENCRYPTED.get(window.read(0, min(4, window.length)))
        if method:
            raise CheckpointError(
                f"it is encrypted ({method})",
                hint="load it with mindspore.load_checkpoint(..., dec_key=..., dec_mode=...) and save it without a key",
            )
        end = window.length
        if _has_footer(window):
            end -= _FOOTER_LENGTH
            found.checksum = _checksum(window, end)
        for record in _records(window, end):
            if slices and record.name != slices[0].name:
                _add(found, slices, window)
                slices = []
            slices.append(record)
        if slices:
            _add(found, slices, window)
    if not found.tensors and not found.metadata:
        raise CheckpointError("it holds no parameter", file=file.place, hint=CUT_OFF)
    return found


def _checksum(window: Window, end: int) -> Checksum:
    """The checksum in the footer, which begins at byte `end`, of all bytes before it."""
    said = int.from_bytes(window.read(window.length - _CRC_LENGTH, _CRC_LENGTH), "big")
    return Checksum((Extent(window.path, 0, end),), f"{said:08x}", f"its end says {said:08x}; {CUT_OFF}")


class _Blocks(Window):
    """A file by position; small neighbouring reads are served from one block."""

    _start, _block = 0, b""

    def read(self, start: int, length: int) -> bytes:
        """As `Window.read`."""
        if length > _BLOCK or start + length > self.length:
            return super().read(start, length)
        if not self._start <= start <= start + length <= self._start + len(self._block):
            self._start, self._block = start, super().read(start, min(_BLOCK, self.length - start))
        return self._block[start - self._start : start - self._start + length]

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """The number at a byte, and the byte after it."""
        data = self.read(at, min(10, max(stop - at, 0)))
        value, used = varint(memoryview(data), 0, len(data))
        return value, at + used

    def fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(number, wire type, first byte or value, length) of each field of the message in bytes [at, stop)."""
        while at < stop:
            key, at = self.varint(at, stop)
            number, wire_type = key >> 3, key & 7
            value, after = self.varint(at, stop)
            if wire_type == VARINT:
                yield number, wire_type, value, 0
                at = after
            elif wire_type == BYTES:
                if after + value > stop:
                    raise CheckpointError(
                        f"the field at byte {after} has {value} bytes, {after + value - stop} more than there are"
                    )
                yield number, wire_type, after, value
                at = after + value
            else:
                raise CheckpointError(f"byte {at} begins no field that MindSpore writes")


def _has_footer(window: Window) -> bool:
    start = window.length - _FOOTER_LENGTH
    return start > 0 and window.read(start, len(_FOOTER)) == _FOOTER


def _records(window: _Blocks, end: int) -> Iterator[_Record]:
    with located(hint=CUT_OFF):
        for number, wire_type, start, length in window.fields(0, end):
            if number != 1 or wire_type != BYTES:
                raise CheckpointError(f"field {number} before byte {start} is none of a checkpoint")
            yield _record(window, start, start + length)


def _record(window: _Blocks, at: int, stop: int) -> _Record:
    name: str | None = None
    inside: tuple[int, int] | None = None
    for number, wire_type, start, length in window.fields(at, stop):
        if number == 1 and wire_type == BYTES:
            name = _text(window, start, length)
        elif number == 2 and wire_type == BYTES:
            inside = (start, start + length)
        elif number == 3 and wire_type == BYTES:
            raise CheckpointError(
                "it is a map parameter, an embedding's hash table, which no other format has",
                tensor=name,
                hint="leave it out of the save, or export it with MindSpore",
            )
    if name is None or inside is None:
        raise CheckpointError(f"the record at byte {at} has no name or no tensor")
    dims: list[int] = []
    kind, content = "", None
    for number, wire_type, start, length in window.fields(*inside):
        if number == 1 and wire_type == VARINT:
            dims.append(signed(start))
        elif number == 1 and wire_type == BYTES:  # as other programs pack them
            place = start
            while place < start + length:
                value, place = window.varint(place, start + length)
                dims.append(signed(value))
        elif number == 2 and wire_type == BYTES:
            kind = _text(window, start, length)
        elif number == 3 and wire_type == BYTES:
            content = (start, length)
        if len(dims) > MAX_DIMENSIONS:
            raise CheckpointError(f"it has more than {MAX_DIMENSIONS} dimensions", tensor=name)
    if content is None:
        raise CheckpointError("it has no content", tensor=name)
    sizes = shape(dims)
    if sizes is None:
        raise CheckpointError(f"its dimensions {dims} are impossible", tensor=name)
    return _Record(name, kind, sizes, *content)


def _text(window: _Blocks, start: int, length: int) -> str:
    if length > _MAX_NAME:
        raise CheckpointError(f"a name of {length} bytes at byte {start}")
    try:
        return window.read(start, length).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the name at byte {start} is not UTF-8") from error


def _add(found: CkptFile, slices: list[_Record], window: _Blocks) -> None:
    """Take a parameter, of which these are all slices."""
    first = slices[0]
    name = first.name
    shown = describe(name, quote="")
    if name in found.tensors or name in found.metadata:
        raise CheckpointError(
            "it occurs again after other parameters; MindSpore takes the last, without a word",
            tensor=shown,
            hint="two files were put together: leave one of them out",
        )
    if any((each.kind, each.dims) != (first.kind, first.dims) for each in slices):
        raise CheckpointError("its slices have several dtypes or dimensions", tensor=shown)
    if first.kind == _TEXT:
        if len(slices) == 1 and first.length <= _MAX_TEXT:
            found.metadata[name] = window.read(first.start, first.length).decode("utf-32-le", "replace")
        return
    if first.kind in _SKIPPED:
        found.notes.append(f"{shown}: a random state ({first.kind}), which is left out")
        return
    if first.kind not in DTYPES:
        raise CheckpointError(
            f"its dtype is {describe(first.kind)}", tensor=shown,
            hint=f"known: {', '.join(DTYPES)}",
        )  # fmt: skip
    dtype = BY_NAME[DTYPES[first.kind]]
    extents = tuple(Extent(window.path, each.start, each.length) for each in slices if each.length)
    held = sum(each.length for each in slices)
    # Files of MindSpore 1 have one dimension of 0 for a scalar.
    shape = () if first.dims == (0,) and held else first.dims
    spec = TensorSpec(name, dtype, shape)
    if held != spec.nbytes:
        raise CheckpointError(
            f"{first.kind} {list(shape)} takes {spec.nbytes} bytes, and its records hold {held}; MindSpore fills "
            "up with zeros, without a word",
            tensor=shown,
            hint=CUT_OFF,
        )
    if first.kind == _PACKED:
        found.notes.append(f"{shown}: Int4, two in a byte, carried through as bytes")
    if name in COUNTERS and shape == ():
        found.metadata[name] = _number(window, extents, dtype)
    else:
        found.tensors[name] = Stored(spec, extents)


def _number(window: _Blocks, extents: tuple[Extent, ...], dtype: DType) -> float | int | bool | None:
    form = _SCALARS.get(dtype.name)
    if form is None or len(extents) != 1:
        return None
    (value,) = struct.unpack(form, window.read(extents[0].offset, extents[0].length))
    assert isinstance(value, (float, int, bool))
    return value
