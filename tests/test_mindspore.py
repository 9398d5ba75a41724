"""MindSpore's own files and ours, in both directions, with MindSpore itself."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import mindspore
import numpy
import pytest
import torch
from comparing import same
from mindspore.train.checkpoint_pb2 import Checkpoint
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.dtypes import BY_NAME
from streamconv.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    PlanError,
    StreamconvError,
    UsageError,
)
from streamconv.readers.mindspore import ckpt
from streamconv.storage.location import locate
from streamconv.tensor import TensorSpec
from streamconv.writers import mindspore as writer
from streamconv.writers.layout import Target

DTYPES = {
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "BF16": torch.bfloat16, "BOOL": torch.bool,
}  # fmt: skip


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=generator)
        found[f"t.{name}"] = values.to(dtype)
        found[f"scalar.{name}"] = values[0, 0].clone().to(dtype)
    return found


def saved(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def to_ckpt(tensors: dict[str, torch.Tensor], directory: Path, **options) -> Path:
    streamconv.convert(saved(directory / "source", tensors), directory / "out", to="mindspore", **options)
    return directory / "out" / "model.ckpt"


def as_torch(parameter) -> torch.Tensor:
    if parameter.dtype == mindspore.bfloat16:
        return torch.from_numpy(parameter.float().asnumpy()).to(torch.bfloat16)
    array = numpy.asarray(parameter.asnumpy())
    # It says ulonglong, which torch takes for another type.
    return torch.from_numpy(array.astype(numpy.uint64) if array.dtype == numpy.uint64 else array.copy())


def read_back(path: Path, directory: Path) -> dict[str, torch.Tensor]:
    streamconv.convert(path, directory)
    return load_file(directory / "model.safetensors")


# ------------------------------------------------------------------------------------------ what we write


def test_mindspore_loads_every_dtype_that_is_written(tmp_path: Path) -> None:
    tensors = every_dtype()
    loaded = mindspore.load_checkpoint(str(to_ckpt(tensors, tmp_path)))
    assert loaded.keys() == tensors.keys()
    assert all(same(as_torch(loaded[name]), tensors[name]) for name in tensors)


@pytest.mark.parametrize("crc", [False, True])
def test_a_file_is_byte_for_byte_mindspores(tmp_path: Path, crc: bool) -> None:
    path = to_ckpt(every_dtype(), tmp_path, crc=crc)
    loaded = mindspore.load_checkpoint(str(path), crc_check=crc)
    parameters = [{"name": name, "data": parameter} for name, parameter in loaded.items()]
    mindspore.save_checkpoint(parameters, str(tmp_path / "theirs.ckpt"), crc_check=crc)
    assert (tmp_path / "theirs.ckpt").read_bytes() == path.read_bytes()


def test_safetensors_are_byte_for_byte_mindspores(tmp_path: Path) -> None:
    # MindSpore's own writer of safetensors fails for BF16 with numpy 2.
    tensors = {
        name: each for name, each in every_dtype().items() if not name.endswith(("BF16", "U16", "U32", "U64"))
    }
    streamconv.convert(saved(tmp_path / "source", tensors), tmp_path / "out", to="mindspore-safetensors")
    loaded = mindspore.load_checkpoint(str(tmp_path / "out" / "model.safetensors"), format="safetensors")
    assert all(same(as_torch(loaded[name]), tensors[name]) for name in tensors)
    parameters = [{"name": name, "data": parameter} for name, parameter in loaded.items()]
    mindspore.save_checkpoint(parameters, str(tmp_path / "theirs.safetensors"), format="safetensors")
    assert (tmp_path / "theirs.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_several_safetensors_have_mindspores_index(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.randn(100, 10) for index in range(5)}
    source = saved(tmp_path / "source", tensors)
    streamconv.convert(source, tmp_path / "out", to="mindspore-safetensors", max_shard=8000)
    assert (tmp_path / "out" / "param_name_map.json").is_file()
    found = read_back(tmp_path / "out", tmp_path / "back")
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_a_large_parameter_is_cut_where_mindspore_cuts_it() -> None:
    numel = (600 << 20) // 4
    layout = writer.layout([Target(TensorSpec("big", BY_NAME["F32"], (150, 1024, 1024)))])
    assert [place.length for place in layout.placements] == [512 << 20, (600 << 20) - (512 << 20)]
    assert [place.start for place in layout.placements] == [0, 512 << 20]
    assert sum(place.length for place in layout.placements) == numel * 4


def test_a_parameter_in_slices_goes_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SLICE", 64)
    tensors = {"a": torch.randn(7, 11), "b": torch.randn(3).double(), "c": torch.randn(33, 2).bfloat16()}
    path = to_ckpt(tensors, tmp_path, engine="inline")
    proto = Checkpoint()
    proto.ParseFromString(path.read_bytes())
    assert [value.tag for value in proto.value].count("a") == 5
    loaded = mindspore.load_checkpoint(str(path))
    assert all(same(as_torch(loaded[name]), tensors[name]) for name in tensors)
    found = read_back(path, tmp_path / "back")
    assert all(same(found[name], tensors[name]) for name in tensors)
    assert not streamconv.verify(tmp_path / "source", tmp_path / "out").problems


def test_what_a_ckpt_cannot_hold_is_said_before_anything_is_written(tmp_path: Path) -> None:
    source = saved(
        tmp_path / "source", {"f8": torch.zeros(4, dtype=torch.float8_e4m3fn), "empty": torch.zeros(0)}
    )
    with pytest.raises(PlanError) as caught:
        streamconv.plan(source, to="mindspore")
    assert "no dtype F8_E4M3" in str(caught.value)
    assert "empty row" in str(caught.value)


# ------------------------------------------------------------------------------------ what MindSpore writes


@pytest.mark.parametrize("crc", [False, True])
def test_mindspores_file_is_read(tmp_path: Path, crc: bool) -> None:
    generator = numpy.random.default_rng(0)
    arrays = {
        "f32": generator.standard_normal((3, 4)).astype(numpy.float32),
        "f16": generator.standard_normal(5).astype(numpy.float16),
        "i64": generator.integers(0, 1 << 40, (2, 2)),
        "bool": generator.integers(0, 2, 7).astype(bool),
        "scalar": numpy.asarray(2.5, numpy.float32),
    }
    parameters = [{"name": name, "data": mindspore.Tensor(each)} for name, each in arrays.items()]
    parameters.append({"name": "bf16", "data": mindspore.Tensor(arrays["f32"]).astype(mindspore.bfloat16)})
    extras = {"epoch_num": 3, "step_num": 70, "lr": 0.5, "text": "größer", "flag": True}
    path = tmp_path / "theirs.ckpt"
    mindspore.save_checkpoint(parameters, str(path), append_dict=extras, crc_check=crc)
    opened = streamconv.open(path)
    assert opened.format == "MindSpore"
    assert opened.contents.metadata == {"epoch_num": 3, "step_num": 70, "text": "größer"}
    for name, array in arrays.items():
        assert opened[name].numpy().tobytes() == array.tobytes()
        assert opened[name].spec.shape == array.shape
    found = read_back(path, tmp_path / "back")
    assert same(found["bf16"], torch.from_numpy(arrays["f32"]).bfloat16())
    assert found.keys() == {*arrays, "bf16", "lr", "flag"}


def record(name: str, kind: str, dims: list[int], content: bytes) -> bytes:
    proto = Checkpoint()
    value = proto.value.add()
    value.tag = name
    value.tensor.dims.extend(dims)
    value.tensor.tensor_type = kind
    value.tensor.tensor_content = content
    return proto.SerializeToString()


def written(tmp_path: Path, *records: bytes) -> Path:
    path = tmp_path / "made.ckpt"
    path.write_bytes(b"".join(records))
    return path


def test_slices_of_any_length_are_joined_as_mindspore_joins_them(tmp_path: Path) -> None:
    data = numpy.arange(6, dtype=numpy.float32).tobytes()
    parts = (data[:7], data[7:10], data[10:])
    path = written(
        tmp_path, *(record("w", "Float32", [2, 3], part) for part in parts), record("b", "Int8", [1], b"x")
    )
    theirs = mindspore.load_checkpoint(str(path))["w"].asnumpy()
    assert streamconv.open(path)["w"].numpy().tolist() == theirs.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_old_scalars_have_one_dimension_of_zero(tmp_path: Path) -> None:
    path = written(
        tmp_path, record("s", "Float32", [0], numpy.float32(1.5).tobytes()), record("w", "Int8", [1], b"x")
    )
    assert mindspore.load_checkpoint(str(path))["s"].shape == ()
    assert streamconv.open(path)["s"].spec.shape == ()


def test_packed_dimensions_are_read(tmp_path: Path) -> None:
    # 0a <len Value> { 0a 01 'w'  12 <len> { 0a 02 02 03 (packed dims)  12 04 Int8  1a 06 ... } }
    tensor = b"\x0a\x02\x02\x03\x12\x04Int8\x1a\x06abcdef"
    value = b"\x0a\x01w\x12" + bytes([len(tensor)]) + tensor
    path = tmp_path / "packed.ckpt"
    path.write_bytes(b"\x0a" + bytes([len(value)]) + value)
    assert streamconv.open(path)["w"].spec.shape == (2, 3)


HOSTILE = {
    "short": ([record("w", "Float32", [2, 3], b"x" * 20)], "takes 24 bytes, and its records hold 20"),
    "long": ([record("w", "Float32", [2, 3], b"x" * 28)], "takes 24 bytes, and its records hold 28"),
    "again": (
        [record("w", "Int8", [1], b"x"), record("v", "Int8", [1], b"x"), record("w", "Int8", [1], b"y")],
        "occurs again",
    ),
    "slices": (
        [record("w", "Int8", [2], b"x"), record("w", "Int8", [3], b"yz")],
        "several dtypes or dimensions",
    ),
    "dtype": (
        [record("v", "Int8", [1], b"x"), record("w", "Complex64", [1], b"x" * 8)],
        "dtype is 'Complex64'",
    ),
    "huge": ([record("w", "Int8", [1 << 40, 1 << 40], b"x")], "impossible"),
    "negative": ([record("w", "Int8", [-3], b"x")], "impossible"),
    "cut off": (
        [record("v", "Int8", [1], b"x"), record("w", "Float32", [4], b"x" * 16)[:-3]],
        "beyond its message's end",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    records, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        ckpt.read(locate(written(tmp_path, *records)))


def test_map_parameters_are_refused(tmp_path: Path) -> None:
    proto = Checkpoint()
    value = proto.value.add()
    value.tag = "table"
    inner = value.maptensor.tensor.add()
    inner.tensor_type, inner.tensor_content = "int32", b"xxxx"
    path = tmp_path / "map.ckpt"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match=r"table.*map parameter"):
        streamconv.open(path)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC"])
def test_encrypted_files_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "secret.ckpt"
    mindspore.save_checkpoint(
        [{"name": "w", "data": mindspore.Tensor(numpy.ones(3, numpy.float32))}],
        str(path),
        enc_key=b"0" * 16,
        enc_mode=mode,
    )
    with pytest.raises(CheckpointError, match=f"encrypted \\({mode}\\)"):
        streamconv.open(path)


def test_a_checksum_is_checked_where_it_is_asked_for(tmp_path: Path) -> None:
    path = to_ckpt({"w": torch.randn(1000)}, tmp_path, crc=True)
    changed = bytearray(path.read_bytes())
    changed[500] ^= 1
    wrong = tmp_path / "changed.ckpt"
    wrong.write_bytes(changed)
    streamconv.convert(path, tmp_path / "right", checksum=True)
    streamconv.convert(wrong, tmp_path / "unasked")
    said = f"{zlib.crc32(path.read_bytes()[:-17]):08x}"
    for engine in ("inline", "local"):
        with pytest.raises(
            ConversionError, match=rf"changed\.ckpt.* CRC-32 .*, not {said} \(.*nothing was fin"
        ):
            streamconv.convert(wrong, tmp_path / engine, checksum=True, engine=engine)
        assert not list((tmp_path / engine).glob("*.safetensors"))
    # What was converted without a word on its checksums is not what is wanted now.
    streamconv.convert(path, tmp_path / "cast", dtype="F16")
    with pytest.raises(DestinationError, match="not compared with the checksums"):
        streamconv.convert(path, tmp_path / "cast", dtype="F16", checksum=True)
    streamconv.convert(path, tmp_path / "cast", dtype="F16", checksum=True, overwrite=True)
    assert streamconv.convert(path, tmp_path / "cast", dtype="F16", checksum=True).finished_before


def test_every_rank_is_held_against_its_checksum(tmp_path: Path) -> None:
    path = to_ckpt({"w": torch.randn(1000)}, tmp_path, crc=True)
    changed = bytearray(path.read_bytes())
    changed[500] ^= 1
    (tmp_path / "ranks" / "rank_0").mkdir(parents=True)
    (tmp_path / "ranks" / "rank_0" / "model.ckpt").write_bytes(changed)
    assert len(streamconv.open(tmp_path / "ranks").contents.checksums) == 1
    with pytest.raises(ConversionError, match="CRC-32"):
        streamconv.convert(tmp_path / "ranks", tmp_path / "asked", checksum=True)


def test_other_files_are_not_taken_for_mindspores(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "torch.ckpt")
    assert streamconv.open(tmp_path / "torch.ckpt").format == "torch zip"
    # A tokenizer of sentencepiece is a message of messages too.
    (tmp_path / "other.ckpt").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 4)
    with pytest.raises(CheckpointError, match="not a weight file of a known format"):
        streamconv.open(tmp_path / "other.ckpt")


def test_gigabytes_are_indexed_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.ckpt"
    spec = TensorSpec("w", BY_NAME["F32"], (5, 1 << 27))
    layout = writer.layout([Target(spec), Target(TensorSpec("b", BY_NAME["I8"], (3,)))])
    with path.open("wb") as file:
        file.truncate(layout.size)
        for literal in layout.literals:
            file.seek(literal.offset)
            file.write(literal.data)
    found = ckpt.read(locate(path)).tensors
    assert len(found["w"].extents) == 5
    assert found["b"].spec.shape == (3,)
    assert os.stat(path).st_blocks * 512 < 1 << 20


# ---------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("form", ["flat map", "weight map", "index"])
def test_every_index_of_mindspores_safetensors(tmp_path: Path, form: str) -> None:
    tensors = {f"w{index}": torch.randn(4) for index in range(4)}
    files = {f"w{index}": f"part{index % 2}.safetensors" for index in range(4)}
    directory = tmp_path / "ms"
    directory.mkdir()
    for file in set(files.values()):
        save_file(
            {name: tensors[name] for name in files if files[name] == file}, directory / file, {"format": "ms"}
        )
    document = files if form == "flat map" else {"metadata": {"total_size": 64}, "weight_map": files}
    name = "model.safetensors.index.json" if form == "index" else "param_name_map.json"
    (directory / name).write_text(json.dumps(document))
    found = read_back(directory, tmp_path / "back")
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "param_name_map.json").write_text('{"w": "../secret.safetensors"}')
    with pytest.raises(CheckpointError, match="not a file of the directory"):
        streamconv.open(tmp_path)


# --------------------------------------------------------------- MindFormers' shards with their metadata


def sharded(directory: Path, tensors: dict[str, torch.Tensor], grid: tuple[int, int] = (2, 2)) -> None:
    """What MindFormers writes from r1.7 on, of a grid of ranks that cut rows and columns; optimizers apart."""
    chunks: dict[str, list[dict]] = {}
    storage: dict[str, list[dict]] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    count = grid[0] * grid[1]
    for name, whole in tensors.items():
        for rank in range(count):
            place = divmod(rank, grid[1])
            part, offsets = whole, []
            for axis in range(whole.ndim):
                cut = axis < 2 and whole.shape[axis] % grid[axis] == 0
                size = whole.shape[axis] // (grid[axis] if cut else 1)
                offsets.append(place[axis] * size if cut else 0)
                part = part.narrow(axis, offsets[-1], size)
            kind = "opt" if name.startswith("adam") else "model"
            file = f"{kind}-{rank:07d}-{count:07d}.safetensors"
            chunk = {"global_offset": offsets, "local_shape": list(part.shape)}
            if chunk not in chunks.setdefault(name, []):
                chunks[name].append(chunk)
            files.setdefault(file, {})[name] = part.contiguous()
            key = str((name, tuple(offsets)))
            storage.setdefault(key, []).append(
                {"file_name": file, "storage_rank": rank, "rank_group": [rank]}
            )
    directory.mkdir(parents=True)
    for file, content in files.items():
        save_file(content, directory / file, {"format": "ms"})
    metadata = {
        name: {"properties": {"dtype": "Float32"}, "global_shape": list(tensors[name].shape), "chunk": found}
        for name, found in chunks.items()
    }
    (directory / "metadata.json").write_text(
        json.dumps({"state_dict_metadata": metadata, "storage_data": storage})
    )
    (directory.parent / "latest_checkpointed_iteration.txt").write_text(
        str(int(directory.name.removeprefix("iteration_")))
    )


SHARDED = {
    "decoder.w": torch.arange(48.0).reshape(6, 8), "decoder.b": torch.arange(4.0), "scale": torch.tensor(2.0),
    "adam_m.decoder.w": torch.ones(6, 8), "adam_v.decoder.w": torch.arange(48.0).reshape(6, 8) * 2,
}  # fmt: skip


@pytest.mark.parametrize("inside", ["", "iteration_00000070"])
def test_mindformers_shards_are_joined_by_their_metadata(tmp_path: Path, inside: str) -> None:
    sharded(tmp_path / "run" / "iteration_00000060", SHARDED)
    sharded(tmp_path / "run" / "iteration_00000070", {name: each + 1 for name, each in SHARDED.items()})
    streamconv.convert(tmp_path / "run" / inside, tmp_path / "out", optimizer=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {"decoder.w", "decoder.b", "scale"}
    assert all(same(found[name], SHARDED[name] + 1) for name in found)
    moment = load_file(tmp_path / "out" / "optimizer" / "exp_avg_sq" / "model.safetensors")
    assert same(moment["decoder.w"], SHARDED["adam_v.decoder.w"] + 1)


def test_shards_that_are_missing_or_lead_elsewhere(tmp_path: Path) -> None:
    sharded(tmp_path / "run" / "iteration_00000070", SHARDED)
    directory = tmp_path / "run" / "iteration_00000070"
    (directory / "model-0000003-0000004.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-0000003-0000004.safetensors: it is named in metadata.json"
    ):
        streamconv.open(directory)
    text = (directory / "metadata.json").read_text()
    (directory / "metadata.json").write_text(text.replace("model-0000003", "../model-0000003"))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        streamconv.open(directory)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("80")
    with pytest.raises(CheckpointError, match=r"says '80', which is not there.*iteration_00000070"):
        streamconv.open(tmp_path / "run")


# ------------------------------------------------------------------------------------------ several ranks


def net() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.tok_embeddings.embedding_weight": random(8, 4), "model.norm_out.weight": random(4)}
    for layer in range(4):
        before = f"model.layers.{layer}."
        tensors |= {
            before + "attention.wq.weight": random(8, 4), before + "attention.wq.bias": random(8),
            before + "attention.wo.weight": random(4, 8).bfloat16(), before + "feed_forward.w2.weight": random(4, 12),
            before + "attention_norm.weight": random(4),
        }  # fmt: skip
    return tensors | {"lm_head.weight": random(8, 4)}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (4, 4)])
@pytest.mark.parametrize("to", ["mindspore", "mindspore-safetensors"])
def test_split_and_joined_again(tmp_path: Path, to: str, tp: int, pp: int) -> None:
    tensors = net()
    streamconv.convert(saved(tmp_path / "source", tensors), tmp_path / "out", to=to, tp=tp, pp=pp)
    assert len(list((tmp_path / "out").glob("rank_*/checkpoint_*"))) == tp * pp
    found = read_back(tmp_path / "out", tmp_path / "back")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_mindspore_merges_what_was_split_to_the_same(tmp_path: Path, tp: int, pp: int) -> None:
    tensors = net()
    streamconv.convert(saved(tmp_path / "source", tensors), tmp_path / "out", to="mindspore", tp=tp, pp=pp)
    mindspore.transform_checkpoints(
        str(tmp_path / "out"),
        str(tmp_path / "theirs"),
        "whole",
        str(tmp_path / "out" / "strategy.json"),
        None,
    )
    loaded = mindspore.load_checkpoint(str(tmp_path / "theirs" / "rank_0" / "whole0.ckpt"))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(as_torch(loaded[name]).float(), tensors[name].float()) for name in tensors)


def test_each_component_of_a_pipeline_has_its_own_strategy(tmp_path: Path) -> None:
    for name, tensors in (("unet", {"a": torch.ones(4)}), ("text_encoder", {"b": torch.zeros(4)})):
        saved(tmp_path / "source" / name, tensors)
    (tmp_path / "source" / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
    streamconv.convert(tmp_path / "source", tmp_path / "out", to="mindspore", tp=2)
    found = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("strategy.json")
    )
    assert found == ["text_encoder/strategy.json", "unet/strategy.json"]
    assert not streamconv.verify(tmp_path / "source", tmp_path / "out").problems
    assert read_back(tmp_path / "out" / "unet", tmp_path / "back").keys() == {"a"}


def strategy_file(path: Path, items: dict[str, tuple[list[int], list[list[int]], int, int]]) -> Path:
    """As MindSpore writes it: parameter -> (grid, maps, step, size) of an optimizer shard."""
    proto = ParallelStrategyMap()
    proto.current_stage = 0
    for name, (grid, maps, step, size) in items.items():
        item = proto.parallel_layout_item.add()
        item.param_name = name
        layouts = item.parallel_layouts
        layouts.dev_matrix.add().dim.extend(grid)
        for each in maps:
            layouts.tensor_map.add().dim.extend(each)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field, layouts.opt_weight_shard_step, layouts.opt_weight_shard_size = 0, step, size
    path.write_bytes(proto.SerializeToString())
    return path


# Two data-parallel groups of two model-parallel ranks; the last parameter's rows are cut by both axes at once.
GRID = {
    "column": ([2, 2], [[0, -1]], 0, 0),
    "row": ([2, 2], [[-1, 0]], 0, 0),
    "copy": ([2, 2], [[-1]], 0, 0),
    "optimizer": ([2, 2], [[0, -1]], 2, 2),
    "whole.optimizer": ([2, 2], [[-1, -1]], 1, 2),
    "all.optimizer": ([2, 2], [[-1, -1]], 1, -1),
}
NESTED = {"both": ([2, 2], [[1, 0], [-1]], 0, 0)}
WHOLE = {
    "column": (8, 6),
    "row": (4, 6),
    "copy": (5,),
    "optimizer": (8, 3),
    "whole.optimizer": (6, 2),
    "all.optimizer": (8, 2),
    "both": (8, 3),
}


def by_hand(name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
    data, model = divmod(rank, 2)
    if name == "column":
        return whole.chunk(2, 0)[model]
    if name == "row":
        return whole.chunk(2, 1)[model]
    if name == "optimizer":
        return whole.chunk(2, 0)[model].chunk(2, 0)[data]
    if name == "whole.optimizer":
        return whole.chunk(2, 0)[model]
    if name in ("both", "all.optimizer"):
        return whole.chunk(4, 0)[rank]
    return whole


def ranks_by_hand(directory: Path, names: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    whole = {name: torch.randn(WHOLE[name], generator=generator) for name in names}
    for rank in range(4):
        (directory / f"rank_{rank}").mkdir(parents=True)
        parts = [
            {"name": name, "data": mindspore.Tensor(by_hand(name, each, rank).contiguous().numpy())}
            for name, each in whole.items()
        ]
        mindspore.save_checkpoint(
            parts, str(directory / f"rank_{rank}" / "net.ckpt"), append_dict={"epoch_num": 2}
        )
    return whole


def test_a_grid_of_ranks_is_merged_as_mindspore_merges_it(tmp_path: Path) -> None:
    whole = ranks_by_hand(tmp_path / "run", list(GRID))
    strategy = strategy_file(tmp_path / "strategy.ckpt", GRID)
    streamconv.convert(tmp_path / "run", tmp_path / "out", source_strategy=strategy)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(same(found[name], whole[name]) for name in whole)
    mindspore.transform_checkpoints(str(tmp_path / "run"), str(tmp_path / "theirs"), "x", str(strategy), None)
    theirs = mindspore.load_checkpoint(str(tmp_path / "theirs" / "rank_0" / "x0.ckpt"))
    assert all(same(found[name], as_torch(theirs[name])) for name in whole)


def test_one_axis_cut_by_two_axes_of_the_grid(tmp_path: Path) -> None:
    whole = ranks_by_hand(tmp_path / "run", list(NESTED))
    strategy = strategy_file(tmp_path / "strategy.ckpt", NESTED)
    found = streamconv.open(tmp_path / "run", source_strategy=strategy)
    assert found["both"].numpy().tolist() == whole["both"].tolist()


def test_a_strategy_decides_how_the_output_is_split(tmp_path: Path) -> None:
    whole = {name: torch.randn(WHOLE[name]) for name in GRID}
    strategy = strategy_file(tmp_path / "strategy.ckpt", GRID)
    streamconv.convert(saved(tmp_path / "source", whole), tmp_path / "out", to="mindspore", strategy=strategy)
    for rank in range(4):
        loaded = mindspore.load_checkpoint(str(tmp_path / "out" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"))
        assert all(same(as_torch(loaded[name]), by_hand(name, whole[name], rank)) for name in GRID)


def test_the_strategies_of_a_training_run_are_found(tmp_path: Path) -> None:
    whole = ranks_by_hand(tmp_path / "output" / "checkpoint", list(GRID))
    (tmp_path / "output" / "strategy").mkdir()
    for rank in range(4):
        strategy_file(tmp_path / "output" / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", GRID)
    opened = streamconv.open(tmp_path / "output" / "checkpoint")
    assert all(opened[name].numpy().tolist() == whole[name].tolist() for name in whole)


def test_the_last_step_is_taken_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        path = tmp_path / "rank_0" / f"llama_rank_0-1_{step}.ckpt"
        path.parent.mkdir(exist_ok=True)
        parameter = {"name": "w", "data": mindspore.Tensor(numpy.full(2, step, numpy.float32))}
        mindspore.save_checkpoint([parameter], str(path))
    assert streamconv.open(tmp_path)["w"].numpy().tolist() == [100, 100]


def test_ranks_without_a_strategy_are_not_guessed(tmp_path: Path) -> None:
    ranks_by_hand(tmp_path / "run", ["row"])
    with pytest.raises(UsageError, match=r"4 ranks, and no strategy.*--source-strategy"):
        streamconv.open(tmp_path / "run")


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    ranks_by_hand(tmp_path / "run", list(GRID))
    shutil.rmtree(tmp_path / "run" / "rank_3")
    with pytest.raises(CheckpointError, match=r"rank_3 of 4 ranks are missing"):
        streamconv.open(tmp_path / "run", source_strategy=strategy_file(tmp_path / "s.ckpt", GRID))
    # A copy in another data-parallel group is as good.
    plain = {name: GRID[name] for name in ("column", "row", "copy")}
    shutil.rmtree(tmp_path / "run")
    whole = ranks_by_hand(tmp_path / "run", list(plain))
    shutil.rmtree(tmp_path / "run" / "rank_3")
    opened = streamconv.open(tmp_path / "run", source_strategy=strategy_file(tmp_path / "s.ckpt", plain))
    assert all(opened[name].numpy().tolist() == whole[name].tolist() for name in plain)


BAD_STRATEGIES = {
    "axis": ({"row": ([2, 2], [[-1, 5]], 0, 0)}, "does not have"),
    "grid": ({"row": ([0, 2], [[-1, 0]], 0, 0)}, "impossible"),
    "shard": ({"row": ([2, 2], [[-1, 0]], 1, 8)}, "does not fit a grid"),
}


@pytest.mark.parametrize("case", BAD_STRATEGIES)
def test_strategies_that_make_no_sense(tmp_path: Path, case: str) -> None:
    items, message = BAD_STRATEGIES[case]
    ranks_by_hand(tmp_path / "run", ["row"])
    with pytest.raises(StreamconvError, match=message):
        streamconv.open(tmp_path / "run", source_strategy=strategy_file(tmp_path / "s.ckpt", items))


def test_a_checkpoint_in_place_of_a_strategy(tmp_path: Path) -> None:
    ranks_by_hand(tmp_path / "run", ["row"])
    with pytest.raises(CheckpointError, match="a checkpoint, not a strategy file"):
        streamconv.open(tmp_path / "run", source_strategy=tmp_path / "run" / "rank_0" / "net.ckpt")


# --------------------------------------------------------------------------------- what the optimizer keeps


def test_adams_slots_go_apart(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4), "b": torch.randn(2)}
    slots = {
        f"{slot}.{name}": torch.randn_like(each)
        for slot in ("adam_m", "adam_v", "accu_grads")
        for name, each in tensors.items()
    }
    path = to_ckpt(tensors | slots, tmp_path)
    found = read_back(path, tmp_path / "plain")
    assert found.keys() == tensors.keys()
    opened = streamconv.open(path)
    assert any("exp_avg, exp_avg_sq) is left out (--optimizer)" in note for note in opened.contents.notes)
    streamconv.convert(path, tmp_path / "all", optimizer=True)
    for slot, state in (("adam_m", "exp_avg"), ("adam_v", "exp_avg_sq")):
        moments = load_file(tmp_path / "all" / "optimizer" / state / "model.safetensors")
        assert all(same(moments[name], slots[f"{slot}.{name}"]) for name in tensors)


def test_many_parameters_with_names_of_every_kind(tmp_path: Path) -> None:
    names = [
        "a",
        "ключ",
        "名前.权重",
        "with space",
        'quote"s',
        "back\\slash",
        "/x",
        *(f"layers.{i}.w" for i in range(2000)),
    ]
    path = written(
        tmp_path,
        *(record(name, "Float32", [1], numpy.float32(at).tobytes()) for at, name in enumerate(names)),
    )
    opened = streamconv.open(path)
    assert list(opened) == names
    assert [opened[name].numpy().item() for name in names[:7]] == [0, 1, 2, 3, 4, 5, 6]
    assert mindspore.load_checkpoint(str(path)).keys() == set(names)
