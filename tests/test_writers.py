"""Writers: one contract for all formats, then what each format owes to its own library.

A layout is made real by `materialise`, which knows nothing of formats, and read back by the library that
defines the format.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import pickletools
import random
import zipfile
import zlib
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import strategies
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streamconv import dtypes, shard
from streamconv.dtypes import DType
from streamconv.errors import PlanError
from streamconv.tensor import TensorSpec
from streamconv.writers import mindspore
from streamconv.writers.formats import FORMATS
from streamconv.writers.layout import About, FileLayout, Literal, Patch, Placement, Target, problems

Read = tuple[DType, tuple[int, ...], bytes]

relaxed = settings(
    deadline=None,
    max_examples=60,
    # One contract runs for every writer, in a class of its own.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)

F32, U8, BOOL, F4, F6, C128 = map(dtypes.by_name, ("F32", "U8", "BOOL", "F4", "F6_E2M3", "C128"))


def targets(specs: list[TensorSpec]) -> list[Target]:
    return [Target(spec) for spec in specs]


def contents_of(specs: list[TensorSpec], seed: int = 0) -> dict[str, bytes]:
    return {spec.name: strategies.tensor_bytes(spec, seed) for spec in specs}


def materialise(layout: FileLayout, contents: dict[str, bytes], seed: int = 0) -> bytes:
    """The file, its parts written in random order over rubbish, its patches last."""
    file = bytearray(b"\xee" * layout.size)
    parts = [(literal.offset, literal.data) for literal in layout.literals]
    parts += [(place.offset, contents[place.name]) for place in layout.placements]
    random.Random(seed).shuffle(parts)
    for offset, data in parts:
        assert offset + len(data) <= layout.size
        file[offset : offset + len(data)] = data

    for patch in layout.patches:
        assert file[patch.offset : patch.offset + 4] == bytes(4)
        assert patch.kind == "crc32"
        checksum = zlib.crc32(file[patch.start : patch.start + patch.length])
        file[patch.offset : patch.offset + 4] = checksum.to_bytes(4, "little")
    assert len(file) == layout.size
    return bytes(file)


class WriterContract:
    """What holds for every writer. A subclass names its writer and reads files in its library."""

    format: str
    dtypes: list[DType]
    names: st.SearchStrategy[str] = st.text(max_size=12)
    aligned = True

    def read(self, path: Path) -> dict[str, Read]:
        """All tensors of a file, as the format's own library has them."""
        raise NotImplementedError

    @property
    def writer(self):
        return FORMATS[self.format].writer

    def specs(self, data) -> list[TensorSpec]:
        return data.draw(strategies.spec_lists(self.dtypes, self.names))

    @pytest.fixture(autouse=True)
    def directory(self, tmp_path_factory):
        self.path = tmp_path_factory.mktemp("written") / "file"

    def refused(self, specs: list[TensorSpec]) -> list[tuple[str, str]]:
        """(tensor, message) of every problem that keeps specs from being written."""
        return [(problem.tensor or "", problem.message) for problem in problems(self.writer, specs)]

    @relaxed
    @given(st.data(), st.integers(0, 9))
    def test_the_library_reads_back_what_was_written(self, data, seed):
        specs = self.specs(data)
        contents = contents_of(specs, seed)
        self.path.write_bytes(materialise(self.writer.layout(targets(specs)), contents, seed))
        assert self.read(self.path) == {
            spec.name: (spec.dtype, spec.shape, contents[spec.name]) for spec in specs
        }

    @relaxed
    @given(st.data())
    def test_all_bytes_have_one_origin(self, data):
        layout = self.writer.layout(targets(self.specs(data)))
        parts = [(place.offset, place.length) for place in layout.placements]
        parts += [(literal.offset, len(literal.data)) for literal in layout.literals]
        position = 0
        for offset, length in sorted(part for part in parts if part[1]):
            assert offset == position
            position += length
        assert position == layout.size

    @relaxed
    @given(st.data())
    def test_order_of_parts(self, data):
        specs = self.specs(data)
        layout = self.writer.layout(targets(specs))
        assert sorted(place.name for place in layout.placements) == sorted(spec.name for spec in specs)
        for parts in (layout.placements, layout.literals):
            assert [part.offset for part in parts] == sorted(part.offset for part in parts)

    @relaxed
    @given(st.data())
    def test_every_tensor_is_aligned(self, data):
        specs = {spec.name: spec for spec in self.specs(data)}
        for place in self.writer.layout(targets(list(specs.values()))).placements:
            spec = specs[place.name]
            assert place.length == spec.nbytes
            if self.aligned:
                assert place.offset % (1 if spec.dtype.packed else spec.dtype.itemsize) == 0

    @relaxed
    @given(st.data(), st.integers(1, 9))
    def test_bytes_follow_from_specs_and_contents_alone(self, data, seed):
        specs = self.specs(data)
        layout = self.writer.layout(targets(specs), About(metadata={"b": "1", "a": "2"}))
        again = self.writer.layout(targets(list(specs)), About(metadata={"a": "2", "b": "1"}))
        assert layout == again
        contents = contents_of(specs)
        assert materialise(layout, contents, seed) == materialise(again, contents, seed + 1)

    @relaxed
    @given(st.data())
    def test_a_layout_survives_json(self, data):
        layout = self.writer.layout(targets(self.specs(data)))
        plain = dataclasses.asdict(layout)
        for literal in plain["literals"]:
            literal["data"] = literal["data"].hex()
        plain = json.loads(json.dumps(plain))
        assert layout == FileLayout(
            plain["size"],
            tuple(Placement(**place) for place in plain["placements"]),
            tuple(Literal(part["offset"], bytes.fromhex(part["data"])) for part in plain["literals"]),
            tuple(Patch(**patch) for patch in plain["patches"]),
        )

    def test_a_file_without_tensors(self):
        self.path.write_bytes(materialise(self.writer.layout([]), {}))
        assert self.read(self.path) == {}

    def test_tied_tensors_are_read_under_every_name(self):
        spec = TensorSpec("embed", F32, (2, 3))
        flat, twin = TensorSpec("flat", F32, (6,)), TensorSpec("head", F32, (2, 3))
        tied = [Target(each, "storage") for each in (spec, flat, twin)]
        contents = dict.fromkeys(("embed", "flat", "head"), strategies.tensor_bytes(spec, 0))
        self.path.write_bytes(materialise(self.writer.layout(tied), contents))
        read = self.read(self.path)
        assert {name: (shape, data) for name, (_, shape, data) in read.items()} == {
            each.name: (each.shape, contents["embed"]) for each in (spec, flat, twin)
        }

    def test_every_problem_is_told_at_once(self):
        specs = [
            TensorSpec("fine", F32, (2,)),
            TensorSpec("half \ud800", F32, (2,)),
            TensorSpec("negative", F32, (2, -1)),
            TensorSpec("bits", F4, (1,)),
            TensorSpec("huge", F32, (1 << 40, 1 << 40)),
            TensorSpec("huge but empty", F32, (1 << 40, 0, 1 << 40)),
        ]
        told = self.refused(specs)
        names = ["half \\ud800", "negative", "bits", "huge", "huge but empty"]
        assert [name for name, _ in told] == names

    def test_sizes_that_overflow_together(self):
        specs = [TensorSpec(str(number), U8, (1 << 62,)) for number in range(2)]
        assert self.refused(specs) == [("", "the tensors together are beyond 64-bit sizes")]

    def test_check_names_the_dtypes_that_the_format_lacks(self):
        held = [row for row in dtypes.BY_NAME.values() if not self.writer.check(TensorSpec("x", row, (8,)))]
        assert held == self.dtypes
        for row in set(dtypes.BY_NAME.values()) - set(held):
            problem = self.writer.check(TensorSpec("x", row, (8,)))
            assert row.name in problem.message
            assert problem.tensor == "x"
            assert problem.hint


