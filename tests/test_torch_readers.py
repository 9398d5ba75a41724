"""The torch file readers against torch, and against files that are not what they claim to be."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import pickle as python_pickle
import struct
import zipfile
from collections import OrderedDict

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.dtypes import BY_TORCH_NAME
from streamconv.errors import CheckpointError
from streamconv.ops import Node, Strided
from streamconv.readers import torch_legacy, torch_zip
from streamconv.readers.pickle import Global, Record
from streamconv.readers.torch_rebuild import Unsupported
from streamconv.storage.location import locate
from streamconv.tensor import Stored

FORMATS = {"torch zip": (torch_zip.load, True), "torch legacy": (torch_legacy.load, False)}


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path):
    """A function that saves an object with torch and loads it with the reader of the same format."""
    load, zipped = FORMATS[request.param]

    def round_trip(value, name="model.pt", **options):
        path = str(tmp_path / name)
        torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
        file = load(locate(path))
        assert file.notes == ()
        return file.content

    return round_trip


def stored_bytes(tensor: Stored) -> bytes:
    """The tensor's bytes, by plain reads of its extents."""
    result = b""
    for extent in tensor.extents:
        with open(extent.file, "rb") as file:
            file.seek(extent.offset)
            result += file.read(extent.length)
    return result


def elements(tensor) -> bytes:
    """The row-major bytes of an expression, by NumPy's strides."""
    if isinstance(tensor, Stored):
        return stored_bytes(tensor)
    assert isinstance(tensor, Node) and isinstance(tensor.op, Strided)
    (storage,) = tensor.operands
    assert isinstance(storage, Stored)
    flat = numpy.frombuffer(stored_bytes(storage), f"V{storage.spec.dtype.itemsize}")
    strides = [stride * flat.itemsize for stride in tensor.op.strides]
    view = numpy.lib.stride_tricks.as_strided(flat[tensor.op.offset :], tensor.spec.shape, strides)
    return view.tobytes()


