"""Llama and its likes from Hugging Face to MindFormers and back, against the official converters' rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from mindformers_contract import (
    MindFormersContract,
    ReferenceContract,
    Tensors,
    assert_same,
    bare,
    saved,
    tensors_of,
)
from recipe_contract import contents, load
from reference_models import baichuan, internlm, internlm2, qwen
from safetensors.torch import save_file

import streamconv
from streamconv.errors import ConversionError, PlanError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def llama_name(name: str) -> str:
    """`name_replace` of mindformers/models/llama/convert_weight.py."""
    for old, new in (
        ("embed_tokens.weight", "tok_embeddings.embedding_weight"),
        (".self_attn.q_proj.", ".attention.wq."),
        (".self_attn.k_proj.", ".attention.wk."),
        (".self_attn.v_proj.", ".attention.wv."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        ("model.norm.", "model.norm_out."),
    ):
        name = name.replace(old, new)
    return name


def state_dict(state: Tensors, config: Any) -> Tensors:
    """What `state_dict()` of the loaded model lists, which the official converters go through."""
    return (
        {"lm_head.weight": state["model.embed_tokens.weight"], **state}
        if config.tie_word_embeddings
        else state
    )


class TestLlama(MindFormersContract):
    recipe = "mindformers-llama"
    configs: ClassVar = (
        hf.LlamaConfig(**SIZES, num_key_value_heads=2),
        hf.LlamaConfig(**SIZES),
        hf.LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=16, attention_bias=True, mlp_bias=True),
        hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        return {llama_name(name): tensor for name, tensor in state_dict(state, config).items()}


class TestQwen2(TestLlama):
    recipe = "mindformers-qwen2"
    configs: ClassVar = (
        hf.Qwen2Config(**SIZES, num_key_value_heads=2),
        hf.Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    )


def without_buffers(state: Tensors) -> Tensors:
    return {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}


class TestBaichuan2(ReferenceContract):
    recipe = "mindformers-baichuan2"
    module = baichuan
    configs: ClassVar = (baichuan.Config(norm_head=True), baichuan.Config())

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        for name, tensor in without_buffers(state).items():
            if "W_pack" in name:
                for part, value in zip("qkv", torch.split(tensor, config.hidden_size), strict=True):
                    made[name.replace(".self_attn.W_pack", f".attention.w{part}")] = value
            else:
                made[llama_name(name)] = tensor
        return made


class TestInternlm(ReferenceContract):
    recipe = "mindformers-internlm"
    module = internlm
    configs: ClassVar = (
        internlm.Config(rotary={"base": 10000, "type": "origin"}),
        internlm.Config(),
        internlm.Config(bias=False),
    )

    def official(self, state: Tensors, config: Any) -> Tensors:
        return {llama_name(name): tensor for name, tensor in without_buffers(state).items()}


class TestInternlm2(ReferenceContract):
    recipe = "mindformers-internlm2"
    module = internlm2
    configs: ClassVar = (
        internlm2.Config(), internlm2.Config(num_key_value_heads=4), internlm2.Config(bias=True)
    )  # fmt: skip

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        for name, tensor in state.items():
            name = name.replace("tok_embeddings.weight", "tok_embeddings.embedding_weight")
            name = name.replace("wqkv", "w").replace(".norm.", ".norm_out.").replace("output", "lm_head")
            made[name] = tensor
        return made


class TestInternlm2Split(TestInternlm2):
    recipe = "mindformers-internlm2-split"

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        dim = config.hidden_size // config.num_attention_heads
        groups = config.num_attention_heads // config.num_key_value_heads
        for name, tensor in super().official(state, config).items():
            if ".w." not in name:
                made[name] = tensor
                continue
            slices = torch.split(tensor, dim * (groups + 2))
            made[name.replace(".w.", ".wq.")] = torch.cat([each[: -2 * dim] for each in slices])
            made[name.replace(".w.", ".wk.")] = torch.cat([each[-2 * dim : -dim] for each in slices])
            made[name.replace(".w.", ".wv.")] = torch.cat([each[-dim:] for each in slices])
        return made


class TestQwen(ReferenceContract):
    recipe = "mindformers-qwen"
    module = qwen
    configs: ClassVar = (qwen.Config(),)

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        for name, tensor in state.items():
            for old, new in (
                (".h.", ".layers."),
                (".wte.weight", ".wte.embedding_weight"),
                ("attn.c_proj.", "attention.wo."),
                ("ln_1.", "attention_norm."),
                ("ln_2.", "ffn_norm."),
                ("mlp.w1.", "feed_forward.w1."),
                ("mlp.w2.", "feed_forward.w3."),
                ("mlp.c_proj.", "feed_forward.w2."),
            ):
                name = name.replace(old, new)
            if "attn.c_attn" in name:
                for part, value in zip("qkv", tensor.chunk(3), strict=True):
                    made[name.replace("attn.c_attn", f"attention.w{part}")] = value
            else:
                made[name] = tensor
        return made


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama of Hugging Face."""
    saved(hf.LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path / "hf")
    return tmp_path / "hf"