# ---------------------------------------------------------------------------------------- safetensors


def by_safetensors(specs: list[TensorSpec], contents: dict[str, bytes]) -> bytes:
    """What the library's own writer makes of the tensors."""
    buffers = {name: numpy.frombuffer(data or b"\0", numpy.uint8) for name, data in contents.items()}
    described = {}
    for spec in specs:
        shape = spec.shape
        if spec.dtype is F4:  # torch's shape, which the library doubles
            shape = (*shape[:-1], shape[-1] // 2)
        described[spec.name] = safetensors.TensorSpec(
            dtype=spec.dtype.torch_name,
            shape=list(shape),
            data_ptr=buffers[spec.name].ctypes.data,
            data_len=spec.nbytes,
        )
    return safetensors.serialize(described, {"format": "pt"})


# Hypothesis finds the one name that the format keeps for itself.
tensor_names = st.text(max_size=12).filter(lambda name: name != "__metadata__")

SAFETENSORS = [row for row in dtypes.BY_NAME.values() if row.rank is not None]


class TestSafetensors(WriterContract):
    """The reference implementation is the `safetensors` package."""

    format = "safetensors"
    dtypes = SAFETENSORS
    names = tensor_names

    def read(self, path: Path) -> dict[str, Read]:
        tensors = {
            name: (dtypes.by_name(found["dtype"]), tuple(found["shape"]), bytes(found["data"]))
            for name, found in safetensors.deserialize(path.read_bytes())
        }
        for backend in ("mmap", "pread"):
            with safetensors.safe_open(path, framework="numpy", backend=backend) as opened:
                assert opened.metadata()["format"] == "pt"
                assert set(opened.keys()) == set(tensors)
                for name, (dtype, shape, _) in tensors.items():
                    piece = opened.get_slice(name)
                    assert (piece.get_dtype(), tuple(piece.get_shape())) == (dtype.name, shape)
        return tensors

    @relaxed
    @given(
        strategies.spec_lists([row for row in SAFETENSORS if row.torch_name], tensor_names, max_size=20),
        st.randoms(),
    )
    @example(
        [
            TensorSpec(name, F32, (1,))
            for name in ("\U00010000", "\uffff", "Z", "a", "é", "", '"\\/\n\x00\x7f')
        ],
        random.Random(0),
    )
    def test_the_file_is_the_library_s_file(self, specs, shuffle):
        contents = contents_of(specs)
        expected = by_safetensors(specs, contents)
        shuffled = shuffle.sample(specs, len(specs))
        layout = self.writer.layout(targets(shuffled))
        assert materialise(layout, contents) == expected
        self.path.write_bytes(expected)
        with safetensors.safe_open(self.path, framework="numpy") as opened:
            order = opened.offset_keys()
        filled = [place.name for place in layout.placements if place.length]
        assert filled == [name for name in order if contents[name]]

    @pytest.mark.parametrize("dtype", [row for row in SAFETENSORS if row.torch_name])
    def test_the_file_is_what_torch_users_save(self, dtype):
        spec = TensorSpec("weight", dtype, (3, 8))
        contents = contents_of([spec])
        flat = torch.frombuffer(bytearray(contents["weight"]), dtype=getattr(torch, dtype.torch_name))
        safetensors.torch.save_file({"weight": flat.reshape(3, -1)}, self.path, {"format": "pt"})
        layout = self.writer.layout(targets([spec]))
        assert materialise(layout, contents) == self.path.read_bytes()

    def test_six_and_four_bit_values_follow_eight_bit_ones(self):
        rows = ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "I64"]
        specs = [TensorSpec(name, dtypes.by_name(name), (4,)) for name in rows]
        layout = self.writer.layout(targets(specs))
        assert [place.name for place in layout.placements] == rows[::-1]

    def test_values_that_share_bytes_across_rows(self):
        spec = TensorSpec("x", F4, (2, 3))
        self.path.write_bytes(materialise(self.writer.layout(targets([spec])), {"x": b"abc"}))
        assert self.read(self.path) == {"x": (F4, (2, 3), b"abc")}

    def test_tied_tensors_are_stored_one_by_one(self):
        specs = [TensorSpec(name, F32, (2,)) for name in "ab"]
        layout = self.writer.layout([Target(spec, 0) for spec in specs])
        assert len({place.offset for place in layout.placements}) == 2

    def test_metadata_is_sorted_and_has_the_format(self):
        layout = self.writer.layout([], About(metadata={"z": "é", "a": '"', "format": "mlx"}))
        (header,) = layout.literals
        assert json.loads(header.data[8:]) == {"__metadata__": {"a": '"', "format": "pt", "z": "é"}}
        assert header.data[8:].startswith('{"__metadata__":{"a":"\\"","format":"pt","z":"é"}}'.encode())

    def test_metadata_that_is_no_text(self):
        with pytest.raises(PlanError, match="metadata"):
            self.writer.layout([], About(metadata={"a": "\ud800"}))

    def test_no_tensor_may_be_called_metadata(self):
        assert self.refused([TensorSpec("__metadata__", F32, ())]) == [
            ("__metadata__", "safetensors keeps metadata under the name __metadata__")
        ]

    @pytest.mark.slow
    def test_the_longest_header(self):
        def named(length: int) -> list[TensorSpec]:
            return [TensorSpec("x" * length, U8, (0,))]

        head = len(self.writer.layout(targets(named(0))).literals[0].data) - 8
        text = self.writer.layout(targets(named(0))).literals[0].data[8:].rstrip()
        longest = 100_000_000 - len(text)
        assert head < 100
        layout = self.writer.layout(targets(named(longest)))
        assert layout.size == 8 + 100_000_000
        assert len(safetensors.deserialize(layout.literals[0].data)) == 1
        with pytest.raises(PlanError, match="100000008 bytes for 1 tensors"):
            self.writer.layout(targets(named(longest + 1)))


