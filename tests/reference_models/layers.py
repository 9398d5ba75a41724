"""The parts that the reference models are made of: norms, rotations, attention, the cache.

Axes are `[batch, heads, time, channels]` wherever there are heads, `[batch, time, hidden]` elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Cosines and sines, each [time, pairs].
Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, the division in float32.

    In half precision the place of the rounding matters: Llama and its kin round before they multiply by the
    weight, ChatGLM after (`rounds_last`).
    """

    def __init__(self, hidden: int, eps: float, *, rounds_last: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps
        self.rounds_last = rounds_last

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.rounds_last:
            return (self.weight * normal).to(x.dtype)
        return self.weight * normal.to(x.dtype)


# ------------------------------------------------------------------------------------ rotation


def frequencies(base: float, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`base ** (-2j / channels)` of the pairs j, every step of the computation in `dtype`."""
    return 1.0 / (base ** (torch.arange(0, channels, 2).to(dtype) / channels))


def dynamic_base(base: float, channels: int, factor: float, length: int, trained_length: int) -> float:
    """The base of dynamic NTK scaling for a sequence of `length` tokens; `base` itself up to the trained length."""
    if length <= trained_length:
        return base
    stretch = factor * length / trained_length - (factor - 1)
    return float(base * stretch ** (channels / (channels - 2)))


def rotation(
    inverse_wavelengths: Tensor, start: int, stop: int, dtype: torch.dtype, *, divisor: float = 1.0
) -> Rotation:
    """Of the positions from `start` to `stop`, all divided by `divisor`: computed in float32, rounded to `dtype`."""
    positions = torch.arange(start, stop, dtype=torch.float32) / divisor
    angles = torch.outer(positions, inverse_wavelengths)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_neighbours(x: Tensor, turn: Rotation) -> Tensor:
    """Channel 2j turns with channel 2j + 1."""
    cos, sin = turn
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def rotate_halves(x: Tensor, turn: Rotation) -> Tensor:
    """Channel j turns with channel j + half, in the dtype of the cosines; the result has that of `x`."""
    cos, sin = turn
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class StoredFrequencies(nn.Module):
    """A buffer that checkpoints hold and that no forward pass reads: models make their tables themselves."""

    inv_freq: Tensor

    def __init__(self, inverse_wavelengths: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_wavelengths)


# ----------------------------------------------------------------------------------- attention


class LayerCache:
    """Keys and values of one layer, in buffers that double, so that a step does not copy what went before."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: list[Tensor] = []

    def extend(self, *new: Tensor) -> list[Tensor]:
        """Append keys and values `[batch, groups, time, channels]`; what is held then."""
        stop = self.length + new[0].shape[2]
        if not self._buffers or self._buffers[0].shape[2] < stop:
            grown = [each.new_empty((*each.shape[:2], 2 * stop, each.shape[3])) for each in new]
            for buffer, old in zip(grown, self._buffers, strict=False):
                buffer[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = grown
        for buffer, each in zip(self._buffers, new, strict=True):
            buffer[:, :, self.length : stop] = each
        self.length = stop
        return [buffer[:, :, :stop] for buffer in self._buffers]


class Cache:
    """What a model remembers of the tokens so far. Starts empty; the model fills it."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerCache] = {}

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers.setdefault(layer, LayerCache())

    @property
    def length(self) -> int:
        """How many tokens went before."""
        return self[0].length


def span(ids: Tensor, cache: Cache | None) -> tuple[int, int]:
    """The positions of `ids`: the first, and the one after the last."""
    start = 0 if cache is None else cache.length
    return start, start + ids.shape[1]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[batch, time, heads * channels]` to `[batch, heads, time, channels]`."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, memory: LayerCache | None) -> Tensor:
    """Every token attends to itself and those before it, those in `memory` among them.

    Query heads share the key and value of their group: head h that of group `h // (heads / groups)`.
    Gives `[batch, time, heads * channels]`. Some models' own code rounds scores and weights on the way, which
    shows in half precision only.
    """
    if memory is not None:
        key, value = memory.extend(key, value)
    batch, heads, time, channels = query.shape
    groups, total = key.shape[1:3]
    if time == 1:
        # Nothing to mask: the heads of a group are rows of one product, and no key has to be copied.
        rows = query.reshape(batch, groups, heads // groups, channels)
        mixed = functional.scaled_dot_product_attention(rows, key, value)
        return mixed.reshape(batch, 1, heads * channels)
    key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
    if total == time:
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        seen = torch.ones(time, total, dtype=torch.bool).tril(total - time)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return mixed.transpose(1, 2).flatten(2)
