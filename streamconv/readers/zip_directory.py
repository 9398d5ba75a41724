"""Zip archives by extent: where each record's bytes are, with nothing about them taken on trust.

Only what torch writes is read: records stored as they are, one disk, no encryption. The archive may be a
part of a larger file, as in a distributed checkpoint; its own offsets then count from its first byte.
Format: PKWARE APPNOTE.TXT 6.3, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from streamconv.errors import CheckpointError
from streamconv.readers.pickle import describe
from streamconv.readers.window import Window
from streamconv.tensor import Extent

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")

_LOCAL_SIGNATURE = b"PK\3\4"
_CENTRAL_SIGNATURE = b"PK\1\2"
_END_SIGNATURE = b"PK\5\6"
_END64_SIGNATURE = b"PK\6\6"
_LOCATOR64_SIGNATURE = b"PK\6\7"

_ENCRYPTED = 0x2041  # encrypted, strongly encrypted, masked header
_STORED = 0
_ZIP64_EXTRA = 1
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_MAX_DIRECTORY = 1 << 29  # bytes: some three million records


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row of the central directory; `header` counts from the archive's first byte."""

    name: str
    raw_name: bytes
    size: int
    header: int


class Archive(Window):
    """A zip archive, which may be a part of a file. Use it in a `with` statement."""

    damaged = "the zip archive is damaged"


def records(archive: Archive) -> dict[str, Extent]:
    """Name -> where the record's bytes are in the file, in the directory's order.

    Raises:
        CheckpointError: the directory contradicts itself, the local headers, or the file's size; two
            records share a name or a byte; a record is compressed or encrypted.
    """
    entries, directory = _entries(archive)
    result: dict[str, Extent] = {}
    spans: list[tuple[int, int, str]] = []
    archive.expect((entry.header, _LOCAL.size + len(entry.raw_name)) for entry in entries)
    for entry in entries:
        if entry.name in result:
            archive.fail(f"two records are called {describe(entry.name)}")
        start = _payload(archive, entry)
        result[entry.name] = Extent(archive.path, archive.offset + start, entry.size)
        spans.append((entry.header, start + entry.size, entry.name))
    spans.sort()
    spans.append((directory, directory, "the directory"))
    for (_, end, name), (header, _, following) in pairwise(spans):
        if end > header:
            archive.fail(f"record {describe(name)} overlaps {describe(following)}")
    return result


def _payload(archive: Archive, entry: _Entry) -> int:
    """Where the record's bytes start: its local header's own lengths count, not the directory's."""
    header = archive.read(entry.header, _LOCAL.size + len(entry.raw_name))
    signature, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(header)
    if signature != _LOCAL_SIGNATURE:
        archive.fail(f"there is no header of record {describe(entry.name)} at byte {entry.header}")
    if name_length != len(entry.raw_name) or header[_LOCAL.size :] != entry.raw_name:
        archive.fail(f"the header at byte {entry.header} is not that of record {describe(entry.name)}")
    if method != _STORED:
        _compressed(archive, entry.name)
    start: int = entry.header + _LOCAL.size + name_length + extra_length
    if start + entry.size > archive.length:
        archive.fail(
            f"record {describe(entry.name)} has {entry.size} bytes from byte {start}, beyond the end at "
            f"{archive.length}"
        )
    return start


def _compressed(archive: Archive, name: str) -> NoReturn:
    raise CheckpointError(
        f"record {describe(name)} is compressed, so its bytes cannot be addressed",
        file=archive.path,
        hint="torch never compresses: unpack the archive and zip it again with `zip -0`",
    )


