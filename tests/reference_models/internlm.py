"""InternLM, the first generation (`model_type` internlm).

The arithmetic is that of the modeling_internlm.py published with internlm/internlm-7b. Its config.json tells two
releases of that code apart: the first knows no `rotary` and stores the frequencies of every layer, the later one
can scale the base of the rotation past the trained length, and stores none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_models import files
from reference_models.configuration import ModelConfig
from reference_models.layers import (
    Cache,
    LayerCache,
    Rotation,
    StoredFrequencies,
    causal_attention,
    dynamic_base,
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
    """Sizes are tiny by default. `rotary` is e.g. `{"base": 10000, "type": "dynamic"}` (or type origin)."""

    vocab_size: int = 128
    hidden_size: int = 64
    intermediate_size: int = 112
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 64
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    bias: bool = True
    rotary: Mapping[str, Any] | None = None
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False
    torch_dtype: str = "float16"
    transformers_version: str = "4.33.1"

    def identity(self) -> dict[str, Any]:
        """As in every release of the family."""
        model = "modeling_internlm.InternLMForCausalLM"
        return {
            "model_type": "internlm",
            "architectures": ["InternLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_internlm.InternLMConfig",
                "AutoModel": model,
                "AutoModelForCausalLM": model,
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


TINY = Config()
INTERNLM_7B = Config(
    vocab_size=103168,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
)
INTERNLM_20B = Config(
    vocab_size=103168,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=60,
    num_attention_heads=40,
    max_position_embeddings=4096,
    bias=False,
    rotary={"base": 10000, "type": "dynamic"},
)


class Attention(nn.Module):
    """Llama's, with biases on all four projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.bias
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=bias)
        self.k_proj = nn.Linear(hidden, hidden, bias=bias)
        self.v_proj = nn.Linear(hidden, hidden, bias=bias)
        self.o_proj = nn.Linear(hidden, hidden, bias=bias)
        if config.rotary is None:
            self.rotary_emb = StoredFrequencies(frequencies(_BASE, hidden // self.heads))

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        query = rotate_halves(split_heads(self.q_proj(x), self.heads), turn)
        key = rotate_halves(split_heads(self.k_proj(x), self.heads), turn)
        value = split_heads(self.v_proj(x), self.heads)
        result: Tensor = self.o_proj(causal_attention(query, key, value, memory))
        return result


class Model(nn.Module):
    """The language model.

    Raises:
        ValueError: When called with a cache past the length up to which the base is fixed: the original then
            turns all earlier keys anew.
    """

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        layers = (
            Layer(Attention(config), hidden, config.intermediate_size, eps)
            for _ in range(config.num_hidden_layers)
        )
        self.model = Backbone(config.vocab_size, hidden, layers, eps)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.to(dtype)

    def _base(self, start: int, stop: int, channels: int) -> float:
        rotary = self.config.rotary or {"type": "origin", "base": _BASE}
        trained = self.config.max_position_embeddings
        if rotary["type"] == "origin":
            return float(rotary["base"])
        if start and stop > trained:
            raise ValueError(f"not modelled: a cache past {trained} tokens with dynamic NTK")
        return dynamic_base(rotary["base"], channels, rotary.get("scaling_factor", 1.0), stop, trained)

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        channels = self.config.hidden_size // self.config.num_attention_heads
        start, stop = span(ids, cache)
        inverse_wavelengths = frequencies(self._base(start, stop, channels), channels)
        turn = rotation(inverse_wavelengths, start, stop, self.lm_head.weight.dtype)
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
