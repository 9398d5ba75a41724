"""Fused projections in both orders, of the older nets and of the parallel core, against MindFormers' own helpers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers as hf
from mindformers_contract import MindFormersContract, Tensors, assert_same, saved, tensors_of
from recipe_contract import contents, shapes_of
from safetensors.torch import save_file
from test_recipe_mindformers_experts import QWEN2, TINY, V3
from test_recipe_mindformers_llama import SIZES, TestLlama

import streamconv
from streamconv.errors import PlanError
from streamconv.families.glm import GLM4
from streamconv.families.qwen import QWEN3

# A contract, many times over: run it when this is what you change.
pytestmark = pytest.mark.slow


def qkv_interleaved(q: Any, k: Any, v: Any, heads: int, groups: int) -> torch.Tensor:
    """`qkv_concat_hf2mg` and `concat_qkv_interleaved`: of each group its queries, its key, its value."""
    dim, per_group, rest = len(q) // heads, heads // groups, q.shape[1:]
    parts = (
        q.reshape(groups, per_group * dim, *rest), k.reshape(groups, dim, *rest), v.reshape(groups, dim, *rest)
    )  # fmt: skip
    return torch.cat(parts, 1).reshape((heads + 2 * groups) * dim, *rest)


def ffn_interleaved(gate: Any, up: Any) -> torch.Tensor:
    """`ffn_concat_hf2mg` and `concat_linear_fc1`."""
    width = len(gate)
    order = np.stack([np.arange(width), np.arange(width) + width], 1).reshape(-1)
    return torch.cat([gate, up])[torch.from_numpy(order)]


class _Chosen:
    """Nothing in the checkpoint tells the order: it is never guessed."""

    def test_it_finds_itself(self, source: Path) -> None:
        with pytest.raises(PlanError, match=f"there are several recipes.*{self.recipe}"):
            streamconv.plan(source, to_arch="hf")

    def fused_attention(self, q: Any, k: Any, v: Any, config: Any) -> torch.Tensor:
        if "interleaved" in self.recipe or "contiguous-mlp" in self.recipe:
            return qkv_interleaved(q, k, v, config.num_attention_heads, config.num_key_value_heads)
        return torch.cat([q, k, v])

    def fused_ffn(self, gate: Any, up: Any) -> torch.Tensor:
        if "interleaved" in self.recipe or "contiguous-attention" in self.recipe:
            return ffn_interleaved(gate, up)
        return torch.cat([gate, up])


class TestLlamaInterleaved(_Chosen, TestLlama):
    recipe = "mindformers-llama-interleaved"

    def official(self, state: Tensors, config: Any) -> Tensors:
        made = super().official(state, config)
        for layer in range(config.num_hidden_layers):
            block = f"model.layers.{layer}."
            for leaf in ("weight", "bias"):
                if f"{block}attention.wq.{leaf}" in made:
                    q, k, v = (made.pop(f"{block}attention.w{part}.{leaf}") for part in "qkv")
                    made[f"{block}attention.w_qkv.{leaf}"] = self.fused_attention(q, k, v, config)
                if f"{block}feed_forward.w1.{leaf}" in made:
                    gate, up = (made.pop(f"{block}feed_forward.w{part}.{leaf}") for part in "13")
                    made[f"{block}feed_forward.w_gate_hidden.{leaf}"] = self.fused_ffn(gate, up)
        return made


@pytest.mark.slow
class TestLlamaContiguous(TestLlamaInterleaved):
    recipe = "mindformers-llama-contiguous"


class TestQwen2Interleaved(TestLlamaInterleaved):
    recipe = "mindformers-qwen2-interleaved"
    configs: ClassVar = (
        hf.Qwen2Config(**SIZES, num_key_value_heads=2),
        hf.Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    )


@pytest.mark.slow
class TestQwen2Contiguous(TestQwen2Interleaved):
    recipe = "mindformers-qwen2-contiguous"


def core_name(name: str) -> str:
    """`weight_mapping` of mindformers/models/*/utils.py."""
    for old, new in (
        ("model.embed_tokens.", "embedding.word_embeddings."),
        (".self_attn.o_proj.", ".self_attention.linear_proj."),
        (".self_attn.q_norm.", ".self_attention.q_layernorm."),
        (".self_attn.k_norm.", ".self_attention.k_layernorm."),
        (".self_attn.q_a_proj.", ".self_attention.linear_q_down_proj."),
        (".self_attn.q_a_layernorm.", ".self_attention.q_layernorm."),
        (".self_attn.q_b_proj.", ".self_attention.linear_q_up_proj."),
        (".self_attn.kv_a_proj_with_mqa.", ".self_attention.linear_kv_down_proj."),
        (".self_attn.kv_a_layernorm.", ".self_attention.kv_layernorm."),
        (".self_attn.kv_b_proj.", ".self_attention.linear_kv_up_proj."),
        (".mlp.down_proj.", ".mlp.linear_fc2."),
        (".mlp.gate.weight", ".mlp.router.weight"),
        (".mlp.gate.e_score_correction_bias", ".mlp.router.expert_bias"),
        (".mlp.shared_experts.down_proj.", ".mlp.shared_experts.linear_fc2."),
        (".post_attention_layernorm.", ".pre_mlp_layernorm."),
        ("model.norm.", "decoder.final_layernorm."),
        ("lm_head.", "output_layer."),
        ("model.layers.", "decoder.layers."),
    ):
        name = name.replace(old, new)
    return name


class _Core(_Chosen, MindFormersContract):
    def official(self, state: Tensors, config: Any) -> Tensors:
        state, made = dict(state), {}
        for name in list(state):
            if name not in state:
                continue
            block, _, rest = name.partition(".self_attn.")
            if rest.startswith("q_proj."):
                leaf = rest.rpartition(".")[2]
                q, k, v = (state.pop(f"{block}.self_attn.{part}_proj.{leaf}") for part in "qkv")
                target = f"{core_name(block + '.')}self_attention.linear_qkv.{leaf}"
                made[target] = self.fused_attention(q, k, v, config)
        for name in list(state):
            if name.endswith("gate_proj.weight") and ".experts." not in name:
                block = name.removesuffix("gate_proj.weight")
                gate, up = state.pop(name), state.pop(block + "up_proj.weight")
                made[core_name(block) + "linear_fc1.weight"] = self.fused_ffn(gate, up)
        for block in {name.partition("experts.")[0] for name in state if ".mlp.experts." in name}:
            count = sum(name.startswith(block) and name.endswith("up_proj.weight") for name in state)
            experts: list[list[torch.Tensor]] = [
                [state.pop(f"{block}experts.{expert}.{part}_proj.weight") for part in ("gate", "up", "down")]
                for expert in range(count)
            ]
            first = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts]).permute(0, 2, 1)
            second = torch.stack([down for _, _, down in experts]).permute(0, 2, 1)
            made[core_name(block) + "experts.weight1"] = first.reshape(count * first.shape[1], -1)
            made[core_name(block) + "experts.weight2"] = second.reshape(-1, second.shape[2])
        return made | {core_name(name): tensor for name, tensor in state.items()}


class TestQwen3Interleaved(_Core):
    recipe = "mindformers-qwen3-interleaved"
    configs: ClassVar = (
        hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
        hf.Qwen3Config(
            **SIZES, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True, attention_bias=True
        ),
    )

    def test_the_table_is_the_class(self, tmp_path: Path) -> None:
        for number in range(len(self.configs)):
            self.make_hf(number, tmp_path / str(number), torch.float32)
            config = json.loads((tmp_path / str(number) / "config.json").read_text())
            table = QWEN3.tensors(QWEN3.sizes_of(config))
            assert {name: each.shape for name, each in table.items()} == shapes_of(tmp_path / str(number))


class TestQwen2CoreInterleaved(_Core):
    recipe = "mindformers-qwen2-core-interleaved"
    configs: ClassVar = (
        hf.Qwen2Config(**SIZES, num_key_value_heads=2),
        hf.Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    )


@pytest.mark.slow
class TestQwen2CoreContiguous(TestQwen2CoreInterleaved):
    recipe = "mindformers-qwen2-core-contiguous"


class TestGlm4Interleaved(_Core):
    recipe = "mindformers-glm4-interleaved"
    configs: ClassVar = (
        hf.Glm4Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False),
        hf.Glm4Config(**SIZES, num_key_value_heads=4, head_dim=16, attention_bias=True,
                      tie_word_embeddings=False),
    )  # fmt: skip

    def official(self, state: Tensors, config: Any) -> Tensors:
        made = super().official(state, config)
        return {name.replace("gate_up_proj", "linear_fc1"): tensor for name, tensor in made.items()}

    def test_the_table_is_the_class(self, tmp_path: Path) -> None:
        for number in range(len(self.configs)):
            self.make_hf(number, tmp_path / str(number), torch.float32)
            config = json.loads((tmp_path / str(number) / "config.json").read_text())
            table = GLM4.tensors(GLM4.sizes_of(config))
            assert {name: each.shape for name, each in table.items()} == shapes_of(tmp_path / str(number))


@pytest.mark.slow
class TestGlm4Contiguous(TestGlm4Interleaved):
    recipe = "mindformers-glm4-contiguous"


@pytest.mark.slow
class TestQwen3Contiguous(TestQwen3Interleaved):
    recipe = "mindformers-qwen3-contiguous"


@pytest.mark.slow
class TestQwen3ContiguousAttention(TestQwen3Interleaved):
    recipe = "mindformers-qwen3-contiguous-attention"


@pytest.mark.slow
class TestQwen3ContiguousMlp(TestQwen3Interleaved):
    recipe = "mindformers-qwen3-contiguous-mlp"


class TestQwen3MoeInterleaved(_Core):
    recipe = "mindformers-qwen3-moe-interleaved"
    configs: ClassVar = (
        hf.Qwen3MoeConfig(**TINY, head_dim=16, moe_intermediate_size=16, num_experts=11, mlp_only_layers=[1]),
        hf.Qwen3MoeConfig(
            **TINY, head_dim=16, moe_intermediate_size=16, num_experts=4, attention_bias=True, tie_word_embeddings=True
        ),
    )  # fmt: skip


@pytest.mark.slow
class TestQwen3MoeContiguous(TestQwen3MoeInterleaved):
    recipe = "mindformers-qwen3-moe-contiguous"


class TestDeepseekV3Interleaved(_Core):
    recipe = "mindformers-deepseekv3-interleaved"
    configs: ClassVar = (
        hf.DeepseekV3Config(**V3),
        hf.DeepseekV3Config(**V3 | {"n_routed_experts": 6, "n_shared_experts": 2}),
    )

    @pytest.fixture
    def predicting(self, tmp_path: Path) -> Path:
        """A model with the layer that predicts a further token, as DeepSeek publishes it."""
        directory = tmp_path / "predicting"
        saved(self.configs[0], directory)
        state = tensors_of(directory)
        layer = "model.layers.3."
        last = {
            name.replace("model.layers.2.", layer): tensor * 1.5
            for name, tensor in state.items()
            if "layers.2." in name
        }
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

    def test_the_layer_that_predicts_is_counted_by_itself(self, predicting: Path, tmp_path: Path) -> None:
        mf, back = tmp_path / "mf", tmp_path / "back"
        streamconv.convert(predicting, mf, recipe=self.recipe, reverse=True, engine="inline")
        expected: Tensors = {}
        for name, tensor in self.official(tensors_of(predicting), self.configs[0]).items():
            if "embed_tokens" in name or "shared_head.head" in name:
                continue
            for old, new in (
                ("decoder.layers.3.enorm", "mtp.layers.0.enorm"),
                ("decoder.layers.3.hnorm", "mtp.layers.0.hnorm"),
                ("decoder.layers.3.eh_proj", "mtp.layers.0.eh_proj"),
                ("decoder.layers.3.shared_head.norm", "mtp.layers.0.final_layernorm"),
                ("decoder.layers.3.", "mtp.layers.0.transformer_layer."),
            ):
                name = name.replace(old, new)
            expected[name] = tensor
        assert_same(tensors_of(mf), expected)
        streamconv.convert(mf, back, recipe=self.recipe, engine="inline")
        assert contents(back) == contents(predicting)


@pytest.mark.slow
class TestDeepseekV3Contiguous(TestDeepseekV3Interleaved):
    recipe = "mindformers-deepseekv3-contiguous"


@pytest.mark.parametrize("layout", ["contiguous-attention", "contiguous-mlp"])
def test_each_of_the_two_settings_can_be_another(layout: str, tmp_path: Path) -> None:
    config = TestQwen3MoeInterleaved.configs[0]
    saved(config, tmp_path / "hf")
    check = type("Check", (_Core,), {"recipe": f"mindformers-qwen3-moe-{layout}"})()
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch=f"mindformers-{layout}", engine="inline")
    assert_same(tensors_of(tmp_path / "mf"), check.official(tensors_of(tmp_path / "hf"), config))
    streamconv.convert(tmp_path / "mf", tmp_path / "back", recipe=check.recipe, engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_the_two_orders_differ(tmp_path: Path) -> None:
    """The same names and shapes, and other rows: what a guess would get wrong without a sign."""
    saved(hf.LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path / "hf")
    for order in ("interleaved", "contiguous"):
        streamconv.convert(tmp_path / "hf", tmp_path / order, to_arch=f"mindformers-{order}", engine="inline")
    one, other = tensors_of(tmp_path / "interleaved"), tensors_of(tmp_path / "contiguous")
    assert {name: each.shape for name, each in one.items()} == {
        name: each.shape for name, each in other.items()
    }
    name = "model.layers.0.attention.w_qkv.weight"
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one[name].sort(0).values, other[name].sort(0).values)


def test_moe_of_qwen2_is_no_net_of_the_core(tmp_path: Path) -> None:
    saved(hf.Qwen2MoeConfig(**QWEN2, num_experts=4, decoder_sparse_step=1), tmp_path / "hf")
    with pytest.raises(PlanError, match="there is no recipe"):
        streamconv.plan(tmp_path / "hf", to_arch="mindformers-interleaved")
