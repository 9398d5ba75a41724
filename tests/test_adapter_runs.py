"""A LoRA of peft in the checkpoint of a training run: out of it as peft loads it, or merged into the base beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers as hf
from comparing import assert_alike, terms_of
from recipe_contract import load
from safetensors.torch import load_file, save_file
from test_lora import ATTENTION, LLAMA, trained

import streamconv
from streamconv.errors import PlanError, UsageError

State = dict[str, torch.Tensor]
OPTIONS = {
    "target_modules": [*ATTENTION, "embed_tokens"],
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"v_proj": 2},
}


def in_torch(state: State, path: Path) -> None:
    path.mkdir()
    torch.save(
        {"module": {f"module.{name}": value for name, value in state.items()}}, path / "pytorch_model.bin"
    )


def in_safetensors(state: State, path: Path) -> None:
    """As accelerate's `save_state` does."""
    path.mkdir()
    save_file(
        {name: value.clone() for name, value in state.items()}, path / "model.safetensors", {"format": "pt"}
    )


def in_dcp(state: State, path: Path) -> None:
    """As FSDP2 and torch.distributed.checkpoint do."""
    dcp.save(
        {"model": {f"_fsdp_wrapped_module.{name}": value for name, value in state.items()}},
        checkpoint_id=path,
    )


RUNS: dict[str, Callable[[State, Path], None]] = {
    "torch": in_torch,
    "safetensors": in_safetensors,
    "dcp": in_dcp,
}


def run(model: Any, write: Callable[[State, Path], None], tmp_path: Path, *, alone: bool) -> Path:
    state = model.state_dict()
    if alone:
        state = {name: value for name, value in state.items() if "lora_" in name or "modules_to_save" in name}
    path = tmp_path / "run"
    write(state, path)
    return path


def logits(model: Any) -> torch.Tensor:
    made: torch.Tensor = model(torch.arange(20)[None]).logits
    return made


@pytest.mark.parametrize("write", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("alone", [True, False])
def test_the_adapter_comes_out_as_peft_loads_it(alone: bool, write: Any, tmp_path: Path) -> None:
    model = trained(LLAMA, OPTIONS, tmp_path)
    path = run(model, write, tmp_path, alone=alone)
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", path)
    options = {} if alone else {"keep_lora": True}
    streamconv.convert(path, tmp_path / "out", engine="inline", **options)
    found, saved = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("out", "adapter"))
    base = {name for name in saved if "base_layer" in name}  # which peft saves along with an embedding
    assert found.keys() == saved.keys() - base
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("write", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_frozen_base_and_its_factors_come_out_merged(
    scale: float | None, write: Any, tmp_path: Path
) -> None:
    model = trained(LLAMA, OPTIONS | {"rank_pattern": {}}, tmp_path)
    path = run(model, write, tmp_path, alone=False)
    if scale is None:
        shutil.copy(tmp_path / "adapter" / "adapter_config.json", path)
    options: dict[str, Any] = {} if scale is None else {"lora_scale": scale}
    streamconv.convert(
        path, tmp_path / "out", config=tmp_path / "base" / "config.json", engine="inline", **options
    )
    made = load(tmp_path / "out")
    assert_alike(logits(made), logits(model), terms_of(made))


@pytest.mark.parametrize("alone", [True, False])
def test_a_scale_that_nothing_says_is_not_guessed(alone: bool, tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    path = run(model, in_torch, tmp_path, alone=alone)
    with pytest.raises(PlanError, match="with --lora-scale"):
        streamconv.plan(path)
    if alone:
        streamconv.convert(path, tmp_path / "out", lora_scale=2.0, engine="inline")
        plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "out")), logits(model))


def test_a_config_that_is_made_up_names_the_layers_that_have_factors(tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION, "layers_to_transform": [1]}, tmp_path)
    path = run(model, in_torch, tmp_path, alone=True)
    streamconv.convert(path, tmp_path / "out", lora_scale=2.0, engine="inline")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    assert made.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(made), logits(model))


def test_a_run_is_merged_into_another_base(tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    path = run(model, in_dcp, tmp_path, alone=True)
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", path)
    streamconv.convert(tmp_path / "base", tmp_path / "out", lora=path, engine="inline")
    streamconv.convert(tmp_path / "base", tmp_path / "same", lora=tmp_path / "adapter", engine="inline")
    out, same = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("out", "same"))
    assert out == same


def test_several_adapters_in_a_run_are_named(tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    path = run(model, in_torch, tmp_path, alone=False)
    with pytest.raises(PlanError, match="there are 2 adapters in it: default, other"):
        streamconv.plan(path, lora_scale=1.0)


def test_keeping_is_for_what_there_is(tmp_path: Path) -> None:
    trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    with pytest.raises(UsageError, match="--keep-lora has no effect"):
        streamconv.plan(tmp_path / "base", keep_lora=True)
