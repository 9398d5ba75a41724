"""A model's tensors as the model-parallel ranks of SAT hold them: a file for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, renamed
from streamconv.plans.placement import Output
from streamconv.plans.plan import Targets
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
from streamconv.readers.sat_splits import split

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
