"""Rotary frequencies are torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamconv.errors import PlanError
from streamconv.ops import Block, Frequencies, Tally, apply

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def made(op: Frequencies, start: int, stop: int) -> np.ndarray:
    (spec,) = op.spec([])
    out = np.empty(stop - start, spec.dtype.numpy)
    op.compute(Block(0, ((start, stop),), out, [], [], [], Tally()))
    return out


# F16 has no base above 65504.
_BASES = [("F32", 1e4), ("F32", 5e5), ("F32", 1e6), ("F16", 1e4), ("BF16", 1e4), ("BF16", 5e5), ("BF16", 1e6)]


@pytest.mark.parametrize(("dtype", "base"), _BASES)
@pytest.mark.parametrize("dim", [2, 8, 16, 32, 64, 96, 128, 256])
def test_it_is_what_models_compute(dim: int, base: float, dtype: str) -> None:
    """The formula of zai-org/ChatGLM3 (modeling_chatglm.py), and with F32 that of everyone else."""
    kind = _TORCH[dtype]
    exponents = torch.arange(0, dim, 2).to(kind) / dim
    # Torch's powers in F32 are as exact as the processor's: with F64's, rounded, there is one right result.
    powers = (torch.tensor(base).to(kind).double() ** exponents.double()).float().to(kind)
    found = made(Frequencies(base, dim, dtype, dtype), 0, dim // 2)
    codes = f"int{8 * found.itemsize}"
    np.testing.assert_array_equal(found.view(codes), (1.0 / powers).view(getattr(torch, codes)).numpy())
    # A power that is one last digit off gives a reciprocal that is up to two off, just below a power of two.
    theirs = (1.0 / base**exponents).view(getattr(torch, codes)).numpy()
    assert np.abs(found.view(codes) - theirs).max() <= 2


def test_any_part_is_part_of_the_whole() -> None:
    op = Frequencies(10000, 128, "F32")
    whole = made(op, 0, 64)
    for start in range(0, 64, 7):
        np.testing.assert_array_equal(made(op, start, min(start + 9, 64)), whole[start : start + 9])


@pytest.mark.parametrize(
    "fields", [(10000, 3, "F32"), (10000, 0, "F32"), (0, 4, "F32"), (10000, 4, "I32"), (10000, 4, "F8_E4M3")]
)
def test_what_makes_no_frequencies(fields: tuple[float, int, str]) -> None:
    with pytest.raises(PlanError):
        apply(Frequencies(*fields))
