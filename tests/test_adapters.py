"""Adapters of every kind that is merged: held against peft's own merge, or the logits of its unmerged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from recipe_contract import load
from reference_models import chatglm
from safetensors.torch import load_file, save_file
from test_lora import ATTENTION, GPT2, LLAMA, TIED, changed, merged, trained

import streamconv
from streamconv.errors import PlanError

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[Any, Any]] = {
    "adalora": (LLAMA, lambda: peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=8, total_step=10, target_modules=ATTENTION, **LM)),
    "loha": (LLAMA, lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=[*ATTENTION, "down_proj"], rank_pattern={"down_proj": 3}, **LM)),
    "lokr": (LLAMA, lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=[*ATTENTION, "down_proj"], **LM)),
    "lokr in four": (LLAMA, lambda: peft.LoKrConfig(r=2, alpha=8, decompose_both=True, decompose_factor=8, target_modules=[*ATTENTION, "up_proj"], **LM)),
    "ia3": (LLAMA, lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM)),
    "ia3 of transposed weights": (GPT2, lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True, **LM)),
    "hira": (LLAMA, lambda: peft.HiraConfig(r=4, target_modules=[*ATTENTION, "down_proj"], **LM)),
    "vera": (LLAMA, lambda: peft.VeraConfig(r=4, target_modules=[*ATTENTION, "down_proj"], **LM)),
    "oft": (LLAMA, lambda: peft.OFTConfig(r=0, oft_block_size=16, use_cayley_neumann=True, target_modules=[*ATTENTION, "down_proj"], **LM)),
    "oft of one rotation": (LLAMA, lambda: peft.OFTConfig(r=0, oft_block_size=16, block_share=True, use_cayley_neumann=True, num_cayley_neumann_terms=3, target_modules=ATTENTION, **LM)),
    "beft": (hf.LlamaConfig(**{**LLAMA.to_dict(), "attention_bias": True}), lambda: peft.BeftConfig(target_modules=["v_proj"], **LM)),
    "ln tuning": (LLAMA, lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **LM)),
    "token rows": (LLAMA, lambda: peft.TrainableTokensConfig(token_indices=[5, 0, 95], target_modules=["embed_tokens"], **LM)),
    "token rows of a lora": (LLAMA, lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": [7, 8, 3], "lm_head": [1]}, **LM)),
    "token rows of a tied model": (TIED, lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, trainable_token_indices=[7, 8, 3], **LM)),
    "dora of an embedding": (LLAMA, lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True, **LM)),
    "dora of transposed weights": (GPT2, lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True, **LM)),
}  # fmt: skip


def written(config: Any, settings: Any, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A base, an adapter beside it in which everything was trained, and peft's model of both."""
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if parameter.ndim == 1 else 0))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), settings
    )
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    config, settings = KINDS[name]
    written(config, settings(), tmp_path)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(20)[None]
    before = model(ids).logits
    expected = model.merge_and_unload().state_dict()
    found = merged(tmp_path)
    old = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not torch.equal(found[key], old[key]) for key in old)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=2e-6)
    made = load(tmp_path / "out")
    assert_alike(made(ids).logits, before, terms_of(made))


MIXTURES: dict[str, tuple[Any, list[str]]] = {
    "mixtral": (
        hf.MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, num_local_experts=4),
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "qwen3 moe": (
        hf.Qwen3MoeConfig(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=96, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ),
    "gpt-oss": (
        hf.GptOssConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=96, num_local_experts=4, num_experts_per_tok=2),
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "one of two": (
        hf.GptOssConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=96, num_local_experts=4, num_experts_per_tok=2),
        ["mlp.experts.down_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_experts_are_what_peft_merges(name: str, tmp_path: Path) -> None:
    config, targets = MIXTURES[name]
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base", save_original_format=False)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets, rank_pattern={}, **LM
        ),
    )
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found = merged(tmp_path)
    old = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(not torch.equal(found[key], old[key]) for key in old) == 2 * (len(targets) + 1)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=2e-6)


def test_dora_of_a_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3))
    for directory in ("base", "adapter"):
        (tmp_path / directory).mkdir()
    save_file(
        {f"net.{key}": value.clone() for key, value in net.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    wrapped = torch.nn.Module()
    wrapped.net = net
    model = peft.get_peft_model(wrapped, peft.LoraConfig(r=4, target_modules=["net.0"], use_dora=True))
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    for key, tensor in merged(tmp_path).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "ADAPTION_PROMPT", "XLORA"])
def test_what_no_weight_can_hold_is_refused_with_what_can_be_done(kind: str, tmp_path: Path) -> None:
    trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    changed(tmp_path / "adapter", peft_type=kind)
    with pytest.raises(PlanError) as caught:
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    said = str(caught.value)
    assert f"the adapter is {kind}" in said
    assert "merge it with peft" not in said and "without --lora" in said


@pytest.mark.parametrize("kind", ["BOFT", "HRA", "FOURIERFT", "C3A", "RANDLORA"])
def test_a_kind_that_is_not_computed_here_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    changed(tmp_path / "adapter", peft_type=kind)
    with pytest.raises(PlanError, match=f"the adapter is {kind}, which is not merged here"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_vera_without_its_shared_matrices_is_refused(tmp_path: Path) -> None:
    written(LLAMA, peft.VeraConfig(r=4, target_modules=ATTENTION, save_projection=False, **LM), tmp_path)
    with pytest.raises(PlanError, match="save it with save_projection=True"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_rows_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    settings = peft.TrainableTokensConfig(token_indices=[5, 0], target_modules=["embed_tokens"], **LM)
    written(LLAMA, settings, tmp_path)
    changed(tmp_path / "adapter", token_indices=[5])
    with pytest.raises(PlanError, match="has 2 rows for it, and its config names 1"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    changed(tmp_path / "adapter", token_indices=[5, 96])
    with pytest.raises(PlanError, match="has a row 96 for it, and the base 96 rows"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def as_two_runs(tmp_path: Path, first: dict[str, Any], **options: Any) -> None:
    """One run with an adapter is what two are: the recipe first, and the adapter into what that makes."""
    streamconv.convert(tmp_path / "source", tmp_path / "plain", engine="inline", **first)
    streamconv.convert(tmp_path / "plain", tmp_path / "two", lora=tmp_path / "adapter", engine="inline")
    streamconv.convert(
        tmp_path / "source", tmp_path / "out", lora=tmp_path / "adapter", engine="inline", **options
    )
    out, two, plain = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "two", "plain"))
    assert out.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in out.items())
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in out.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("options", [{}, {"recipe": "dequantise"}])
def test_a_quantised_base_is_made_plain_first(options: dict[str, Any], tmp_path: Path) -> None:
    trained(LLAMA, {"target_modules": ATTENTION}, tmp_path, torch.bfloat16)
    streamconv.convert(tmp_path / "base", tmp_path / "source", recipe="bf16-fp8", engine="inline")
    as_two_runs(tmp_path, {"recipe": "dequantise"}, **options)
    notes = streamconv.plan(tmp_path / "source", lora=tmp_path / "adapter").notes
    assert any("the base is quantised: it is made plain first" in note for note in notes)


def test_an_adapter_may_have_the_names_that_a_recipe_gives(tmp_path: Path) -> None:
    chatglm.write(tmp_path / "source", chatglm.Config())
    streamconv.convert(tmp_path / "source", tmp_path / "llama", to_arch="llama", engine="inline")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ATTENTION, **LM))
    with torch.no_grad():
        for parameter in (each for each in tuned.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    as_two_runs(tmp_path, {"to_arch": "llama"}, to_arch="llama")
