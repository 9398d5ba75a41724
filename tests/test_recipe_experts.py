"""Experts apart and packed: both layouts are what transformers 5 writes, byte for byte, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from recipe_contract import RecipeContract, contents, load, shapes_of
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.errors import PlanError
from streamconv.plans import named

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2 = {**TINY, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
QWEN3 = {**TINY, "head_dim": 16, "moe_intermediate_size": 16}
LATENT = {
    **TINY, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
ONE_GROUP = {**LATENT, "n_group": 1, "topk_group": 1}
MODELS: dict[str, tuple[str, Any]] = {
    "Mixtral": ("mixtral-packed", hf.MixtralConfig(**TINY, num_local_experts=4)),
    "Mixtral tied, wide heads": (
        "mixtral-packed", hf.MixtralConfig(**TINY, num_local_experts=3, head_dim=16, tie_word_embeddings=True)
    ),
    "Qwen2-MoE": ("qwen2moe-packed", hf.Qwen2MoeConfig(**QWEN2, decoder_sparse_step=1, mlp_only_layers=[1])),
    "Qwen2-MoE tied, every second layer, without bias": (
        "qwen2moe-packed",
        hf.Qwen2MoeConfig(**QWEN2, decoder_sparse_step=2, tie_word_embeddings=True, qkv_bias=False),
    ),
    "Qwen3-MoE": ("qwen3moe-packed", hf.Qwen3MoeConfig(**QWEN3, num_experts=11)),
    "Qwen3-MoE biased, one layer dense": (
        "qwen3moe-packed", hf.Qwen3MoeConfig(**QWEN3, num_experts=4, attention_bias=True, mlp_only_layers=[0])
    ),
    "OLMoE": ("olmoe-packed", hf.OlmoeConfig(**TINY, num_experts=4)),
    "OLMoE biased": ("olmoe-packed", hf.OlmoeConfig(**TINY, num_experts=4, attention_bias=True, clip_qkv=0.5)),
    "DeepSeek-V2-Lite": ("deepseek-v2-packed", hf.DeepseekV2Config(**ONE_GROUP, q_lora_rank=None)),
    "DeepSeek-V2": ("deepseek-v2-packed", hf.DeepseekV2Config(**ONE_GROUP, q_lora_rank=16)),
    "DeepSeek-V2 biased": (
        "deepseek-v2-packed",
        hf.DeepseekV2Config(**ONE_GROUP | {"n_shared_experts": 2}, q_lora_rank=16, attention_bias=True, mlp_bias=True),
    ),
    "DeepSeek-V3": ("deepseek-v3-packed", hf.DeepseekV3Config(**LATENT, q_lora_rank=16, n_group=2, topk_group=1)),
    "DeepSeek-V3 biased, no low rank": (
        "deepseek-v3-packed",
        hf.DeepseekV3Config(**LATENT, q_lora_rank=None, n_group=2, topk_group=1, attention_bias=True),
    ),
}  # fmt: skip


def saved(name: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path, Path]:
    """A random model, and how transformers writes it in both layouts."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MODELS[name][1]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.8 if parameter.ndim == 1 else 0))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.data = torch.randn_like(buffer, dtype=torch.float32)  # F32 whatever the rest is
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "packed", save_original_format=False)
    return model, tmp_path / "apart", tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_both_layouts_are_those_of_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, apart, packed = saved(name, tmp_path, dtype)
    assert contents(apart).keys() != contents(packed).keys()
    streamconv.convert(apart, tmp_path / "to-packed", to_arch="packed", engine="inline")
    assert contents(tmp_path / "to-packed") == contents(packed)
    streamconv.convert(packed, tmp_path / "to-apart", to_arch="experts-apart", engine="inline")
    assert contents(tmp_path / "to-apart") == contents(apart)
    for made in ("to-packed", "to-apart"):
        assert (tmp_path / made / "config.json").read_text() == (apart / "config.json").read_text()
    if dtype == torch.float32:
        ids = torch.arange(20)[None]
        original = load(apart)
        expected = original(ids).logits
        for made in ("to-packed", "to-apart"):
            assert_alike(load(tmp_path / made)(ids).logits, expected, terms_of(original))


