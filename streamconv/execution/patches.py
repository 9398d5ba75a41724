"""Patches: bytes of a file that depend on the rest of it, and are written last.

Files are read again one at a time, through a buffer of `_BLOCK` bytes outside any worker's arena.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Literal

from streamconv.storage.files import Files
from streamconv.writers.layout import FileLayout, Patch

_BLOCK = 4 << 20


def computed(layout: FileLayout, path: str, files: Files) -> Iterator[tuple[int, bytes]]:
    """Each patch of a file whose tensor bytes are all in place, as (offset, bytes)."""
    buffer = memoryview(bytearray(_BLOCK if layout.patches else 0))
    # A zip holds each checksum twice, and patches over one range are neighbours: it is read once.
    for (start, length), patches in itertools.groupby(
        layout.patches, key=lambda patch: (patch.start, patch.length)
    ):
        crc = 0
        for at in range(start, start + length, _BLOCK):
            part = buffer[: min(start + length - at, _BLOCK)]
            files.read_into(path, part, at)
            crc = zlib.crc32(part, crc)
        for patch in patches:
            yield patch.offset, crc.to_bytes(4, _order(patch))


def text(patch: Patch, value: bytes | bytearray) -> str:
    """What a patch's four bytes say, in hexadecimal."""
    return f"{int.from_bytes(value, _order(patch)):08x}"


def _order(patch: Patch) -> Literal["big", "little"]:
    return "big" if patch.kind == "crc32, big-endian" else "little"


def apply(layout: FileLayout, path: str) -> None:
    """Write every patch into a file."""
    with Files() as files:
        for offset, data in computed(layout, path, files):
            files.write(path, data, offset)
