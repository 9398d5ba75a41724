"""The main job, end to end, on what the real libraries write, loaded by the real libraries."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from comparing import assert_alike, terms_of
from safetensors.torch import load_file, save_file

import streamconv

SOURCES = ("safetensors", "torch zip", "torch legacy")
TARGETS = ("safetensors", "torch")
INPUT = torch.arange(24).reshape(2, 12) % 96


def tiny_llama(*, tied: bool, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    return new_llama(config)


def new_llama(config: transformers.LlamaConfig) -> transformers.LlamaForCausalLM:
    """A random model. Not by `.to(dtype)`, which casts the rotary frequencies too; loading does not."""
    return transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()


def assert_same_logits(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    with torch.no_grad():
        logits = [model.float()(INPUT).logits for model in (found, expected)]
    assert_alike(*logits, terms_of(expected))


def save_as(model: transformers.LlamaForCausalLM, form: str, directory: Path, shard_size: str) -> None:
    """A model directory as people have them; the torch forms are the plain state dict, ties and all."""
    if form == "safetensors":
        model.save_pretrained(directory, max_shard_size=shard_size)
        return
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    state = model.state_dict()
    legacy = form == "torch legacy"
    names = list(state)
    # Tied names stay in one file, as every writer keeps them.
    parts = [names] if shard_size == "5GB" else [names[1:-1], [names[0], names[-1]]]
    files = [f"pytorch_model-{i + 1:05d}-of-{len(parts):05d}.bin" for i in range(len(parts))]
    files = ["pytorch_model.bin"] if len(parts) == 1 else files
    for file, part in zip(files, parts, strict=True):
        shard = {name: state[name] for name in part}
        torch.save(shard, directory / file, _use_new_zipfile_serialization=not legacy)
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def load_strictly(directory: Path) -> transformers.LlamaForCausalLM:
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize(
    ("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["untied F32", "tied BF16"]
)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(SOURCES, TARGETS)))
def test_llama_gives_the_same_logits(
    tmp_path: Path, source: str, target: str, tied: bool, dtype: torch.dtype, shard_size: str
) -> None:
    model = tiny_llama(tied=tied, dtype=dtype)
    (tmp_path / "source").mkdir()
    save_as(model, source, tmp_path / "source", shard_size)

    streamconv.convert(tmp_path / "source", tmp_path / "target", to=target, max_shard=shard_size, workers=1)

    assert not streamconv.verify(tmp_path / "source", tmp_path / "target").problems
    again = (
        load_strictly(tmp_path / "target")
        if target == "safetensors"
        else load_bins(tmp_path / "target", model)
    )
    assert_same_logits(again, model)
    assert (shard_size != "5GB") == bool(list((tmp_path / "target").glob("*.index.json")))


def load_bins(directory: Path, like: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """Every `.bin` file through torch's safe loader, into the model, strictly."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.bin")):
        state |= torch.load(path, weights_only=True, mmap=True)
    again = new_llama(like.config)
    # A tied model's own state dict may come without the tied name.
    names = set(again.state_dict())
    tied_names = {"lm_head.weight"} if like.config.tie_word_embeddings else set()
    assert names - tied_names <= set(state) <= names
    again.load_state_dict(state, strict=not tied_names)
    return again