def without_config(llama: Path, directory: Path) -> Path:
    """The weights of a Llama as MindFormers has them: one file, no config."""
    directory.mkdir()
    save_file(
        {llama_name(name): each for name, each in tensors_of(llama).items()}, directory / "x.safetensors"
    )
    return directory / "x.safetensors"


@pytest.mark.parametrize("family", ["yi", "deepseek"])
def test_families_that_are_llamas_are_converted_alike(family: str, llama: Path, tmp_path: Path) -> None:
    for recipe in ("llama", family):
        streamconv.convert(
            llama, tmp_path / recipe, recipe=f"mindformers-{recipe}", reverse=True, engine="inline"
        )
    assert contents(tmp_path / family) == contents(tmp_path / "llama")
    back = tmp_path / "back"
    streamconv.convert(tmp_path / family, back, recipe=f"mindformers-{family}", engine="inline")
    assert contents(back) == contents(llama)


def test_the_direction_is_found(llama: Path, tmp_path: Path) -> None:
    streamconv.convert(llama, tmp_path / "mf", to_arch="mindformers", engine="inline")
    assert "model.tok_embeddings.embedding_weight" in contents(tmp_path / "mf")
    for to_arch in ("hf", "llama"):
        back = tmp_path / f"to-{to_arch}"
        streamconv.convert(tmp_path / "mf", back, to_arch=to_arch, engine="inline")
        assert contents(back) == contents(llama)


def test_a_file_without_config_takes_that_of_the_original(llama: Path, tmp_path: Path) -> None:
    weights = without_config(llama, tmp_path / "mf")
    for number, options in enumerate(({"config": llama / "config.json"}, {"like": llama})):
        made = tmp_path / str(number)
        streamconv.convert(weights, made, recipe="mindformers-llama", engine="inline", **options)
        assert contents(made) == contents(llama)
        ids = torch.arange(12)[None]
        before, after = load(llama), load(made)
        assert_alike(after(ids).logits, before(ids).logits, terms_of(before))


def test_without_config_it_says_what_is_not_known(llama: Path, tmp_path: Path) -> None:
    weights = without_config(llama, tmp_path / "mf")
    plan = streamconv.plan(
        weights, recipe="mindformers-llama"
    )  # it only renames, and says what that leaves open
    assert any(
        "does not know what is missing; --config FILE or --like DIR tells" in each for each in plan.notes
    )
    assert any("there is no config.json" in each for each in plan.notes)
    assert {tensor.spec.name for tensor in plan.tensors} == tensors_of(llama).keys()
    (tmp_path / "heads.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    plan = streamconv.plan(weights, recipe="mindformers-llama", config=tmp_path / "heads.json")
    assert any("hidden_size 32" in note and "num_hidden_layers 2" in note for note in plan.notes)
    streamconv.convert(plan, tmp_path / "made", engine="inline")
    assert contents(tmp_path / "made") == contents(llama)
    load(tmp_path / "made")


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"vocab_size": 65}],
    ids=str,
)
def test_a_wrong_config_is_an_error(change: dict[str, int], llama: Path, tmp_path: Path) -> None:
    weights = without_config(llama, tmp_path / "mf")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PlanError):
        streamconv.plan(weights, recipe="mindformers-llama", config=tmp_path / "config.json")


