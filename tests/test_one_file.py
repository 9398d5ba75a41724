"""A destination that ends as weight files do is that one file: alone, verified, resumed, and nothing beside it touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore
import numpy
import pytest
import torch
from reference_models import whisper_openai
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from watched import Failing, watching

import streamconv
from streamconv import cli
from streamconv.errors import DestinationError, StreamconvError, UsageError
from streamconv.storage.location import locate

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, sharded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    directory = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="30KB")
    assert (directory / "model.safetensors.index.json").is_file()
    return directory


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


def files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def assert_holds(found: dict[str, torch.Tensor], model: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(model).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def load_mindspore(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(value.asnumpy())
        for name, value in mindspore.load_checkpoint(str(path)).items()
    }


@pytest.mark.parametrize(
    ("name", "words", "load"),
    [
        ("m.safetensors", (), load_file),
        ("m.fp16.safetensors", (), load_file),
        ("m.bin", (), load_torch),
        ("m.pt", (), load_torch),
        ("m.pth", ("--max-shard", "1GB"), load_torch),
        ("m.ckpt", (), load_torch),
        ("m.ckpt", ("--to", "torch"), load_torch),
        ("m.ckpt", ("--to", "mindspore"), load_mindspore),
    ],
)
def test_the_suffix_says_the_format(
    name: str,
    words: tuple[str, ...],
    load: Callable[[Path], dict[str, Any]],
    model: Path,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    out = tmp_path / "new" / name
    assert call("plan", model, out, *words) == 0
    assert not out.parent.exists()
    assert call(model, out, *words, "--verify") == 0
    assert_holds(load(out), model)
    assert set(files(out.parent)) == {name, f".streamconv/{name}/conversion.json"}
    assert call("verify", model, out) == 0
    assert call("inspect", out) == 0
    assert call("diff", model, out) == 0
    capsys.readouterr()
    assert call(model, out, *words) == 0
    assert "already converted" in capsys.readouterr().out


def test_what_the_naming_says_decides_among_formats(model: Path, tmp_path: Path) -> None:
    plan = streamconv.plan(model, tmp_path / "m.ckpt", to_arch="mindformers")
    assert plan.target_format == "mindspore"
    plan = streamconv.plan(model, tmp_path / "m.ckpt")
    assert plan.target_format == "torch"
    assert any("--to mindspore makes another kind" in note for note in plan.notes)


def test_transformers_loads_it_beside_a_config_that_was_there(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.safetensors").write_bytes(b"theirs")
    before = files(tmp_path)
    assert call(model, tmp_path / "model.safetensors", "--quiet") == 0
    assert before.items() <= files(tmp_path).items()
    (tmp_path / "other.safetensors").unlink()
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_holds(loaded.state_dict(), model)


def test_a_file_lies_beside_the_file_that_it_comes_from(model: Path, tmp_path: Path) -> None:
    assert call(model, tmp_path / "a.bin", "--quiet") == 0
    before = files(tmp_path)
    assert call(tmp_path / "a.bin", tmp_path / "a.safetensors", "--quiet") == 0
    assert before.items() <= files(tmp_path).items()
    assert_holds(load_file(tmp_path / "a.safetensors"), model)
    assert call(tmp_path / "a.bin", tmp_path / "a.bin", "--overwrite", "--quiet") == 2
    assert call(model, model / "one.safetensors", "--quiet") == 2
    assert not (model / "one.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("m.safetensors", ("--to", "torch"), "--to torch contradicts the destination"),
        ("m.bin", ("--to", "safetensors"), "--to safetensors contradicts the destination"),
        ("m.pt", ("--to", "mindspore"), "--to mindspore contradicts the destination"),
        ("m.bin", ("--to", "zip"), "'zip' is not a known format"),
        ("m.gguf", (), "files that end in .gguf cannot be written"),
        ("m.h5", (), "files that end in .h5 cannot be written"),
        ("model.safetensors.index.json", (), "files that end in .json cannot be written"),
        ("model-00001-of-00002.safetensors", (), "the name of one shard of several"),
        (
            "m.safetensors",
            ("--max-shard", "30KB"),
            "--max-shard 30KB makes 4 files, and the destination is one",
        ),
        ("m.ckpt", ("--to-arch", "mindformers", "--tp", "2"), "a file for each of 2 ranks"),
        ("m.pth", ("--to-arch", "meta"), "such a checkpoint is not one file: params.json goes with it"),
    ],
)
def test_what_is_not_one_file_is_refused(
    name: str, words: tuple[str, ...], said: str, model: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert call(model, tmp_path / name, *words) == 2
    assert said in capsys.readouterr().err
    assert not files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_component_of_a_pipeline_is_one_file(tmp_path: Path, capsys: Captured) -> None:
    pipeline = tmp_path / "pipeline"
    parts = {name: {f"{name}.w": torch.randn(4, 4)} for name in ("unet", "vae")}
    for name, tensors in parts.items():
        (pipeline / name).mkdir(parents=True)
        save_file(tensors, pipeline / name / "diffusion_pytorch_model.safetensors")
        (pipeline / name / "config.json").write_text('{"_class_name": "X"}')
    index = {"_class_name": "P", **{name: ["diffusers", "X"] for name in parts}}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    assert call(pipeline, tmp_path / "all.safetensors") == 2
    assert "there is a file for each of unet, vae, and the destination is one file" in capsys.readouterr().err
    assert call(pipeline, tmp_path / "vae.safetensors", "--only", "vae/*", "--verify", "--quiet") == 0
    assert torch.equal(load_file(tmp_path / "vae.safetensors")["vae.w"], parts["vae"]["vae.w"])


def test_what_is_around_the_tensors_comes_along(tmp_path: Path) -> None:
    whisper_openai.write(tmp_path / "tiny.pt", whisper_openai.TINY, seed=0)
    assert call(tmp_path / "tiny.pt", tmp_path / "hf", "--to-arch", "whisper", "--quiet") == 0
    assert call(tmp_path / "hf", tmp_path / "back.pt", "--to-arch", "openai-whisper", "--quiet") == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("tiny.pt", "back.pt"))
    assert after["dims"] == before["dims"]
    assert all(
        torch.equal(after["model_state_dict"][name], tensor)
        for name, tensor in before["model_state_dict"].items()
    )


@pytest.mark.parametrize("method", ["create", "write", "copy_from", "sync", "publish", "remove"])
def test_a_killed_run_goes_on_and_leaves_its_neighbours_alone(
    method: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    streamconv.convert(model, tmp_path / "whole" / "m.safetensors", dtype="BF16", engine="inline")
    out = tmp_path / "out" / "m.safetensors"
    out.parent.mkdir()
    (out.parent / "neighbour.safetensors").write_bytes(b"mine")
    interrupted = 0
    for skipped in range(12):
        try:
            with watching(Failing(method, KeyboardInterrupt(), skipped)):
                streamconv.convert(model, out, dtype="BF16", engine="inline")
        except KeyboardInterrupt:
            interrupted += 1
            if out.exists():
                assert out.read_bytes() == (tmp_path / "whole" / "m.safetensors").read_bytes()
    streamconv.convert(model, out, dtype="BF16", engine="inline")
    found = files(out.parent)
    assert interrupted or method == "copy_from"
    assert found.pop("neighbour.safetensors") == b"mine"
    assert found == files(tmp_path / "whole")


def test_an_unfinished_run_is_resumed_or_thrown_away(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with watching(Failing("publish", KeyboardInterrupt(), 1)), pytest.raises(KeyboardInterrupt):
        streamconv.convert(model, out, dtype="BF16", engine="inline")
    with pytest.raises(DestinationError, match="the destination holds an unfinished conversion"):
        streamconv.convert(model, out, engine="inline")
    streamconv.convert(model, out, engine="inline", restart=True)
    assert_holds(load_file(out), model)


def test_what_stands_there_is_replaced_only_where_that_is_asked_for(
    model: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    assert call(model, out, "--quiet") == 2
    assert "a file is there (--overwrite" in capsys.readouterr().err
    assert files(tmp_path) == {"m.safetensors": b"precious"}
    assert call(model, out, "--quiet", "--overwrite") == 0
    assert call(model, out, "--quiet", "--dtype", "BF16") == 2
    assert call(model, out, "--quiet", "--dtype", "BF16", "--overwrite") == 0
    assert load_file(out)["model.norm.weight"].dtype == torch.bfloat16
    out.unlink()  # only its record is left, which says nothing
    assert call(model, out, "--quiet") == 0
    assert call("verify", model, out, "--quiet") == 0
    out.with_suffix(".safetensors.partial").write_bytes(b"mine")
    out.unlink()
    shutil.rmtree(tmp_path / ".streamconv")
    assert call(model, out, "--quiet") == 2


def test_verify_finds_what_was_changed(model: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "m.pt"
    assert call("verify", model, out) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert call(model, out, "--quiet") == 0
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    assert call("verify", model, out) == 1
    assert "m.pt: " in capsys.readouterr().err


def test_directories_may_be_called_like_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    assert call(model, tmp_path / "a.bin", "--quiet") == 0
    assert call(model, f"{tmp_path}/b.bin/", "--quiet") == 0
    for name in ("a.bin", "b.bin"):
        assert (tmp_path / name / "config.json").is_file()
        assert call("verify", model, tmp_path / name, "--quiet") == 0


def test_a_plan_is_for_the_destination_that_it_was_made_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(UsageError, match="not one of this file alone"):
        streamconv.convert(streamconv.plan(model), out)
    plan = streamconv.plan(model, out)
    with pytest.raises(UsageError, match="not one of this file alone"):
        streamconv.convert(plan, tmp_path / "n.safetensors")
    streamconv.convert(plan, out, engine="inline")
    assert not streamconv.verify(plan, out).problems
    with pytest.raises(StreamconvError):
        streamconv.verify(streamconv.plan(model), out)
    assert numpy.array_equal(
        streamconv.open(out)["model.norm.weight"].numpy(), streamconv.open(model)["model.norm.weight"].numpy()
    )
    assert locate(out).is_file()
