"""Whisper in OpenAI's own names: one `.pt` file with `dims` and `model_state_dict`.

The arithmetic is that of openai/whisper: whisper/model.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_models import files
from reference_models.layers import split_heads


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of `dims`. Sizes are tiny by default."""

    n_mels: int = 16
    n_audio_ctx: int = 24
    n_audio_state: int = 64
    n_audio_head: int = 4
    n_audio_layer: int = 2
    n_vocab: int = 128
    n_text_ctx: int = 32
    n_text_state: int = 64
    n_text_head: int = 4
    n_text_layer: int = 2

    def to_json(self) -> dict[str, int]:
        """The contents of `dims`."""
        return asdict(self)


TINY = Config()
# The size that OpenAI calls tiny, in the multilingual version.
WHISPER_TINY = Config(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=384,
    n_audio_head=6,
    n_audio_layer=4,
    n_vocab=51865,
    n_text_ctx=448,
    n_text_state=384,
    n_text_head=6,
    n_text_layer=4,
)


def sinusoids(length: int, channels: int) -> Tensor:
    """Positions of the encoder `[length, channels]`: sines of wavelengths 1 to 10000 (over 2 pi), then cosines."""
    step = math.log(10000) / (channels // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(channels // 2))
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class LayerNorm(nn.LayerNorm):
    """In float32 whatever the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return wide.to(x.dtype)


class Attention(nn.Module):
    """The keys have no bias."""

    def __init__(self, state: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(state, state)
        self.key = nn.Linear(state, state, bias=False)
        self.value = nn.Linear(state, state)
        self.out = nn.Linear(state, state)

    def forward(self, x: Tensor, source: Tensor, *, causal: bool = False) -> Tensor:
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(x), self.key(source), self.value(source))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Of the encoder; with `crossed`, of the decoder."""

    def __init__(self, state: int, heads: int, *, crossed: bool) -> None:
        super().__init__()
        self.crossed = crossed
        self.attn = Attention(state, heads)
        self.attn_ln = LayerNorm(state)
        if crossed:
            self.cross_attn = Attention(state, heads)
            self.cross_attn_ln = LayerNorm(state)
        self.mlp = nn.Sequential(nn.Linear(state, 4 * state), nn.GELU(), nn.Linear(4 * state, state))
        self.mlp_ln = LayerNorm(state)

    def forward(self, x: Tensor, audio: Tensor | None = None) -> Tensor:
        normal = self.attn_ln(x)
        x = x + self.attn(normal, normal, causal=self.crossed)
        if self.crossed:
            x = x + self.cross_attn(self.cross_attn_ln(x), audio)
        result: Tensor = x + self.mlp(self.mlp_ln(x))
        return result


class Encoder(nn.Module):
    positional_embedding: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        state = config.n_audio_state
        self.conv1 = nn.Conv1d(config.n_mels, state, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(state, state, kernel_size=3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(config.n_audio_ctx, state))
        self.blocks = nn.ModuleList(
            Block(state, config.n_audio_head, crossed=False) for _ in range(config.n_audio_layer)
        )
        self.ln_post = LayerNorm(state)

    def forward(self, mel: Tensor) -> Tensor:
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(mel)))).transpose(1, 2)
        x = (x + self.positional_embedding).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        normal: Tensor = self.ln_post(x)
        return normal


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        state = config.n_text_state
        self.token_embedding = nn.Embedding(config.n_vocab, state)
        self.positional_embedding = nn.Parameter(torch.empty(config.n_text_ctx, state))
        self.blocks = nn.ModuleList(
            Block(state, config.n_text_head, crossed=True) for _ in range(config.n_text_layer)
        )
        self.ln = LayerNorm(state)

    def forward(self, tokens: Tensor, audio: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, audio)
        # The head is the embedding.
        return functional.linear(self.ln(x), self.token_embedding.weight).float()


class Model(nn.Module):
    """Spectrogram `[batch, n_mels, 2 * n_audio_ctx]` and tokens `[batch, time]` to logits in float32."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to(dtype)

    @torch.no_grad()
    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(tokens, self.encoder(mel))
        return logits


def write(file: Path, config: Config = TINY, seed: int = 0, dtype: torch.dtype = torch.float16) -> Model:
    """Write a `.pt` file with random weights; the model that it holds. The published ones are in float16."""
    model = Model(config, dtype)
    files.randomise(model, seed, output="decoder.token_embedding.weight")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"dims": config.to_json(), "model_state_dict": model.state_dict()}, file)
    return model


def load(file: Path) -> Model:
    """The model that a `.pt` file holds."""
    contents = torch.load(file, weights_only=True)
    state = contents["model_state_dict"]
    model = Model(Config(**contents["dims"]), state["decoder.token_embedding.weight"].dtype)
    model.load_state_dict(state, strict=True)
    model.eval().requires_grad_(requires_grad=False)
    return model
