"""The safetensors reader: its contract, every rule of the format, and the Rust library's opinion."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
from reader_contract import SAFETENSORS, ReaderContract, State
from safetensors.torch import save_file

from streamconv import readers
from streamconv.errors import CheckpointError
from streamconv.readers import safetensors as reader
from streamconv.readers.safetensors import read
from streamconv.storage.location import locate


class TestFile(ReaderContract):
    holds = SAFETENSORS

    def write(self, state: State, directory: Path) -> Path:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        return directory / "model.safetensors"


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def file_of(header: object, data: bytes = b"", *, length: int | None = None, pad: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += pad
    return struct.pack("<Q", len(text) if length is None else length) + text + data


EIGHT = bytes(8)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "seven bytes": (b"\x01" * 7, "not a weight file"),
    "length only": (struct.pack("<Q", 2), "not a weight file"),
    "length of zero": (file_of(b"", EIGHT), "not a weight file"),
    "header beyond the file": (file_of({"a": F32}, EIGHT, length=5000), "the file ends after"),
    "header of 100 GB": (file_of({"a": F32}, EIGHT, length=10**11), "more than the 100000000"),
    "header just too long": (file_of({"a": F32}, EIGHT, length=10**8 + 1), "more than the 100000000"),
    "not JSON": (file_of(b"{not json}", EIGHT), "not JSON"),
    "cut JSON": (file_of(b'{"a":{"dtype":"F32"', EIGHT), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff":1}', EIGHT), "not JSON"),
    "NUL padding": (file_of({"a": F32}, EIGHT, pad=b"\0" * 8), "not JSON"),
    "deep nesting": (file_of(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "not JSON"),
    "text after the object": (file_of(b'{}{"a":1}'), "not JSON"),
    "metadata a list": (file_of({"__metadata__": [1]}), "not an object of text"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "not an object of text"),
    "metadata nested": (file_of({"__metadata__": {"a": {"b": "c"}}}), "not an object of text"),
    "metadata twice": (
        file_of(b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}'),
        "'__metadata__': the header has this key twice",
    ),
    "entry a number": (file_of({"a": 1}), "tensor 'a': its entry in the header is not an object"),
    "entry null": (file_of({"a": None}), "not an object"),
    "entry empty": (file_of({"a": {}}), "lacks dtype, shape, data_offsets"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "lacks dtype"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "lacks shape"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "lacks data_offsets"),
    "unknown dtype": (file_of({"a": entry(dtype="F33")}, EIGHT), "no dtype 'F33'"),
    "dtype of torch": (file_of({"a": entry(dtype="float32")}, EIGHT), "no dtype 'float32'"),
    "dtype it lacks": (file_of({"a": entry(dtype="C128", shape=[1])}, EIGHT), "no dtype 'C128'"),
    "dtype a number": (file_of({"a": entry(dtype=7)}, EIGHT), "no dtype"),
    "dtype a list": (file_of({"a": entry(dtype=["F32"])}, EIGHT), "no dtype"),
    "dtype very long": (file_of({"a": entry(dtype="F" * 10**6)}, EIGHT), "no dtype"),
    "negative size": (file_of({"a": entry(shape=[-2])}, EIGHT), "not a list of sizes"),
    "fractional size": (file_of({"a": entry(shape=[2.0])}, EIGHT), "not a list of sizes"),
    "boolean size": (file_of({"a": entry(shape=[True, 2])}, EIGHT), "not a list of sizes"),
    "size as text": (file_of({"a": entry(shape=["2"])}, EIGHT), "not a list of sizes"),
    "shape no list": (file_of({"a": entry(shape=2)}, EIGHT), "not a list of sizes"),
    "size beyond 64 bits": (file_of({"a": entry(shape=[1 << 70])}, EIGHT), "not a list of sizes"),
    "product beyond 64 bits": (file_of({"a": entry(shape=[1 << 40, 1 << 40])}, EIGHT), "beyond 64-bit sizes"),
    "bits beyond 64 bits": (file_of({"a": entry(shape=[1 << 62])}, EIGHT), "beyond 64-bit sizes"),
    "huge times zero": (
        file_of({"a": entry(shape=[1 << 63, 4, 0], data_offsets=[0, 0])}),
        "beyond 64-bit sizes",
    ),
    "negative offset": (file_of({"a": entry(data_offsets=[-8, 0])}, EIGHT), "not a first byte and an end"),
    "one offset": (file_of({"a": entry(data_offsets=[8])}, EIGHT), "not a first byte and an end"),
    "three offsets": (file_of({"a": entry(data_offsets=[0, 4, 8])}, EIGHT), "not a first byte and an end"),
    "offsets backwards": (file_of({"a": entry(data_offsets=[8, 0])}, EIGHT), "not a first byte and an end"),
    "offsets as text": (file_of({"a": entry(data_offsets=["0", "8"])}, EIGHT), "not a first byte and an end"),
    "too short for its shape": (file_of({"a": entry(data_offsets=[0, 4])}, EIGHT), "takes 8 bytes"),
    "too long for its shape": (file_of({"a": entry(shape=[1])}, EIGHT), "takes 4 bytes"),
    "half a byte": (file_of({"a": entry(dtype="F4", shape=[3], data_offsets=[0, 2])}, b"12"), "whole bytes"),
    "a quarter byte": (
        file_of({"a": entry(dtype="F6_E2M3", shape=[2], data_offsets=[0, 2])}, b"12"),
        "whole bytes",
    ),
    "gap before": (file_of({"a": entry(data_offsets=[4, 12])}, bytes(12)), "begins at byte 4"),
    "gap between": (
        file_of({"a": F32, "b": entry(data_offsets=[12, 20])}, bytes(20)),
        "tensor 'b': its data begins at byte 12",
    ),
    "overlap": (
        file_of({"a": F32, "b": entry(data_offsets=[4, 12])}, bytes(12)),
        "tensor 'b': its data begins",
    ),
    "two names for one extent": (file_of({"a": F32, "b": F32}, EIGHT), "its data begins at byte 0"),
    "data cut off": (file_of({"a": F32}, bytes(5)), "3 of 8 bytes of tensor data are missing"),
    "data far beyond": (
        file_of({"a": entry(shape=[1 << 50], data_offsets=[0, 1 << 52])}, EIGHT),
        "are missing",
    ),
    "bytes left over": (file_of({"a": F32}, bytes(9)), "1 bytes follow the last tensor"),
    "name twice, same entry": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), EIGHT),
        "'a': the header has this key twice",
    ),
    "name twice by an escape": (
        file_of(b'{"a":%b,"\\u0061":%b}' % ((json.dumps(F32).encode(),) * 2), EIGHT),
        "'a': the header has this key twice",
    ),
    "shape twice": (
        file_of(b'{"a":{"dtype":"F32","shape":[9],"shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "'shape': the header has this key twice",
    ),
}

# What the library lets through and we do not: names twice, of which it takes the last without a word.
STRICTER = {"name twice, same entry", "name twice by an escape"}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        readers.open_checkpoint(path)

    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    if case not in STRICTER:
        with pytest.raises((safetensors.SafetensorError, OSError)):
            safetensors.safe_open(path, framework="numpy")


ACCEPTED: dict[str, bytes] = {
    "no tensors": file_of({}),
    "no metadata": file_of({"a": F32}, EIGHT),
    "metadata null": file_of({"__metadata__": None, "a": F32}, EIGHT),
    "metadata last": file_of({"a": F32, "__metadata__": {"format": "pt"}}, EIGHT),
    "padding of blanks": file_of({"a": F32}, EIGHT, pad=b"     "),
    "padding of lines": file_of({"a": F32}, EIGHT, pad=b"\n\n"),
    "a blank before": file_of(b" " + json.dumps({"a": F32}).encode(), EIGHT),
    "other fields": file_of({"a": entry(extra=[1, {"x": 2}])}, EIGHT),
    "empty name": file_of({"": F32}, EIGHT),
    "unaligned": file_of(
        {"i": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}, "f": entry(data_offsets=[1, 9])},
        bytes(9),
    ),
    "empty tensors at one place": file_of(
        {"x": entry(shape=[0], data_offsets=[0, 0]), "a": F32, "y": entry(shape=[0, 3], data_offsets=[8, 8])},
        EIGHT,
    ),
    "names that look like fields": file_of(
        {"data_offsets": F32, "shape": entry(data_offsets=[8, 16])}, bytes(16)
    ),
    "names with escapes": file_of({'a"b\\c\n': F32}, EIGHT),
    "0-d": file_of({"a": entry(shape=[], data_offsets=[0, 4])}, bytes(4)),
    "four bits": file_of({"a": entry(dtype="F4", shape=[2, 8], data_offsets=[0, 8])}, EIGHT),
    "six bits": file_of({"a": entry(dtype="F6_E3M2", shape=[4], data_offsets=[0, 3])}, bytes(3)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_right_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(ACCEPTED[case])
    with safetensors.safe_open(path, framework="numpy") as theirs:
        ours = readers.open_checkpoint(path)
        assert set(ours) == set(theirs.keys())
        assert list(read(locate(path)).tensors) == list(theirs.offset_keys()) or "empty" in case
        assert (theirs.metadata() or {}) == read(locate(path)).metadata


def test_a_file_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "outer"
    path.write_bytes(b"before" + file_of({"a": F32}, b"12345678") + b"after")
    (tensor,) = read(locate(path), 6, len(file_of({"a": F32}, EIGHT))).tensors.values()
    (extent,) = tensor.extents
    assert path.read_bytes()[extent.offset : extent.offset + extent.length] == b"12345678"


def many(count: int, *, between: str = ",", name: str = "t.{}") -> bytes:
    """A header of so many tensors of four bytes, and their data."""
    entries = (
        f'"{name.format(at)}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * at},{4 * at + 4}]}}'
        for at in range(count)
    )
    return file_of(("{" + between.join(entries) + "}").encode(), bytes(4 * count))


def test_a_long_header_is_read_in_parts(tmp_path: Path) -> None:
    """What is kept of a tensor is a few hundred bytes, and no more is needed while it is read."""
    path = tmp_path / "many.safetensors"
    count = 60_000
    path.write_bytes(many(count))
    tracemalloc.start()
    try:
        found = read(locate(path)).tensors
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (
        len(found) == count and found["t.777"].extents[0].offset == found["t.0"].extents[0].offset + 4 * 777
    )
    assert held < 400 * count and peak < 600 * count


@pytest.mark.parametrize("part", [1, 50, 200, 1 << 20])
@pytest.mark.parametrize("between", [",", " ,\n", "\t, "])
@pytest.mark.parametrize("name", ["t.{}", '}},\\"{}', "{}\\\\", "\\u00e9{}"])
def test_parts_of_a_header_are_the_header(
    part: int, between: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_PART", part)
    path = tmp_path / "many.safetensors"
    path.write_bytes(many(9, between=between, name=name))
    found = read(locate(path)).tensors
    with safetensors.safe_open(path, "numpy") as theirs:
        assert set(found) == set(theirs.keys())
    assert list(found) == [json.loads(f'"{name.format(at)}"') for at in range(9)]


@pytest.mark.parametrize("part", [1, 1 << 20])
@pytest.mark.parametrize("case", HOSTILE)
def test_faults_are_found_in_parts_too(
    case: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = HOSTILE[case]
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    monkeypatch.setattr(reader, "_PART", part)
    with pytest.raises(CheckpointError):
        read(locate(path))


@pytest.mark.parametrize(
    "text",
    [
        '{{"a":{0},"b":{1},"a":{0}}}', '{{"a":{0},"b":{1},}}', '{{"a":{0},"b":{1}  ,  }}', '{{"a":{0},,"b":{1}}}',
        '{{"__metadata__":{{"x":"1"}},"a":{0},"b":{1},"__metadata__":{{"x":"2"}}}}',
        '{{"__metadata__":null,"a":{0},"b":{1},"__metadata__":{{"x":"2"}}}}', '{{"a":{0}}},{{"b":{1}}}', '{{"a":{0} "b":{1}}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", [1, 60, 1 << 20])
def test_what_is_no_header_is_none_in_parts(
    text: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [f'{{"dtype":"F32","shape":[1],"data_offsets":[{at},{at + 4}]}}' for at in (0, 4)]
    path = tmp_path / "odd.safetensors"
    path.write_bytes(file_of(text.format(*entries).encode(), EIGHT))
    monkeypatch.setattr(reader, "_PART", part)
    with pytest.raises(CheckpointError):
        read(locate(path))
