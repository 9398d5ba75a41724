"""Fused projections apart and together: what each class of transformers itself takes them for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from recipe_contract import RecipeContract, contents, load, shapes_of
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.plans import named

HEADS, DIM, HIDDEN = 4, 8, 32
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FALCON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": 64,
    **IDS,
}
MODELS: dict[str, tuple[str, Any]] = {
    "GPT-2": ("gpt2-split", hf.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=HEADS, vocab_size=64, n_positions=48, **IDS)),
    "BLOOM": ("bloom-split", hf.BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=HEADS, vocab_size=64, **IDS)),
    "GPT-NeoX": (
        "neox-split",
        hf.GPTNeoXConfig(
            hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=64, intermediate_size=48, **IDS
        ),
    ),
    "Falcon-7B": ("falcon-split", hf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True, bias=False)),
    "Falcon-40B": ("falcon-split", hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)),
    "Falcon-RW": (
        "falcon-split", hf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True)
    ),
    "Falcon-11B": (
        "falcon-split",
        hf.FalconConfig(
            **FALCON, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False
        ),
    ),
}  # fmt: skip


def saved(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MODELS[name][1]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.8 if parameter.ndim == 1 else 0))
    model.save_pretrained(directory)
    return model


def their_split(model: Any, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of the first layer as the class's own code makes them, `[tokens, heads * DIM]`."""
    kind = model.config.model_type
    if kind == "gpt2":
        return model.transformer.h[0].attn.c_attn(states).split(HIDDEN, dim=-1)
    if kind == "gpt_neox":
        fused = model.gpt_neox.layers[0].attention.query_key_value(states)
        parts = fused.view(len(states), HEADS, 3 * DIM).chunk(3, dim=-1)
        return tuple(part.reshape(len(states), -1) for part in parts)
    attention = model.transformer.h[0].self_attention
    fused = attention.query_key_value(states)[None]
    if kind == "bloom":
        parts = attention._reshape(fused)
        query, key, value = (part.transpose(1, 2) for part in parts)
        return tuple(part.reshape(len(states), -1) for part in (query, key, value))
    query, key, value = attention._split_heads(fused)
    if model.config.new_decoder_architecture:  # its keys are repeated for every query of their group
        groups = HEADS // model.config.num_kv_heads
        key, value = key[:, :, ::groups], value[:, :, ::groups]
    return tuple(part.reshape(len(states), -1) for part in (query, key, value))


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_are_what_the_class_takes_them_for(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    made = load_file(tmp_path / "split" / "model.safetensors")
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
    for part, expected in zip("qkv", their_split(model, states), strict=True):
        (weight,) = [made[key] for key in made if ".0." in key and key.endswith(f".{part}_proj.weight")]
        bias = [made[key] for key in made if ".0." in key and key.endswith(f".{part}_proj.bias")]
        found = torch.nn.functional.linear(states, weight, *bias)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_and_back_it_is_the_model_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(name, tmp_path / "source", dtype)
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    arch = named(MODELS[name][0]).source
    assert arch is not None
    streamconv.convert(tmp_path / "split", tmp_path / "back", to_arch=arch.name, engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")
    ids = torch.arange(16)[None]
    assert torch.equal(load(tmp_path / "back")(ids).logits, load(tmp_path / "source")(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_model(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "source")
    arch = named(MODELS[name][0]).source
    assert arch is not None
    table = arch.tensors(arch.sizes_of(json.loads((tmp_path / "source" / "config.json").read_text())))
    real = shapes_of(tmp_path / "source")
    assert {key: each.shape for key, each in table.items() if key in real} == real
    assert {key for key, each in table.items() if not each.optional} <= set(real)


def test_gpt2_in_the_order_of_heads(tmp_path: Path) -> None:
    model = saved("GPT-2", tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "out", to_arch="per-head", engine="inline")
    made = load_file(tmp_path / "out" / "model.safetensors")
    fused = model.transformer.h[1].attn.c_attn
    wanted = fused.weight.T.reshape(3, HEADS, DIM, HIDDEN).transpose(0, 1).reshape(3 * HIDDEN, HIDDEN)
    assert torch.equal(made["transformer.h.1.attn.c_attn.weight"], wanted)
    wanted = fused.bias.reshape(3, HEADS, DIM).transpose(0, 1).reshape(-1)
    assert torch.equal(made["transformer.h.1.attn.c_attn.bias"], wanted)
    assert torch.equal(made["transformer.h.1.mlp.c_fc.weight"], model.transformer.h[1].mlp.c_fc.weight.T)
    streamconv.convert(
        tmp_path / "out", tmp_path / "back", recipe="gpt2-per-head", reverse=True, engine="inline"
    )
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_gpt2_without_its_head_and_with_its_masks(tmp_path: Path) -> None:
    """As the published gpt2 is: names of the bare model, and a mask in every layer."""
    saved("GPT-2", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in range(2)}
    save_file(state, file, {"format": "pt"})
    plan = streamconv.plan(tmp_path / "source", to_arch="split")
    assert any("leaves off" in note for note in plan.notes)
    assert {dropped.name for dropped in plan.dropped} == {"h.0.attn.bias", "h.1.attn.bias"}
    assert all(tensor.spec.name.startswith("transformer.") for tensor in plan.tensors)


class TestGpt2(RecipeContract):
    recipe = "gpt2-split"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        saved("GPT-2", tmp_path / "source")
        return tmp_path / "source"


class TestFalcon(RecipeContract):
    recipe = "falcon-split"

    @pytest.fixture(params=["Falcon-7B", "Falcon-40B", "Falcon-RW"])
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        saved(request.param, tmp_path / "source")
        return tmp_path / "source"
