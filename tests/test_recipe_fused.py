"""Fused projections apart and together: what each class of transformers itself takes them for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from recipe_contract import RecipeContract, contents, load, shapes_of
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import streamconv
from streamconv.errors import PlanError
from streamconv.plans import named

HEADS, DIM, HIDDEN, LAYERS = 4, 8, 32, 2
IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 48, **IDS}
BLOOM = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, **IDS}
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, **IDS}
NEOX = {**SIZES, "intermediate_size": 48}
GROUPED = {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}
MODELS: dict[str, tuple[str, Any]] = {
    "GPT-2": ("gpt2-split", hf.GPT2Config(**GPT2)),
    "GPT-2 untied, narrow": ("gpt2-split", hf.GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False)),
    "BLOOM": ("bloom-split", hf.BloomConfig(**BLOOM)),
    "BLOOM untied": ("bloom-split", hf.BloomConfig(**BLOOM, tie_word_embeddings=False)),
    "GPT-NeoX": ("neox-split", hf.GPTNeoXConfig(**NEOX)),
    "GPT-NeoX tied, without bias": (
        "neox-split", hf.GPTNeoXConfig(**NEOX, attention_bias=False, tie_word_embeddings=True)
    ),
    "Falcon-7B": ("falcon-split", hf.FalconConfig(**SIZES, multi_query=True, parallel_attn=True, bias=False)),
    "Falcon-40B": ("falcon-split", hf.FalconConfig(**GROUPED)),
    "Falcon-40B, biased, a key for each query": (
        "falcon-split", hf.FalconConfig(**SIZES, new_decoder_architecture=True, bias=True)
    ),
    "Falcon-RW": (
        "falcon-split", hf.FalconConfig(**SIZES, multi_query=False, parallel_attn=False, alibi=True, bias=True)
    ),
    "Falcon-11B": (
        "falcon-split", hf.FalconConfig(**GROUPED, num_ln_in_parallel_attn=1, tie_word_embeddings=False)
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


def edited(directory: Path, **changes: Any) -> dict[str, Any]:
    """A config with other keys; None takes one away."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return config


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


class _Given(torch.nn.Module):
    """Gives the same, whatever comes."""

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.result


