"""What all adapters have in common: sums of a weight and a product, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, LowRankAdd, apply, in_dtype
from streamconv.plans.findings import grouped


def merged(what: str, updates: Iterable[Callable[[], tuple[int, float]]], kinds: str = "") -> str:
    """Make the updates of all weights, each of which gives its rank and scale; what was merged, in words.

    Raises:
        PlanError: of all that does not fit.
    """
    used: list[tuple[int, float]] = []
    problems: list[Problem] = []
    for update in updates:
        try:
            used.append(update())
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(f"{what} does not fit", problems=grouped(problems))
    ranks, scales = (
        ", ".join(f"{value:g}" for value in sorted({each[at] for each in used})) or "none" for at in (0, 1)
    )
    return f"{kinds}rank {ranks} is merged into {len(used)} weights with scale {scales}"


def check_base(name: str, weight: Expression) -> None:
    """Refuse to add to quantised weights.

    Raises:
        PlanError: they are.
    """
    if weight.spec.dtype.kind != "float" or weight.spec.dtype.bits < 16:
        raise PlanError(
            f"the base is {weight.spec.dtype}, quantised",
            tensor=name,
            hint="merge into weights that are not quantised, also after QLoRA",
        )


def low_rank_sum(weight: Expression, a: Expression, b: Expression, scale: float) -> Expression:
    """`weight + scale * b @ a`, rounded once."""
    return apply(LowRankAdd(scale), weight, as_float(a), as_float(b))[0]


def as_float(tensor: Expression) -> Expression:
    """A factor in a dtype that can be calculated with."""
    return tensor if tensor.spec.dtype.bits >= 16 else in_dtype(tensor, "F32")


def wide(tensor: Expression) -> Expression:
    """In F32, or as wide as it is."""
    return tensor if tensor.spec.dtype.bits >= 32 else in_dtype(tensor, "F32")