# ---------------------------------------------------------------------------------------------- torch


def torch_bytes(tensor: torch.Tensor) -> bytes:
    """The row-major bytes of a tensor of any dtype, without a copy through values."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def as_torch(spec: TensorSpec, data: bytes) -> torch.Tensor:
    """A tensor that owns a storage of exactly these bytes."""
    shape = spec.shape if spec.dtype is not F4 else (*spec.shape[:-1], spec.shape[-1] // 2)
    tensor = torch.empty(shape, dtype=getattr(torch, spec.dtype.torch_name))
    if data:
        tensor.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return tensor


def without_id(file: bytes) -> bytes:
    """A torch file with zeros for the serialization id and its two checksums."""
    blank = bytearray(file)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        record = archive.infolist()[-1]
        directory = archive.start_dir
    assert record.filename.endswith("/.data/serialization_id")
    header = record.header_offset
    lengths = [int.from_bytes(file[at : at + 2], "little") for at in (header + 26, header + 28)]
    payload = header + 30 + sum(lengths)
    blank[payload : payload + 40] = bytes(40)
    blank[payload + 44 : payload + 48] = bytes(4)
    entry = file.rindex(b"PK\1\2", directory)
    blank[entry + 16 : entry + 20] = bytes(4)
    return bytes(blank)


# The first size and offset that 32 bits cannot hold.
LIMIT = 1 << 32

TORCH = [row for row in dtypes.BY_NAME.values() if row.torch_name is not None]

# A string that equals another is the same string for our pickle, and may be a second one for torch's.
torch_names = tensor_names.filter(
    lambda name: not (name.isdigit() or name in ("cpu", "storage") or name.startswith("tied to "))
)


class TestTorch(WriterContract):
    """The reference implementation is `torch.save` and `torch.load`."""

    format = "torch"
    dtypes = TORCH

    def read(self, path: Path) -> dict[str, Read]:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        loaded = [torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True)]
        seen = []
        for tensors in loaded:
            assert type(tensors) is dict
            seen.append({})
            for name, tensor in tensors.items():
                assert tensor.is_contiguous()
                assert not tensor.requires_grad
                dtype, shape = dtypes.parse(str(tensor.dtype)), tuple(tensor.shape)
                if dtype is F4:
                    shape = (*shape[:-1], shape[-1] * 2)
                seen[-1][name] = (dtype, shape, torch_bytes(tensor))
        assert seen[0] == seen[1]
        return seen[0]

    @relaxed
    @given(strategies.spec_lists(TORCH, torch_names), st.data())
    def test_the_file_is_torch_s_file(self, specs, data):
        contents = contents_of(specs)
        tensors = {spec.name: as_torch(spec, contents[spec.name]) for spec in specs}
        made = [Target(spec, index) for index, spec in enumerate(specs)]
        for spec in specs:  # tied views of some
            if data.draw(st.booleans()):
                name = f"tied to {spec.name}"
                tensors[name] = tensors[spec.name].view(tensors[spec.name].shape)
                contents[name] = contents[spec.name]
                made.append(Target(dataclasses.replace(spec, name=name), specs.index(spec)))
        path = self.path.with_name("pytorch_model-00001-of-00002.bin")
        torch.save(tensors, path)
        written = materialise(self.writer.layout(made, About(path.name)), contents)
        assert without_id(written) == without_id(path.read_bytes())

    @pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 2000])
    def test_batches_of_the_pickle(self, count):
        specs = [TensorSpec(f"layer {number}", F32, (0,)) for number in range(count)]
        torch.save({spec.name: as_torch(spec, b"") for spec in specs}, self.path)
        written = materialise(self.writer.layout(targets(specs), About("file")), contents_of(specs))
        assert without_id(written) == without_id(self.path.read_bytes())

    @pytest.mark.parametrize(
        "name", ["model.bin", "a.b.pt", "no_dot", ".hidden.bin", "blank name.bin", "模型.bin", "é"]
    )
    def test_the_directory_inside_is_torch_s(self, name):
        spec = TensorSpec("x", F32, (2,))
        path = self.path.with_name(name)
        torch.save({"x": as_torch(spec, bytes(8))}, path)
        written = materialise(self.writer.layout(targets([spec]), About(name)), {"x": bytes(8)})
        assert without_id(written) == without_id(path.read_bytes())

    @pytest.mark.parametrize("name", ["", ".bin"])
    def test_a_file_name_that_has_no_stem(self, name):
        layout = self.writer.layout([], About(name))
        assert b"archive/data.pkl" in layout.literals[0].data

    def test_tied_tensors_share_a_record(self):
        spec = TensorSpec("a", F32, (4,))
        others = [
            dataclasses.replace(spec, name="same"),
            dataclasses.replace(spec, name="shape", shape=(2, 2)),
            dataclasses.replace(spec, name="dtype", dtype=dtypes.by_name("I32")),
        ]
        layout = self.writer.layout([Target(each, "tied") for each in (spec, *others)])
        offsets = {place.name: place.offset for place in layout.placements}
        assert offsets["a"] == offsets["same"]
        assert len(set(offsets.values())) == 3
        self.path.write_bytes(materialise(layout, dict.fromkeys(offsets, bytes(range(16)))))
        for mmap in (False, True):
            loaded = torch.load(self.path, weights_only=True, mmap=mmap)
            assert loaded["a"].data_ptr() == loaded["same"].data_ptr()
            assert loaded["a"].data_ptr() != loaded["shape"].data_ptr()

    def test_records_are_aligned_for_maps(self):
        specs = [TensorSpec(str(size), U8, (size,)) for size in range(200)]
        layout = self.writer.layout(targets(specs))
        assert {place.offset % 64 for place in layout.placements} == {0}

    def test_a_checksum_goes_to_two_neighbouring_patches(self):
        specs = [TensorSpec("x", U8, (10,)), TensorSpec("y", U8, (0,)), TensorSpec("z", U8, (1,))]
        layout = self.writer.layout(targets(specs))
        offsets = {place.name: place.offset for place in layout.placements}
        assert [(patch.name, patch.start, patch.length) for patch in layout.patches] == [
            *[("x", offsets["x"], 10)] * 2,
            *[("z", offsets["z"], 1)] * 2,
        ]

    def test_a_wrong_byte_is_noticed_by_zip_readers(self):
        spec = TensorSpec("x", U8, (10,))
        layout = self.writer.layout(targets([spec]))
        damaged = bytearray(materialise(layout, {"x": bytes(10)}))
        damaged[layout.placements[0].offset] ^= 1
        with zipfile.ZipFile(io.BytesIO(damaged)) as archive:
            assert archive.testzip() == "archive/data/0"

    @pytest.mark.parametrize("shape", [(2, 3), (3, 2, 1), (8, 0, 5)])
    def test_odd_rows_of_four_bit_values(self, shape):
        ((name, message),) = self.refused([TensorSpec("x", F4, shape)])
        assert name == "x"
        assert "packs 2 values of F4" in message

    def test_the_pickle_is_of_protocol_2_and_small_means(self):
        specs = [TensorSpec(row.name, row, (2, 8)) for row in TORCH]
        file = materialise(self.writer.layout(targets(specs)), contents_of(specs))
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            data = archive.read("archive/data.pkl")
        opcodes = list(pickletools.genops(data))
        assert max(opcode.proto for opcode, _, _ in opcodes) == 2
        modules = {argument.split()[0] for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
        assert modules == {"torch", "torch._utils", "torch.storage", "collections"}

    def test_the_id_follows_from_the_specs(self):
        def made(shape):
            return self.writer.layout(targets([TensorSpec("x", U8, shape)])).literals

        assert made((2, 3)) == made((2, 3))
        with zipfile.ZipFile(io.BytesIO(self.blank((2, 3)))) as one:
            first = one.read("archive/.data/serialization_id")
        with zipfile.ZipFile(io.BytesIO(self.blank((3, 2)))) as two:
            second = two.read("archive/.data/serialization_id")
        assert first != second
        assert len(first) == len(second) == 40
        assert (first + second).isdigit()

    def blank(self, shape: tuple[int, ...]) -> bytes:
        spec = TensorSpec("x", U8, shape)
        return materialise(self.writer.layout(targets([spec])), {"x": bytes(spec.nbytes)})

    def sparse(self, layout: FileLayout, contents: dict[str, bytes]) -> None:
        """The file at `self.path`, with holes for tensors without contents and zeros for checksums."""
        with self.path.open("wb") as file:
            for literal in layout.literals:
                os.pwrite(file.fileno(), literal.data, literal.offset)
            for place in layout.placements:
                os.pwrite(file.fileno(), contents.get(place.name, b""), place.offset)
            file.truncate(layout.size)

    @pytest.mark.parametrize(
        "sizes",
        [
            [5, LIMIT - 2, 3, 0],
            [LIMIT - 1, 0, 7],
            [LIMIT, 0, 7],
            [0, LIMIT + 5, 3, 0, LIMIT - 2, LIMIT - 1],
            [3 * LIMIT, LIMIT, 70_000, 300],
        ],
        ids=str,
    )
    def test_sizes_and_offsets_beyond_32_bits(self, sizes):
        self.assert_torch_plans_the_same(sizes)

    @pytest.mark.parametrize("step", range(-2, 3))
    def test_an_offset_at_the_edge_of_32_bits(self, step):
        def offset_of_second_header(size: int) -> int:
            specs = [TensorSpec("tensor 0", U8, (size,)), TensorSpec("tensor 1", U8, (4,))]
            return self.writer.layout(targets(specs), About("file")).placements[0].offset + size + 16

        size = 2 * LIMIT - 4000 - offset_of_second_header(LIMIT - 4000) - 1 + step
        assert offset_of_second_header(size) == LIMIT - 1 + step
        self.assert_torch_plans_the_same([size, 4])

    def assert_torch_plans_the_same(self, sizes: list[int]) -> None:
        """That torch writes the same bytes around tensors of these sizes, checksums left at zero."""
        specs = [TensorSpec(f"tensor {number}", U8, (size,)) for number, size in enumerate(sizes)]
        # Memory that nobody touches, and holes for the data: nothing large is ever written.
        tensors = {spec.name: torch.empty(spec.shape, dtype=torch.uint8) for spec in specs}
        with torch.serialization.skip_data():
            torch.save(tensors, self.path)
        layout = self.writer.layout(targets(specs), About("file"))
        assert self.path.stat().st_size == layout.size
        with self.path.open("rb") as file:
            saved = [
                Literal(part.offset, os.pread(file.fileno(), len(part.data), part.offset))
                for part in layout.literals
            ]
        assert layout.literals[:-1] == tuple(saved[:-1])
        # In the last one is the id, its checksum behind it and in the directory.
        last = zip(layout.literals[-1].data, saved[-1].data, strict=True)
        assert sum(ours != theirs for ours, theirs in last) <= 40 + 4 + 4

    def test_torch_reads_beyond_32_bits(self):
        specs = [
            TensorSpec("before", F32, (3,)),
            TensorSpec("large", U8, (LIMIT // 2 + 3, 2)),
            TensorSpec("after", F32, (2, 2)),
            TensorSpec("empty", F32, (0,)),
        ]
        layout = self.writer.layout(targets(specs))
        contents = contents_of([specs[0], specs[2], specs[3]])
        self.sparse(layout, contents)
        loaded = torch.load(self.path, weights_only=True, mmap=True)
        assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
            spec.name: spec.shape for spec in specs
        }
        assert {name: torch_bytes(loaded[name]) for name in contents} == contents
        assert loaded["large"][-1].tolist() == [0, 0]
        with zipfile.ZipFile(self.path) as archive:
            sizes = [record.file_size for record in archive.infolist() if "/data/" in record.filename]
        assert sizes == [spec.nbytes for spec in specs]

    @pytest.mark.slow
    def test_more_records_than_16_bits_can_count(self):
        specs = [TensorSpec(f"tensor {number}", U8, (1,)) for number in range(65_600)]
        contents = {spec.name: bytes([number % 251]) for number, spec in enumerate(specs)}
        self.path.write_bytes(materialise(self.writer.layout(targets(specs)), contents))
        with zipfile.ZipFile(self.path) as archive:
            assert len(archive.infolist()) == len(specs) + 6
            assert archive.testzip() is None
        loaded = torch.load(self.path, weights_only=True, mmap=True)
        assert list(loaded) == [spec.name for spec in specs]
        assert torch_bytes(torch.cat(list(loaded.values()))) == b"".join(contents.values())


# ---------------------------------------------------------------------- a whole model, as the hub has it


@relaxed
@given(
    strategies.spec_lists([row for row in TORCH if row.rank and not row.packed], torch_names, max_size=10),
    st.integers(8, 400),
    st.sampled_from(["safetensors", "torch"]),
    st.data(),
)
def test_a_model_is_saved_as_huggingface_hub_saves_it(tmp_path_factory, specs, limit, form, data):
    contents = contents_of(specs)
    tensors = {spec.name: as_torch(spec, contents[spec.name]) for spec in specs}
    tied = {spec.name: number for number, spec in enumerate(specs)}
    if form == "torch" and specs:  # in safetensors files huggingface_hub drops tied tensors
        spec = data.draw(st.sampled_from(specs))
        twin = dataclasses.replace(spec, name=f"tied to {spec.name}")
        tensors[twin.name] = tensors[spec.name].view(tensors[spec.name].shape)
        contents[twin.name], tied[twin.name] = contents[spec.name], tied[spec.name]
        specs = [*specs, twin]

    saved = tmp_path_factory.mktemp("saved")
    huggingface_hub.save_torch_state_dict(
        tensors, saved, max_shard_size=limit, safe_serialization=form == "safetensors"
    )

    naming = shard.Naming(suffix=FORMATS[form].suffix)
    by_name = {spec.name: spec for spec in specs}
    shards = shard.pack([shard.entry_of(spec, tied[spec.name]) for spec in specs], limit)
    files = shard.weight_map(naming, shards)
    written = {
        path: materialise(
            FORMATS[form].writer.layout(
                [Target(by_name[name], tied[name]) for name in names if files[name] == path], About(path)
            ),
            contents,
        )
        for names in shards
        for path in {files[name] for name in names}
    }
    if len(shards) > 1:
        index = json.loads((saved / shard.index_name(naming)).read_text())
        ours = shard.index_json(files, sum(spec.nbytes for spec in specs if "tied to " not in spec.name))
        assert json.loads(ours) == index
        (saved / shard.index_name(naming)).unlink()
    same = without_id if form == "torch" else bytes
    assert {path: same(file) for path, file in written.items()} == {
        path.name: same(path.read_bytes()) for path in saved.iterdir()
    }


MINDSPORE = [row for row in dtypes.BY_NAME.values() if row.name in mindspore.TYPES]


class TestMindspore(WriterContract):
    """The reference implementation is MindSpore's own Protocol Buffers; `tests/test_mindspore.py` loads with MindSpore."""

    format = "mindspore"
    dtypes = MINDSPORE
    aligned = False
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)

    def specs(self, data) -> list[TensorSpec]:
        # An empty row would be read as a scalar, and is refused.
        return [spec for spec in super().specs(data) if spec.shape != (0,)]

    def read(self, path: Path) -> dict[str, Read]:
        from mindspore.train.checkpoint_pb2 import Checkpoint

        proto = Checkpoint()
        proto.ParseFromString(path.read_bytes())
        ours = {theirs: name for name, theirs in mindspore.TYPES.items()}
        return {
            value.tag: (
                dtypes.by_name(ours[value.tensor.tensor_type]),
                tuple(value.tensor.dims),
                value.tensor.tensor_content,
            )
            for value in proto.value
        }


class TestMindsporeSafetensors(WriterContract):
    """As safetensors, with MindSpore's metadata and its dtypes."""

    format = "mindspore-safetensors"
    dtypes = MINDSPORE
    names = tensor_names

    def read(self, path: Path) -> dict[str, Read]:
        with safetensors.safe_open(path, framework="numpy") as opened:
            assert opened.metadata() == {"format": "ms"}
        return {
            name: (dtypes.by_name(found["dtype"]), tuple(found["shape"]), bytes(found["data"]))
            for name, found in safetensors.deserialize(path.read_bytes())
        }


# ------------------------------------------------------------------------------------ the table of formats


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_row_leads_to_its_modules(name):
    form = FORMATS[name]
    assert form.name == name
    assert callable(form.writer.check) and callable(form.writer.layout)
    assert bool(form.ranks) == ("tp" in form.options)
    assert not form.ranks or callable(importlib.import_module(form.ranks).ranks)
    assert ("max_shard" in form.options) == (not form.one_file and form.wrapping != "needed")
