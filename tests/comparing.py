"""Tensors compared to the bit."""

from __future__ import annotations

import torch


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the bit, with dtype and shape."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