@pytest.mark.parametrize("tied", ["keep", "drop"])
def test_tied_names_are_written_as_asked(tmp_path: Path, tied: str) -> None:
    model = tiny_llama(tied=True, dtype=torch.float32)
    (tmp_path / "source").mkdir()
    save_as(model, "torch zip", tmp_path / "source", "5GB")

    streamconv.convert(tmp_path / "source", tmp_path / "target", tied=tied)

    names = set(load_file(tmp_path / "target" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (tied == "keep")
    assert_same_logits(load_strictly(tmp_path / "target"), model)


def test_torch_output_keeps_tied_tensors_tied(tmp_path: Path) -> None:
    model = tiny_llama(tied=True, dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    streamconv.convert(tmp_path / "model.pt", tmp_path / "target", to="torch")

    state = torch.load(tmp_path / "target" / "pytorch_model.bin", weights_only=True)
    embedding, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    assert embedding.untyped_storage().data_ptr() == head.untyped_storage().data_ptr()


def test_cast_is_torchs_cast_and_the_config_says_so(tmp_path: Path) -> None:
    model = tiny_llama(tied=False, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")

    streamconv.convert(tmp_path / "source", tmp_path / "target", dtype=["BF16", "*norm*=F32"])

    state = load_file(tmp_path / "target" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        wanted = tensor if "norm" in name else tensor.to(torch.bfloat16)
        assert state[name].dtype == wanted.dtype
        assert torch.equal(state[name], wanted)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_strictly(tmp_path / "target").dtype == torch.bfloat16


@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_checkpoint_under_a_key_with_odd_tensors(tmp_path: Path, workers: int) -> None:
    base = torch.arange(240, dtype=torch.float32).reshape(12, 20)
    state = {
        "whole": base,
        "transposed": base.T,
        "column": base[:, 3],
        "window": base[2:7, 4:9],
        "every other": base[::2, ::3],
        "expanded": torch.tensor([1.5, 2.5]).expand(4, 2),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(base[3].clone()),
        "half": base.to(torch.float16),
        "eight": base.to(torch.float8_e4m3fn),
        "complex": torch.complex(base, -base),
        "flags": base > 100,
        "counts": torch.arange(5),
    }
    torch.save({"step": 7, "model": {"module": state}, "optimizer": {"lr": 0.1}}, tmp_path / "it.pt")

    streamconv.convert(tmp_path / "it.pt", tmp_path / "target", workers=workers)

    written = load_file(tmp_path / "target" / "model.safetensors")
    assert set(written) == set(state)
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype, name
        assert written[name].shape == tensor.shape, name
        assert raw(written[name]) == raw(tensor), name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_diffusers_pipeline_loads_and_gives_the_same_images(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=20))
    pipeline.save_pretrained(tmp_path / "source", max_shard_size="100KB")

    streamconv.convert(tmp_path / "source", tmp_path / "target", max_shard="200KB", dtype="F32")

    again = DDPMPipeline.from_pretrained(tmp_path / "target", local_files_only=True)
    images = [
        torch.from_numpy(
            each(num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np").images
        )
        for each in (pipeline, again)
    ]
    # Each step runs the whole model on what the one before it left.
    assert_alike(images[1], images[0], 2 * terms_of(unet))
    state = again.unet.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in unet.state_dict().items())
    written = {path.name for path in (tmp_path / "target" / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.json" in written
    assert (tmp_path / "target" / "model_index.json").is_file()
    assert (tmp_path / "target" / "scheduler" / "scheduler_config.json").is_file()


def test_names_files_and_index_are_those_of_hugging_face(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    torch.manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(int(torch.randint(1, 90, ())), 16) for i in range(40)}
    save_file(state, tmp_path / "model.safetensors")
    # The library walks the state dict in its own order; a file's order is by dtype and name.
    ordered = load_file(tmp_path / "model.safetensors")
    ordered = {name: ordered[name] for name in sorted(ordered)}
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(ordered, tmp_path / "theirs", max_shard_size="9KB")

    streamconv.convert(tmp_path / "model.safetensors", tmp_path / "ours", max_shard="9KB")

    ours = {path.name for path in (tmp_path / "ours").iterdir() if path.is_file()}
    assert ours == set(os.listdir(tmp_path / "theirs"))
    for name in ours:
        a, b = (tmp_path / "ours" / name).read_bytes(), (tmp_path / "theirs" / name).read_bytes()
        if name.endswith(".json"):
            assert json.loads(a) == json.loads(b)
        else:
            assert a == b, name


def test_no_conversion_imports_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.save({"a": torch.randn(3, 3).T}, tmp_path / "m.pt")
    program = (
        "import sys, streamconv\n"
        f"streamconv.convert({str(tmp_path / 'm.pt')!r}, {str(tmp_path / 'out')!r}, dtype='BF16', to='torch')\n"
        f"assert not streamconv.verify({str(tmp_path / 'm.pt')!r}, {str(tmp_path / 'out')!r}).problems\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_lazy_tensors_read_what_is_asked_for(tmp_path: Path) -> None:
    state = {"a": torch.randn(50, 7), "b": torch.randn(6, 4).T, "c": torch.randn(3).to(torch.bfloat16)}
    torch.save(state, tmp_path / "m.pt")

    checkpoint = streamconv.open(tmp_path / "m.pt")

    assert list(checkpoint) == list(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint[name].torch(), tensor)
        assert torch.equal(torch.tensor(checkpoint[name][1:3].astype("float32")), tensor[1:3].float())
    assert checkpoint["a"][10:10].shape == (0, 7)
