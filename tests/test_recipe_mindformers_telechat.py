"""TeleChat to MindFormers and back, against the official converters' rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mindformers_contract import ShapesContract, Tensors, tensors_of
from recipe_contract import contents
from safetensors.torch import save_file

import streamconv
from streamconv.errors import PlanError

HIDDEN, FFN, VOCAB, DIM, LAYERS = 32, 48, 64, 8, 2
CONFIG = {
    "architectures": ["TelechatForCausalLM"], "model_type": "telechat", "hidden_size": HIDDEN, "ffn_hidden_size": FFN,
    "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB,
}  # fmt: skip


def common(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    groups = config.get("num_key_value_heads", config["n_head"])
    made: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (VOCAB, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}."
        made |= {
            block + "input_layernorm.weight": (HIDDEN,),
            block + "self_attention.query.weight": (HIDDEN, HIDDEN),
            block + "self_attention.key_value.weight": (2 * groups * DIM, HIDDEN),
            block + "self_attention.dense.weight": (HIDDEN, HIDDEN),
            block + "self_attention.dense.bias": (HIDDEN,),
            block + "post_attention_layernorm.weight": (HIDDEN,),
        }
    return made


def name_replace(name: str) -> str:
    for old, new in (
        ("transformer.word_embeddings.weight", "model.tok_embeddings.embedding_weight"),
        (".input_layernorm", ".attention_norm"),
        (".self_attention.dense.", ".attention.wo."),
        (".self_attention.query.", ".attention.wq."),
        (".self_attention.key_value.", ".attention.wk_v."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".mlp.router.", ".feed_forward.router.dense."),
        (".post_attention_layernorm.", ".ffn_norm."),
        ("transformer.ln_f.", "model.norm_out."),
        ("transformer.h.", "model.layers."),
    ):
        name = name.replace(old, new)
    return name


class TestTelechat(ShapesContract):
    recipe = "mindformers-telechat"
    configs: ClassVar = (CONFIG, {**CONFIG, "num_key_value_heads": 2})

    def shapes(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        made = common(config)
        for layer in range(LAYERS):
            block = f"transformer.h.{layer}.mlp."
            made |= {
                block + "gate_proj.weight": (FFN, HIDDEN),
                block + "up_proj.weight": (FFN, HIDDEN),
                block + "down_proj.weight": (HIDDEN, FFN),
                block + "down_proj.bias": (HIDDEN,),
            }
        return made

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        return {name_replace(name): tensor for name, tensor in state.items()}


class TestTelechatContiguous(TestTelechat):
    recipe = "mindformers-telechat-contiguous"

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        made = super().official(state, config)
        for layer in range(LAYERS):
            block = f"model.layers.{layer}."
            key_value = made.pop(block + "attention.wk_v.weight")
            pieces = key_value.split(DIM)
            made[block + "attention.w_qkv.weight"] = torch.cat(
                [made.pop(block + "attention.wq.weight"), *pieces[0::2], *pieces[1::2]]
            )
            made[block + "feed_forward.w_gate_hidden.weight"] = torch.cat(
                [made.pop(block + "feed_forward.w1.weight"), made.pop(block + "feed_forward.w3.weight")]
            )
        return made

    def test_it_finds_itself(self, source: Path) -> None:
        """Its names are also those of Llama's net with fused projections: it is found by its name alone."""
        with pytest.raises(PlanError, match="there is no recipe"):
            streamconv.plan(source, to_arch="hf")


class TestTelechatMoe(ShapesContract):
    recipe = "mindformers-telechat-moe"
    configs: ClassVar = ({**CONFIG, "num_experts": 12},)

    def shapes(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        made = common(config)
        for layer in range(LAYERS):
            block = f"transformer.h.{layer}.mlp."
            made[block + "router.weight"] = (config["num_experts"], HIDDEN)
            for expert in range(config["num_experts"]):
                one = f"{block}local_experts.{expert}."
                made |= {
                    one + "gate_proj.weight": (FFN, HIDDEN),
                    one + "up_proj.weight": (FFN, HIDDEN),
                    one + "down_proj.weight": (HIDDEN, FFN),
                    one + "down_proj.bias": (HIDDEN,),
                }
        return made

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        made: Tensors = {}
        groups: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in state.items():
            found = re.search(r"local_experts\.(\d+)\.(\w+)\.", name)
            if found is None:
                made[name_replace(name)] = tensor
                continue
            part = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[found[2]]
            layer, leaf = name.split(".")[2], name.rsplit(".", 1)[1]
            target = f"model.layers.{layer}.feed_forward.ffn.{part}.{leaf}"
            groups.setdefault(target, {})[int(found[1])] = tensor
        for name, tensors in groups.items():
            value = torch.stack([tensors[expert] for expert in sorted(tensors)])
            made[name] = value.unsqueeze(0).unsqueeze(2) if "bias" in name else value
        return made


def test_names_with_and_without_the_prefix_are_known(tmp_path: Path) -> None:
    """7B is published without, 12B with it; MindFormers takes one of the two, and writes back `h.` whatever it was."""
    TestTelechat().make_hf(0, tmp_path / "hf", torch.float32)
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    state = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path / "hf").items()
    }
    del state["lm_head.weight"]
    (tmp_path / "bare").mkdir()
    save_file(state, tmp_path / "bare/model.safetensors")
    (tmp_path / "bare/config.json").write_text(json.dumps(CONFIG))
    streamconv.convert(tmp_path / "bare", tmp_path / "mf2", to_arch="mindformers", engine="inline")
    expected = contents(tmp_path / "mf")
    assert contents(tmp_path / "mf2") == {
        name: each for name, each in expected.items() if name != "lm_head.weight"
    }
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
