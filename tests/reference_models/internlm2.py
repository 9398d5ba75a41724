"""InternLM2 and InternLM2.5 (`model_type` internlm2).

The arithmetic is that of the modeling_internlm2.py published with internlm/internlm2-7b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_models import files
from reference_models.configuration import ModelConfig
from reference_models.layers import (
    Cache,
    LayerCache,
    RMSNorm,
    Rotation,
    causal_attention,
    dynamic_base,
    frequencies,
    rotate_halves,
    rotation,
    span,
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are tiny by default. `rope_scaling` is e.g. `{"type": "dynamic", "factor": 2.0}` (or type linear)."""

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
    use_cache: bool = True
    bias: bool = False
    rope_theta: float = 1000000
    rope_scaling: Mapping[str, Any] | None = None
    attn_implementation: str = "eager"
    pad_token_id: int = 2
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"
    transformers_version: str = "4.41.0"

    def identity(self) -> dict[str, Any]:
        """As in every release of the family."""
        model = "modeling_internlm2.InternLM2ForCausalLM"
        return {
            "model_type": "internlm2",
            "architectures": ["InternLM2ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModelForCausalLM": model,
                "AutoModel": model,
            },
        }

    def generation_config(self) -> dict[str, Any]:
        """The tokens of the config."""
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "transformers_version": self.transformers_version,
        }


TINY = Config()
INTERNLM2_7B = Config(
    vocab_size=92544,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
)


class Attention(nn.Module):
    """`wqkv` has, group by group, the heads that ask, the key and the value."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.groups = groups
        self.askers = heads // groups
        self.wqkv = nn.Linear(hidden, (heads + 2 * groups) * (hidden // heads), bias=config.bias)
        self.wo = nn.Linear(hidden, hidden, bias=config.bias)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        # [batch, groups, heads of a group + 2, time, channels]
        mixed = self.wqkv(x).view(*x.shape[:2], self.groups, self.askers + 2, -1).permute(0, 2, 3, 1, 4)
        query = mixed[:, :, : self.askers].flatten(1, 2)
        key, value = mixed[:, :, -2], mixed[:, :, -1]
        query, key = rotate_halves(query, turn), rotate_halves(key, turn)
        result: Tensor = self.wo(causal_attention(query, key, value, memory))
        return result


class FeedForward(nn.Module):
    """`w2(silu(w1(x)) * w3(x))`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return result


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, memory)
        result: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return result


class Backbone(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, turn: Rotation, cache: Cache | None) -> Tensor:
        x = self.tok_embeddings(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, None if cache is None else cache[index])
        normal: Tensor = self.norm(x)
        return normal


class Model(nn.Module):
    """The language model. Keys are cached turned, so with dynamic scaling a cache keeps the base of its time."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)

    def _rotation(self, start: int, stop: int) -> Rotation:
        config = self.config
        base, dtype = config.rope_theta, self.output.weight.dtype
        channels = config.hidden_size // config.num_attention_heads
        scaling = config.rope_scaling or {"type": "linear", "factor": 1.0}
        factor = float(scaling["factor"])
        if scaling["type"] == "linear":
            return rotation(frequencies(base, channels), start, stop, dtype, divisor=factor)
        base = dynamic_base(base, channels, factor, stop, config.max_position_embeddings)
        return rotation(frequencies(base, channels), start, stop, dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        logits: Tensor = self.output(self.model(ids, self._rotation(*span(ids, cache)), cache))
        return logits


def write(
    directory: Path,
    config: Config = TINY,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    form: files.Form = "safetensors",
) -> Model:
    """Write a checkpoint with random weights; the model that it holds."""
    return files.write(Model, directory, config, seed, dtype, shards, form, output="output.weight")


def load(directory: Path) -> Model:
    """The model that a checkpoint directory holds."""
    return files.load(Model, Config, directory)
