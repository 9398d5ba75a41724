"""LoRA adapters of MindFormers as peft's and back, against peft itself and MindFormers' own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from mindformers_contract import Tensors, assert_same, saved, tensors_of
from recipe_contract import contents
from reference_models import chatglm
from safetensors.torch import load_file, save_file
from test_recipe_mindformers_llama import SIZES, llama_name

import streamconv
from streamconv.errors import PlanError

MODULES = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 3, 12
SPELLINGS = {
    "mindpet": ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
    "mindpet as declared": ("mindpet_delta_lora_A", "mindpet_delta_lora_B"),
    "tk": ("tk_delta_lora_a", "tk_delta_lora_b"),
    "bare": ("lora_a", "lora_b"),
    "core": ("lora_A.weight", "lora_B.weight"),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A Llama in `base` and an adapter of peft for it, with random factors."""
    base = saved(hf.LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.25, target_modules=MODULES
    )
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def as_mindformers(adapter: Path, spelling: str) -> Tensors:
    a, b = SPELLINGS[spelling]
    made: Tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = llama_name(name.removeprefix("base_model.model."))
        made[name.replace("lora_A.weight", a).replace("lora_B.weight", b)] = tensor
    return made


def settings(directory: Path, **changes: Any) -> Path:
    path = directory / "pet.json"
    path.write_text(json.dumps({"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.25} | changes))
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_what_peft_saved(spelling: str, adapter: Path, tmp_path: Path) -> None:
    """With the dot before `lora_B` that MindFormers' own way back loses, and the prefix that it leaves off."""
    save_file(as_mindformers(adapter, spelling), tmp_path / "mf.safetensors")
    made = tmp_path / "made"
    streamconv.convert(
        tmp_path / "mf.safetensors",
        made,
        recipe="mindformers-llama-lora",
        config=settings(tmp_path),
        engine="inline",
    )
    assert contents(made) == contents(adapter)
    assert any(name.endswith("q_proj.lora_B.weight") for name in contents(made))
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, ALPHA, 0.25)
    assert sorted(config["target_modules"]) == sorted(MODULES)
    assert not (made / "config.json").exists()


def test_peft_loads_it_and_computes_the_same(adapter: Path, tmp_path: Path) -> None:
    save_file(as_mindformers(adapter, "mindpet"), tmp_path / "mf.safetensors")
    made = tmp_path / "made"
    streamconv.convert(
        tmp_path / "mf.safetensors",
        made,
        recipe="mindformers-llama-lora",
        config=settings(tmp_path),
        engine="inline",
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        models = [
            peft.PeftModel.from_pretrained(
                hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), each
            ).eval()
            for each in (adapter, made)
        ]
        assert_alike(*(model(ids).logits for model in models), terms_of(models[0]))


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_way_there_writes_the_present_names(prefixed: bool, adapter: Path, tmp_path: Path) -> None:
    if not prefixed:
        state = load_file(adapter / "adapter_model.safetensors")
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
        save_file(state, adapter / "adapter_model.safetensors")
    made = tmp_path / "made"
    streamconv.convert(
        adapter,
        made,
        recipe="mindformers-llama-lora",
        reverse=True,
        config=adapter / "adapter_config.json",
        engine="inline",
    )
    assert_same(tensors_of(made), as_mindformers(adapter, "mindpet"))
    config = json.loads((made / "adapter_config.json").read_text())
    assert config == {
        "pet_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.25,
        "target_modules": ".*w2|.*wq|.*wv",
    }


def test_a_checkpoint_of_base_and_adapter_is_taken_apart_and_merged(adapter: Path, tmp_path: Path) -> None:
    """As training saves it, against what MindFormers' own merge makes of it: W + B @ A * alpha / rank."""
    base = {llama_name(name): tensor for name, tensor in tensors_of(tmp_path / "base").items()}
    factors = as_mindformers(adapter, "mindpet")
    (tmp_path / "mf").mkdir()
    slots = {f"adam_m.{name}": tensor * 2 for name, tensor in factors.items()}
    save_file({**base, **factors, **slots}, tmp_path / "mf/model.safetensors")
    taken, merged = tmp_path / "taken", tmp_path / "merged"
    streamconv.convert(
        tmp_path / "mf", taken, recipe="mindformers-llama-lora", config=settings(tmp_path), engine="inline"
    )
    assert contents(taken) == contents(adapter)
    config = tmp_path / "base/config.json"
    with pytest.raises(PlanError, match=r"a LoRA of MindFormers, not merged.*--lora"):
        streamconv.plan(tmp_path / "mf", recipe="mindformers-llama", config=config)
    streamconv.convert(
        tmp_path / "mf",
        tmp_path / "hf",
        recipe="mindformers-llama",
        config=config,
        drop=["*delta_lora_*"],
        engine="inline",
    )
    assert contents(tmp_path / "hf") == contents(tmp_path / "base")
    streamconv.convert(tmp_path / "hf", merged, lora=taken, engine="inline")
    streamconv.convert(merged, tmp_path / "merged-mf", to_arch="mindformers", engine="inline")
    found = tensors_of(tmp_path / "merged-mf")
    for name, tensor in base.items():
        a = factors.get(name.replace(".weight", ".mindpet_delta_lora_a"))
        if a is not None:
            b = factors[name.replace(".weight", ".mindpet_delta_lora_b")]
            tensor = tensor + torch.mm(b, a) * (ALPHA / RANK)
        assert_alike(found[name], tensor, RANK + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lora_rank": 8}, "rank is 8; the factors have 3"), ({"lora_alpha": None}, None)],
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any], message: str | None, adapter: Path, tmp_path: Path
) -> None:
    save_file(as_mindformers(adapter, "mindpet"), tmp_path / "mf.safetensors")
    path = settings(tmp_path, **changes)
    if message is None:  # not there at all
        path.write_text(json.dumps({"lora_rank": RANK}))
    with pytest.raises(PlanError, match=message or "it has no 'lora_alpha'"):
        streamconv.plan(tmp_path / "mf.safetensors", recipe="mindformers-llama-lora", config=path)


def test_a_factor_without_the_other_is_named(adapter: Path, tmp_path: Path) -> None:
    state = as_mindformers(adapter, "mindpet")
    lost = "model.layers.1.attention.wv.mindpet_delta_lora_b"
    del state[lost]
    save_file(state, tmp_path / "mf.safetensors")
    with pytest.raises(PlanError, match=lost):
        streamconv.plan(
            tmp_path / "mf.safetensors", recipe="mindformers-llama-lora", config=settings(tmp_path)
        )


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "alpha_pattern"])
def test_what_mindformers_cannot_hold_is_refused(key: str, adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"q_proj": 3}}))
    with pytest.raises(PlanError, match="mindformers-llama-lora cannot do it"):
        streamconv.plan(adapter, recipe="mindformers-llama-lora", reverse=True, config=path)


def test_a_fused_projection_keeps_its_adapter(tmp_path: Path) -> None:
    chatglm.write(tmp_path / "hf", chatglm.Config(), form="safetensors")
    module = "transformer.encoder.layers.0.self_attention.query_key_value"
    factors = {
        f"{module}.tk_delta_lora_a": torch.rand(2, 64),
        f"{module}.tk_delta_lora_b": torch.rand(128, 2),
    }
    save_file(factors, tmp_path / "mf.safetensors")
    made = tmp_path / "made"
    path = settings(tmp_path, lora_rank=2)
    streamconv.convert(
        tmp_path / "mf.safetensors", made, recipe="mindformers-glm-n-lora", config=path, engine="inline"
    )
    assert contents(made).keys() == {
        f"base_model.model.{module}.lora_A.weight",
        f"base_model.model.{module}.lora_B.weight",
    }
    streamconv.convert(tmp_path / "hf", tmp_path / "merged", lora=made, engine="inline")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "merged")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{module}.weight"}
