"""The comparison of what libraries compute lets another order of sums pass, and nothing else."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_alike, terms_of

TERMS = 4096


def product(x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x[:, order] @ weight[:, order].T


def test_another_order_of_sums_is_alike_and_a_swapped_row_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, TERMS, generator=generator) for _ in "xw")
    expected = product(x, weight, torch.arange(TERMS))
    assert_alike(product(x, weight, torch.randperm(TERMS, generator=generator)), expected, TERMS)
    for wrong in (expected.roll(1, 1), expected * (1 + 1e-3), expected.double(), expected[:4]):
        with pytest.raises(AssertionError):
            assert_alike(wrong, expected, TERMS)


def test_a_dtype_that_is_too_coarse_is_refused() -> None:
    coarse = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="too coarse"):
        assert_alike(coarse, coarse, TERMS)


def test_terms_are_those_of_the_layers_one_after_another() -> None:
    layers = [torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Conv2d(7, 2, 3)]
    assert terms_of(torch.nn.Sequential(*layers)) == 5 + 7 * 9
