"""GPT-2, BLOOM and WizardCoder to MindFormers and back, against the official converters' rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from mindformers_contract import MindFormersContract, Tensors, assert_same, bare, saved, tensors_of
from recipe_contract import contents, load, shapes_of
from safetensors.torch import save_file

import streamconv
from streamconv.errors import PlanError
from streamconv.families.mindformers.gpt import GPTBIGCODE

IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, **IDS)
BLOOM = hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS)
BIGCODE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, **IDS}

GPT_NAMES = {
    "transformer.wte.weight": "backbone.embedding.word_embedding.embedding_table",
    "transformer.wpe.weight": "backbone.embedding.position_embedding.embedding_table",
    "transformer.ln_f.weight": "backbone.layernorm.gamma",
    "transformer.ln_f.bias": "backbone.layernorm.beta",
    "lm_head.weight": "head.head_weight",
}
GPT_LAYER = {
    "ln_1.weight": "layernorm1.gamma",
    "ln_1.bias": "layernorm1.beta",
    "ln_2.weight": "layernorm2.gamma",
    "ln_2.bias": "layernorm2.beta",
    "attn.c_proj.weight": "attention.projection.weight",
    "attn.c_proj.bias": "attention.projection.bias",
    "mlp.c_fc.weight": "output.mapping.weight",
    "mlp.c_fc.bias": "output.mapping.bias",
    "mlp.c_proj.weight": "output.projection.weight",
    "mlp.c_proj.bias": "output.projection.bias",
}


def gpt_name(name: str) -> str:
    if name in GPT_NAMES:
        return GPT_NAMES[name]
    layer, _, rest = name.removeprefix("transformer.h.").partition(".")
    return f"backbone.blocks.{layer}." + GPT_LAYER.get(rest, rest)


def numbered(name: str, fused: str, part: int) -> str:
    return gpt_name(name).replace(fused, f"attention.dense{part}")


class TestGpt(MindFormersContract):
    recipe = "mindformers-gpt"
    configs: ClassVar = (
        GPT2,
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=48, n_inner=40, **IDS),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        for name, tensor in state.items():
            if ".attn.c_attn." in name:
                for part, value in enumerate(tensor.chunk(3, -1), 1):
                    made[numbered(name, "attn.c_attn", part)] = value.T if value.ndim == 2 else value
            else:
                made[gpt_name(name)] = tensor
        return made


class TestBloom(MindFormersContract):
    recipe = "mindformers-bloom"
    configs: ClassVar = (BLOOM, hf.BloomConfig(hidden_size=48, n_layer=1, n_head=3, **IDS))

    def official(self, state: Tensors, config: Any) -> Tensors:
        names = {
            "word_embeddings.weight": "embedding.word_embedding.embedding_table",
            "word_embeddings_layernorm.weight": "embedding.norm.gamma",
            "word_embeddings_layernorm.bias": "embedding.norm.beta",
            "ln_f.weight": "ln_f.gamma",
            "ln_f.bias": "ln_f.beta",
        }
        layer_names = {
            "input_layernorm.weight": "layernorm1.gamma",
            "input_layernorm.bias": "layernorm1.beta",
            "self_attention.dense.weight": "attention.projection.weight",
            "self_attention.dense.bias": "attention.projection.bias",
            "post_attention_layernorm.weight": "layernorm2.gamma",
            "post_attention_layernorm.bias": "layernorm2.beta",
            "mlp.dense_h_to_4h.weight": "output.mapping.weight",
            "mlp.dense_h_to_4h.bias": "output.mapping.bias",
            "mlp.dense_4h_to_h.weight": "output.projection.weight",
            "mlp.dense_4h_to_h.bias": "output.projection.bias",
        }
        heads, dim = config.n_head, config.hidden_size // config.n_head
        made: Tensors = {}
        for name, tensor in state.items():
            name = name.removeprefix("transformer.")
            if name in names:
                made[names[name]] = tensor
                continue
            _, layer, rest = name.split(".", 2)
            if "query_key_value" in rest:
                by_head = tensor.reshape(heads, 3, dim, *tensor.shape[1:])
                for part in range(3):
                    value = by_head[:, part].reshape(heads * dim, *tensor.shape[1:])
                    made[f"blocks.{layer}.attention.dense{part + 1}.{rest.rsplit('.', 1)[1]}"] = value
                continue
            target = layer_names[rest]
            turned = ("projection" in target or "mapping" in target) and target.endswith("weight")
            made[f"blocks.{layer}.{target}"] = tensor.T if turned else tensor
        return made


class TestWizardcoder(MindFormersContract):
    recipe = "mindformers-wizardcoder"
    configs: ClassVar = (
        hf.GPTBigCodeConfig(**BIGCODE),
        hf.GPTBigCodeConfig(**BIGCODE, n_inner=40, tie_word_embeddings=False),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        dim = config.n_embd // config.n_head
        for name, tensor in {"lm_head.weight": state["transformer.wte.weight"], **state}.items():
            if ".attn.c_attn." in name:
                for part, value in enumerate(torch.split(tensor, [config.n_embd, dim, dim]), 1):
                    made[numbered(name, "attn.c_attn", part)] = value
            else:
                turned = name.endswith("weight") and ("c_proj" in name or "c_fc" in name)
                made[gpt_name(name)] = tensor.T if turned else tensor
        return made

    def test_the_table_is_the_class(self, tmp_path: Path) -> None:
        for number in range(len(self.configs)):
            self.make_hf(number, tmp_path / str(number), torch.float32)
            config = json.loads((tmp_path / str(number) / "config.json").read_text())
            table = GPTBIGCODE.tensors(GPTBIGCODE.sizes_of(config))
            assert {name: each.shape for name, each in table.items()} == shapes_of(tmp_path / str(number))


def test_keys_without_the_prefix_are_known(tmp_path: Path) -> None:
    """As the published files of GPT-2 and BLOOM have them; MindFormers drops GPT-2's with it in silence."""
    for name, config in (("gpt2", GPT2), ("bloom", BLOOM)):
        source = tmp_path / name
        saved(config, source)
        streamconv.convert(source, tmp_path / f"{name}-mf", to_arch="mindformers", engine="inline")
        unprefixed = {key.removeprefix("transformer."): tensor for key, tensor in tensors_of(source).items()}
        save_file(unprefixed, source / "model.safetensors", metadata={"format": "pt"})
        streamconv.convert(source, tmp_path / f"{name}-mf2", to_arch="mindformers", engine="inline")
        assert contents(tmp_path / f"{name}-mf2") == contents(tmp_path / f"{name}-mf")


