"""CogVideoX in SAT's names and arithmetic, as functions of a state dict: the transformer and the 3D autoencoder.

Source: THUDM/CogVideo: sat/dit_video_concat.py, sat/sgm/modules/diffusionmodules/util.py, sat/vae_modules/cp_enc_dec.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]
_EPS = 1e-6


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], _EPS)


def _angles(step: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of a time step."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = step[:, None].float() * frequencies[None]
    return torch.cat((angles.cos(), angles.sin()), -1)


def rotations(frames: int, height: int, width: int, channels: int) -> Tensor:
    """Angles of every patch, `[frames * height * width, channels]`, each twice for its pair of channels."""
    parts = ((frames, channels // 4), (height, channels // 8 * 3), (width, channels // 8 * 3))
    grids = []
    for axis, (count, size) in enumerate(parts):
        frequencies = 1.0 / (10000 ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(count).float(), frequencies).repeat_interleave(2, -1)
        shape = [1, 1, 1, size]
        shape[axis] = count
        grids.append(angles.view(shape).expand(frames, height, width, size))
    return torch.cat(grids, -1).reshape(-1, channels)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def transformer(
    state: State,
    config: Mapping[str, Any],
    video: Tensor,
    text: Tensor,
    step: Tensor,
    ofs: Tensor | None = None,
) -> Tensor:
    """The noise of a video `[batch, frames, channels, height, width]` given text `[batch, tokens, width]`."""
    head, hidden = config["attention_head_dim"], config["hidden_size"]
    p, p_t = config["patch_size"], config["patch_size_t"] or 1
    batch, frames, channels, height, width = video.shape
    t, h, w = frames // p_t, height // p, width // p
    time = _linear(
        state, "time_embed.2", functional.silu(_linear(state, "time_embed.0", _angles(step, hidden)))
    )
    if ofs is not None:
        angles = _angles(ofs, config["ofs_embed_dim"])
        time = time + _linear(state, "ofs_embed.2", functional.silu(_linear(state, "ofs_embed.0", angles)))
    patches = (
        video.view(batch, t, p_t, channels, h, p, w, p)
        .permute(0, 1, 4, 6, 3, 2, 5, 7)
        .reshape(batch, t * h * w, -1)
    )
    weight = state["mixins.patch_embed.proj.weight"].flatten(1)
    image = functional.linear(patches, weight, state["mixins.patch_embed.proj.bias"])
    words = _linear(state, "mixins.patch_embed.text_proj", text)
    count = words.shape[1]
    turn = rotations(t, h, w, head)

    for i in range(config["num_layers"]):
        mods = _linear(state, f"mixins.adaln_layer.adaLN_modulations.{i}.1", functional.silu(time))
        of_image, of_text = (half.chunk(6, -1) for half in mods[:, None].chunk(2, -1))
        layer = f"transformer.layers.{i}"

        def modulated(
            norm: str, first: int, image: Tensor, words: Tensor, of: Any = (of_image, of_text)
        ) -> Tensor:
            """Text, then image, normalised, scaled and shifted by their own parts."""
            sides = []
            for x, parts in ((words, of[1]), (image, of[0])):
                sides.append(_norm(state, norm, x) * (1 + parts[first + 1]) + parts[first])
            return torch.cat(sides, 1)

        x = modulated(f"{layer}.input_layernorm", 0, image, words)
        mixed = _linear(state, f"{layer}.attention.query_key_value", x)
        q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in mixed.chunk(3, -1))
        q = _norm(state, f"mixins.adaln_layer.query_layernorm_list.{i}", q)
        k = _norm(state, f"mixins.adaln_layer.key_layernorm_list.{i}", k)
        q, k = (torch.cat((z[:, :, :count], _rotated(z[:, :, count:], turn)), 2) for z in (q, k))
        context = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = _linear(state, f"{layer}.attention.dense", context)
        words, image = words + of_text[2] * out[:, :count], image + of_image[2] * out[:, count:]
        x = modulated(f"{layer}.post_attention_layernorm", 3, image, words)
        up = functional.gelu(_linear(state, f"{layer}.mlp.dense_h_to_4h", x), approximate="tanh")
        out = _linear(state, f"{layer}.mlp.dense_4h_to_h", up)
        words, image = words + of_text[5] * out[:, :count], image + of_image[5] * out[:, count:]

    x = _norm(state, "transformer.final_layernorm", image)
    mods = _linear(state, "mixins.final_layer.adaLN_modulation.1", functional.silu(time))
    shift, scale = mods[:, None].chunk(2, -1)
    x = _linear(
        state,
        "mixins.final_layer.linear",
        _norm(state, "mixins.final_layer.norm_final", x) * (1 + scale) + shift,
    )
    made = x.view(batch, t, h, w, config["out_channels"], p_t, p, p).permute(0, 1, 5, 4, 2, 6, 3, 7)
    return made.reshape(batch, frames, config["out_channels"], height, width)


# ---------------------------------------------------------------------------------- autoencoder


def _convolved(state: State, name: str, x: Tensor) -> Tensor:
    """A causal convolution: the first frame stands for those before it."""
    weight = state[f"{name}.weight"]
    before, around = weight.shape[2] - 1, weight.shape[3] // 2
    x = torch.cat([x[:, :, :1]] * before + [x], 2)
    return functional.conv3d(x, weight, state[f"{name}.bias"], padding=(0, around, around))


def _grouped(state: State, name: str, x: Tensor) -> Tensor:
    return functional.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], _EPS)


def _spatial(state: State, name: str, x: Tensor, latent: Tensor) -> Tensor:
    """A norm whose scale and shift come from the latent, stretched to the size of `x`."""
    if x.shape[2] > 1 and x.shape[2] % 2 == 1:
        first = functional.interpolate(latent[:, :, :1], x[:, :, :1].shape[-3:])
        latent = torch.cat((first, functional.interpolate(latent[:, :, 1:], x[:, :, 1:].shape[-3:])), 2)
    else:
        latent = functional.interpolate(latent, x.shape[-3:])
    scale, shift = (_convolved(state, f"{name}.{part}.conv", latent) for part in ("conv_y", "conv_b"))
    return _grouped(state, f"{name}.norm_layer", x) * scale + shift


def _block(state: State, name: str, x: Tensor, latent: Tensor | None = None) -> Tensor:
    residual = x
    for number in (1, 2):
        norm = f"{name}.norm{number}"
        x = _grouped(state, norm, x) if latent is None else _spatial(state, norm, x, latent)
        x = _convolved(state, f"{name}.conv{number}.conv", functional.silu(x))
    shortcut = f"{name}.nin_shortcut"
    return x + (_convolved(state, shortcut, residual) if f"{shortcut}.weight" in state else residual)


def _flat(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """A two-dimensional convolution of every frame."""
    frames = x.transpose(1, 2).flatten(0, 1)
    made = functional.conv2d(
        frames, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=1 if stride == 1 else 0
    )
    return made.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def encode(state: State, config: Mapping[str, Any], video: Tensor) -> Tensor:
    """Mean and logarithm of the variance `[batch, 2 * latent, ...]` of a video `[batch, 3, frames, height, width]`."""
    x = _convolved(state, "encoder.conv_in.conv", video)
    levels = len(config["block_out_channels"])
    for level in range(levels):
        for number in range(config["layers_per_block"]):
            x = _block(state, f"encoder.down.{level}.block.{number}", x)
        if level < levels - 1:
            if level < 2:  # the first two halve the frames too, but never join the first to another
                odd = x.shape[2] % 2
                rest = functional.avg_pool3d(x[:, :, odd:], (2, 1, 1)) if x.shape[2] > 1 else x[:, :, odd:]
                x = torch.cat((x[:, :, :odd], rest), 2)
            x = _flat(state, f"encoder.down.{level}.downsample.conv", functional.pad(x, (0, 1, 0, 1)), 2)
    for number in (1, 2):
        x = _block(state, f"encoder.mid.block_{number}", x)
    return _convolved(state, "encoder.conv_out.conv", functional.silu(_grouped(state, "encoder.norm_out", x)))


def decode(state: State, config: Mapping[str, Any], latent: Tensor) -> Tensor:
    """The video of a latent `[batch, latent, frames, height, width]`."""
    x = _convolved(state, "decoder.conv_in.conv", latent)
    for number in (1, 2):
        x = _block(state, f"decoder.mid.block_{number}", x, latent)
    levels = len(config["block_out_channels"])
    for level in reversed(range(levels)):
        for number in range(config["layers_per_block"] + 1):
            x = _block(state, f"decoder.up.{level}.block.{number}", x, latent)
        if level > 0:
            twice = (2, 2, 2) if level >= levels - 2 else (1, 2, 2)
            odd = x.shape[2] % 2 if twice[0] == 2 else 0
            first = functional.interpolate(x[:, :, :odd], scale_factor=(1, 2, 2)) if odd else x[:, :, :0]
            rest = (
                functional.interpolate(x[:, :, odd:], scale_factor=twice)
                if x.shape[2] > odd
                else x[:, :, odd:]
            )
            x = rest if not odd else (first if x.shape[2] == odd else torch.cat((first, rest), 2))
            x = _flat(state, f"decoder.up.{level}.upsample.conv", x, 1)
    return _convolved(
        state, "decoder.conv_out.conv", functional.silu(_spatial(state, "decoder.norm_out", x, latent))
    )
