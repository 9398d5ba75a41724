"""Diffusion models with all their parts in one file, as their authors, WebUI and ComfyUI keep them.

The denoiser lies under `model.diffusion_model.`, mostly with autoencoder and text encoders beside it. Programs take
such a file, and no shards of it; none needs a config.

Source: huggingface/diffusers (loaders/single_file_utils.py, `CHECKPOINT_KEY_NAMES`).
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.sat import FORMAT as SAT

_DENOISER = "model.diffusion_model."
_KINDS = {
    _DENOISER + "joint_blocks.": "Stable Diffusion 3",
    _DENOISER + "double_blocks.": "Flux",
    "conditioner.embedders.": "Stable Diffusion XL",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "cond_stage_model.transformer.": "Stable Diffusion 1",
}
"""How some name begins -> what it then is."""


def identified(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with a note of what it is, to be written as one file again; others as they are."""
    (first, *more) = checkpoint.components
    if more or first.config is not None or checkpoint.format == SAT.name:
        return checkpoint
    if not any(name.startswith(_DENOISER) for name in first.tensors):
        return checkpoint
    begins = (begin for begin in _KINDS if any(name.startswith(begin) for name in first.tensors))
    kind = next((_KINDS[begin] for begin in begins), "a diffusion model")
    note = f"by its names it is {kind} in one file, as WebUI, ComfyUI and diffusers' from_single_file load it"
    return replace(checkpoint, components=(replace(first, one_file=True),), notes=(*checkpoint.notes, note))
