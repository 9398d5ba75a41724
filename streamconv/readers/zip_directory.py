"""Zip archives by extent: where each record's bytes are, with nothing about them taken on trust.

Only what torch writes is read: records stored as they are, one disk, no encryption. The archive may be a
part of a larger file, as in a distributed checkpoint; its own offsets then count from its first byte.
Format: PKWARE APPNOTE.TXT 6.3, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, Self

from streamconv.errors import CheckpointError
from streamconv.readers.pickle import describe
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

_CUT_OFF = "the file is cut off or damaged: copy it again, and check its size"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row of the central directory; `header` counts from the archive's first byte."""

    name: str
    raw_name: bytes
    size: int
    header: int


class Window:
    """A part of a file, read by position. Use it in a `with` statement."""

    def __init__(self, path: str, offset: int = 0, length: int | None = None) -> None:
        """Open bytes [offset, offset + length) of a file; without a length, up to its end.

        Raises:
            CheckpointError: the file cannot be read, is no regular file, or is shorter than that.
        """
        try:
            if not Path(path).is_file():
                raise CheckpointError("there is no such file", file=path)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"the file cannot be read: {error.strerror}", file=path) from error
        size = os.fstat(self._descriptor).st_size
        self.path = path
        self.offset = offset
        self.length = size - offset if length is None else length
        if offset < 0 or self.length < 0 or offset + self.length > size:
            os.close(self._descriptor)
            raise CheckpointError(
                f"an archive is expected at byte {offset}, {self.length} bytes long; the file has {size}",
                file=path,
                hint=_CUT_OFF,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, both checked to lie in the window. Raises CheckpointError."""
        if start < 0 or length < 0 or start + length > self.length:
            self.fail(f"bytes {start} to {start + length} are named, and there are {self.length}")
        parts = []
        while length:
            part = os.pread(self._descriptor, length, self.offset + start)
            if not part:
                self.fail(f"it ended at byte {start} while it was read")
            parts.append(part)
            start += len(part)
            length -= len(part)
        return b"".join(parts)

    def fail(self, message: str, hint: str = _CUT_OFF) -> NoReturn:
        """Raise the error for this file."""
        raise CheckpointError(f"the zip archive is damaged: {message}", file=self.path, hint=hint)


def records(window: Window) -> dict[str, Extent]:
    """Name -> where the record's bytes are in the file, in the directory's order.

    Raises:
        CheckpointError: the directory contradicts itself, the local headers, or the file's size; two
            records share a name or a byte; a record is compressed or encrypted.
    """
    entries, directory = _entries(window)
    result: dict[str, Extent] = {}
    spans: list[tuple[int, int, str]] = []
    for entry in entries:
        if entry.name in result:
            window.fail(f"two records are called {describe(entry.name)}")
        start = _payload(window, entry)
        result[entry.name] = Extent(window.path, window.offset + start, entry.size)
        spans.append((entry.header, start + entry.size, entry.name))
    spans.sort()
    spans.append((directory, directory, "the directory"))
    for (_, end, name), (header, _, following) in pairwise(spans):
        if end > header:
            window.fail(f"record {describe(name)} overlaps {describe(following)}")
    return result


def _payload(window: Window, entry: _Entry) -> int:
    """Where the record's bytes start: its local header's own lengths count, not the directory's."""
    header = window.read(entry.header, _LOCAL.size + len(entry.raw_name))
    signature, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(header)
    if signature != _LOCAL_SIGNATURE:
        window.fail(f"there is no header of record {describe(entry.name)} at byte {entry.header}")
    if name_length != len(entry.raw_name) or header[_LOCAL.size :] != entry.raw_name:
        window.fail(f"the header at byte {entry.header} is not that of record {describe(entry.name)}")
    if method != _STORED:
        _compressed(window, entry.name)
    start: int = entry.header + _LOCAL.size + name_length + extra_length
    if start + entry.size > window.length:
        window.fail(
            f"record {describe(entry.name)} has {entry.size} bytes from byte {start}, beyond the end at "
            f"{window.length}"
        )
    return start


def _compressed(window: Window, name: str) -> NoReturn:
    raise CheckpointError(
        f"record {describe(name)} is compressed, so its bytes cannot be addressed",
        file=window.path,
        hint="torch never compresses: unpack the archive and zip it again with `zip -0`",
    )


def _entries(window: Window) -> tuple[list[_Entry], int]:
    """The rows of the central directory and where it starts."""
    count, size, offset = _end(window)
    if size > _MAX_DIRECTORY or count * _CENTRAL.size > size:
        window.fail(f"{count} records in a directory of {size} bytes")
    data = window.read(offset, size)
    entries = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            window.fail(f"its directory of {size} bytes holds fewer than {count} records")
        (
            signature, _, _, flags, method, _, _, _, packed, length, name_length, extra_length, comment_length,
            disk, _, _, header,
        ) = _CENTRAL.unpack_from(data, at)  # fmt: skip
        name_end = at + _CENTRAL.size + name_length
        end = name_end + extra_length + comment_length
        if signature != _CENTRAL_SIGNATURE or end > size:
            window.fail(f"its directory has no entry at byte {offset + at}")
        raw_name = data[at + _CENTRAL.size : name_end]
        name = _name(window, raw_name)
        if length == _MAX32 or packed == _MAX32 or header == _MAX32:
            extra = data[name_end : name_end + extra_length]
            length, packed, header = _widened(window, name, extra, length, packed, header)
        if flags & _ENCRYPTED:
            window.fail(f"record {describe(name)} is encrypted", "decrypt the archive first")
        if method != _STORED:
            _compressed(window, name)
        if packed != length:
            window.fail(f"record {describe(name)} has {length} bytes, and {packed} in the archive")
        if disk not in (0, _MAX16):
            window.fail(f"record {describe(name)} is on another disk")
        entries.append(_Entry(name, raw_name, length, header))
        at = end
    if at != size:
        window.fail(f"its directory has {size - at} bytes more than its {count} records")
    return entries, offset


def _name(window: Window, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        window.fail(f"the name of a record, {raw[:64]!r}, is not UTF-8")


def _widened(
    window: Window, name: str, extra: bytes, length: int, packed: int, header: int
) -> tuple[int, int, int]:
    """The fields that do not fit into 32 bits, from the zip64 extra, which holds those alone, in order."""
    fields = [length, packed, header]
    wide = struct.iter_unpack("<Q", _extra(extra))
    for index, value in enumerate(fields):
        if value == _MAX32:
            field = next(wide, None)
            if field is None:
                window.fail(f"record {describe(name)} lacks its 64-bit sizes")
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


def _end(window: Window) -> tuple[int, int, int]:
    """Records, bytes and offset of the central directory, from the record at the archive's end."""
    end = _end_record(window, 0)
    if end is None:
        end = _end_record(window, _MAX16)
    if end is None:
        window.fail("its directory, which is at the end, is missing")
    _, disk, first_disk, here, count, size, offset, _ = _END.unpack(window.read(end, _END.size))
    locator = window.read(end - _LOCATOR64.size, _LOCATOR64.size) if end >= _LOCATOR64.size else b""
    if locator[:4] == _LOCATOR64_SIGNATURE:
        # Torch writes it always, also where 32 bits are enough.
        end = _LOCATOR64.unpack(locator)[2]
        signature, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack(
            window.read(end, _END64.size)
        )
        if signature != _END64_SIGNATURE:
            window.fail(f"there is no zip64 end record at byte {end}")
    if disk or first_disk or here != count:
        window.fail("it is spread over several files, or its zip64 end record is missing")
    if offset + size != end:
        window.fail(
            f"its directory of {size} bytes at byte {offset} does not end where its end record begins"
        )
    return count, size, offset


def _end_record(window: Window, longest_comment: int) -> int | None:
    """Where the end record is whose comment, as long at most, is the last of the archive."""
    start = max(window.length - _END.size - longest_comment, 0)
    tail = window.read(start, window.length - start)
    at = tail.rfind(_END_SIGNATURE)
    while at >= 0:
        # The signature may occur in the comment too.
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail):
            return start + at
        at = tail.rfind(_END_SIGNATURE, 0, at)
    return None