def torch_bytes(tensor: torch.Tensor) -> bytes:
    """The row-major bytes that torch sees."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(read, tensor: torch.Tensor) -> None:
    assert read.spec.dtype is BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    assert read.spec.shape == tuple(tensor.shape)
    assert elements(read) == torch_bytes(tensor)


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8
    )
    return raw.view(dtype)


# --------------------------------------------------------------------------------- what torch writes


@pytest.mark.parametrize("name", [name for name, dtype in BY_TORCH_NAME.items() if not dtype.packed])
def test_every_dtype(saved, name):
    tensor = random_tensor(getattr(torch, name), 3, 5)
    content = saved({"a": tensor, "b": tensor[1:], "scalar": tensor[0, 0], "none": tensor[:0]})
    for key, value in {"a": tensor, "b": tensor[1:], "scalar": tensor[0, 0], "none": tensor[:0]}.items():
        assert_same(content[key], value)


def test_pairs_of_4_bits_count_as_two_elements(saved):
    raw = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    packed = raw.view(torch.float4_e2m1fn_x2)
    content = saved({"a": packed, "row": packed[1:2], "transposed": packed.t(), "scalar": packed[0, 0]})
    assert content["a"].spec.shape == (3, 8) and content["a"].spec.dtype.name == "F4"
    assert stored_bytes(content["a"]) == raw.numpy().tobytes()
    assert content["row"].spec.shape == (1, 8)
    assert stored_bytes(content["row"]) == raw[1:2].numpy().tobytes()
    assert isinstance(content["transposed"], Unsupported) and isinstance(content["scalar"], Unsupported)


VIEWS = {
    "whole": lambda base: base,
    "rows": lambda base: base[1:3],
    "columns": lambda base: base[:, 1:3],
    "every second": lambda base: base[::2, ::3],
    "transposed": lambda base: base.t(),
    "expanded": lambda base: base[0, 0].expand(5, 2),
    "expanded rows": lambda base: base[1].expand(4, 6),
    "diagonal": lambda base: base.diagonal(),
    "overlapping": lambda base: base.as_strided((4, 3), (1, 1), 2),
    "scalar": lambda base: base[2, 3],
    "axes of one": lambda base: base[1:2, :, None].transpose(0, 2),
    "no rows": lambda base: base[2:2],
    "no columns": lambda base: base[:, 6:],
    "nothing strided": lambda base: base.as_strided((0, 7), (3, 9), 24),
    "last element": lambda base: base[3:, 5:],
    "four axes": lambda base: base.view(2, 2, 3, 2).permute(3, 0, 2, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(saved, view):
    tensor = VIEWS[view](torch.arange(24, dtype=torch.int16).view(4, 6))
    read = saved([tensor])[0]
    assert_same(read, tensor)
    assert isinstance(read, Stored) is tensor.is_contiguous()


def test_channels_last(saved):
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert_same(saved([tensor])[0], tensor)


def test_a_contiguous_view_is_only_its_own_bytes(saved):
    base = torch.arange(100, dtype=torch.float32)
    whole, part = saved([base, base[10:20]])
    (extent,), (inner,) = whole.extents, part.extents
    assert (inner.offset - extent.offset, inner.length) == (40, 40)


def test_tied_and_shared(saved):
    weight = torch.randn(4, 4)
    content = saved({"a": weight, "b": weight, "c": weight.t(), "d": weight.view(16)})
    assert content["a"] is content["b"]
    assert content["a"].extents == content["d"].extents
    assert content["c"].operands[0].extents == content["a"].extents
    assert_same(content["c"], weight.t())


def test_two_views_share_one_storage(saved):
    weight = torch.randn(4, 4)
    first, second = saved([weight.t(), weight[:, 1]])
    assert first.operands[0] is second.operands[0]


class Tagged(torch.Tensor):
    pass


def test_parameters_and_attributes(saved):
    plain, tagged = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(3))
    tagged.ds_id = 3
    attributed = torch.randn(2)
    attributed.note = "n"
    buffer = torch.nn.Buffer(torch.ones(2))
    content = saved({"p": plain, "t": tagged, "a": attributed, "b": buffer})
    for key, value in {"p": plain, "t": tagged, "a": attributed, "b": buffer}.items():
        assert_same(content[key], value)


def test_structure_around_tensors(saved):
    tensor = torch.randn(2)
    value = {
        "state": OrderedDict(w=tensor),
        "list": [tensor, (tensor, None)],
        "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16),
        "shape": tensor.shape,
        "device": torch.device("cpu"),
        "bytes": b"\x00\xff",
        3: {1, 2},
    }
    content = saved(value)
    assert list(content) == list(value)
    assert_same(content["state"]["w"], tensor)
    assert content["list"][1] == (content["list"][0], None)
    assert content["args"].fields == {"lr": 0.1, "dtype": Global("torch", "bfloat16")}
    assert content["shape"] == (2,) and content["bytes"] == b"\x00\xff" and content[3] == {1, 2}
    assert isinstance(content["device"], Record)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(saved, protocol):
    value = {
        "w": torch.randn(2, 3),
        "args": argparse.Namespace(x=1),
        "t": torch.randn(3, 2).t(),
        "b": b"\xff",
    }
    content = saved(value, pickle_protocol=protocol)
    assert_same(content["w"], value["w"])
    assert_same(content["t"], value["t"])
    assert content["args"].fields == {"x": 1} and content["b"] == b"\xff"


def test_many_storages(saved):
    value = {f"layers.{i}.weight": torch.full((3,), i) for i in range(300)}
    content = saved(value)
    for name, tensor in value.items():
        assert_same(content[name], tensor)


def test_modules(saved):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    content = saved(module)
    assert content.cls == Global("torch.nn.modules.container", "Sequential")
    linear = content.fields["_modules"]["0"]
    assert_same(linear.fields["_parameters"]["weight"], module[0].weight)


def quantised():
    return torch.quantize_per_tensor(torch.randn(3), 0.1, 2, torch.qint8)


UNSUPPORTED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "quantised": (quantised, "quantised"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta device"),
    "negated integers": (lambda: torch._neg_view(torch.arange(3)), "negated"),
    "of a subclass": (lambda: torch.ones(2).as_subclass(Tagged), "Tagged"),
    "complex32": (lambda: torch.zeros(3, dtype=torch.complex32), "torch.complex32"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_read_are_leaves(saved, kind):
    make, reason = UNSUPPORTED[kind]
    content = saved({"good": torch.ones(1), "bad": make()})
    assert_same(content["good"], torch.ones(1))
    assert isinstance(content["bad"], Unsupported) and reason in content["bad"].reason


def by_hand(path, name: str, arguments: str) -> object:
    """A zip file with one storage of 8 bytes and one call of a function of torch._utils."""
    parts = {
        "STORAGE": b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\2tQ",
        "TENSOR": b"ctorch._utils\n_rebuild_tensor\n(STORAGE" + b"K\0K\2\x85K\1\x85tR",
        "F32": b"ctorch\nfloat32\n",
        "F16": b"ctorch\nfloat16\n",
        "SIZE": b"K\2\x85",
        "STRIDE": b"K\1\x85",
        "ZERO": b"K\0",
        "NONE": b"N",
    }
    parts["TENSOR"] = parts["TENSOR"].replace(b"STORAGE", parts["STORAGE"])
    data = f"ctorch._utils\n{name}\n(".encode() + b"".join(parts[word] for word in arguments.split()) + b"tR."
    write_zip(path, {"x/data.pkl": b"\x80\2" + data, "x/data/0": struct.pack("<2f", 1, 2)})
    return torch_zip.load(locate(path)).content


def write_zip(path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_rebuild_tensor", "STORAGE ZERO SIZE STRIDE"),
        ("_rebuild_tensor_v2", "STORAGE ZERO SIZE STRIDE NONE NONE"),
        ("_rebuild_tensor_v3", "STORAGE ZERO SIZE STRIDE NONE NONE F32"),
        ("_rebuild_parameter", "TENSOR NONE NONE"),
        ("_rebuild_parameter_with_state", "TENSOR NONE NONE NONE"),
        ("_rebuild_device_tensor_from_cpu_tensor", "TENSOR F32 NONE NONE"),
    ],
)
def test_every_rebuild_function(tmp_path, name, arguments):
    read = by_hand(tmp_path / "x.pt", name, arguments)
    assert_same(read, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("_rebuild_device_tensor_from_cpu_tensor", "TENSOR F16 NONE NONE", "its dtype torch.float16"),
        ("_rebuild_device_tensor_from_numpy", "NONE F32 NONE NONE", "inside the pickle"),
        ("_rebuild_xla_tensor", "NONE F32 NONE NONE", "inside the pickle"),
        ("_rebuild_wrapper_subclass", "NONE F32", "wraps other tensors"),
    ],
)
def test_rebuild_functions_that_give_no_expression(tmp_path, name, arguments, reason):
    read = by_hand(tmp_path / "x.pt", name, arguments)
    assert isinstance(read, Unsupported) and reason in read.reason


def test_one_dtensor_stays_a_record(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        local = torch.arange(8.0).view(4, 2)
        tensor = distribute_tensor(local, init_device_mesh("cpu", (1,)), [Shard(0)])
        torch.save({"w": tensor}, tmp_path / "x.pt")
    finally:
        torch.distributed.destroy_process_group()
    record = torch_zip.load(locate(tmp_path / "x.pt")).content["w"]
    assert isinstance(record, Record) and record.cls == Global("torch.distributed.tensor", "DTensor")
    assert_same(record.fields["_local_tensor"], local)
    (placement,) = record.fields["_spec"].fields["placements"]
    assert placement.fields == {"dim": 0}


def test_a_renamed_file_keeps_its_stem(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "before.pt")
    os.rename(tmp_path / "before.pt", tmp_path / "after.bin")
    assert_same(torch_zip.load(locate(tmp_path / "after.bin")).content[0], torch.ones(2))


def test_archives_inside_a_larger_file(tmp_path):
    path = tmp_path / "__0_0.distcp"
    tensors = [torch.randn(3, 4), torch.randn(5)]
    places = []
    with open(path, "wb") as file:
        file.write(b"?" * 7)
        for tensor in tensors:
            stream = io.BytesIO()
            torch.save(tensor, stream)
            places.append((file.tell(), len(stream.getvalue())))
            file.write(stream.getvalue())
    for tensor, (offset, length) in zip(tensors, places, strict=True):
        assert_same(torch_zip.load(locate(path), offset, length).content, tensor)
    with pytest.raises(CheckpointError, match="no zip64 end record"):
        torch_zip.load(locate(path))
    with pytest.raises(CheckpointError, match="the file has"):
        torch_zip.load(locate(path), 7, 1 << 40)


def test_storages_beyond_4_gib(tmp_path):
    path = str(tmp_path / "big.pt")
    big = 5 << 28
    with torch.serialization.skip_data():
        torch.save(
            {
                "a": torch.empty(big),
                "b": torch.empty(7, dtype=torch.int16),
            },
            path,
        )
    assert os.path.getsize(path) > 4 * big > 1 << 32
    oracle = torch.load(path, map_location="meta")
    content = torch_zip.load(locate(path)).content
    for name in "ab":
        (extent,) = content[name].extents
        assert extent.offset == oracle[name].untyped_storage()._checkpoint_offset
        assert extent.length == oracle[name].nbytes
    with open(path, "r+b") as file:
        file.seek(content["b"].extents[0].offset)
        file.write(numpy.arange(7, dtype="<i2").tobytes())
    assert stored_bytes(content["b"]) == torch_bytes(torch.load(path, mmap=True)["b"])


def test_old_views_of_legacy_storages(tmp_path):
    """Torch before 0.4 named parts of storages: (key, first element, elements)."""
    path = tmp_path / "old.pt"
    write_legacy(path, legacy_object(view=b"X\1\0\0\0vK\1K\1\x87", size=1))
    assert_same(torch_legacy.load(locate(path)).content, torch.tensor([2.0]))


def test_bytes_after_a_legacy_file_are_noted(tmp_path):
    path = tmp_path / "two.pt"
    torch.save([torch.ones(2)], path, _use_new_zipfile_serialization=False)
    length = path.stat().st_size
    path.write_bytes(path.read_bytes() * 2)
    file = torch_legacy.load(locate(path))
    assert_same(file.content[0], torch.load(path)[0])
    assert f"{length} bytes after the last storage" in file.notes[0]


# ------------------------------------------------------------------------------------ hostile files


def torch_zip_bytes(value=None, **options) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(6.0)} if value is None else value, stream, **options)
    return stream.getvalue()


GOOD_ZIP = torch_zip_bytes()
GOOD_LEGACY = torch_zip_bytes(_use_new_zipfile_serialization=False)


def directory(data: bytes) -> int:
    """Where the central directory's entry of the storage starts."""
    return data.index(b"archive/data/0", data.index(b"PK\1\2")) - 46


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def entry(field: int, new: bytes) -> bytes:
    """A good archive with other bytes at a position of the storage's directory entry."""
    return patched(GOOD_ZIP, directory(GOOD_ZIP) + field, new)


