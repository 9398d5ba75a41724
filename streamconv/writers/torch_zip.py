"""The zip format of `torch.save`: a pickle that names storages, and one stored record for each.

The layout is torch's own (pytorch/pytorch: torch/serialization.py, `_save`; caffe2/serialize/
inline_container.cc; third_party/miniz): order of records, padding, data descriptors, zip64. A file is what
`torch.save` writes for a plain dictionary of the same tensors, except for the serialization id, which torch
makes from the contents; here it is made from the names, dtypes and shapes.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from streamconv.errors import Problem
from streamconv.tensor import Shape, TensorSpec
from streamconv.writers.layout import BARE, About, FileLayout, Literal, Patch, Placement, Target
from streamconv.writers.torch_pickle import TorchTensor, pickled

_ALIGNMENT = 64


def check(spec: TensorSpec) -> Problem | None:
    """Why a torch file cannot hold such a tensor, or None where it can."""
    if spec.dtype.torch_name is None:
        return Problem(
            f"torch has no dtype {spec.dtype}",
            tensor=spec.name,
            hint=f"write --to safetensors, or cast it: --dtype '{spec.name}=BF16'",
        )
    if spec.dtype.packed and (not spec.shape or spec.shape[-1] % _per_element(spec)):
        return Problem(
            f"torch packs {_per_element(spec)} values of {spec.dtype} into one element of the last dimension; "
            f"shape {list(spec.shape)} does not divide so",
            tensor=spec.name,
            hint=f"write --to safetensors, or cast it: --dtype '{spec.name}=BF16'",
        )
    return None


def layout(tensors: Sequence[Target], about: About = BARE) -> FileLayout:
    """Plan a torch file of a dictionary of the tensors, in their order.

    Tied tensors (equal storage, dtype and shape) share one record, as they do in `torch.save`. The stem of the file's
    name is the directory inside the archive; without one: `archive`, as torch calls it in a stream. There is no place
    for metadata.
    """
    described, first_of_key = _storages(tensors)
    data_pickle = pickled(described, about.wrapping)

    archive = _Archive(directory_name(about.name))
    archive.add("data.pkl", data_pickle)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", str(_ALIGNMENT).encode("ascii"))
    archive.add("byteorder", b"little")
    offsets = {key: archive.add(f"data/{key}", first) for key, first in first_of_key.items()}
    archive.add("version", b"3\n")
    archive.add(".data/serialization_id", _serialization_id(data_pickle))
    literals, patches = archive.finish()

    placements = sorted(
        (Placement(tensor.name, offsets[tensor.key], tensor.nbytes) for tensor in described),
        key=lambda placement: placement.offset,
    )
    return FileLayout(archive.size, tuple(placements), literals, patches)


def directory_name(file_name: str) -> str:
    """The directory that torch puts all records of a file in: the name up to its last dot.

    A name that is not ASCII, or has nothing before the dot, gives `archive` (torch/serialization.py,
    `_open_zipfile_writer_file`: such files are written as streams).
    """
    stem = file_name.rpartition(".")[0] if "." in file_name else file_name
    return stem if stem and file_name.isascii() else "archive"


def _storages(tensors: Sequence[Target]) -> tuple[list[TorchTensor], dict[str, TorchTensor]]:
    """The tensors with their storage keys, and for each key the first tensor that has it."""
    described: list[TorchTensor] = []
    first_of_key: dict[str, TorchTensor] = {}
    key_of: dict[tuple[Hashable, str, Shape], str] = {}
    for target in tensors:
        spec = target.spec
        key = str(len(first_of_key))
        if target.storage is not None:
            key = key_of.setdefault((target.storage, spec.dtype.name, spec.shape), key)
        tensor = TorchTensor(spec.name, spec.dtype, _torch_shape(spec), key, spec.nbytes)
        described.append(tensor)
        first_of_key.setdefault(key, tensor)
    return described, first_of_key


def _per_element(spec: TensorSpec) -> int:
    """How many values torch puts into one element: 2 for F4 (float4_e2m1fn_x2)."""
    return 8 // spec.dtype.bits


def _torch_shape(spec: TensorSpec) -> Shape:
    if not spec.dtype.packed:
        return spec.shape
    return (*spec.shape[:-1], spec.shape[-1] // _per_element(spec))


def _serialization_id(data_pickle: bytes) -> bytes:
    """Forty decimal digits, as torch's has, that follow from names, dtypes and shapes."""
    number = int.from_bytes(hashlib.sha256(data_pickle).digest(), "big")
    return f"{number % 10**40:040d}".encode("ascii")


# ------------------------------------------------------------------------------------------------ zip

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_CENTRAL_CRC = 16
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR_64 = struct.Struct("<4sI2Q")
_DESCRIPTOR_CRC = 4
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")

