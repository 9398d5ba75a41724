"""What the steps of making a plan find, besides what they make: one collector, handed from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from streamconv.errors import Problem, StreamconvError
from streamconv.plans.patterns import shape_of
from streamconv.plans.plan import Check, Dropped


@dataclass(slots=True)
class Findings:
    """What the plan says besides where its bytes come from. Every step adds to it, in the order of the steps.

    Attributes:
        dropped: source tensors that lead to no target.
        checks: what must be proven for the plan to be right.
        notes: what was decided and a user should know, one line each.
        problems: all that is wrong; where there are any, there is no plan.
    """

    dropped: list[Dropped] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the problems of an error that ends the step; later steps still run."""
        try:
            yield
        except StreamconvError as error:
            self.problems += error.problems


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """The first problem of each kind, and how many more there are like it: numbers in names and messages do not count."""
    kinds: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[f"{problem.file}{shape_of(f'{problem.tensor}{problem.message}')}"].append(problem)
    return [
        replace(first, message=first.message + (f" (and {len(more)} more like it)" if more else ""))
        for first, *more in kinds.values()
    ]
