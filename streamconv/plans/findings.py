"""What the steps of making a plan find, besides what they make: one collector, handed from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from streamconv.errors import Problem, StreamconvError
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
        """A step that an error ends; its problems are kept, and what comes after goes on."""
        try:
            yield
        except StreamconvError as error:
            self.problems += error.problems
