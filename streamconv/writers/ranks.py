"""What the files of several ranks hold of a model: a format's layout of ranks takes all of it, and says each one's part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, renamed
from streamconv.readers.mindspore.strategy import Layout
from streamconv.writers.layout import Wrapping

Tensors = Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class Whole:
    """A model that is to be split.

    Attributes:
        tensors: by name.
        ranks: tensor-parallel ones, of each stage.
        stages: of the pipeline.
        strategy: how each tensor is split, instead of these numbers.
        config: the model's.
        wrapping: what one file of it would hold around the tensors.
    """

    tensors: Tensors
    ranks: int
    stages: int = 1
    strategy: Mapping[str, Layout] | None = None
    config: Mapping[str, Any] | None = None
    wrapping: Wrapping | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds.

    Attributes:
        tensors: by the names that they have in the whole.
        stem: what the rank's files are called, without the suffix; empty: as those of the whole.
        wrapping: what its file holds around the tensors.
        texts: other files that go with it, by path.
    """

    tensors: Tensors
    stem: str = ""
    wrapping: Wrapping | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


RankLayout = Callable[[Whole], Sequence[Part]]
"""What each rank holds, in their order; none where the whole stays one. Raises PlanError."""


def dealt(
    tensors: Tensors, ranks: int, parts: Callable[[str, Expression], Mapping[int, Expression]]
) -> list[Tensors]:
    """What each rank has of the tensors; `parts` gives each holder's part of one, by rank.

    Raises:
        PlanError: with every tensor that cannot be split.
    """
    result: list[dict[str, Expression]] = [{} for _ in range(ranks)]
    problems: list[Problem] = []
    for name, whole in tensors.items():
        try:
            held = parts(name, whole)
        except PlanError as error:
            problems += error.problems
            continue
        for rank, part in held.items():
            result[rank][name] = renamed(part, name)
    if problems:
        raise PlanError(f"it cannot be split among {ranks} ranks", problems=problems)
    return list(result)