def local(field: int, new: bytes) -> bytes:
    """A good archive with other bytes at a position of the storage's local header."""
    return patched(GOOD_ZIP, GOOD_ZIP.index(b"archive/data/0") - 30 + field, new)


def end_record(field: int, new: bytes) -> bytes:
    return patched(GOOD_ZIP, GOOD_ZIP.rindex(b"PK\6\6") + field, new)


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    write_zip(stream, records, compression)
    return stream.getvalue()


def twice(name: str) -> bytes:
    """An archive with two records of one name."""
    return archive({name: b"1", name[:-1] + "?": b"2"}).replace((name[:-1] + "?").encode(), name.encode())


def view(
    size: object = (6,),
    strides: object = (1,),
    offset: object = 0,
    numel: object = 6,
    cls: str = "FloatStorage",
):
    """An archive with a storage of 24 bytes and a hand-made view of it."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, strides, False, OrderedDict())

    class Pickler(python_pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, cls), "0", "cpu", numel) if isinstance(value, Storage) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(Tensor())
    return archive({"x/data.pkl": stream.getvalue(), "x/data/0": bytes(24)})


def pickled(data: bytes, **records: bytes) -> bytes:
    return archive({"x/data.pkl": data, **{f"x/{name}": content for name, content in records.items()}})


ZIP64_END = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 46 << 40, 0)

HOSTILE_ZIPS = {
    "empty file": (b"", "directory, which is at the end, is missing"),
    "only a header": (b"PK\3\4", "directory, which is at the end, is missing"),
    "cut at the end": (GOOD_ZIP[:-1], "directory, which is at the end, is missing"),
    "cut in the data": (GOOD_ZIP[:700], "directory, which is at the end, is missing"),
    "cut at the front": (GOOD_ZIP[100:], "damaged"),
    "bytes in front": (b"#!/bin/sh\n" + GOOD_ZIP, "damaged"),
    "bytes behind": (GOOD_ZIP + b"more", "directory, which is at the end, is missing"),
    "deflated": (archive({"x/data.pkl": bytes(1000)}, zipfile.ZIP_DEFLATED), "record 'x/data.pkl' is compressed"),
    "deflated in the local header": (local(8, b"\x08\0"), "record 'archive/data/0' is compressed"),
    "encrypted": (entry(8, b"\x01"), "record 'archive/data/0' is encrypted"),
    "unequal sizes": (entry(24, b"\x19"), "has 25 bytes, and 24 in the archive"),
    "another disk": (entry(34, b"\x01"), "is on another disk"),
    "size beyond the end": (entry(20, b"\xff\xff\xff\x7f" * 2), "beyond the end"),
    "size without zip64": (entry(20, b"\xff" * 8), "lacks its 64-bit sizes"),
    "overlap with the next record": (entry(20, struct.pack("<2I", 400, 400)), "overlaps"),
    "header beyond the end": (entry(42, b"\xff\xff\xff\x7f"), "are named, and there are"),
    "header elsewhere": (entry(42, b"\x05\0\0\0"), "there is no header of record 'archive/data/0'"),
    "header of another record": (entry(42, b"\0\0\0\0"), "is not that of record 'archive/data/0'"),
    "other name in the header": (local(30, b"archive/data/1"), "is not that of record 'archive/data/0'"),
    "long extra field": (local(28, b"\xff\xff"), "beyond the end"),
    "payload moved into the next record": (local(28, b"\xa0\x01"), "overlaps"),
    "name that is no text": (entry(46, b"\xff"), "is not UTF-8"),
    "name beyond the directory": (entry(28, b"\xff\xff"), "has no entry at byte"),
    "no signature": (entry(0, b"XX"), "has no entry at byte"),
    "duplicate names": (twice("x/data/0"), "two records are called 'x/data/0'"),
    "more records than there are": (end_record(24, struct.pack("<2Q", 9, 9)), "damaged"),
    "fewer records than there are": (end_record(24, struct.pack("<2Q", 3, 3)), "bytes more than its 3 records"),
    "records on other disks": (end_record(24, struct.pack("<2Q", 1, 9)), "spread over several files"),
    "records beyond count": (
        ZIP64_END + struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 0, 0, 0),
        "does not end where its end record begins",
    ),
    "directory beyond the end": (end_record(48, b"\xff" * 8), "does not end where its end record begins"),
    "zip64 record elsewhere": (
        patched(GOOD_ZIP, GOOD_ZIP.rindex(b"PK\6\7") + 8, b"\0" * 8),
        "there is no zip64 end record at byte 0",
    ),
    "zip64 record beyond the end": (
        patched(GOOD_ZIP, GOOD_ZIP.rindex(b"PK\6\7") + 8, b"\xff" * 8),
        "are named, and there are",
    ),
    "no object": (archive({"x/data/0": b"1"}), "holds no records called data.pkl"),
    "two objects": (archive({"x/data.pkl": b"N.", "y/data.pkl": b"N."}), "holds 2 records called data.pkl"),
    "TorchScript": (pickled(b"N.", **{"constants.pkl": b"N."}), "TorchScript"),
    "big-endian": (pickled(b"N.", byteorder=b"big"), "big-endian"),
    "odd-endian": (pickled(b"N.", byteorder=b"middle"), "byte order is unknown"),
    "endless byte order": (pickled(b"N.", byteorder=b"little" * 9), "too long to be what it is called"),
    "object cut off": (pickled(b"]"), "byte 1 of the pickle: the pickle ends in the middle"),
    "bytes after the object": (pickled(b"N.N."), "2 bytes follow the end of the pickle"),
    "no storage": (pickled(b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0NK\2tQ."), "lacks the data of storage '0'"),
    "persistent text": (pickled(b"Pname\n."), "refers to something that is not a storage"),
    "persistent module": (pickled(b"(X\6\0\0\0moduleNNNtQ."), "refers to something that is not a storage"),
    "storage of a foreign class": (pickled(b"(X\7\0\0\0storagecos\nsystem\nX\1\0\0\0" + b"0NK\2tQ."), "none of torch's"),
    "storage called 3": (pickled(b"(X\7\0\0\0storagectorch\nFloatStorage\nK\3NK\2tQ."), "a storage is called 3"),
    "storage longer than its record": (view(numel=7), "should have 28 bytes, and its record has 24"),
    "storage of -1 elements": (view(numel=-1), "storage '0' has -1 elements"),
    "storage of too many elements": (view(numel=1 << 100), "has a huge integer elements"),
    "storage of half an element": (view(numel=0.5), "storage '0' has 0.5 elements"),
    "storage of True elements": (view(numel=True), "storage '0' has True elements"),
    "view beyond the end": (view(size=(7,)), "reaches element 6 of storage 'data/0', which holds 6 of F32"),
    "offset beyond the end": (view(offset=1), "reaches element 6"),
    "stride beyond the end": (view(strides=(2,)), "reaches element 10"),
    "huge stride": (view(size=(2,), strides=(1 << 61,)), "reaches element 2305843009213693952"),
    "stride out of range": (view(strides=(1 << 63,)), "impossible stride"),
    "negative stride": (view(strides=(-1,), offset=5), "impossible stride"),
    "negative size": (view(size=(-6,)), "impossible size"),
    "negative offset": (view(offset=-1), "impossible offset"),
    "offset of a text": (view(offset="0"), "impossible offset"),
    "size of truths": (view(size=(True,)), "impossible size"),
    "size that is a number": (view(size=6), "impossible size"),
    "expanded beyond all memory": (view(size=(1 << 40, 1 << 40), strides=(0, 0)), "impossible size"),
    "expanded many times": (view(size=(1 << 20,) * 64, strides=(0,) * 64), "impossible size"),
    "too many axes": (view(size=(1,) * 65, strides=(1,) * 65), "impossible size"),
    "sizes without strides": (view(size=(2, 3)), "has 2 sizes and 1 strides"),
    "too few arguments": (pickled(b"ctorch._utils\n_rebuild_tensor_v2\n)R."), "arguments that it does not take"),
    "tensor of no storage": (pickled(b"ctorch._utils\n_rebuild_tensor\n(NK\0))tR."), "a tensor is made of None"),
    "parameter of no tensor": (pickled(b"ctorch._utils\n_rebuild_parameter\n(NNNtR."), "a parameter is made of None"),
    "type of no type": (pickled(b"ctorch._tensor\n_rebuild_from_type_v2\n(NNNNtR."), "not a class"),
    "deep rebuilds": (
        pickled(b"ctorch._tensor\n_rebuild_from_type_v2\nq\0" * 1 + b"0" + b"(h\0ctorch\nTensor\n" * 5000 + b")N" + b"tN" * 4999 + b"tR."),
        "containers are nested too deep",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE_ZIPS.values(), ids=HOSTILE_ZIPS)
def test_hostile_zips_end_in_one_error(tmp_path, data, message):
    path = tmp_path / "evil.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        torch_zip.load(locate(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def legacy_object(key: bytes = b"k", view: bytes = b"N", numel: int = 2, size: int = 2) -> bytes:
    """The fourth pickle: one float32 tensor of a storage of two elements."""
    name = b"X" + struct.pack("<I", len(key)) + key
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n" + name + b"NK" + bytes([numel]) + view + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\0K" + bytes([size]) + b"\x85K\1\x85tR."


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
MAGIC = 0x1950A86A20F9469CFC6C


def legacy_bytes(
    content: bytes,
    keys: object = ("k",),
    data: bytes | None = None,
    magic=MAGIC,
    protocol=1001,
    system=SYSTEM,
) -> bytes:
    keys = list(keys) if isinstance(keys, tuple) else keys
    pickles = [python_pickle.dumps(value, 2) for value in (magic, protocol, system)]
    storages = struct.pack("<q2f", 2, 1, 2) if data is None else data
    return b"".join((*pickles, content, python_pickle.dumps(keys, 2), storages))


def write_legacy(path, content: bytes) -> None:
    path.write_bytes(legacy_bytes(content))


HOSTILE_LEGACY = {
    "empty file": (b"", "the file is empty"),
    "another pickle": (python_pickle.dumps([1], 2), "not a file of torch.save"),
    "no pickle": (b"\x93NUMPY", "byte 0 of the pickle"),
    "magic only": (python_pickle.dumps(MAGIC, 2), "ends in the middle"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(1000), "tar archive"),
    "another protocol": (legacy_bytes(b"N.", protocol=1000), "file protocol is 1000"),
    "big-endian": (legacy_bytes(b"N.", system={"little_endian": False}), "big-endian"),
    "no byte order": (legacy_bytes(b"N.", system=[]), "big-endian, or"),
    "keys in a dict": (legacy_bytes(legacy_object(), keys={}), "the list of storages is a dict"),
    "key that is a number": (
        legacy_bytes(legacy_object(), keys=(1,)),
        "storage 1 is in the file, and no tensor",
    ),
    "key that is a list": (legacy_bytes(legacy_object(), keys=([],)), "storage a list is in the file"),
    "unknown key": (
        legacy_bytes(legacy_object(), keys=("k", "z")),
        "storage 'z' is in the file, and no tensor",
    ),
    "key twice": (legacy_bytes(legacy_object(), keys=("k", "k")), "two storages are called 'k'"),
    "no key": (legacy_bytes(legacy_object(), keys=()), "lacks the data of storage 'k'"),
    "count cut off": (legacy_bytes(legacy_object(), data=b"\2\0\0"), "beyond the end"),
    "no count": (legacy_bytes(legacy_object(), data=b""), "beyond the end"),
    "data cut off": (legacy_bytes(legacy_object(), data=struct.pack("<qf", 2, 1)), "should have 8 bytes"),
    "negative count": (legacy_bytes(legacy_object(), data=struct.pack("<q2f", -2, 1, 2)), "has -2 elements"),
    "huge count": (legacy_bytes(legacy_object(), data=struct.pack("<q2f", 1 << 61, 1, 2)), "beyond the end"),
    "another count": (legacy_bytes(legacy_object(numel=3)), "has 8 bytes, and the pickle says 12"),
    "view beyond the storage": (
        legacy_bytes(legacy_object(view=b"X\1\0\0\0vK\1K\2\x87")),
        "storage 'v' reaches byte 12 of 'k', which has 8",
    ),
    "negative view": (
        legacy_bytes(legacy_object(view=b"X\1\0\0\0vJ\xff\xff\xff\xffK\2\x87")),
        "has -1 elements",
    ),
    "view of nothing": (legacy_bytes(legacy_object(view=b"K\1")), "view that makes no sense"),
    "tensor beyond the storage": (legacy_bytes(legacy_object(size=3)), "reaches element 2"),
    "persistent text": (legacy_bytes(b"Pname\n."), "refers to something that is not a storage"),
    "object cut off": (legacy_bytes(b"]")[:-30], "of the pickle"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE_LEGACY.values(), ids=HOSTILE_LEGACY)
def test_hostile_legacy_files_end_in_one_error(tmp_path, data, message):
    path = tmp_path / "evil.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        torch_legacy.load(locate(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("load", [torch_zip.load, torch_legacy.load])
def test_files_that_are_none(tmp_path, load):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such file"):
            load(locate(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="there is no such file"):
        load(locate(tmp_path / "pipe"))


class Attack:
    """What runs a command in an unpickler that calls what it reads."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_nothing_runs(saved, tmp_path):
    content = saved({"w": torch.ones(2), "attack": Attack(tmp_path / "ran")})
    assert_same(content["w"], torch.ones(2))
    assert content["attack"].cls.name == "system"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("good", [GOOD_ZIP, GOOD_LEGACY], ids=FORMATS)
