"""Llama in Meta's own layout: against Meta's arithmetic, and back to Meta's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_alike, terms_of
from recipe_contract import contents, load

import streamconv
from streamconv.errors import PlanError

DIM, HEADS, KV, FFN, LAYERS, VOCAB = 64, 4, 2, 96, 2, 80


def write(directory: Path, dtype: torch.dtype = torch.float32, **params: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    head = DIM // HEADS

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) / shape[-1] ** 0.5

    state = {"tok_embeddings.weight": torch.randn(VOCAB, DIM), "norm.weight": torch.rand(DIM) + 0.5}
    for i in range(LAYERS):
        p = f"layers.{i}."
        state |= {
            p + "attention.wq.weight": random(HEADS * head, DIM), p + "attention.wk.weight": random(KV * head, DIM),
            p + "attention.wv.weight": random(KV * head, DIM), p + "attention.wo.weight": random(DIM, HEADS * head),
            p + "feed_forward.w1.weight": random(FFN, DIM), p + "feed_forward.w2.weight": random(DIM, FFN),
            p + "feed_forward.w3.weight": random(FFN, DIM), p + "attention_norm.weight": torch.rand(DIM) + 0.5,
            p + "ffn_norm.weight": torch.rand(DIM) + 0.5,
        }  # fmt: skip
    state["output.weight"] = random(VOCAB, DIM)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    directory.mkdir()
    torch.save(state, directory / "consolidated.00.pth")
    content = {
        "dim": DIM,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (directory / "params.json").write_text(json.dumps(content | params))
    return state


def logits(state: dict[str, torch.Tensor], ids: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Meta's forward pass: rotation as a product of complex numbers over neighbouring channels."""
    head, length = DIM // HEADS, ids.shape[1]
    angles = torch.outer(
        torch.arange(length).float(), 1.0 / theta ** (torch.arange(0, head, 2).float() / head)
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    x = state["tok_embeddings.weight"][ids[0]]
    for i in range(LAYERS):
        p = f"layers.{i}."
        h = norm(x, state[p + "attention_norm.weight"])
        q = rotated((h @ state[p + "attention.wq.weight"].T).view(length, HEADS, head))
        k = rotated((h @ state[p + "attention.wk.weight"].T).view(length, KV, head)).repeat_interleave(
            HEADS // KV, 1
        )
        v = (h @ state[p + "attention.wv.weight"].T).view(length, KV, head).repeat_interleave(HEADS // KV, 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
        )
        x = x + mixed.transpose(0, 1).reshape(length, -1) @ state[p + "attention.wo.weight"].T
        h = norm(x, state[p + "ffn_norm.weight"])
        gated = torch.nn.functional.silu(h @ state[p + "feed_forward.w1.weight"].T) * (
            h @ state[p + "feed_forward.w3.weight"].T
        )
        x = x + gated @ state[p + "feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def test_logits_are_those_of_the_original(tmp_path: Path) -> None:
    state = write(tmp_path / "meta", rope_theta=500000.0)
    streamconv.convert(tmp_path / "meta", tmp_path / "hf", to_arch="llama", engine="inline")
    ids = torch.arange(40)[None]
    model = load(tmp_path / "hf")
    assert_alike(model(ids).logits[0], logits(state, ids, 500000.0), terms_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_and_back_it_is_metas_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = write(tmp_path / "meta", dtype)
    streamconv.convert(tmp_path / "meta", tmp_path / "hf", recipe="meta-llama", engine="inline")
    streamconv.convert(tmp_path / "hf", tmp_path / "back", to_arch="meta", to="torch", engine="inline")
    after = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert (params["dim"], params["n_kv_heads"], params["vocab_size"]) == (DIM, KV, VOCAB)
    streamconv.convert(tmp_path / "back", tmp_path / "again", recipe="meta-llama", engine="inline")
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")


def test_the_scaled_rotation_of_later_releases(tmp_path: Path) -> None:
    write(tmp_path / "meta", use_scaled_rope=True, rope_theta=500000.0)
    streamconv.convert(tmp_path / "meta", tmp_path / "hf", recipe="meta-llama", engine="inline")
    model = load(tmp_path / "hf")
    assert model.config.rope_parameters["rope_type"] == "llama3"


def test_one_of_several_files_is_not_the_model(tmp_path: Path) -> None:
    state = write(tmp_path / "meta")
    for name in state:
        if name.endswith(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")):
            state[name] = state[name].chunk(2)[0].clone()
    torch.save(state, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(PlanError, match=r"layers\.0\.attention\.wq\.weight"):
        streamconv.plan(tmp_path / "meta", recipe="meta-llama")
