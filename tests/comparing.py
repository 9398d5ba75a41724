"""Tensors compared: to the bit what the program decides, to the rounding what libraries compute from it.

Kernels sum in orders of their own, by processor, by where a tensor lies in memory and by the shape of a batch.
So weights are compared by `same` (or `torch.equal`), and what a model makes of them by `assert_alike`.
"""

from __future__ import annotations

import math

import torch

LIKELY = 4
"""Factor of the bound below: it fails with a probability of about 2 exp(-LIKELY**2 / 2), were roundings random."""


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the bit, with dtype and shape."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


def terms_of(model: torch.nn.Module) -> int:
    """The length of the sums, laid end to end, that stand between a model's input and its output."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return sum(each[0].numel() if each.ndim > 3 else max(each.shape[1:]) for each in weights)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Equal but for the order of sums of `terms` terms in all, in the dtype of both.

    Two orders of a sum of n terms are about sqrt(n) roundings apart, each of half an eps on either side (Higham
    and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019), in relation to the largest value.
    Compute in F32: in BF16 this would let anything pass.
    """
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    bound = LIKELY * math.sqrt(terms) * torch.finfo(expected.dtype).eps
    assert bound < 1e-3, "too coarse a dtype, or too long a sum, to show anything"
    apart, largest = (each.detach().abs().max().item() for each in (found - expected, expected))
    assert apart <= bound * largest, (
        f"{apart:.2g} apart at values up to {largest:.2g}; {bound:.2g} of it may be"
    )