def test_every_truncation_is_an_error(tmp_path, good):
    load = torch_zip.load if good is GOOD_ZIP else torch_legacy.load
    path = tmp_path / "cut.pt"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load(locate(path))


RICH = {
    "model": OrderedDict(w=torch.arange(6.0).view(2, 3).t(), v=torch.nn.Parameter(torch.ones(2))),
    "f8": torch.ones(4).to(torch.float8_e4m3fn),
    "args": argparse.Namespace(x=1, y=[b"\xff", {1, 2}]),
    "module": torch.nn.Linear(1, 2),
}
RICH_FILES = [
    torch_zip_bytes(copy.copy(RICH), _use_new_zipfile_serialization=zipped) for zipped in (True, False)
]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_files_end_in_a_value_or_the_error(tmp_path_factory, data):
    zipped = data.draw(st.booleans())
    content = bytearray(RICH_FILES[0] if zipped else RICH_FILES[1])
    for _ in range(data.draw(st.integers(1, 5))):
        # Half of the changes hit the pickle, which is at the front.
        top = data.draw(st.sampled_from((1500, len(content) - 1)))
        content[data.draw(st.integers(0, top))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content[: data.draw(st.sampled_from((len(content), len(content) - 40, 1000)))])
    with contextlib.suppress(CheckpointError):
        (torch_zip.load if zipped else torch_legacy.load)(locate(path))
