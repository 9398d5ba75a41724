"""What a destination is to hold, and what each of several ranks has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, renamed
from streamconv.plans.plan import OutputFile, PlannedTensor, Targets, TextFile
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted


@dataclass(slots=True)
class Output:
    """What the destination is to hold, as far as it is decided.

    Attributes:
        tensors: in the order of their files and offsets.
        files: weight files.
        texts: small files that are made.
        left_out: paths of side files that are not to be copied.
    """

    tensors: list[PlannedTensor] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


RankLayout = Callable[[Transformed, Wanted, Output], Iterator[Transformed]]
"""What each rank has of a component's targets, and what its file is called; texts are added to the output."""


def dealt(
    targets: Targets, ranks: int, parts: Callable[[str, Expression], Mapping[int, Expression]]
) -> list[Targets]:
    """What each rank has of the targets; `parts` gives each holder's part of one, by rank.

    Raises:
        PlanError: with every target that cannot be split.
    """
    result: list[dict[str, tuple[tuple[str, ...], Expression]]] = [{} for _ in range(ranks)]
    problems: list[Problem] = []
    for name, (sources, whole) in targets.items():
        try:
            held = parts(name, whole)
        except PlanError as error:
            problems += error.problems
            continue
        for rank, part in held.items():
            result[rank][name] = (sources, renamed(part, name))
    if problems:
        raise PlanError(f"it cannot be split among {ranks} ranks", problems=problems)
    return list(result)
