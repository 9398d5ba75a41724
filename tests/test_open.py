"""Which files of a directory are the checkpoint; what is said where that cannot be told."""

from __future__ import annotations

import contextlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv import readers
from streamconv.errors import CheckpointError, StreamconvError, UsageError, listed
from streamconv.readers.together import Missing

A, B = {"a": torch.arange(4.0)}, {"b": torch.arange(6.0)}


def put(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)


def put_index(
    directory: Path, weight_map: dict[str, object], name: str = "model.safetensors.index.json"
) -> None:
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": weight_map}))


def ignored(directory: Path) -> dict[str, str]:
    return {each.path: each.reason for each in readers.open_checkpoint(directory).ignored}


def failure(path: Path) -> str:
    with pytest.raises(StreamconvError) as caught:
        readers.open_checkpoint(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_index_decides_not_the_directory(tmp_path: Path) -> None:
    put(A, tmp_path / "model-00001-of-00002.safetensors")
    put(B, tmp_path / "model-00002-of-00002.safetensors")
    put(A | B, tmp_path / "original" / "consolidated.safetensors")
    put(A | B, tmp_path / "consolidated.safetensors")
    put_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})

    checkpoint = readers.open_checkpoint(tmp_path)

    assert set(checkpoint) == {"a", "b"}
    assert set(ignored(tmp_path)) == {"original/consolidated.safetensors", "consolidated.safetensors"} | {
        "model.safetensors.index.json"
    } - {"model.safetensors.index.json"}


def test_safetensors_go_before_torch_and_plain_before_variants(tmp_path: Path) -> None:
    put(A, tmp_path / "model.safetensors")
    put(A, tmp_path / "model.fp16.safetensors")
    put(A, tmp_path / "pytorch_model.bin")
    put(A, tmp_path / "optimizer.bin")

    checkpoint = readers.open_checkpoint(tmp_path)

    assert [Path(file).name for file in checkpoint.files] == ["model.safetensors"]
    assert set(ignored(tmp_path)) == {"model.fp16.safetensors", "pytorch_model.bin", "optimizer.bin"}


