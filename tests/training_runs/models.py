"""Small models whose checkpoints show all that a reader must get right."""

from __future__ import annotations

import torch


class Odd(torch.nn.Module):
    """Odd sizes, a tied head, a frozen part, and buffers of three kinds."""

    def __init__(self, *, tied: bool = True, frozen: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(37, 13)
        self.first = torch.nn.Linear(13, 29)
        self.second = torch.nn.Linear(29, 13, bias=False)
        self.norm = torch.nn.LayerNorm(13)
        self.head = torch.nn.Linear(13, 37, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.adapter = torch.nn.Linear(13, 13)
        if frozen:
            self.adapter.requires_grad_(False)
        self.register_buffer("ema_scale", torch.tensor([1.0000001, 2.5], dtype=torch.float32))
        self.register_buffer("counter", torch.tensor((1 << 40) + 1, dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean of all logits."""
        states = self.embed(ids)
        states = states + self.second(torch.relu(self.first(states)))
        states = self.norm(states)
        states = states + self.adapter(states)
        return self.head(states).float().mean()


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with random values everywhere, norms and biases too, so that a swap would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


LLAMA = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "tie_word_embeddings": False,
}  # fmt: skip

COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 6,
    "text_embed_dim": 8, "num_layers": 2, "sample_width": 4, "sample_height": 4, "sample_frames": 5, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 8,
}  # fmt: skip
