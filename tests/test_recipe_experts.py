"""Experts apart and packed: both layouts are what transformers 5 writes, byte for byte, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from recipe_contract import RecipeContract, contents, load, shapes_of

import streamconv
from streamconv import dtypes
from streamconv.plans import named
from streamconv.plans.application import _direction
from streamconv.plans.mapping import map_tensors
from streamconv.tensor import Extent, Stored, TensorSpec

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    **TINY, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, Any]] = {
    "Mixtral": ("mixtral-packed", hf.MixtralConfig(**TINY, num_local_experts=4)),
    "Qwen2-MoE": (
        "qwen2moe-packed",
        hf.Qwen2MoeConfig(
            **TINY, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, decoder_sparse_step=1,
            mlp_only_layers=[1],
        ),
    ),
    "Qwen2-MoE tied, every second layer": (
        "qwen2moe-packed",
        hf.Qwen2MoeConfig(
            **TINY, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, decoder_sparse_step=2,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3-MoE": (
        "qwen3moe-packed", hf.Qwen3MoeConfig(**TINY, head_dim=16, num_experts=11, moe_intermediate_size=16)
    ),
    "DeepSeek-V2-Lite": ("deepseek-v2-packed", hf.DeepseekV2Config(**LATENT, q_lora_rank=None, n_group=1, topk_group=1)),
    "DeepSeek-V2": ("deepseek-v2-packed", hf.DeepseekV2Config(**LATENT, q_lora_rank=16, n_group=1, topk_group=1)),
    "DeepSeek-V3": ("deepseek-v3-packed", hf.DeepseekV3Config(**LATENT, q_lora_rank=16, n_group=2, topk_group=1)),
}  # fmt: skip


def saved(name: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path, Path]:
    """A random model, and how transformers writes it in both layouts."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MODELS[name][1]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.8 if parameter.ndim == 1 else 0))
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "packed", save_original_format=False)
    return model, tmp_path / "apart", tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_both_layouts_are_those_of_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = MODELS[name][0]
    _, apart, packed = saved(name, tmp_path, dtype)
    streamconv.convert(apart, tmp_path / "to-packed", to_arch="packed", engine="inline")
    assert contents(tmp_path / "to-packed") == contents(packed)
    streamconv.convert(packed, tmp_path / "to-apart", recipe=recipe, reverse=True, engine="inline")
    assert contents(tmp_path / "to-apart") == contents(apart)
    ids = torch.arange(20)[None]
    expected = load(apart)(ids).logits
    for made in ("to-packed", "to-apart"):
        assert torch.equal(load(tmp_path / made)(ids).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_experts_move_by_kernel_copy(name: str, tmp_path: Path) -> None:
    _, apart, _ = saved(name, tmp_path)
    plan = streamconv.plan(apart, to_arch="packed")
    assert {tensor.exactness.label for tensor in plan.tensors} == {"bit-exact"}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_model(name: str, tmp_path: Path) -> None:
    _, _, packed = saved(name, tmp_path)
    target = named(MODELS[name][0]).target
    assert target is not None
    table = target.tensors(target.sizes_of(json.loads((packed / "config.json").read_text())))
    real = shapes_of(packed)
    assert {key: each.shape for key, each in table.items() if key in real} == real
    assert {key for key, each in table.items() if not each.optional} <= set(real)


class TestMixtral(RecipeContract):
    recipe = "mixtral-packed"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved("Mixtral", tmp_path)[1]


class TestDeepseek3(RecipeContract):
    recipe = "deepseek-v3-packed"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved("DeepSeek-V3", tmp_path)[1]


def test_the_layer_that_predicts_further_tokens_is_dropped(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, apart, packed = saved("DeepSeek-V3", tmp_path)
    state = load_file(apart / "model.safetensors")
    for name in [name for name in state if name.startswith("model.layers.2.")]:
        state[name.replace("layers.2", "layers.3")] = state[name].clone()
    state["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(state, apart / "model.safetensors", {"format": "pt"})
    plan = streamconv.plan(apart, to_arch="packed")
    assert {dropped.name for dropped in plan.dropped} == {name for name in state if ".3." in name[:16]}
    assert {tensor.spec.name for tensor in plan.tensors} == set(contents(packed))


def test_sixty_layers_of_experts_are_mapped_at_once() -> None:
    """DeepSeek-V3 in full: some 45,000 tensors, without a file."""
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "vocab_size": 129280, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
    }  # fmt: skip
    recipe = named("deepseek-v3-packed")
    assert recipe.source is not None
    tensors: dict[str, Any] = {}
    for name, declared in recipe.source.tensors(recipe.source.sizes_of(config)).items():
        spec = TensorSpec(name, dtypes.by_name("BF16"), declared.shape)
        tensors[name] = Stored(spec, (Extent("/nowhere", 0, spec.nbytes),))
    assert len(tensors) > 45_000
    mapped = map_tensors(tensors, _direction(recipe, config, None, reverse=False))
    assert not mapped.problems
    assert not mapped.leftover
    assert len(mapped.targets) < 1_300
