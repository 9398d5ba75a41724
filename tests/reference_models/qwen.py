"""Qwen, the first generation (`model_type` qwen).

The arithmetic is that of the modeling_qwen.py published with Qwen/Qwen-7B, up to `seq_length` tokens. Beyond
them the original changes the base of the rotation and scales its queries, which is not modelled.
"""

from __future__ import annotations

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
    frequencies,
    rotate_halves,
    rotation,
    span,
    split_heads,
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are tiny by default. `intermediate_size` counts both halves of the gated unit."""

    vocab_size: int = 128
    hidden_size: int = 64
    intermediate_size: int = 224
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    kv_channels: int = 16
    layer_norm_epsilon: float = 1e-6
    seq_length: int = 64
    max_position_embeddings: int = 128
    rotary_emb_base: int = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_flash_attn: bool | str = "auto"
    use_cache: bool = True
    no_bias: bool = True
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    scale_attn_weights: bool = True
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    tokenizer_class: str = "QWenTokenizer"
    transformers_version: str = "4.32.0"

    def identity(self) -> dict[str, Any]:
        """As in every release of the family."""
        return {
            "model_type": "qwen",
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
        }

    def generation_config(self) -> dict[str, Any]:
        """Ends at the first token that no piece of text has."""
        end = 151643
        return {
            "chat_format": "raw",
            "eos_token_id": end,
            "pad_token_id": end,
            "stop_words_ids": [[end]],
            "max_new_tokens": 512,
            "do_sample": True,
            "top_k": 0,
            "top_p": 0.8,
            "transformers_version": "4.31.0",
        }


TINY = Config()
QWEN_7B = Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    kv_channels=128,
    seq_length=8192,
    max_position_embeddings=32768,
)


class Attention(nn.Module):
    """`c_attn` has all queries, then all keys, then all values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        projection = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * projection)
        self.c_proj = nn.Linear(config.hidden_size, projection, bias=not config.no_bias)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.c_attn(x).chunk(3, dim=-1))
        query, key = rotate_halves(query, turn), rotate_halves(key, turn)
        result: Tensor = self.c_proj(causal_attention(query, key, value, memory))
        return result


class Mlp(nn.Module):
    """The gate is `w2`, not `w1`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, ffn, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(hidden, ffn, bias=bias)
        self.w2 = nn.Linear(hidden, ffn, bias=bias)
        self.c_proj = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_proj(self.w1(x) * functional.silu(self.w2(x)))
        return result


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), turn, memory)
        result: Tensor = x + self.mlp(self.ln_2(x))
        return result


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, turn: Rotation, cache: Cache | None) -> Tensor:
        x = self.wte(ids)
        for index, layer in enumerate(self.h):
            x = layer(x, turn, None if cache is None else cache[index])
        normal: Tensor = self.ln_f(x)
        return normal


class Model(nn.Module):
    """The language model.

    Raises:
        ValueError: Heads that rotate in part, which no released model has; when called, more than `seq_length`
            tokens with dynamic NTK or log n attention.
    """

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if config.rotary_pct != 1.0 or config.kv_channels * config.num_attention_heads != config.hidden_size:
            raise ValueError("not modelled: heads that rotate in part or do not add up to the hidden size")
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        config = self.config
        start, stop = span(ids, cache)
        if stop > config.seq_length and (config.use_dynamic_ntk or config.use_logn_attn):
            raise ValueError(f"not modelled: {stop} tokens, past seq_length {config.seq_length}")
        # In float32 whatever the dtype of the model.
        turn = rotation(frequencies(config.rotary_emb_base, config.kv_channels), start, stop, torch.float32)
        logits: Tensor = self.lm_head(self.transformer(ids, turn, cache))
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
    return files.write(Model, directory, config, seed, dtype, shards, form, output="lm_head.weight")


def load(directory: Path) -> Model:
    """The model that a checkpoint directory holds."""
    return files.load(Model, Config, directory)
