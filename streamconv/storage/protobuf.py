"""Protocol Buffers' wire format, read without a schema: fields of a message, one after the other.

Source: protocolbuffers.dev, "Encoding"; protocolbuffers/protobuf: src/google/protobuf/wire_format_lite.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, overload

from streamconv.errors import CheckpointError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; groups (3 and 4) are not read, nothing has written them for years."""

_FIXED = {FIXED64: 8, FIXED32: 4}
_LONGEST_VARINT = 10
_LONGEST_TEXT = 4096


class Buffer(Protocol):
    """Bytes by position: a `memoryview`, or a file that is read where it is looked at."""

    @overload
    def __getitem__(self, key: int, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes | memoryview: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message.

    Attributes:
        number: the field's number in its schema.
        wire_type: how it is encoded.
        value: of a varint, unsigned; 0 for other types.
        start: where the content begins, in the buffer that was read.
        stop: where it ends.
    """

    number: int
    wire_type: int
    value: int
    start: int
    stop: int


def fields(buffer: Buffer, start: int = 0, stop: int | None = None) -> Iterator[Field]:
    """The fields of the message in bytes [start, stop) of a buffer. Allocates nothing for their contents.

    Raises:
        CheckpointError: it is not a message; says at which byte.
    """
    stop = len(buffer) if stop is None else stop
    at = start
    while at < stop:
        key, at = varint(buffer, at, stop)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise CheckpointError(f"the field before byte {at} has the number 0, which no field has")
        if wire_type == VARINT:
            value, end = varint(buffer, at, stop)
            yield Field(number, wire_type, value, at, end)
        elif wire_type == BYTES:
            length, at = varint(buffer, at, stop)
            end = at + length
            if end > stop:
                raise CheckpointError(
                    f"a field of {length} bytes at byte {at} goes beyond its message's end, {stop}"
                )
            yield Field(number, wire_type, 0, at, end)
        elif wire_type in _FIXED:
            end = at + _FIXED[wire_type]
            if end > stop:
                raise CheckpointError(f"a number at byte {at} goes beyond its message's end, {stop}")
            yield Field(number, wire_type, 0, at, end)
        else:
            raise CheckpointError(f"wire type {wire_type} at byte {at} is not one that is written")
        at = end


def varint(buffer: Buffer, at: int, stop: int) -> tuple[int, int]:
    """The unsigned number at a byte, and the byte after it.

    Raises:
        CheckpointError: it does not end where it should.
    """
    value = 0
    for shift in range(_LONGEST_VARINT):
        if at + shift >= stop:
            raise CheckpointError(f"a number at byte {at} goes beyond its message's end, {stop}")
        byte = buffer[at + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value & (1 << 64) - 1, at + shift + 1
    raise CheckpointError(f"the number at byte {at} does not end")


def encoded_varint(value: int) -> bytes:
    """An unsigned number as a varint."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def signed(value: int) -> int:
    """A varint as the `int32` or `int64` that it encodes."""
    return value - (1 << 64) if value >> 63 else value


def integers(buffer: Buffer, field: Field) -> Iterator[int]:
    """The numbers in a field of `int32` or `int64`: one, or several that are packed."""
    if field.wire_type in _FIXED:
        raise CheckpointError(f"the number at byte {field.start} is of a fixed size")
    at = field.start
    while at < field.stop:
        value, at = varint(buffer, at, field.stop)
        yield signed(value)


def float32(buffer: Buffer, field: Field) -> float:
    """The content of a FIXED32 field as a float."""
    return float(struct.unpack("<f", buffer[field.start : field.stop])[0])


def text(buffer: Buffer, field: Field) -> str:
    """The content of a BYTES field as text.

    Raises:
        CheckpointError: it is not UTF-8, or longer than any name.
    """
    if field.stop - field.start > _LONGEST_TEXT:
        raise CheckpointError(f"a text of {field.stop - field.start} bytes at byte {field.start}")
    try:
        return bytes(buffer[field.start : field.stop]).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the text at byte {field.start} is not UTF-8: {error.reason}") from None
