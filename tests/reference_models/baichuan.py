"""Baichuan-7B and Baichuan2-7B (`model_type` baichuan). The 13B models, which have ALiBi, are not modelled.

The arithmetic is that of baichuan-inc/Baichuan-7B: models/modeling_baichuan.py, and of the modeling_baichuan.py
published with baichuan-inc/Baichuan2-7B-Base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_models import files
from reference_models.configuration import ModelConfig, not_in_json
from reference_models.layers import (
    Cache,
    LayerCache,
    Rotation,
    StoredFrequencies,
    causal_attention,
    frequencies,
    rotate_halves,
    rotation,
    span,
    split_heads,
)
from reference_models.llama_naming import Backbone, Layer

_BASE = 10000


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are tiny by default. `norm_head` makes it Baichuan2; of config.json, only class names tell."""

    norm_head: bool = not_in_json(False)
    vocab_size: int = 128
    hidden_size: int = 64
    intermediate_size: int = 112
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 64
    model_max_length: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"
    transformers_version: str = "4.29.1"

    def identity(self) -> dict[str, Any]:
        """The two releases spell their classes differently."""
        name = "Baichuan" if self.norm_head else "BaiChuan"
        return {
            "model_type": "baichuan",
            "architectures": [f"{name}ForCausalLM"],
            "auto_map": {
                "AutoConfig": f"configuration_baichuan.{name}Config",
                "AutoModelForCausalLM": f"modeling_baichuan.{name}ForCausalLM",
            },
        }

    def generation_config(self) -> dict[str, Any]:
        """What transformers derives from the config."""
        return {
            "_from_model_config": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "transformers_version": self.transformers_version,
        }

    @classmethod
    def from_json(cls, contents: Mapping[str, Any]) -> Self:
        """The config that config.json describes."""
        norm_head = contents["architectures"] == ["BaichuanForCausalLM"]
        return replace(super().from_json(contents), norm_head=norm_head)


TINY = Config()
TINY_2 = Config(norm_head=True, model_max_length=64, transformers_version="4.29.2")
BAICHUAN_7B = Config(
    vocab_size=64000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
BAICHUAN2_7B = replace(BAICHUAN_7B, norm_head=True, vocab_size=125696, model_max_length=4096)


class Attention(nn.Module):
    """`W_pack` has all queries, then all keys, then all values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if not config.norm_head:
            self.rotary_emb = StoredFrequencies(frequencies(_BASE, config.hidden_size // self.heads))

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.W_pack(x).chunk(3, dim=-1))
        query, key = rotate_halves(query, turn), rotate_halves(key, turn)
        result: Tensor = self.o_proj(causal_attention(query, key, value, memory))
        return result


class NormHead(nn.Module):
    """The head of Baichuan2: the rows of its weight are divided by their norms before use."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight))


class Model(nn.Module):
    """The language model."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        layers = (
            Layer(Attention(config), hidden, config.intermediate_size, eps)
            for _ in range(config.num_hidden_layers)
        )
        self.model = Backbone(config.vocab_size, hidden, layers, eps)
        self.lm_head = (
            NormHead(hidden, config.vocab_size)
            if config.norm_head
            else nn.Linear(hidden, config.vocab_size, bias=False)
        )
        self.to(dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        # Baichuan2 turns in float32 whatever its dtype, Baichuan1 in its dtype.
        dtype = torch.float32 if self.config.norm_head else self.lm_head.weight.dtype
        channels = self.config.hidden_size // self.config.num_attention_heads
        turn = rotation(frequencies(_BASE, channels), *span(ids, cache), dtype)
        logits: Tensor = self.lm_head(self.model(ids, turn, cache))
        return logits


def write(
    directory: Path,
    config: Config = TINY,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    form: files.Form = "bin",
) -> Model:
    """Write a checkpoint with random weights; the model that it holds."""
    return files.write(Model, directory, config, seed, dtype, shards, form, output="lm_head.weight")


def load(directory: Path) -> Model:
    """The model that a checkpoint directory holds."""
    return files.load(Model, Config, directory)
