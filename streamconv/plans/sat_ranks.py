"""A model's tensors as the model-parallel ranks of SAT hold them: the mirror of what `readers.sat` joins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import PlanError, Problem
from streamconv.ops import Concat, Expression, Split, apply, renamed
from streamconv.plans.placement import Output
from streamconv.plans.plan import Targets
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
from streamconv.readers.sat import SPLIT_VOCABULARY, fused_ratios, split_of

_RANK = "mp_rank_00"
"""What a path has in the place of a rank's own number."""


def ranks(made: Transformed, wanted: Wanted, output: Output) -> Iterator[Transformed]:
    """One file a rank; what the path of is no rank's stays one file."""
    del output
    if made.wrapping is None or _RANK not in made.wrapping.path:
        yield made
        return
    for rank, targets in enumerate(rank_parts(made.targets, made.config or {}, wanted.ranks)):
        path = made.wrapping.path.replace(_RANK, f"mp_rank_{rank:02d}")
        wrapping = replace(made.wrapping, path=path, texts=made.wrapping.texts if rank == 0 else {})
        yield replace(made, targets=targets, shared={}, wrapping=wrapping)


def rank_parts(targets: Targets, config: Mapping[str, Any], count: int) -> list[Targets]:
    """For each of `count` ranks, its part of every target.

    Raises:
        PlanError: tensors cannot be split so; all of them at once.
    """
    ranks: list[dict[str, tuple[tuple[str, ...], Expression]]] = [{} for _ in range(count)]
    problems: list[Problem] = []
    for name, (sources, expression) in targets.items():
        try:
            parts = split(name, expression, config, count)
        except PlanError as error:
            problems += error.problems
            continue
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = (sources, renamed(part, name))
    if problems:
        raise PlanError(f"it cannot be split among {count} ranks", problems=problems)
    return list(ranks)


def split(name: str, whole: Expression, config: Mapping[str, Any], count: int) -> list[Expression]:
    """What each of `count` ranks has of a tensor.

    Raises:
        PlanError: it cannot be split so.
    """
    kind = split_of(name)
    if kind == "vocabulary":
        kind = "rows" if whole.spec.shape[0] >= SPLIT_VOCABULARY else "whole"
    if kind == "whole" or not whole.spec.shape:
        return [whole] * count
    if kind in ("rows", "columns"):
        return _equal(whole, 0 if kind == "rows" else 1, count)
    ratios = (1, 1) if kind == "pair" else fused_ratios(name, config)
    unit = whole.spec.shape[0] // sum(ratios)
    sizes = tuple(unit * ratio for ratio in ratios)
    kinds = [_equal(part, 0, count) for part in apply(Split(0, sizes), whole)]
    return [apply(Concat(0), *(parts[rank] for parts in kinds))[0] for rank in range(count)]


def _equal(tensor: Expression, axis: int, count: int) -> list[Expression]:
    size, rest = divmod(tensor.spec.shape[axis], count)
    if rest:
        raise PlanError(
            f"its {tensor.spec.shape[axis]} {'rows' if axis == 0 else 'columns'} do not divide by {count}",
            tensor=tensor.spec.name,
            hint="choose a --tp that divides them",
        )
    return list(apply(Split(axis, (size,) * count), tensor))
