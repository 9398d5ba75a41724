"""Llama as torchtitan saves it with torch.distributed.checkpoint: against Meta's arithmetic, which it shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from comparing import assert_alike, terms_of
from recipe_contract import RecipeContract, load
from test_recipe_meta_llama import DIM, FFN, HEADS, KV, LAYERS, VOCAB, logits

import streamconv

CURRENT = {"wq": "qkv_linear.wq", "wk": "qkv_linear.wk", "wv": "qkv_linear.wv"}


def config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, vocab_size=VOCAB, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip


def weights(*, current: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def attention(name: str) -> str:
        return f"attention.{CURRENT.get(name, name) if current else name}.weight"

    state = {"tok_embeddings.weight": random(VOCAB, DIM), "norm.weight": random(DIM) + 1}
    for layer in range(LAYERS):
        before = f"layers.{layer}."
        state |= {
            before + attention("wq"): random(DIM, DIM),
            before + attention("wk"): random(DIM // HEADS * KV, DIM),
            before + attention("wv"): random(DIM // HEADS * KV, DIM),
            before + attention("wo"): random(DIM, DIM),
            before + "feed_forward.w1.weight": random(FFN, DIM),
            before + "feed_forward.w2.weight": random(DIM, FFN),
            before + "feed_forward.w3.weight": random(FFN, DIM),
            before + "attention_norm.weight": random(DIM) + 1,
            before + "ffn_norm.weight": random(DIM) + 1,
        }
    state["lm_head.weight" if current else "output.weight"] = random(VOCAB, DIM)
    return state


def save(directory: Path, state: dict[str, torch.Tensor]) -> None:
    """A step of a run: the model's names at the top, and the run's own state beside them."""
    optimizer = {
        f"optimizer.state.{name}.exp_avg": torch.rand_like(tensor) for name, tensor in state.items()
    } | {"optimizer.param_groups.layers.0.lr": 0.1}
    train = {"train_state": {"step": torch.tensor(7)}, "lr_scheduler": {"last_epoch": 7}}
    dcp.save({**state, **optimizer, **train}, checkpoint_id=directory, no_dist=True)


class TestTorchtitan(RecipeContract):
    recipe = "torchtitan-llama"
    current = True

    @pytest.fixture(params=["F32", "BF16"])
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[request.param]
        save(tmp_path / "step-7", weights(current=self.current, dtype=dtype))
        config().save_pretrained(tmp_path / "step-7")
        return tmp_path / "step-7"

    def test_the_same_logits(self, tmp_path: Path) -> None:
        state = weights(current=self.current)
        save(tmp_path / "step-7", state)
        config().save_pretrained(tmp_path / "hf")
        streamconv.convert(tmp_path / "step-7", tmp_path / "out", to_arch="llama", like=tmp_path / "hf")
        plain = {
            name.replace("qkv_linear.", "").replace("lm_head", "output"): tensor
            for name, tensor in state.items()
        }
        ids = torch.arange(12).reshape(1, 12) * 7 % VOCAB
        with torch.no_grad():
            model = load(tmp_path / "out")
            assert_alike(model(ids).logits[0], logits(plain, ids), terms_of(model))


class TestTorchtitanUntil2025(TestTorchtitan):
    recipe = "torchtitan2025-llama"
    current = False


def test_moments_keep_the_runs_own_names(tmp_path: Path) -> None:
    state = weights(current=True)
    save(tmp_path / "step-7", state)
    opened = streamconv.open(tmp_path / "step-7", optimizer=True)
    assert {name for name in opened if name.startswith("optimizer/exp_avg/")} == {
        f"optimizer/exp_avg/{name}" for name in state
    }