def test_a_variant_alone_keeps_its_name(tmp_path: Path) -> None:
    put(A, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    (component,) = readers.open_checkpoint(tmp_path).components
    assert (component.stem, component.variant) == ("diffusion_pytorch_model", "fp16")


@pytest.mark.parametrize("first", [0, 1])
def test_shards_without_an_index(tmp_path: Path, first: int) -> None:
    put(A, tmp_path / f"model-{first:05d}-of-00002.safetensors")
    put(B, tmp_path / f"model-{first + 1:05d}-of-00002.safetensors")
    checkpoint = readers.open_checkpoint(tmp_path)
    assert list(checkpoint) == ["a", "b"]
    assert "no index" in checkpoint.notes[0]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    put(A, tmp_path / "model-00001-of-00003.safetensors")
    assert "shards 2, 3 of 3 are missing" in failure(tmp_path)
    put_index(tmp_path, {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"})
    assert "model-00002-of-00003.safetensors" in failure(tmp_path)


def test_an_index_of_another_save_can_be_removed_where_the_rest_is_whole(tmp_path: Path) -> None:
    put(A, tmp_path / "model-00001-of-00002.safetensors")
    put(B, tmp_path / "model-00002-of-00002.safetensors")
    put_index(tmp_path, {"a": "model-00001-of-00003.safetensors"})
    assert "remove it, and " in failure(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "b" in readers.open_checkpoint(tmp_path)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_of_a_file_and_an_index_the_library_decides(stem: str, tmp_path: Path) -> None:
    """transformers takes the file, diffusers the index."""
    from diffusers import AutoencoderKL
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {
        "vocab_size": 8,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    }
    for kind in (tmp_path / "file", tmp_path / "both"):
        torch.manual_seed(len(kind.name))
        model = BertModel(BertConfig(**size)) if stem == "model" else AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2
        )  # fmt: skip
        model.save_pretrained(kind, max_shard_size="1KB" if kind.name == "both" else "5GB")
    single = tmp_path / "both" / f"{stem}.safetensors"
    single.write_bytes((tmp_path / "file" / f"{stem}.safetensors").read_bytes())
    cls = BertModel if stem == "model" else AutoencoderKL
    state = cls.from_pretrained(tmp_path / "both", local_files_only=True).state_dict()
    streamconv.convert(tmp_path / "both", tmp_path / "out")
    made = load_file(tmp_path / "out" / f"{stem}.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.items())
    if stem == "model":
        notes = readers.open_checkpoint(tmp_path / "both").notes
        assert any("index.json beside model.safetensors: left alone" in note for note in notes)


def test_an_index_without_files_beside_another_format_can_be_removed(tmp_path: Path) -> None:
    put(A, tmp_path / "pytorch_model-00001-of-00002.bin")
    put(B, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    put_index(tmp_path, files, "pytorch_model.bin.index.json")
    put_index(tmp_path, {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"})
    assert "remove it, and all 2 shards of pytorch_model.bin will be taken" in failure(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(readers.open_checkpoint(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00003.safetensors",
        "model-00001-of-00002.fp16.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model_00001-of-00072.bin",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "mine-0001-of-0002.pt",
        "consolidated.01.pth",
        "mp_rank_01_model_states.pt",
        "pytorch_model_0_rank1.bin",
        "model-0000000-0000002.safetensors",
    ],
)
@pytest.mark.parametrize("root", [None, "module"])
def test_one_of_several_files_is_no_checkpoint(tmp_path: Path, name: str, root: str | None) -> None:
    put(A, tmp_path / name)
    with pytest.raises(UsageError, match="not a checkpoint by itself") as caught:
        readers.open_checkpoint(tmp_path / name, {"root": root})
    assert caught.value.headline.hint
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("names", ["consolidated.0{}.pth", "mp_rank_0{}_model_states.pt"])
def test_the_first_of_several_ranks_is_all_where_it_is_alone(tmp_path: Path, names: str) -> None:
    first = tmp_path / names.format(0)
    put(A, first)
    assert "a" in readers.open_checkpoint(first)
    put(A, tmp_path / names.format(1))
    assert "not a checkpoint by itself" in failure(first)


def test_one_rank_of_mindspore_whose_model_a_strategy_splits(tmp_path: Path) -> None:
    for rank in range(2):
        put(A, tmp_path / f"rank_{rank}" / "model.safetensors")
    assert "a" in readers.open_checkpoint(tmp_path / "rank_0" / "model.safetensors")
    (tmp_path / "strategy").mkdir()
    assert "one of 2 ranks, and not a checkpoint by itself" in failure(
        tmp_path / "rank_0" / "model.safetensors"
    )


def test_a_rank_that_says_that_it_is_one_of_several(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": A, "mp_world_size": 2, "num_experts": []}, path)
    assert "of 2 model-parallel ranks (give the directory" in failure(path)
    torch.save({"module": A, "mp_world_size": 1, "num_experts": [4]}, path)
    assert "its experts are in files of their own" in failure(path)
    torch.save({"module": A, "mp_world_size": 1, "num_experts": []}, path)
    assert "a" in readers.open_checkpoint(path)


def test_an_index_that_disagrees_says_how_in_all_shards_at_once(tmp_path: Path) -> None:
    put(A, tmp_path / "one.safetensors")
    put(B | {f"x.{i}": torch.zeros(1) for i in range(1000)}, tmp_path / "two.safetensors")
    put_index(tmp_path, {"b": "one.safetensors", "gone": "two.safetensors"})

    message = failure(tmp_path)

    assert "lacks 1 tensors that the index has in it: b" in message
    assert "has 1 tensors that the index does not have in it: a" in message
    assert "lacks 1 tensors that the index has in it: gone" in message
    assert "has 1001 tensors" in message
    assert "and 996 more" in message


def test_names_in_two_shards(tmp_path: Path) -> None:
    put(A, tmp_path / "model-00001-of-00002.safetensors")
    put(A | B, tmp_path / "model-00002-of-00002.safetensors")
    assert "another shard has tensors of these names too: a" in failure(tmp_path)


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../model.safetensors", "x/../../y", "..", "", 7, None, "a\\..\\b", "a\x1b[31m"]
)
def test_index_paths_stay_in_the_directory(tmp_path: Path, target: object) -> None:
    put(A, tmp_path / "inside" / "other.safetensors")
    put(A, tmp_path / "model.safetensors")
    put_index(tmp_path / "inside", {"a": target})
    message = failure(tmp_path / "inside")
    assert "is not a file of the directory" in message
    assert "\x1b" not in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "\xff"])
def test_indexes_that_are_none(tmp_path: Path, text: str) -> None:
    put(A, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "model.safetensors.index.json" in failure(tmp_path)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    put(A, tmp_path / "blobs" / "0123.safetensors")
    (tmp_path / "blobs" / "0123.safetensors").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshots" / "x").mkdir(parents=True)
    (tmp_path / "snapshots" / "x" / "model.safetensors").symlink_to("../../blobs/0123")
    (tmp_path / "blobs" / "4567").write_text("{}")
    (tmp_path / "snapshots" / "x" / "config.json").symlink_to("../../blobs/4567")
    checkpoint = readers.open_checkpoint(tmp_path / "snapshots" / "x")
    assert list(checkpoint) == ["a"]
    assert checkpoint.side_files == ("config.json",)


def test_side_files_go_along_and_other_weights_do_not(tmp_path: Path) -> None:
    put(A, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "README.md", "modeling_x.py", "sub/template.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("model.gguf", "onnx/model.onnx", "onnx/config.json", "flax_model.msgpack"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0")
    for name in (".git/config", ".cache/x", ".streamconv/conversion.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    checkpoint = readers.open_checkpoint(tmp_path)

    assert set(checkpoint.side_files) == {
        "config.json", "tokenizer.json", "README.md", "modeling_x.py", "sub/template.jinja",
    }  # fmt: skip
    assert set(ignored(tmp_path)) == {
        "model.gguf",
        "onnx/model.onnx",
        "onnx/config.json",
        "flax_model.msgpack",
    }


def test_a_single_file_takes_only_well_known_neighbours_along(tmp_path: Path) -> None:
    put(A, tmp_path / "step.ckpt")
    put(B, tmp_path / "other.ckpt")
    for name in ("config.json", "notes.txt", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
    checkpoint = readers.open_checkpoint(tmp_path / "step.ckpt")
    assert checkpoint.side_files == ("config.json", "tokenizer.model")
    assert list(checkpoint) == ["a"]


def test_a_directory_with_one_loose_torch_file(tmp_path: Path) -> None:
    put({"state_dict": A}, tmp_path / "last.ckpt")
    (tmp_path / "notes.pt").write_text("no weights")
    assert list(readers.open_checkpoint(tmp_path)) == ["a"]
    put(B, tmp_path / "first.ckpt")
    assert "several weight files" in failure(tmp_path)


def test_unrelated_weights_are_not_guessed_between(tmp_path: Path) -> None:
    put(A, tmp_path / "one.safetensors")
    put(B, tmp_path / "two.safetensors")
    message = failure(tmp_path)
    assert "one.safetensors, two.safetensors" in message
    assert "give the file itself" in message


def test_a_file_is_what_it_holds_whatever_it_is_called(tmp_path: Path) -> None:
    put(A, tmp_path / "model.safetensors")
    os.rename(tmp_path / "model.safetensors", tmp_path / "model.bin")
    assert readers.open_checkpoint(tmp_path / "model.bin").format == "safetensors"
    torch.save(B, tmp_path / "x.safetensors")
    assert readers.open_checkpoint(tmp_path / "x.safetensors").format == "torch zip"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(64), "gzip"),
        (b"\x93NUMPY\x01\0" + bytes(64), "NumPy"),
        (bytes(100), "not a weight file of a known format"),
        (b"plain text, nothing more", "not a weight file of a known format"),
    ],
)
def test_strangers_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert message in failure(tmp_path / "model.safetensors")
    assert message in failure(tmp_path)


def test_places_without_weights(tmp_path: Path) -> None:
    assert "no such file" in failure(tmp_path / "absent")
    assert "no weights" in failure(tmp_path)
    (tmp_path / "latest").write_text("global_step5")
    assert "DeepSpeed" in failure(tmp_path)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert "no weights" in failure(tmp_path / "pipe")


def test_a_pipeline_is_all_its_components(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "X"}')
    put(A, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    put(A, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    put(B, tmp_path / "text_encoder" / "pytorch_model.bin")
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 8}')
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")

    checkpoint = readers.open_checkpoint(tmp_path)

    assert list(checkpoint) == ["text_encoder/b", "unet/a"]
    assert [each.stem for each in checkpoint.components] == ["model", "diffusion_pytorch_model"]
    assert checkpoint.components[1].config == {"sample_size": 8}
    assert set(checkpoint.side_files) == {
        "model_index.json", "unet/config.json", "scheduler/scheduler_config.json",
    }  # fmt: skip
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in ignored(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"")
    message = failure(tmp_path)
    assert "unet" in message and "text_encoder" in message


@pytest.mark.parametrize("depth", [199, 201, 1000])
def test_a_config_that_could_not_be_written_again_is_refused(tmp_path: Path, depth: int) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
    if depth < 200:
        streamconv.plan(tmp_path)
        return
    with pytest.raises(
        CheckpointError, match=r"config.json: cannot be read as JSON: it is more than 200 levels deep"
    ):
        streamconv.plan(tmp_path)


@pytest.mark.parametrize("stop", [0, 3, 1 << 40, 10**300])
@pytest.mark.parametrize("first", [0, 1])
def test_numbers_that_are_missing_are_only_counted(stop: int, first: int) -> None:
    missing = Missing({0, 2, 10**6}, stop, first)
    if stop < 4:
        assert list(missing) == [number for number in range(first, stop) if number == 1]
        assert len(missing) == len(list(missing))
    else:
        assert len(missing) == min(stop, 1 << 62) - first - (2 if first else 3)
        assert listed(missing, 2) == f"1, 3 and {len(missing) - 2:,} more"


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("model-00001-of-999999999.safetensors", ()),
        (f"shard-{'9' * 100}-model-00001-of-00001.safetensors", ("shard-00001-model-00001-of-00001.safetensors",)),
        (f"model_world_size_{'9' * 100}_rank_0.pt", ()),
        (f"pytorch_model_fsdp_0_rank{'9' * 100}.bin", ("pytorch_model_fsdp_0_rank0.bin",)),
        (f"consolidated.{'9' * 100}.pth", ("consolidated.00.pth",)),
        (f"zero_pp_rank_{'9' * 100}_mp_rank_00_optim_states.pt", ("mp_rank_00_model_states.pt",)),
        (f"mp_rank_{'9' * 100}_model_states.pt", ("zero_pp_rank_0_mp_rank_00_optim_states.pt",)),
        (f"1/mp_rank_{'9' * 100}_model_states.pt", ("1/mp_rank_00_model_states.pt", "latest")),
        (f"rank_{'9' * 100}/net.safetensors", ("rank_0/net.safetensors",)),
        (f"layer_{'9' * 100}-model_states.pt", ("mp_rank_00_model_states.pt",)),
        (f"layer_0_expert_{'9' * 100}_mp_rank_00_model_states.pt", ("mp_rank_00_model_states.pt",)),
        (f"model-{1:07d}-{9999999:07d}.safetensors", ("metadata.json",)),
    ],
)  # fmt: skip
def test_a_number_in_a_name_makes_no_list(name: str, beside: tuple[str, ...], tmp_path: Path) -> None:
    for each in (name, *beside):
        path = tmp_path / each
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"w": torch.ones(2)}, path)
        elif path.suffix:
            torch.save({"module": {"w": torch.ones(2)}, "w": torch.ones(2)}, path)
        else:
            path.write_text("1")
    tracemalloc.start()
    try:
        with contextlib.suppress(StreamconvError):
            streamconv.plan(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "said", [{"architectures": 1}, {"architectures": "Llama"}, {"architectures": [1]}, {"model_type": ["llama"]},
             {"model_type": 3}, {"_class_name": {}}],
    ids=str,
)  # fmt: skip
def test_a_config_says_by_names_which_model_it_is(said: dict[str, object], tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1, **said}))
    (key,) = said
    with pytest.raises(CheckpointError, match=rf"config.json: '{key}' is .*, not a (list of )?names?"):
        streamconv.plan(tmp_path)
