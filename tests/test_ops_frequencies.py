"""Rotary frequencies are torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamconv.errors import PlanError
from streamconv.ops import Frequencies, Tally, apply

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def made(op: Frequencies, start: int, stop: int) -> np.ndarray:
    (spec,) = op.spec([])
    out = np.empty(stop - start, spec.dtype.numpy)
    op.compute(0, ((start, stop),), out, [], [], [], Tally())
    return out


# F16 has no base above 65504.
_BASES = [("F32", 1e4), ("F32", 5e5), ("F32", 1e6), ("F16", 1e4), ("BF16", 1e4), ("BF16", 5e5), ("BF16", 1e6)]


@pytest.mark.parametrize(("dtype", "base"), _BASES)
@pytest.mark.parametrize("dim", [2, 8, 16, 32, 64, 96, 128, 256])
def test_it_is_what_models_compute(dim: int, base: float, dtype: str) -> None:
    """The formula of zai-org/ChatGLM3 (modeling_chatglm.py), and with F32 that of everyone else."""
    kind = _TORCH[dtype]
    expected = 1.0 / (base ** (torch.arange(0, dim, 2).to(kind) / dim))
    found = made(Frequencies(base, dim, dtype, dtype), 0, dim // 2)
    # torch's powers in F32 are a step off for some exponents; in shorter dtypes rounding hides that.
    steps = (
        found.view(f"i{found.itemsize}") - expected.view(getattr(torch, f"int{8 * found.itemsize}")).numpy()
    )
    assert np.abs(steps).max() <= (1 if dtype == "F32" else 0)
    assert np.count_nonzero(steps) <= dim // 16


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