def test_what_training_saves_besides_is_left_out_and_said(llama: Path, tmp_path: Path) -> None:
    weights = without_config(llama, tmp_path / "mf")
    state = tensors_of(weights.parent)
    slots = {f"adam_m.{name}": tensor * 2 for name, tensor in state.items()}
    counters = {
        name: torch.tensor(number) for number, name in enumerate(("epoch_num", "step_num", "loss_scale"))
    }
    save_file({**state, **slots, **counters}, weights)
    plan = streamconv.plan(weights, recipe="mindformers-llama", config=llama / "config.json")
    assert {each.name for each in plan.dropped} == slots.keys() | counters.keys()
    streamconv.convert(plan, tmp_path / "made", engine="inline")
    assert contents(tmp_path / "made") == contents(llama)


def test_old_buffers_have_no_place_in_mindformers(llama: Path, tmp_path: Path) -> None:
    state = tensors_of(llama)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    save_file({**state, **buffers}, llama / "model.safetensors", metadata={"format": "pt"})
    plan = streamconv.plan(llama, to_arch="mindformers")
    assert {each.name for each in plan.dropped} == buffers.keys()
    streamconv.convert(plan, tmp_path / "mf", engine="inline")
    assert_same(tensors_of(tmp_path / "mf"), {llama_name(name): each for name, each in state.items()})


def test_a_head_that_is_not_the_embedding_is_not_lost_silently(tmp_path: Path) -> None:
    saved(hf.LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    state = tensors_of(tmp_path / "mf")
    save_file({**state, "lm_head.weight": state["lm_head.weight"] + 1}, tmp_path / "mf/model.safetensors")
    with pytest.raises(ConversionError, match="must be equal"):
        streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")


def test_a_tied_net_may_lack_its_head(tmp_path: Path) -> None:
    saved(hf.Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True), tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    state = tensors_of(tmp_path / "mf")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "mf/model.safetensors")
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_a_vocabulary_grows_under_mindformers_names(llama: Path, tmp_path: Path) -> None:
    streamconv.convert(llama, tmp_path / "mf", to_arch="mindformers", pad_vocab=80, engine="inline")
    made = tensors_of(tmp_path / "mf")
    assert made["model.tok_embeddings.embedding_weight"].shape == made["lm_head.weight"].shape == (80, 32)
    assert json.loads((tmp_path / "mf/config.json").read_text())["vocab_size"] == 80


def test_the_way_back_fuses_weights_as_well_as_biases(tmp_path: Path) -> None:
    """MindFormers' own way back leaves the weights of Qwen's projections split, under names of its own."""
    qwen.write(tmp_path / "hf", qwen.Config())
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    names = contents(tmp_path / "back").keys()
    assert {f"transformer.h.0.attn.c_attn.{leaf}" for leaf in ("weight", "bias")} <= names
    assert not any("attention.w" in name for name in names)


def test_the_letter_w_stays_what_it_is(tmp_path: Path) -> None:
    """MindFormers' own way back of InternLM2 makes `wqkveight` of `weight`."""
    internlm2.write(tmp_path / "hf", internlm2.Config())
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    assert "model.layers.0.attention.w.weight" in contents(tmp_path / "mf")
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_without_a_config_baichuan2_is_not_taken_for_llama(tmp_path: Path) -> None:
    """Their tensors are called alike, and compute something else."""
    baichuan.write(tmp_path / "hf", baichuan.Config(norm_head=True), form="safetensors")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    weights = bare(tmp_path / "mf")
    with pytest.raises(PlanError, match=r"several recipes.*mindformers-llama.*mindformers-baichuan2"):
        streamconv.plan(weights, to_arch="hf")
    plan = streamconv.plan(weights, to_arch="hf", config=tmp_path / "hf/config.json")
    assert any(note.startswith("recipe mindformers-baichuan2:") for note in plan.notes)
