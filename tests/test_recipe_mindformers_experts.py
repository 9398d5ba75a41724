"""Mixtures of experts to MindFormers and back, against the official converters' rules with any number of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from mindformers_contract import MindFormersContract, Tensors, assert_same, saved, tensors_of
from recipe_contract import contents
from safetensors.torch import save_file
from test_recipe_mindformers_llama import llama_name, state_dict

import streamconv
from streamconv.errors import PlanError

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2 = {**TINY, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
LATENT = {
    **TINY, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "topk_group": 1,
}  # fmt: skip
V2 = {**LATENT, "n_group": 1}
V3 = {**LATENT, "n_group": 2, "q_lora_rank": 24}


def stacked(state: Tensors, middle: str, ours: str, parts: dict[str, str], *, grouped: bool) -> Tensors:
    """Every layer's experts as one tensor a part; `grouped`: with its last two axes exchanged."""
    made: Tensors = {}
    layers = {name.split(".")[2] for name in state if f".{middle}.experts." in name}
    for layer in layers:
        for theirs, part in parts.items():
            prefix, suffix = f"model.layers.{layer}.{middle}.experts.", f".{theirs}.weight"
            count = sum(name.startswith(prefix) and name.endswith(suffix) for name in state)
            stack = torch.stack([state[f"{prefix}{expert}{suffix}"] for expert in range(count)])
            made[f"model.layers.{layer}.{ours}.{part}.weight"] = stack.transpose(1, 2) if grouped else stack
    return made


PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class TestMixtral(MindFormersContract):
    recipe = "mindformers-mixtral"
    grouped = False
    configs: ClassVar = (
        hf.MixtralConfig(**TINY, num_local_experts=8),
        hf.MixtralConfig(**TINY, num_local_experts=3, head_dim=16, tie_word_embeddings=True),
        hf.MixtralConfig(**TINY, num_local_experts=11),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        made = stacked(
            state,
            "block_sparse_moe",
            "feed_forward.ffn",
            {part: part for part in PARTS.values()},
            grouped=self.grouped,
        )
        for name, tensor in state_dict(state, config).items():
            if ".experts." not in name:
                made[llama_name(name).replace(".block_sparse_moe.gate.", ".feed_forward.router.dense.")] = (
                    tensor
                )
        return made


class TestQwen2Moe(MindFormersContract):
    recipe = "mindformers-qwen2-moe"
    grouped = False
    configs: ClassVar = (
        hf.Qwen2MoeConfig(**QWEN2, num_experts=11, decoder_sparse_step=1, mlp_only_layers=[1]),
        hf.Qwen2MoeConfig(
            **QWEN2, num_experts=4, decoder_sparse_step=2, tie_word_embeddings=True, qkv_bias=False
        ),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        made = stacked(state, "mlp", "feed_forward.routed_experts.ffn", PARTS, grouped=self.grouped)
        for name, tensor in state_dict(state, config).items():
            if ".experts." not in name:
                name = name.replace(".mlp.gate.", ".feed_forward.routed_experts.router.dense.")
                for theirs, ours in PARTS.items():
                    name = name.replace(
                        f".mlp.shared_expert.{theirs}.", f".feed_forward.shared_experts.{ours}."
                    )
                name = name.replace(".mlp.shared_expert_gate.", ".feed_forward.shared_experts_gate.")
                made[llama_name(name)] = tensor
        return made


def latent_name(name: str) -> str:
    for old, new in (
        (".self_attn.q_proj.", ".attention.q_proj."),
        (".self_attn.q_a_proj.", ".attention.q2l_proj."),
        (".self_attn.q_a_layernorm.", ".attention.lq_norm."),
        (".self_attn.q_b_proj.", ".attention.l2q_proj."),
        (".self_attn.kv_a_proj_with_mqa.", ".attention.kv2l."),
        (".self_attn.kv_a_layernorm.", ".attention.lkv_norm."),
        (".self_attn.kv_b_proj.", ".attention.lkv2kv."),
        (".mlp.shared_experts.gate_proj.", ".feed_forward.shared_experts.w1."),
        (".mlp.shared_experts.down_proj.", ".feed_forward.shared_experts.w2."),
        (".mlp.shared_experts.up_proj.", ".feed_forward.shared_experts.w3."),
    ):
        name = name.replace(old, new)
    return llama_name(name)


class TestDeepseekV2(MindFormersContract):
    recipe = "mindformers-deepseek-v2"
    grouped = False
    configs: ClassVar = (
        hf.DeepseekV2Config(**V2, q_lora_rank=24),
        hf.DeepseekV2Config(**V2, q_lora_rank=None),
        hf.DeepseekV2Config(
            **V2 | {"n_shared_experts": 2}, q_lora_rank=24, attention_bias=True, mlp_bias=True
        ),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        made = stacked(state, "mlp", "feed_forward.routed_experts.ffn", PARTS, grouped=self.grouped)
        for name, tensor in state.items():
            if ".experts." not in name:
                name = name.replace(".mlp.gate.", ".feed_forward.routed_experts.router.dense.")
                made[latent_name(name)] = tensor
        return made


class _Grouped:
    """For grouped products, which shows in shapes alone, and not always: the recipe is found by its name only."""

    grouped = True

    def test_it_finds_itself(self, source: Path) -> None:
        with pytest.raises(PlanError, match="it is"):
            streamconv.plan(source, to_arch="hf")


@pytest.mark.slow
class TestMixtralGrouped(_Grouped, TestMixtral):
    recipe = "mindformers-mixtral-gmm"


class TestQwen2MoeGrouped(_Grouped, TestQwen2Moe):
    recipe = "mindformers-qwen2-moe-gmm"


@pytest.mark.slow
class TestDeepseekV2Grouped(_Grouped, TestDeepseekV2):
    recipe = "mindformers-deepseek-v2-gmm"


class TestDeepseekV3(MindFormersContract):
    recipe = "mindformers-deepseek-v3"
    configs: ClassVar = (hf.DeepseekV3Config(**V3), hf.DeepseekV3Config(**V3 | {"n_routed_experts": 6}))
    router, bias = "router_dense.weight", "topk_bias"

    def experts(self, state: Tensors) -> Tensors:
        """As `use_grouped_gemm` has them."""
        made = stacked(state, "mlp", "feed_forward.routed_experts.ffn", PARTS, grouped=True)
        layers = {name.partition(".feed_forward")[0] for name in made}
        names = {layer: f"{layer}.feed_forward.routed_experts.ffn" for layer in layers}
        return {
            **{
                f"{name}.w1": torch.cat((made[f"{name}.w1.weight"], made[f"{name}.w3.weight"]), -1)
                for name in names.values()
            },
            **{f"{name}.w2": made[f"{name}.w2.weight"] for name in names.values()},
        }

    def official(self, state: Tensors, config: Any) -> Tensors:
        made = self.experts(state)
        heads, still, turning = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        value = config.v_head_dim
        predicting = f"model.layers.{config.num_hidden_layers}."
        for name, tensor in state.items():
            ours = latent_name(name)
            if ".mlp.experts." in name:
                continue
            if name in (predicting + "embed_tokens.weight", predicting + "shared_head.head.weight"):
                continue
            if "q_b_proj" in name:
                rest, rope = tensor.reshape(heads, still + turning, -1).split([still, turning], dim=1)
                rope = rope.reshape(heads, turning // 2, 2, -1).permute(0, 2, 1, 3)
                made[ours.replace(".l2q_proj.", ".l2q_nope_proj.")] = rest.reshape(-1, tensor.shape[-1])
                made[ours.replace(".l2q_proj.", ".l2q_pe_proj.")] = rope.reshape(-1, tensor.shape[-1])
            elif "kv_a_proj_with_mqa" in name:
                latent, rope = tensor.split([tensor.shape[0] - turning, turning], dim=0)
                rope = rope.reshape(turning // 2, 2, -1).permute(1, 0, 2).reshape(turning, -1)
                made[ours.replace(".kv2l.", ".kv2l_latent_kv.")] = latent
                made[ours.replace(".kv2l.", ".kv2l_k_pe.")] = rope
            elif "kv_b_proj" in name:
                key, values = tensor.reshape(heads, still + value, -1).split([still, value], dim=1)
                made[ours.replace(".lkv2kv.", ".lkv2kv_k_nope.")] = key.reshape(-1, tensor.shape[-1])
                made[ours.replace(".lkv2kv.", ".lkv2kv_v.")] = values.reshape(-1, tensor.shape[-1])
            else:
                routed = "feed_forward.routed_experts."
                for old, new in (
                    ("mlp.gate.weight", routed + self.router),
                    ("mlp.gate.e_score_correction_bias", routed + self.bias),
                    (predicting + "enorm", "model.mtp_hidden_fusers.0.norm_emb"),
                    (predicting + "hnorm", "model.mtp_hidden_fusers.0.norm"),
                    (predicting + "eh_proj", "model.mtp_hidden_fusers.0.dense"),
                    (predicting + "shared_head.norm", "model.mtp_norms.0"),
                ):
                    ours = ours.replace(old, new)
                made[ours] = tensor
        return made

    @pytest.fixture
    def predicting(self, tmp_path: Path) -> Path:
        """A model with the layer that predicts a further token, as DeepSeek publishes it."""
        directory = tmp_path / "predicting"
        saved(self.configs[0], directory)
        state = tensors_of(directory)
        last = {
            name.replace("model.layers.2.", "model.layers.3."): tensor * 1.5
            for name, tensor in state.items()
            if "layers.2." in name
        }
        layer = "model.layers.3."
        last |= {
            layer + "enorm.weight": torch.rand(32),
            layer + "hnorm.weight": torch.rand(32),
            layer + "eh_proj.weight": torch.rand(32, 64),
            layer + "shared_head.norm.weight": torch.rand(32),
            layer + "embed_tokens.weight": state["model.embed_tokens.weight"].clone(),
            layer + "shared_head.head.weight": state["lm_head.weight"].clone(),
        }
        save_file({**state, **last}, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(
            json.dumps({**config, "num_nextn_predict_layers": 1}, indent=2)
        )
        return directory

    def test_the_layer_that_predicts_comes_along(self, predicting: Path, tmp_path: Path) -> None:
        mf, back = tmp_path / "mf", tmp_path / "back"
        streamconv.convert(predicting, mf, recipe=self.recipe, reverse=True, engine="inline")
        assert_same(tensors_of(mf), self.official(tensors_of(predicting), self.configs[0]))
        streamconv.convert(mf, back, to_arch="hf", engine="inline")
        assert contents(back) == contents(predicting)

    def test_a_part_of_that_layer_is_not_taken_for_none(self, predicting: Path, tmp_path: Path) -> None:
        lost = "model.layers.3.hnorm.weight"
        with pytest.raises(PlanError, match=r"model\.layers\.3\.hnorm\.weight"):
            streamconv.plan(predicting, recipe=self.recipe, reverse=True, drop=[lost])
        for lost in (
            "model.layers.3.mlp.experts.3.up_proj.weight",
            "model.layers.3.mlp.experts.1.up_proj.weight",
        ):
            with pytest.raises(PlanError, match=r"experts"):
                streamconv.plan(predicting, recipe=self.recipe, reverse=True, drop=[lost])

    def test_quantised_weights_are_refused(self, predicting: Path) -> None:
        config = json.loads((predicting / "config.json").read_text())
        (predicting / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
        )
        with pytest.raises(PlanError, match="dequantise"):
            streamconv.plan(predicting, recipe=self.recipe, reverse=True)


class TestDeepseekV3Ungrouped(TestDeepseekV3):
    recipe = "mindformers-deepseek-v3-ungrouped"
    router, bias = "router.dense.weight", "router.router.topk_bias"

    def experts(self, state: Tensors) -> Tensors:
        return stacked(state, "mlp", "feed_forward.routed_experts.ffn", PARTS, grouped=False)


@pytest.mark.parametrize("number", [2, 7])
def test_an_expert_that_is_missing_is_named(number: int, tmp_path: Path) -> None:
    """MindFormers leaves an incomplete group out without a word, and stacks wrongly what it has not eight of."""
    saved(hf.MixtralConfig(**TINY, num_local_experts=8), tmp_path / "hf")
    lost = f"model.layers.1.block_sparse_moe.experts.{number}.w3.weight"
    with pytest.raises(PlanError, match=f"experts.{number}.w3"):
        streamconv.plan(tmp_path / "hf", to_arch="mindformers", drop=[lost])


def test_another_number_of_experts_than_the_config_says_is_an_error(tmp_path: Path) -> None:
    saved(hf.MixtralConfig(**TINY, num_local_experts=4), tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    config = json.loads((tmp_path / "mf/config.json").read_text())
    for count in (3, 8):
        (tmp_path / "mf/config.json").write_text(json.dumps({**config, "num_local_experts": count}))
        with pytest.raises(PlanError, match=r"it is \[4, 48, 32\]"):
            streamconv.plan(tmp_path / "mf", to_arch="hf")
