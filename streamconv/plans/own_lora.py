"""A LoRA that lies unmerged in a checkpoint of SAT: merged into its weights, or kept apart from them.

    original.weight + scale * matrix_B @ matrix_A      for each part of the rows, and on each rank for its own part

In F32, rounded once.

Source: THUDM/SwissArmyTransformer: sat/model/finetune/lora2.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from streamconv.errors import PlanError, Problem
from streamconv.ops import Concat, Expression, LowRankAdd, Split, apply, renamed
from streamconv.plans.findings import Findings
from streamconv.plans.lora import as_float, grouped, numbers
from streamconv.readers.checkpoint import Component
from streamconv.readers.sat import LORA, sizes_of
from streamconv.readers.splits import SAT, WHOLE, join, split


class _Factor(NamedTuple):
    """Which factor of a module: of which rank, of which part of the rows, and which side of the product."""

    rank: int
    part: int
    side: str


_Factors = Mapping[_Factor, Expression]


def settle(component: Component, scale: float | None, findings: Findings, *, keep: bool) -> Component:
    """The component with the LoRA that lies in it merged into the weights, or with a config that describes it.

    Args:
        component: as it was read.
        scale: what the product is multiplied by; None: 1 / rank, as SAT's alpha of 1 means.
        findings: what was merged.
        keep: whether it is kept apart.

    Raises:
        PlanError: it cannot be merged, or not be kept apart; all problems at once.
    """
    modules = _modules(component.tensors)
    if not modules:
        return component
    if not keep:
        return _merged(component, modules, scale, findings)
    factors = next(iter(modules.values()))
    if any(factor.rank for factor in factors):
        raise PlanError(
            "a LoRA that is split among ranks cannot be kept apart: the ranks' factors differ",
            tensor=next(iter(modules)),
            hint="merge it into the weights",
        )
    settings = {"lora_rank": next(iter(_ranks(factors)), None), "lora_scale": scale}
    return replace(component, config={**(component.config or {}), **settings})


def _modules(tensors: Mapping[str, Expression]) -> dict[str, _Factors]:
    """The factors of each module that has any."""
    modules: dict[str, dict[_Factor, Expression]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = LORA.fullmatch(name)
        if found and found["side"]:
            factor = _Factor(int(found["rank"] or 0), int(found["part"]), found["side"])
            modules[found["module"]][factor] = tensor
    return dict(modules)


def _merged(
    component: Component, modules: Mapping[str, _Factors], scale: float | None, findings: Findings
) -> Component:
    orphans = [module for module in modules if f"{module}.original.weight" not in component.tensors]
    if orphans:
        raise PlanError(
            f"there are LoRA factors for {orphans[0]} and {len(orphans) - 1} more, and no weights to add them to",
            tensor=orphans[0],
            hint="a LoRA saved alone cannot be merged; give the checkpoint with the base weights",
        )
    tensors: dict[str, Expression] = {}
    problems: list[Problem] = []
    used: set[float] = set()
    for name, tensor in component.tensors.items():
        found = LORA.fullmatch(name)
        if found is None or found["side"]:
            if found is None:
                tensors[name] = tensor
            continue
        target = f"{found['module']}.{found['leaf']}"
        tensors[target] = renamed(tensor, target)
        factors = modules.get(found["module"])
        if factors is None or found["leaf"] != "weight":
            continue
        by = 1 / max(1, *_ranks(factors)) if scale is None else scale
        used.add(by)
        try:
            tensors[target] = renamed(_update(target, tensor, factors, by, component.config or {}), target)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError("the unmerged LoRA does not fit", problems=grouped(problems))
    ranks = {rank for factors in modules.values() for rank in _ranks(factors)}
    stated = " (alpha / rank; no file says alpha, SAT's default is 1: --lora-scale)" if scale is None else ""
    findings.notes.append(
        f"an unmerged LoRA of rank {numbers(ranks)} is merged into {len(modules)} weights with scale "
        f"{numbers(used)}{stated}"
    )
    return replace(component, tensors=tensors)


def _ranks(factors: _Factors) -> set[int]:
    """The ranks of the products of one module."""
    return {tensor.spec.shape[0] for factor, tensor in factors.items() if factor.side == "A"}


def _update(
    name: str, weight: Expression, factors: _Factors, scale: float, config: Mapping[str, Any]
) -> Expression:
    """A weight with its products added, on each rank to that rank's part of it."""
    if weight.spec.dtype.kind != "float":
        raise PlanError(
            f"it is {weight.spec.dtype}, quantised weights under a LoRA",
            tensor=name,
            hint="take the checkpoint that was trained without QLoRA",
        )
    ranks, parts = (len({factor[axis] for factor in factors}) for axis in (0, 1))
    wanted = {_Factor(rank, part, side) for rank in range(ranks) for part in range(parts) for side in "AB"}
    if factors.keys() != wanted:
        raise PlanError("parts of its LoRA factors are missing", tensor=name)
    sharding, sizes = SAT.find(name) or WHOLE, sizes_of(config)
    pieces = split(weight, sharding, ranks, sizes)
    done = []
    for rank, piece in enumerate(pieces):
        left, right = (
            [as_float(factors[_Factor(rank, part, side)]) for part in range(parts)] for side in "BA"
        )
        rows = apply(Split(0, tuple(factor.spec.shape[0] for factor in left)), piece)
        sums = [apply(LowRankAdd(scale), *each)[0] for each in zip(rows, right, left, strict=True)]
        done.append(apply(Concat(0), *sums)[0] if parts > 1 else sums[0])
    return join(done, sharding, sizes) if ranks > 1 else done[0]