def test_a_bloom_that_kept_the_prefix_comes_back(tmp_path: Path) -> None:
    """MindFormers' own way there keeps `transformer.`, and its way back breaks on it."""
    saved(BLOOM, tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    state = {f"transformer.{name}": tensor for name, tensor in tensors_of(tmp_path / "mf").items()}
    save_file(state, tmp_path / "mf/model.safetensors")
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_masks_are_left_out_and_said(tmp_path: Path) -> None:
    saved(GPT2, tmp_path / "hf")
    state = tensors_of(tmp_path / "hf")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril() for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file({**state, **masks}, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    plan = streamconv.plan(tmp_path / "hf", to_arch="mindformers")
    assert {each.name for each in plan.dropped} == masks.keys()
    streamconv.convert(plan, tmp_path / "mf", engine="inline")
    made = tensors_of(tmp_path / "mf")
    assert_same(made, TestGpt().official(state, GPT2))
    buffers = {f"backbone.blocks.{i}.attention.beta": torch.ones(1) for i in range(2)}
    save_file({**made, **buffers}, tmp_path / "mf/model.safetensors")
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    assert_same(tensors_of(tmp_path / "back"), state)


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_a_head_of_its_own_is_refused(kind: str, tmp_path: Path) -> None:
    """MindFormers' GPT-2 drops it in silence, and its BLOOM computes without it."""
    config = {"gpt2": GPT2, "bloom": BLOOM}[kind].__class__(
        n_embd=32, hidden_size=32, n_layer=1, n_head=2, **IDS, tie_word_embeddings=False
    )
    saved(config, tmp_path / "hf")
    with pytest.raises(PlanError, match="no output layer besides its embedding"):
        streamconv.plan(tmp_path / "hf", to_arch="mindformers")


def test_shapes_say_all_of_a_gpt2(tmp_path: Path) -> None:
    saved(hf.GPT2Config(n_embd=128, n_layer=2, n_head=2, n_positions=48, vocab_size=64), tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    plan = streamconv.plan(bare(tmp_path / "mf"), to_arch="hf")
    assert any("n_embd 128" in note and "n_layer 2" in note and "n_head 2" in note for note in plan.notes)
    streamconv.convert(plan, tmp_path / "back", engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    ids = torch.arange(20)[None]
    before, after = load(tmp_path / "hf"), load(tmp_path / "back")
    assert_alike(after(ids).logits, before(ids).logits, terms_of(before))


def test_a_bloom_needs_the_number_of_its_heads_alone(tmp_path: Path) -> None:
    saved(BLOOM, tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    weights = bare(tmp_path / "mf")
    with pytest.raises(PlanError, match="n_head"):
        streamconv.plan(weights, to_arch="hf")
    for heads in (4, 3):
        (tmp_path / "heads.json").write_text(json.dumps({"n_head": heads}))
        if heads == 3:
            with pytest.raises(PlanError):
                streamconv.plan(weights, to_arch="hf", config=tmp_path / "heads.json")
            continue
        streamconv.convert(
            weights, tmp_path / "back", to_arch="hf", config=tmp_path / "heads.json", engine="inline"
        )
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    ids = torch.arange(20)[None]
    before, after = load(tmp_path / "hf"), load(tmp_path / "back")
    assert_alike(after(ids).logits, before(ids).logits, terms_of(before))
