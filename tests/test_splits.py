"""Tensors among tensor-parallel ranks: what each has of one, and that joining undoes splitting."""

from __future__ import annotations

import re

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv import dtypes, families
from streamconv.api import LazyTensor
from streamconv.errors import PlanError
from streamconv.families.splits import DEEPSPEED, MINDFORMERS, SAT
from streamconv.plans import formula
from streamconv.readers.splits import (
    COLUMNS,
    PAIR,
    QKV,
    ROWS,
    TRIPLE,
    WHOLE,
    Sharding,
    join,
    split,
)
from streamconv.tensor import Extent, Stored, TensorSpec

KINDS = [WHOLE, ROWS, COLUMNS, PAIR, TRIPLE, QKV, Sharding(2, (2, 1)), Sharding(0, least=1000)]


def stored(path, array: numpy.ndarray) -> Stored:
    path.write_bytes(array.tobytes())
    spec = TensorSpec("w", dtypes.by_name("I32"), array.shape)
    return Stored(spec, (Extent(str(path), 0, array.nbytes),))


def numbered(*shape: int) -> numpy.ndarray:
    return numpy.arange(numpy.prod(shape, dtype=int), dtype=numpy.int32).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_joining_undoes_splitting(tmp_path_factory, kind, count, heads, kv_heads, known) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads} if known else {}
    shape = [2, 3, 2]
    if kind.axis is not None:
        shape[kind.axis] = count * sum(kind.ratios(sizes) or (1,)) * 2
    array = numbered(*shape)
    whole = stored(tmp_path_factory.mktemp("whole") / "file", array)
    parts = split(whole, kind, count, sizes)
    assert len(parts) == count
    joined = join(parts, kind, sizes)
    assert joined.spec.shape == array.shape
    assert (LazyTensor(joined).numpy() == array).all()
    if kind.cuts(array.shape):
        assert sum(part.spec.numel for part in parts) == array.size


def test_each_rank_has_its_share_of_every_tensor_in_one(tmp_path) -> None:
    array = numbered(12, 2)  # of two ranks with 4 heads and 1 for keys: q q q q, k, v of 2 rows each
    first, second = (
        LazyTensor(part).numpy()
        for part in split(stored(tmp_path / "file", array), QKV, 2, {"heads": 4, "kv_heads": 1})
    )
    assert (first == array[[0, 1, 2, 3, 8, 10]]).all()
    assert (second == array[[4, 5, 6, 7, 9, 11]]).all()


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (ROWS, (5, 2), "its 5 rows do not divide by 2"),
        (COLUMNS, (2, 5), "its 5 columns do not divide by 2"),
        (COLUMNS, (4,), r"axis 1 of \[4\] is not there"),
        (QKV, (10, 2), "its 10 rows are not in the ratios 4:1:1 .*heads 4, kv_heads 1"),
        (QKV, (6, 2), "do not divide by 2"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, kind, shape, message) -> None:
    with pytest.raises(PlanError, match=message):
        split(stored(tmp_path / "file", numbered(*shape)), kind, 2, {"heads": 4, "kv_heads": 1})


@pytest.mark.parametrize(
    ("table", "name", "kind"),
    [
        (SAT, "transformer.layers.0.attention.query_key_value.weight", QKV),
        (SAT, "model.diffusion_model.transformer.layers.0.attention.query_key_value.original.weight", QKV),
        (SAT, "mixins.eva.vit_model.transformer.layers.0.attention.query_key_value.bias", TRIPLE),
        (SAT, "transformer.layers.0.attention.dense.bias", WHOLE),
        (SAT, "model.diffusion_model.mixins.final_layer.linear.weight", WHOLE),
        (DEEPSPEED, "transformer.layers.0.attention.dense.bias", WHOLE),
        (DEEPSPEED, "something.else", None),
        (MINDFORMERS, "model.layers.0.attention.wo.weight", COLUMNS),
    ],
)
def test_names_say_how_tensors_are_split(table, name, kind) -> None:
    assert table.sharding(name) == kind


@pytest.mark.parametrize(("naming", "table"), [("sat", SAT), ("mindformers", MINDFORMERS)])
def test_what_is_split_has_the_axis(naming, table) -> None:
    sides = [
        side for recipe in families.recipes() for side in (recipe.source, recipe.target) if side is not None
    ]
    lines = {line for side in sides if side.name.partition("-")[0] == naming for line in side.lines}
    kinds = {line: table.sharding(re.sub(r"{\w+}", "0", line.name.text)) or WHOLE for line in lines}
    split_lines = [line for line, kind in kinds.items() if kind.axis is not None]
    assert len(split_lines) > 20
    for line in split_lines:
        assert kinds[line].axis < len(formula.elements(line.dimensions)), line.text
