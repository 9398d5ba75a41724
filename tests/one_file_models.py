"""Diffusion models under the names of their authors, in one file: the names of diffusers, turned around.

diffusers turns them back itself (loaders/single_file_utils.py: `convert_ldm_unet_checkpoint`,
`convert_ldm_vae_checkpoint`, `convert_sd3_transformer_checkpoint_to_diffusers`), so a wrong line here fails to load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

State = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE = {
    r"down_blocks\.(\d+)\.resnets\.": r"down.\1.block.", r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2", r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"attn_1\.group_norm": "attn_1.norm", r"attn_1\.to_(q|k|v)\.": r"attn_1.\1.", r"attn_1\.to_out\.0": "attn_1.proj_out",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", r"up_blocks\.0\.resnets\.": "up.0.block.",
}  # fmt: skip
_SD3 = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_JOINT = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip


def _begin(name: str, table: dict[str, str]) -> str:
    """A name with what it begins with replaced."""
    begins = [begin for begin in table if name == begin or name.startswith(f"{begin}.")]
    longest = max(begins, key=len, default="")
    return table[longest] + name[len(longest) :] if longest else name


def unet(state: State, layers: int) -> State:
    """Of Stable Diffusion 1: `layers` is layers_per_block."""
    result = {}
    attentive = {found[1] for name in state if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    for name, tensor in state.items():
        found = re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
        )
        if found is None:
            own = _begin(name, _UNET)
            if own.startswith(("middle_block.0.", "middle_block.2.")):
                own = own[:15] + _begin(own[15:], _RESNET)
        else:
            way, block, kind, at, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            first = (layers + 1) * block
            if kind == "downsamplers":
                own = f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                own = f"output_blocks.{first + layers}.{2 if found[2] in attentive else 1}.{rest}"
            else:
                number = first + at + 1 if way == "down" else first + at
                rest = _begin(rest, _RESNET) if kind == "resnets" else rest
                own = f"{'in' if way == 'down' else 'out'}put_blocks.{number}.{int(kind == 'attentions')}.{rest}"
        result[f"model.diffusion_model.{own}"] = tensor
    return result


def vae(state: State) -> State:
    """Of one block each way."""
    result = {}
    for name, tensor in state.items():
        own = name
        for pattern, replacement in _VAE.items():
            own = re.sub(pattern, replacement, own)
        matrix = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", own)
        result[f"first_stage_model.{own}"] = tensor[:, :, None, None].contiguous() if matrix else tensor
    return result


def stable_diffusion_3(state: State) -> State:
    """Its transformer."""
    result, blocks = (
        {},
        1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks.")),
    )
    for name, tensor in state.items():
        found = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        if re.search(r"\.attn\.(to_|add_)[kqv](_proj)?\.", name):
            continue
        own = f"joint_blocks.{found[1]}.{_begin(found[2], _JOINT)}" if found else _begin(name, _SD3)
        last = own.startswith(f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation")
        if last or own.startswith("final_layer.adaLN_modulation"):
            tensor = torch.cat(tensor.chunk(2)[::-1])  # scale and shift
        result[f"model.diffusion_model.{own}"] = tensor
    for at in range(blocks):
        for part, names in (("x", "to_{}"), ("context", "add_{}_proj")):
            for kind in ("weight", "bias"):
                parts: Iterable[torch.Tensor] = (
                    state[f"transformer_blocks.{at}.attn.{names.format(each)}.{kind}"] for each in "qkv"
                )
                result[f"model.diffusion_model.joint_blocks.{at}.{part}_block.attn.qkv.{kind}"] = torch.cat(
                    list(parts)
                )
    return result