def _entries(archive: Archive) -> tuple[list[_Entry], int]:
    """The rows of the central directory and where it starts."""
    count, size, offset = _end(archive)
    if size > _MAX_DIRECTORY or count * _CENTRAL.size > size:
        archive.fail(f"{count} records in a directory of {size} bytes")
    data = archive.read(offset, size)
    entries = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            archive.fail(f"its directory of {size} bytes holds fewer than {count} records")
        (
            signature, _, _, flags, method, _, _, _, packed, length, name_length, extra_length, comment_length,
            disk, _, _, header,
        ) = _CENTRAL.unpack_from(data, at)  # fmt: skip
        name_end = at + _CENTRAL.size + name_length
        end = name_end + extra_length + comment_length
        if signature != _CENTRAL_SIGNATURE or end > size:
            archive.fail(f"its directory has no entry at byte {offset + at}")
        raw_name = data[at + _CENTRAL.size : name_end]
        name = _name(archive, raw_name)
        if length == _MAX32 or packed == _MAX32 or header == _MAX32:
            extra = data[name_end : name_end + extra_length]
            length, packed, header = _widened(archive, name, extra, length, packed, header)
        if flags & _ENCRYPTED:
            archive.fail(f"record {describe(name)} is encrypted", "decrypt the archive first")
        if method != _STORED:
            _compressed(archive, name)
        if packed != length:
            archive.fail(f"record {describe(name)} has {length} bytes, and {packed} in the archive")
        if disk not in (0, _MAX16):
            archive.fail(f"record {describe(name)} is on another disk")
        entries.append(_Entry(name, raw_name, length, header))
        at = end
    if at != size:
        archive.fail(f"its directory has {size - at} bytes more than its {count} records")
    return entries, offset


def _name(archive: Archive, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        archive.fail(f"the name of a record, {raw[:64]!r}, is not UTF-8")


def _widened(
    archive: Archive, name: str, extra: bytes, length: int, packed: int, header: int
) -> tuple[int, int, int]:
    """The fields that do not fit into 32 bits, from the zip64 extra, which holds those alone, in order."""
    fields = [length, packed, header]
    wide = struct.iter_unpack("<Q", _extra(extra))
    for index, value in enumerate(fields):
        if value == _MAX32:
            field = next(wide, None)
            if field is None:
                archive.fail(f"record {describe(name)} lacks its 64-bit sizes")
            (fields[index],) = field
    return fields[0], fields[1], fields[2]


def _extra(extra: bytes) -> bytes:
    """The whole 64-bit fields of the zip64 extra, empty without one."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == _ZIP64_EXTRA:
            return extra[at : at + min(size, len(extra) - at) // 8 * 8]
        at += size
    return b""


def _end(archive: Archive) -> tuple[int, int, int]:
    """Records, bytes and offset of the central directory, from the record at the archive's end."""
    end = _end_record(archive, 0)
    if end is None:
        end = _end_record(archive, _MAX16)
    if end is None:
        archive.fail("its directory, which is at the end, is missing")
    _, disk, first_disk, here, count, size, offset, _ = _END.unpack(archive.read(end, _END.size))
    locator = archive.read(end - _LOCATOR64.size, _LOCATOR64.size) if end >= _LOCATOR64.size else b""
    if locator[:4] == _LOCATOR64_SIGNATURE:
        # Torch writes it always, also where 32 bits are enough.
        end = _LOCATOR64.unpack(locator)[2]
        signature, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack(
            archive.read(end, _END64.size)
        )
        if signature != _END64_SIGNATURE:
            archive.fail(f"there is no zip64 end record at byte {end}")
    if disk or first_disk or here != count:
        archive.fail("it is spread over several files, or its zip64 end record is missing")
    if offset + size != end:
        archive.fail(
            f"its directory of {size} bytes at byte {offset} does not end where its end record begins"
        )
    return count, size, offset


def _end_record(archive: Archive, longest_comment: int) -> int | None:
    """Where the end record is whose comment, as long at most, is the last of the archive."""
    start = max(archive.length - _END.size - longest_comment, 0)
    tail = archive.read(start, archive.length - start)
    at = tail.rfind(_END_SIGNATURE)
    while at >= 0:
        # The signature may occur in the comment too.
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail):
            return start + at
        at = tail.rfind(_END_SIGNATURE, 0, at)
    return None
