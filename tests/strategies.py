"""Random inputs that several test modules draw from. Small functions; each says what it draws."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.tensor import TensorSpec


def tensor_shapes(dtype: DType) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of up to five axes, 0-d and empty ones among them; packed elements fill whole bytes by rows."""
    axes = st.integers(0, 4)
    if not dtype.packed:
        return st.lists(axes, max_size=5).map(tuple)
    last = axes.map(lambda size: size * 4)
    return st.builds(lambda front, end: (*front, end), st.lists(axes, max_size=3), last)


def tensor_specs(names: st.SearchStrategy[str], rows: list[DType]) -> st.SearchStrategy[TensorSpec]:
    """Specs with these names and dtypes."""
    return st.sampled_from(rows).flatmap(
        lambda dtype: st.builds(TensorSpec, names, st.just(dtype), tensor_shapes(dtype))
    )


def spec_lists(
    rows: list[DType] | None = None, names: st.SearchStrategy[str] | None = None, max_size: int = 12
) -> st.SearchStrategy[list[TensorSpec]]:
    """Lists of specs with distinct names (any Unicode text) and all dtypes, unless told otherwise."""
    specs = tensor_specs(
        st.text(max_size=12) if names is None else names, rows or list(dtypes.BY_NAME.values())
    )
    return st.lists(specs, max_size=max_size, unique_by=lambda spec: spec.name)


def tensor_bytes(spec: TensorSpec, seed: int) -> bytes:
    """Random contents for a tensor: any bit pattern, but only 0 and 1 for BOOL."""
    data = random.Random(f"{seed}/{spec.name}").randbytes(spec.nbytes)
    return bytes(byte & 1 for byte in data) if spec.dtype.name == "BOOL" else data
