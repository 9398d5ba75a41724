"""ChatGLM2, ChatGLM3 and GLM-4 (`model_type` chatglm).

The arithmetic is that of the modeling_chatglm.py published with zai-org/chatglm3-6b, with which this agrees bit
for bit in float32, bfloat16 and float16 (in float32 also with that of chatglm2-6b, which computes positions in
its own dtype). It has no wall at `seq_length`, where the original's table of rotations ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    StoredFrequencies,
    causal_attention,
    frequencies,
    rotate_halves,
    rotate_neighbours,
    rotation,
    span,
    split_heads,
)

_BASE = 10000


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are tiny by default, everything else is ChatGLM3-6B's."""

    padded_vocab_size: int = 128
    hidden_size: int = 64
    num_layers: int = 2
    num_attention_heads: int = 4
    kv_channels: int = 16
    ffn_hidden_size: int = 112
    seq_length: int = 64
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    layernorm_epsilon: float = 1e-5
    original_rope: bool = True
    rope_ratio: int | float | None = None
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    bias_dropout_fusion: bool = True
    fp32_residual_connection: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    quantization_bit: int | None = None
    pre_seq_len: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    eos_token_id: int | tuple[int, ...] = 2
    pad_token_id: int = 0
    torch_dtype: str = "float16"
    transformers_version: str = "4.30.2"

    def identity(self) -> dict[str, Any]:
        """As in every release of the family."""
        generator = "modeling_chatglm.ChatGLMForConditionalGeneration"
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "auto_map": {
                "AutoConfig": "configuration_chatglm.ChatGLMConfig",
                "AutoModel": generator,
                "AutoModelForCausalLM": generator,
                "AutoModelForSeq2SeqLM": generator,
                "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
            },
        }

    def generation_config(self) -> dict[str, Any] | None:
        """Only GLM-4, which ends at several tokens, has the file."""
        if isinstance(self.eos_token_id, int):
            return None
        return {
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.8,
            "max_length": self.seq_length,
            "transformers_version": self.transformers_version,
        }

    @property
    def groups(self) -> int:
        """How many key and value heads there are."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


TINY = Config()
CHATGLM3_6B = Config(
    padded_vocab_size=65024,
    hidden_size=4096,
    num_layers=28,
    num_attention_heads=32,
    kv_channels=128,
    ffn_hidden_size=13696,
    seq_length=8192,
)
GLM4_9B_CHAT = Config(
    padded_vocab_size=151552,
    hidden_size=4096,
    num_layers=40,
    num_attention_heads=32,
    kv_channels=128,
    ffn_hidden_size=13696,
    seq_length=131072,
    layernorm_epsilon=1.5625e-07,
    rope_ratio=500,
    eos_token_id=(151329, 151336, 151338),
    pad_token_id=151329,
    torch_dtype="bfloat16",
    transformers_version="4.44.0",
)
GLM4_9B_CHAT_1M = replace(GLM4_9B_CHAT, multi_query_group_num=4, rope_ratio=10000, seq_length=1048576)


class SelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.kv_channels
        keys = config.groups * config.kv_channels
        self.query_key_value = nn.Linear(
            config.hidden_size, queries + 2 * keys, bias=config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = nn.Linear(queries, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        query, key, value = self._split(self.query_key_value(x))
        dense: Tensor = self.dense(
            causal_attention(self.rotate(query, turn), self.rotate(key, turn), value, memory)
        )
        return dense

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of all queries, keys and values; without groups, the three of each head side by side."""
        heads, groups, channels = (
            self.config.num_attention_heads,
            self.config.groups,
            self.config.kv_channels,
        )
        if not self.config.multi_query_attention:
            query, key, value = split_heads(mixed, heads).chunk(3, dim=-1)
            return query, key, value
        query, key, value = torch.split(
            mixed, [heads * channels, groups * channels, groups * channels], dim=-1
        )
        return split_heads(query, heads), split_heads(key, groups), split_heads(value, groups)

    def rotate(self, x: Tensor, turn: Rotation) -> Tensor:
        """The first half of the channels; the second stays as it is."""
        turning, still = x.chunk(2, dim=-1)
        rotate = rotate_neighbours if self.config.original_rope else rotate_halves
        return torch.cat((rotate(turning, turn), still), dim=-1)


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(hidden, 2 * ffn, bias=bias)
        self.dense_4h_to_h = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        down: Tensor = self.dense_4h_to_h(functional.silu(gate) * up)
        return down


def _norm(config: Config) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.layernorm_epsilon, rounds_last=True)


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, turn: Rotation, memory: LayerCache | None) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), turn, memory)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = _norm(config)

    def forward(self, x: Tensor, turn: Rotation, cache: Cache | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, None if cache is None else cache[index])
        normal: Tensor = self.final_layernorm(x)
        return normal


class Embedding(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Transformer(nn.Module):
    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        # To base 10000 whatever `rope_ratio`, and computed in the model's dtype, as the original does.
        self.rotary_pos_emb = StoredFrequencies(frequencies(_BASE, config.kv_channels // 2, dtype))
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)


class Model(nn.Module):
    """The language model.

    `rope_ratio` multiplies the base of the rotation, as in ChatGLM3 and GLM-4. With `divides_positions` it
    divides the positions instead, as in the code of ChatGLM2-6B-32k: no field of config.json tells the two apart.

    Raises:
        ValueError: The config asks for something that no released model has.
    """

    def __init__(
        self, config: Config, dtype: torch.dtype = torch.float32, *, divides_positions: bool = False
    ) -> None:
        super().__init__()
        if (
            not config.rmsnorm
            or not config.post_layer_norm
            or config.apply_residual_connection_post_layernorm
            or config.quantization_bit
            or config.pre_seq_len
            or config.tie_word_embeddings
        ):
            raise ValueError("not modelled: other norms or residuals, quantised or tied weights, prefixes")
        self.config = config
        self.divides_positions = divides_positions
        self.transformer = Transformer(config, dtype)
        self.to(dtype)

    def rotation(self, start: int, stop: int, dtype: torch.dtype) -> Rotation:
        """Cosines and sines of the positions from `start` to `stop`, each `[stop - start, kv_channels / 4]`."""
        ratio = self.config.rope_ratio or 1
        channels = self.config.kv_channels // 2
        if self.divides_positions:
            return rotation(frequencies(_BASE, channels), start, stop, dtype, divisor=ratio)
        return rotation(frequencies(_BASE * ratio, channels), start, stop, dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.transformer.embedding.word_embeddings(ids)
        turn = self.rotation(*span(ids, cache), x.dtype)
        logits: Tensor = self.transformer.output_layer(self.transformer.encoder(x, turn, cache))
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
    output = "transformer.output_layer.weight"
    return files.write(Model, directory, config, seed, dtype, shards, form, output=output)


def load(directory: Path) -> Model:
    """The model that a checkpoint directory holds."""
    return files.load(Model, Config, directory)
