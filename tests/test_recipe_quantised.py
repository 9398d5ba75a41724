"""Dequantising and quantising, by name endings, held against transformers' own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_alike, terms_of
from recipe_contract import contents, load
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamconv
from streamconv.errors import PlanError


def blocks_of(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition: every element times the scale of its 128 x 128 block, edges short."""
    rows = torch.arange(weight.shape[0]) // 128
    columns = torch.arange(weight.shape[1]) // 128
    return (weight.float() * scale.float()[rows][:, columns]).to(torch.bfloat16)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A DeepSeek-shaped checkpoint whose weights and scales lie in different shards."""
    torch.manual_seed(0)
    weights, scales = {}, {}
    for name, (rows, columns) in {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 256),
        "model.layers.0.self_attn.o_proj.weight": (128, 384),
        "model.layers.0.mlp.experts.3.down_proj.weight": (200, 130),
    }.items():
        weights[name] = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scales[name + "_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.01
    weights["model.norm.weight"] = torch.randn(64).to(torch.bfloat16)
    scales["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.randn(8)
    source = tmp_path / "source"
    source.mkdir()
    save_file(weights, source / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(scales, source / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    index |= dict.fromkeys(scales, "model-00002-of-00002.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (source / "config.json").write_text(json.dumps(config))
    return source


def everything(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def test_fp8_to_bf16(fp8: Path, tmp_path: Path) -> None:
    streamconv.convert(fp8, tmp_path / "out", recipe="fp8-bf16", memory_budget="32MiB")
    before, after = everything(fp8), everything(tmp_path / "out")
    assert not any("scale_inv" in name for name in after)
    for name, tensor in after.items():
        scale = before.get(name + "_scale_inv")
        wanted = before[name] if scale is None else blocks_of(before[name], scale)
        assert torch.equal(tensor, wanted), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
    }
    plan = streamconv.plan(fp8, recipe="auto")
    assert any("recipe dequantise" in note for note in plan.notes)
    sources = {tensor.spec.name: tensor.sources for tensor in plan.tensors}
    assert sources["model.layers.0.self_attn.o_proj.weight"] == (
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.o_proj.weight_scale_inv",
    )


def test_a_scale_of_the_wrong_shape_is_a_plan_error(fp8: Path) -> None:
    file = fp8 / "model-00002-of-00002.safetensors"
    scales = load_file(file)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    scales[name] = scales[name][:4].clone()
    save_file(scales, file, {"format": "pt"})
    with pytest.raises(PlanError, match=r"\[5, 2\]"):
        streamconv.plan(fp8, recipe="fp8-bf16")


def test_bf16_to_fp8_and_back_stays_close(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(300, 200).to(torch.bfloat16),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(300).to(torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.randn(200).to(torch.bfloat16),
        "lm_head.weight": torch.randn(64, 200).to(torch.bfloat16),
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    streamconv.convert(source, tmp_path / "fp8", recipe="bf16-fp8", memory_budget="32MiB")
    made = everything(tmp_path / "fp8")
    weight, scale = (made["model.layers.0.self_attn.q_proj.weight" + end] for end in ("", "_scale_inv"))
    assert weight.dtype == torch.float8_e4m3fn
    assert scale.shape == (3, 2)
    padded = torch.nn.functional.pad(
        tensors["model.layers.0.self_attn.q_proj.weight"].float(), (0, 56, 0, 84)
    )
    largest = padded.reshape(3, 128, 2, 128).abs().amax((1, 3))
    assert torch.equal(scale, largest / 448)
    for name in ("lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(made[name], tensors[name])

    streamconv.convert(tmp_path / "fp8", tmp_path / "back", recipe="fp8-bf16", memory_budget="32MiB")
    back = everything(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(back[name].float(), tensor.float(), rtol=1 / 16, atol=0.02), name


@pytest.fixture
def gpt_oss(tmp_path: Path) -> tuple[Path, GptOssForCausalLM]:
    """A tiny gpt-oss with random MXFP4 experts, and the model that its dequantised weights make."""
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=96, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    model = GptOssForCausalLM(config).to(torch.bfloat16).eval()
    state = dict(model.state_dict())
    for name, tensor in list(state.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, into, out = tensor.shape
            blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, out, into // 32), dtype=torch.uint8)
            del state[name]
            state |= {name + "_blocks": blocks, name + "_scales": scales}
            model.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        elif "bias" in name or "sinks" in name:
            state[name] = torch.randn_like(tensor)
            model.get_parameter(name).data = state[name]
    source = tmp_path / "source"
    source.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    document = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (source / "config.json").write_text(json.dumps(document, default=str))
    return source, model


def test_mxfp4_to_bf16_is_what_transformers_makes_of_it(
    gpt_oss: tuple[Path, GptOssForCausalLM], tmp_path: Path
) -> None:
    source, model = gpt_oss
    streamconv.convert(source, tmp_path / "out", recipe="mxfp4-bf16", memory_budget="32MiB")
    found = everything(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    ids = torch.arange(24)[None] % 96
    model.save_pretrained(tmp_path / "theirs")
    before, after = (load(tmp_path / each).float() for each in ("theirs", "out"))
    assert_alike(after(ids).logits, before(ids).logits, terms_of(before))
    plan = streamconv.plan(source, recipe="mxfp4-bf16")
    labels = {tensor.exactness.label for tensor in plan.tensors}
    assert labels == {"bit-exact", "value-exact"}


def test_small_blocks_change_no_byte(gpt_oss: tuple[Path, GptOssForCausalLM], tmp_path: Path) -> None:
    source, _ = gpt_oss
    streamconv.convert(source, tmp_path / "one", recipe="mxfp4-bf16", engine="inline")
    streamconv.convert(source, tmp_path / "two", recipe="mxfp4-bf16", memory_budget="16MiB", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