_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF

_UTF8_NAME = 0x0800
_HAS_DESCRIPTOR = 0x0008
_ZIP64_EXTRA = 0x0001

# Versions 3.0, on Unix, and 4.5, which brought zip64.
_MADE_BY = 0x031E
_NEEDED_FOR_64 = 45


@dataclass(slots=True)
class _Archive:
    """Records laid end to end. All bytes but those of reserved records become literals.

    Attributes:
        directory: the path before every record's name.
        size: bytes so far.
    """

    directory: str
    size: int = 0
    _literals: list[Literal] = field(default_factory=list)
    _pending: bytearray = field(default_factory=bytearray)  # the literal that ends at `size`
    _central: bytearray = field(default_factory=bytearray)
    _count: int = 0
    _unknown: list[tuple[Placement, int, int]] = field(default_factory=list)  # and where the two CRCs go

    def add(self, name: str, content: bytes | TorchTensor) -> int:
        """A record of bytes, or of a tensor's, which come later; returns where they go."""
        length = len(content) if isinstance(content, bytes) else content.nbytes
        crc = zlib.crc32(content) if isinstance(content, bytes) else 0
        central = len(self._central)
        start = self._begin(name, length, crc)
        payload = self.size
        if isinstance(content, bytes):
            self._write(content)
        elif length:
            self._flush()
            self.size += length
            place = Placement(content.name, payload, length)
            self._unknown.append((place, self.size + _DESCRIPTOR_CRC, central + _CENTRAL_CRC))
        if length:
            form = _DESCRIPTOR_64 if max(start, length) >= _MAX32 else _DESCRIPTOR
            self._write(form.pack(b"PK\7\10", crc, length, length))
        return payload

    def finish(self) -> tuple[tuple[Literal, ...], tuple[Patch, ...]]:
        """Write the directory; returns all literals and patches."""
        start = self.size
        self._write(self._central)
        self._write(_directory_end(self._count, start, self.size))
        self._flush()
        return tuple(self._literals), tuple(
            Patch(place.name, offset, "crc32", place.offset, place.length)
            for place, descriptor, central in self._unknown
            for offset in (descriptor, start + central)
        )

    def _begin(self, name: str, length: int, crc: int) -> int:
        """A record's headers, the local one padded so that the payload is aligned; returns its offset."""
        path = f"{self.directory}/{name}".encode()
        start = self.size
        flags = _UTF8_NAME | (_HAS_DESCRIPTOR if length else 0)
        # Checksum and sizes are left to the descriptor, and so is the compressed size in the extra field.
        extra = _extra_64(length, 0, start)
        padding = -(start + _LOCAL.size + len(path) + len(extra) + 4) % _ALIGNMENT
        extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        self._write(_LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra)
        self._central += _central_header(path, flags, crc, length, start)
        self._count += 1
        return start

    def _write(self, data: bytes | bytearray) -> None:
        self._pending += data
        self.size += len(data)

    def _flush(self) -> None:
        if self._pending:
            self._literals.append(Literal(self.size - len(self._pending), bytes(self._pending)))
            self._pending.clear()


def _extra_64(length: int, compressed: int, header_offset: int) -> bytes:
    """The zip64 extra field: the sizes if one is too large for 32 bits, and the offset if that is."""
    if length < _MAX32 and header_offset < _MAX32:
        return b""
    body = b""
    if length >= _MAX32:
        body += struct.pack("<2Q", length, compressed)
    if header_offset >= _MAX32:
        body += struct.pack("<Q", header_offset)
    return struct.pack("<2H", _ZIP64_EXTRA, len(body)) + body


def _central_header(path: bytes, flags: int, crc: int, length: int, header_offset: int) -> bytes:
    extra = _extra_64(length, length, header_offset)
    sizes = min(length, _MAX32)
    numbers = (0, 0, flags, 0, 0, 0, crc, sizes, sizes, len(path), len(extra), 0, 0, 0, 0)
    return _CENTRAL.pack(b"PK\1\2", *numbers, min(header_offset, _MAX32)) + path + extra


def _directory_end(count: int, start: int, stop: int) -> bytes:
    """The end records, the zip64 ones always among them, after a directory in bytes [start, stop)."""
    length = stop - start
    return (
        _END_64.pack(
            b"PK\6\6", _END_64.size - 12, _MADE_BY, _NEEDED_FOR_64, 0, 0, count, count, length, start
        )
        + _LOCATOR_64.pack(b"PK\6\7", 0, stop, 1)
        + _END.pack(
            *(b"PK\5\6", 0, 0, min(count, _MAX16), min(count, _MAX16)),
            *(min(length, _MAX32), min(start, _MAX32), 0),
        )
    )