def test_experts_move_unchanged_and_it_is_said_who_reads_them(tmp_path: Path) -> None:
    _, apart, _ = saved("DeepSeek-V3", tmp_path)
    plan = streamconv.plan(apart, to_arch="packed")
    assert {tensor.exactness.label for tensor in plan.tensors} == {"bit-exact"}
    assert any("transformers 5 reads packed experts" in note for note in plan.notes)


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_are_the_model(name: str, tmp_path: Path) -> None:
    _, apart, packed = saved(name, tmp_path)
    recipe = named(MODELS[name][0])
    config = json.loads((packed / "config.json").read_text())
    written = {key: shape for key, (_, shape, _) in contents(apart).items()}
    for architecture, real in ((recipe.source, written), (recipe.target, shapes_of(packed))):
        assert architecture is not None
        table = architecture.tensors(architecture.sizes_of(config))
        assert {key: each.shape for key, each in table.items() if key in real} == real
        assert {key for key, each in table.items() if not each.optional} <= set(real)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    _, apart, _ = saved("Qwen3-MoE", tmp_path)
    for number in (4, 10):  # in the middle, and the last
        lost = f"model.layers.1.mlp.experts.{number}.up_proj.weight"
        with pytest.raises(PlanError, match=f"experts.{number}.up_proj.weight"):
            streamconv.plan(apart, to_arch="packed", drop=[lost])


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    _, apart, packed = saved("DeepSeek-V3", tmp_path)
    for directory, to_arch in ((apart, "packed"), (packed, "experts-apart")):
        path = directory / "config.json"
        quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
        with pytest.raises(PlanError, match=r"its weights are quantised.*--recipe dequantise"):
            streamconv.plan(directory, to_arch=to_arch)


class TestMixtral(RecipeContract):
    recipe = "mixtral-packed"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved("Mixtral", tmp_path)[1]


class TestOlmoe(RecipeContract):
    recipe = "olmoe-packed"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved("OLMoE", tmp_path)[1]


class TestDeepseek3(RecipeContract):
    recipe = "deepseek-v3-packed"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved("DeepSeek-V3", tmp_path, torch.bfloat16)[1]


def test_the_layer_that_predicts_further_tokens_is_dropped(tmp_path: Path) -> None:
    _, apart, packed = saved("DeepSeek-V3", tmp_path)
    expected = contents(packed)
    state = load_file(apart / "model.safetensors")
    for name in [name for name in state if name.startswith("model.layers.2.")]:
        state[name.replace("layers.2", "layers.3")] = state[name].clone()
    state["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    state["model.layers.3.shared_head.norm.weight"] = torch.zeros(32)
    save_file(state, apart / "model.safetensors", {"format": "pt"})
    plan = streamconv.plan(apart, to_arch="packed")
    further = {name for name in state if name.startswith("model.layers.3.")}
    assert {dropped.name for dropped in plan.dropped} == further
    assert all("predicts further tokens" in dropped.reason for dropped in plan.dropped)
    streamconv.convert(apart, tmp_path / "out", to_arch="packed", engine="inline")
    assert contents(tmp_path / "out") == expected


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "vocab_size": 129280, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
}  # fmt: skip


def headers_only(directory: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of these BF16 tensors in one file without any data on disk: a hole."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return directory


@pytest.mark.slow
def test_deepseek_v3_in_full_both_ways(tmp_path: Path) -> None:
    """Some 46,000 tensors and 1.3 TB, of which there are only headers."""
    recipe = named("deepseek-v3-packed")
    assert recipe.source is not None and recipe.target is not None
    sizes = recipe.source.sizes_of(DEEPSEEK_V3)
    apart = {name: each.shape for name, each in recipe.source.tensors(sizes).items()}
    packed = {name: each.shape for name, each in recipe.target.tensors(sizes).items()}
    further = {name.replace(".60.", ".61."): shape for name, shape in apart.items() if ".layers.60." in name}
    assert len(apart) > 45_000
    plan = streamconv.plan(headers_only(tmp_path / "apart", apart | further), to_arch="packed")
    assert {tensor.spec.name: tensor.spec.shape for tensor in plan.tensors} == packed
    assert {dropped.name for dropped in plan.dropped} == set(further)
    plan = streamconv.plan(headers_only(tmp_path / "packed", packed), to_arch="experts-apart")
    assert {tensor.spec.name: tensor.spec.shape for tensor in plan.tensors} == apart
