"""What Baichuan, InternLM and Yi have from Llama: the names and the wiring outside attention."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional

from reference_models.layers import Cache, RMSNorm, Rotation


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Layer(nn.Module):
    """Norm, attention, norm, multilayer perceptron, each pair with a residual around it."""

    def __init__(
        self,
        attention: nn.Module,
        hidden: int,
        intermediate: int,
        eps: float,
        norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMlp(hidden, intermediate)
        self.norms = norms
        for name in norms:
            self.add_module(name, RMSNorm(hidden, eps))

    def forward(self, x: Tensor, turn: Rotation, cache: Cache | None, index: int) -> Tensor:
        before_attention, before_mlp = (self.get_submodule(name) for name in self.norms)
        x = x + self.self_attn(before_attention(x), turn, None if cache is None else cache[index])
        result: Tensor = x + self.mlp(before_mlp(x))
        return result


class Backbone(nn.Module):
    """Embedding, layers, final norm: the part under `model.`."""

    def __init__(self, vocabulary: int, hidden: int, layers: Iterable[Layer], eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, eps)

    def forward(self, ids: Tensor, turn: Rotation, cache: Cache | None) -> Tensor:
        x = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, cache, index)
        normal: Tensor = self.norm(x)
        return normal
