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

from streamconv.errors import PlanError, Problem, listed
from streamconv.ops import Concat, Expression, LowRankAdd, Split, apply, renamed
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.lora import as_float, described
from streamconv.readers.checkpoint import Component
from streamconv.readers.sat import LORA
from streamconv.readers.splits import NAMINGS, WHOLE, join, split


class _Factor(NamedTuple):
    """Which factor of a module: of which rank, of which part of the rows, and which side of the product."""

    rank: int
    part: int
    side: str


_Factors = Mapping[_Factor, Expression]


def settle(component: Component, scale: float | None, findings: Findings, *, keep: bool) -> Component:
    """The component with the LoRA that lies in it merged into the weights, or kept, with a config that describes it.

    Without a `scale` the product is multiplied by 1 / rank, as SAT's alpha of 1 means.

    Raises:
        PlanError: it cannot be merged, or not be kept apart; all problems at once.
    """
    modules = _modules(component.tensors)
    if not keep:
        return replace(component, tensors=_merged(component, modules, scale, findings))
    for module, factors in modules.items():
        if any(factor.rank for factor in factors):
            raise PlanError(
                "a LoRA that is split among ranks cannot be kept apart: the ranks' factors differ",
                tensor=module,
                hint="merge it into the weights",
            )
        settings = {"lora_rank": _rank(factors), "lora_scale": scale}
        return replace(component, config={**(component.config or {}), **settings})
    return component


def _modules(tensors: Mapping[str, Expression]) -> Mapping[str, _Factors]:
    """The factors of each module that has any.

    Raises:
        PlanError: one is not a matrix.
    """
    modules: dict[str, dict[_Factor, Expression]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = LORA.fullmatch(name)
        if found and found["side"]:
            if len(tensor.spec.shape) != 2 or not tensor.spec.numel:
                raise PlanError(f"a LoRA factor of {list(tensor.spec.shape)} is not a matrix", tensor=name)
            factor = _Factor(int(found["rank"] or 0), int(found["part"]), found["side"])
            modules[found["module"]][factor] = tensor
    return modules


def _merged(
    component: Component, modules: Mapping[str, _Factors], scale: float | None, findings: Findings
) -> dict[str, Expression]:
    orphans = [module for module in modules if f"{module}.original.weight" not in component.tensors]
    if orphans:
        raise PlanError(
            f"there are LoRA factors for {listed(orphans, 1)}, and no weights to add them to",
            tensor=orphans[0],
            hint="a LoRA saved alone cannot be merged; give the checkpoint with the base weights",
        )
    tensors: dict[str, Expression] = {}
    problems: list[Problem] = []
    for name, tensor in component.tensors.items():
        found = LORA.fullmatch(name)
        if found is None:
            tensors[name] = tensor
        elif found["leaf"]:
            target = f"{found['module']}.{found['leaf']}"
            tensors[target] = renamed(tensor, target)
    used: list[tuple[int, float]] = []
    for module, factors in modules.items():
        target, rank = f"{module}.weight", _rank(factors)
        used.append((rank, 1 / rank if scale is None else scale))
        try:
            merged = _update(target, tensors[target], factors, used[-1][1], component.config or {})
            tensors[target] = renamed(merged, target)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError("the unmerged LoRA does not fit", problems=grouped(problems))
    if modules:
        assumed = " (alpha / rank; no file says alpha, SAT's default is 1: --lora-scale)"
        findings.notes.append(f"an unmerged LoRA of {described(used)}{assumed if scale is None else ''}")
    return tensors


def _rank(factors: _Factors) -> int:
    """The rank of the products of one module, which all have one."""
    return next(iter(factors.values())).spec.shape[0 if next(iter(factors)).side == "A" else 1]


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
    naming = NAMINGS["sat"]
    sharding, sizes = naming.sharding(name) or WHOLE, naming.sizes_of(config)
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
