"""A LoRA of SAT, which lies unmerged in its checkpoint: merged into the weights, or kept apart.

It has factors for each part of a weight's rows, and on each rank for that rank's part of the weight.
(THUDM/SwissArmyTransformer: sat/model/finetune/lora2.py.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from streamconv.errors import PlanError
from streamconv.ops import Concat, Expression, Split, apply, renamed
from streamconv.plans.adapters.sums import check_base, low_rank_sum, merged
from streamconv.plans.findings import Findings
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
    modules: dict[str, dict[_Factor, Expression]] = defaultdict(dict)
    made: dict[str, Expression] = {}
    for name, tensor in component.tensors.items():
        found = LORA.fullmatch(name)
        if found and found["side"]:
            if len(tensor.spec.shape) != 2 or not tensor.spec.numel:
                raise PlanError(f"a LoRA factor of {list(tensor.spec.shape)} is not a matrix", tensor=name)
            factor = _Factor(int(found["rank"] or 0), int(found["part"]), found["side"])
            modules[found["module"]][factor] = tensor
        else:
            target = f"{found['module']}.{found['leaf']}" if found else name
            made[target] = renamed(tensor, target)
    if keep:
        return _described(component, modules, scale) if modules else component
    if not modules:
        return replace(component, tensors=made)
    present, config = component.tensors.keys(), component.config or {}
    updates = (
        partial(_updated, made, present, module, each, scale, config) for module, each in modules.items()
    )
    assumed = " (alpha / rank; no file says alpha, SAT's default is 1: --lora-scale)"
    said = merged("the unmerged LoRA", updates)
    findings.notes.append(f"an unmerged LoRA of {said}{assumed if scale is None else ''}")
    return replace(component, tensors=made)


def _described(component: Component, modules: Mapping[str, _Factors], scale: float | None) -> Component:
    """The component, with what its LoRA is in the config."""
    for module, factors in modules.items():
        if any(factor.rank for factor in factors):
            raise PlanError(
                "a LoRA that is split among ranks cannot be kept apart: the ranks' factors differ",
                tensor=module,
                hint="merge it into the weights",
            )
    settings = {"lora_rank": _rank(next(iter(modules.values())))} | (
        {} if scale is None else {"lora_scale": scale}
    )
    return replace(component, config={**(component.config or {}), **settings})


def _rank(factors: _Factors) -> int:
    """The rank of the products of one module, which all have one."""
    return next(tensor.spec.shape["BA".index(factor.side) - 1] for factor, tensor in factors.items())


def _updated(
    made: dict[str, Expression], present: Collection[str], module: str, factors: _Factors, scale: float | None,
    config: Mapping[str, Any],
) -> tuple[int, float]:  # fmt: skip
    """Put a weight with its products into `made`, each rank's into that rank's part; the rank and scale of all."""
    name = f"{module}.weight"
    if f"{module}.original.weight" not in present:
        raise PlanError(
            f"there are LoRA factors for {module}, and no weights to add them to",
            tensor=module,
            hint="a LoRA saved alone cannot be merged; give the checkpoint with the base weights",
        )
    check_base(name, made[name])
    rank = _rank(factors)
    scale = 1 / rank if scale is None else scale
    ranks, parts = (len({factor[axis] for factor in factors}) for axis in (0, 1))
    wanted = {_Factor(each, part, side) for each in range(ranks) for part in range(parts) for side in "AB"}
    if factors.keys() != wanted:
        raise PlanError("parts of its LoRA factors are missing", tensor=name)
    naming = NAMINGS["sat"]
    sharding, sizes = naming.sharding(name) or WHOLE, naming.sizes_of(config)
    pieces = []
    for number, piece in enumerate(split(made[name], sharding, ranks, sizes)):
        left, right = ([factors[_Factor(number, part, side)] for part in range(parts)] for side in "BA")
        rows = apply(Split(0, tuple(factor.spec.shape[0] for factor in left)), piece)
        sums = [low_rank_sum(*each, scale) for each in zip(rows, right, left, strict=True)]
        pieces.append(apply(Concat(0), *sums)[0] if parts > 1 else sums[0])
    made[name] = renamed(join(pieces, sharding, sizes) if ranks > 1 else pieces[0], name)
    return rank, scale
