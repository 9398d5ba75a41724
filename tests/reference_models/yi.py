"""Yi, as first released (`model_type` Yi): Llama with other names for two norms.

The arithmetic is that of the modeling_yi.py published with 01-ai/Yi-6B, before its checkpoints took Llama's names.
"""

from __future__ import annotations

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
    causal_attention,
    frequencies,
    rotate_halves,
    rotation,
    span,
    split_heads,
)
from reference_models.llama_naming import Backbone, Layer


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are tiny by default."""

    vocab_size: int = 128
    hidden_size: int = 64
    intermediate_size: int = 112
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 64
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 5000000.0
    use_cache: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"
    transformers_version: str = "4.34.0"

    def identity(self) -> dict[str, Any]:
        """As in the first releases."""
        return {
            "model_type": "Yi",
            "architectures": ["YiForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_yi.YiConfig",
                "AutoModel": "modeling_yi.YiModel",
                "AutoModelForCausalLM": "modeling_yi.YiForCausalLM",
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
YI_6B = Config(
    vocab_size=64000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=4096,
)


class Attention(nn.Module):
    """Llama's, without biases."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        keys = self.groups * (hidden // self.heads)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        query = rotate_halves(split_heads(self.q_proj(x), self.heads), turn)
        key = rotate_halves(split_heads(self.k_proj(x), self.groups), turn)
        value = split_heads(self.v_proj(x), self.groups)
        result: Tensor = self.o_proj(causal_attention(query, key, value, memory))
        return result


class Model(nn.Module):
    """The language model."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        layers = (
            Layer(Attention(config), hidden, config.intermediate_size, eps, norms=("ln1", "ln2"))
            for _ in range(config.num_hidden_layers)
        )
        self.model = Backbone(config.vocab_size, hidden, layers, eps)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.to(dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        channels = self.config.hidden_size // self.config.num_attention_heads
        inverse_wavelengths = frequencies(self.config.rope_theta, channels)
        turn = rotation(inverse_wavelengths, *span(ids, cache), self.lm_head.weight.dtype)
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