def _record(module: Any, *states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """Attention that only keeps what it is asked for: `[1, heads, tokens, DIM]` each."""
    module.recorded = states[:3]
    return torch.zeros(1, states[0].shape[2], HEADS, DIM), None


hf.AttentionInterface.register("recorded", _record)


def attention_of(model: Any, layer: int) -> tuple[str, Any]:
    """Its name and its module."""
    base = "gpt_neox.layers" if model.config.model_type == "gpt_neox" else "transformer.h"
    leaf = {"gpt2": "attn", "gpt_neox": "attention"}.get(model.config.model_type, "self_attention")
    name = f"{base}.{layer}.{leaf}"
    return name, model.get_submodule(name)


def their_parts(model: Any, attention: Any, fused: torch.Tensor) -> list[torch.Tensor]:
    """What the class's own code makes of `fused [tokens, out]`: queries, keys, values `[tokens, rows]`."""
    kind, tokens = model.config.model_type, len(fused)
    if kind in ("gpt2", "gpt_neox"):
        model.config._attn_implementation = "recorded"
        name = "c_attn" if kind == "gpt2" else "query_key_value"
        real = getattr(attention, name)
        setattr(attention, name, _Given(fused[None]))
        turn = {}
        if kind == "gpt_neox":  # by no angle
            rotating = (1, tokens, attention.rotary_ndims)
            turn = {"position_embeddings": (torch.ones(rotating), torch.zeros(rotating))}
        attention(torch.zeros(1, tokens, HIDDEN), attention_mask=None, **turn)
        setattr(attention, name, real)
        parts = [part.transpose(1, 2) for part in attention.recorded]
    elif kind == "bloom":
        parts = [part.transpose(1, 2) for part in attention._reshape(fused[None])]
    else:
        query, key, value = attention._split_heads(fused[None])
        if model.config.new_decoder_architecture:  # its keys are repeated for every query of their group
            groups = HEADS // model.config.num_kv_heads
            key, value = key[:, :, ::groups], value[:, :, ::groups]
        parts = [query, key, value]
    return [part.reshape(tokens, -1) for part in parts]


def expected_parts(model: Any) -> dict[str, torch.Tensor]:
    """Every split projection, as the class's own code slices the fused weights and biases."""
    made: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        name, attention = attention_of(model, layer)
        fused = attention.c_attn if hasattr(attention, "c_attn") else attention.query_key_value
        matrix = fused.weight if isinstance(fused, Conv1D) else fused.weight.T  # [in, out]
        for part, weight in zip("qkv", their_parts(model, attention, matrix), strict=True):
            made[f"{name}.{part}_proj.weight"] = weight.T
        if fused.bias is not None:
            for part, bias in zip("qkv", their_parts(model, attention, fused.bias[None]), strict=True):
                made[f"{name}.{part}_proj.bias"] = bias[0]
    return made


def unfused(model: Any) -> dict[str, torch.Tensor]:
    """All other tensors of a model, with every matrix `[out, in]`."""
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if not module.endswith(("c_attn", "query_key_value")):
            turned = isinstance(model.get_submodule(module), Conv1D) and leaf == "weight"
            state[name] = tensor.T if turned else tensor
    if model.config.model_type == "gpt_neox":
        state["embed_out.weight"] = state.pop("lm_head.weight")  # in files
    return state


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_parts_are_what_the_class_takes_them_for(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    made = state_of(tmp_path / "split")
    expected = expected_parts(model) | unfused(model)
    tied = set(expected) - set(made)
    assert tied <= ({"lm_head.weight", "embed_out.weight"} if model.config.tie_word_embeddings else set())
    assert set(made) <= set(expected)
    for key, tensor in made.items():
        assert torch.equal(tensor, expected[key]), key


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_three_layers_in_the_place_of_one_give_what_the_class_computes(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    made = state_of(tmp_path / "split")
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        base, attention = attention_of(model, layer)
        fused = attention.c_attn if hasattr(attention, "c_attn") else attention.query_key_value
        for part, expected in zip("qkv", their_parts(model, attention, fused(states)), strict=True):
            bias = made.get(f"{base}.{part}_proj.bias")
            found = torch.nn.functional.linear(states, made[f"{base}.{part}_proj.weight"], bias)
            assert_alike(found, expected, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_and_back_it_is_the_model_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(name, tmp_path / "source", dtype)
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    arch = named(MODELS[name][0]).source
    assert arch is not None
    streamconv.convert(tmp_path / "split", tmp_path / "back", to_arch=arch.name, engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")
    configs = [
        json.loads((tmp_path / each / "config.json").read_text()) for each in ("source", "split", "back")
    ]
    assert configs[2] == configs[0]
    assert configs[1] == {**configs[0], "qkv_layout": "split"}
    if dtype == torch.float32:
        ids = torch.arange(16)[None]
        before, after = (load(tmp_path / each) for each in ("source", "back"))
        assert_alike(after(ids).logits, before(ids).logits, terms_of(before))


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_model(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "source")
    arch = named(MODELS[name][0]).source
    assert arch is not None
    table = arch.tensors(arch.sizes_of(json.loads((tmp_path / "source" / "config.json").read_text())))
    real = shapes_of(tmp_path / "source")
    if arch.name == "neox":
        real["embed_out.weight"] = real.pop("lm_head.weight")  # in files
    assert {key: each.shape for key, each in table.items() if key in real} == real
    assert {key for key, each in table.items() if not each.optional} <= set(real)
    written = {key: shape for key, (_, shape, _) in contents(tmp_path / "source").items()}
    assert {key: each.shape for key, each in table.items() if key in written} == written


def test_it_is_said_that_nothing_reads_it(tmp_path: Path) -> None:
    saved("BLOOM", tmp_path / "source")
    plan = streamconv.plan(tmp_path / "source", to_arch="split")
    assert any("no class of transformers reads this form" in note for note in plan.notes)


def test_gpt2_in_the_order_of_heads(tmp_path: Path) -> None:
    model = saved("GPT-2", tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "out", to_arch="per-head", engine="inline")
    made = state_of(tmp_path / "out")
    fused = model.transformer.h[1].attn.c_attn
    wanted = fused.weight.T.reshape(3, HEADS, DIM, HIDDEN).transpose(0, 1).reshape(3 * HIDDEN, HIDDEN)
    assert torch.equal(made["transformer.h.1.attn.c_attn.weight"], wanted)
    wanted = fused.bias.reshape(3, HEADS, DIM).transpose(0, 1).reshape(-1)
    assert torch.equal(made["transformer.h.1.attn.c_attn.bias"], wanted)
    for key, tensor in unfused(model).items():
        assert key == "lm_head.weight" or torch.equal(made[key], tensor), key


def test_the_order_of_heads_is_that_of_bloom(tmp_path: Path) -> None:
    """BLOOM's own code, which comes from Megatron, slices GPT-2's projection once it is in that order."""
    model, bloom = saved("GPT-2", tmp_path / "source"), saved("BLOOM", tmp_path / "bloom")
    streamconv.convert(tmp_path / "source", tmp_path / "out", to_arch="per-head", engine="inline")
    with torch.no_grad():
        expected = expected_parts(model)
        matrix = state_of(tmp_path / "out")["transformer.h.0.attn.c_attn.weight"]
        parts = their_parts(bloom, bloom.transformer.h[0].self_attention, matrix.T)
    for part, found in zip("qkv", parts, strict=True):
        assert torch.equal(found.T, expected[f"transformer.h.0.attn.{part}_proj.weight"])


def with_buffers(directory: Path, buffers: Mapping[str, torch.Tensor], without: str = "") -> set[str]:
    """Buffers of older versions put into a file whose names lose a prefix; gives the buffers' names."""
    state = {name.removeprefix(without): tensor for name, tensor in state_of(directory).items()}
    save_file(state | dict(buffers), directory / "model.safetensors", {"format": "pt"})
    return set(buffers)


def test_gpt2_without_its_head_and_with_its_masks(tmp_path: Path) -> None:
    """As the published gpt2 is: names of the bare model, and a mask in every layer."""
    saved("GPT-2", tmp_path / "source")
    mask = torch.ones(1, 1, 48, 48).tril()
    buffers = {f"h.{i}.attn.bias": mask.clone() for i in range(LAYERS)}
    buffers |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}
    names = with_buffers(tmp_path / "source", buffers, "transformer.")
    for to_arch in ("split", "per-head"):
        plan = streamconv.plan(tmp_path / "source", to_arch=to_arch)
        assert any("leaves off" in note for note in plan.notes)
        assert {dropped.name for dropped in plan.dropped} == names
        assert all(tensor.spec.name.startswith("transformer.") for tensor in plan.tensors)


def test_neox_with_its_buffers(tmp_path: Path) -> None:
    """As Pythia is published."""
    saved("GPT-NeoX", tmp_path / "source")
    before = contents(tmp_path / "source")
    of_layer = {
        "bias": torch.ones(1, 1, 48, 48).tril().bool(),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.ones(1),
    }
    buffers = {
        f"gpt_neox.layers.{i}.attention.{name}": tensor.clone()
        for i in range(LAYERS)
        for name, tensor in of_layer.items()
    }
    names = with_buffers(tmp_path / "source", buffers)
    plan = streamconv.plan(tmp_path / "source", to_arch="split")
    assert {dropped.name for dropped in plan.dropped} == names
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    streamconv.convert(tmp_path / "split", tmp_path / "back", to_arch="neox", engine="inline")
    assert contents(tmp_path / "back") == before


def test_neox_under_the_names_in_memory(tmp_path: Path) -> None:
    """`lm_head`, as transformers 5 writes it on request, leads to the same; and without a head nothing goes."""
    model = saved("GPT-NeoX", tmp_path / "source")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert "lm_head.weight" in contents(tmp_path / "memory")
    for name in ("source", "memory"):
        streamconv.convert(tmp_path / name, tmp_path / f"{name}-split", to_arch="split", engine="inline")
    assert contents(tmp_path / "memory-split") == contents(tmp_path / "source-split")
    with pytest.raises(PlanError, match=r"embed_out\.weight"):
        streamconv.plan(tmp_path / "source", to_arch="split", drop=["embed_out.weight"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "Falcon-40B",
            {
                "model_type": "RefinedWeb",
                "n_head_kv": 2,
                "new_decoder_architecture": None,
                "multi_query": None,
            },
        ),
        ("Falcon-7B", {"model_type": "RefinedWebModel", "new_decoder_architecture": None}),
        ("Falcon-RW", {"model_type": "RefinedWebModel", "new_decoder_architecture": None}),
    ],
)
def test_falcon_under_its_first_config(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Before transformers had the class: other keys, and the 40B without the one that tells it apart."""
    saved(name, tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "expected", to_arch="split", engine="inline")
    gone = dict.fromkeys(("num_kv_heads", "num_attention_heads", "num_hidden_layers", "ffn_hidden_size"))
    edited(
        tmp_path / "source", **gone, **changes, n_head=HEADS, n_layer=LAYERS, architectures=["RWForCausalLM"]
    )
    streamconv.convert(tmp_path / "source", tmp_path / "split", to_arch="split", engine="inline")
    assert contents(tmp_path / "split") == contents(tmp_path / "expected")


class TestGpt2(RecipeContract):
    recipe = "gpt2-split"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        saved("GPT-2", tmp_path / "source")
        return tmp_path / "source"


class TestGpt2PerHead(TestGpt2):
    recipe = "gpt2-per-head"


class TestBloom(RecipeContract):
    recipe = "bloom-split"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        saved("BLOOM", tmp_path / "source")
        return tmp_path / "source"


class TestNeox(RecipeContract):
    recipe = "neox-split"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        saved("GPT-NeoX", tmp_path / "source")
        return tmp_path / "source"


class TestFalcon(RecipeContract):
    recipe = "falcon-split"

    @pytest.fixture(params=["Falcon-7B", "Falcon-40B", "Falcon-RW"])
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        saved(request.param, tmp_path / "source")
        return tmp_path / "source"
