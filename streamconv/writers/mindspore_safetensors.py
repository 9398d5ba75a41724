"""Safetensors as `mindspore.save_checkpoint(..., format="safetensors")` writes it: the metadata says `ms`.

Source: mindspore-ai/mindspore: mindspore/python/mindspore/train/serialization.py (`_exec_save`).
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.errors import Problem
from streamconv.tensor import TensorSpec
from streamconv.writers import mindspore, safetensors
from streamconv.writers.layout import BARE, About, FileLayout, Target

_ALWAYS = {"format": "ms"}


def check(spec: TensorSpec) -> Problem | None:
    """Why MindSpore could not load such a tensor, or None where it can."""
    if spec.dtype.name not in mindspore.TYPES:
        return Problem(
            f"MindSpore has no dtype {spec.dtype}",
            tensor=spec.name,
            hint="cast it with --dtype, or leave it out with --drop",
        )
    return safetensors.check(spec)


def layout(tensors: Sequence[Target], about: About = BARE) -> FileLayout:
    """Plan a file; see `safetensors.layout`."""
    del about  # MindSpore takes keys of metadata for names of Int4 parameters
    return safetensors.laid_out(tensors, _ALWAYS)
