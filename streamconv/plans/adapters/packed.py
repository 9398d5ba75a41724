"""LoRA of parameters that are not the weight of a layer, such as experts in one tensor (peft's `target_parameters`).

For a parameter [experts, out, in] or [experts, in, out], A is [experts * r, in] with an expert's rows together, and B
[out, r * experts] with an expert's columns `experts` apart. Of several parameters of a module the names say nothing but
their nesting, so that shapes tell which is which. (huggingface/peft 0.21: tuners/lora/layer.py, `ParamWrapper`.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from streamconv.errors import PlanError
from streamconv.ops import Expression, PermuteAxes, apply, in_dtype, renamed, reshaped, turned
from streamconv.plans.adapters.adapter import NESTED, Adapter
from streamconv.plans.adapters.sums import check_base, low_rank_sum, wide


class Parameter(NamedTuple):
    """A parameter that factors are for, and whether it is [experts, in, out]."""

    name: str
    turned: bool


class Scale(Protocol):
    """What the product of factors of a rank is multiplied by."""

    def __call__(self, rank: int) -> float:
        """The scale."""


def parameters(
    layers: Mapping[str, Mapping[str, Expression]],
    base: Mapping[str, Expression],
    prefix: str,
    adapter: Adapter,
) -> dict[str, Parameter]:
    """Which of the modules with factors stand for a parameter, and for which.

    Raises:
        PlanError: it is not clear.
    """
    targets = adapter.config.get("target_parameters") or []
    if not targets:
        return {}
    groups: dict[str, list[str]] = defaultdict(list)
    for module in layers:
        groups[module.replace(NESTED, "")].append(module)
    found: dict[str, Parameter] = {}
    for place, nested in groups.items():
        if prefix + place + ".weight" in base or place + ".weight" in base:
            continue
        own = prefix + place if any(name.startswith(f"{prefix}{place}.") for name in base) else place
        names = [
            name
            for name in base
            if name.rpartition(".")[0] == own and any(f".{name}".endswith(f".{each}") for each in targets)
        ]
        fits = {module: _fitting(layers[module], names, base) for module in nested}
        chosen: dict[str, Parameter] = {}
        while pending := [module for module in nested if module not in chosen]:
            taken = {each.name for each in chosen.values()}
            left = {module: [each for each in fits[module] if each.name not in taken] for module in pending}
            sure = {
                module: found for module, found in left.items() if len({each.name for each in found}) == 1
            }
            if not sure:
                raise PlanError(
                    f"the adapter has factors for {len(nested)} parameters of it, and which is which is not clear: "
                    f"{', '.join(names) or 'the base has none of them'}",
                    file=adapter.path, tensor=place,
                )  # fmt: skip
            for module, fitting in sure.items():
                ways = {each.turned for each in fitting}
                chosen[module] = Parameter(
                    fitting[0].name, ways.pop() if len(ways) == 1 else _way(fits, base)
                )
        found |= chosen
    return found


def _fitting(
    parts: Mapping[str, Expression], names: list[str], base: Mapping[str, Expression]
) -> list[Parameter]:
    """The parameters whose shape is that of what the factors make, in either order of in and out."""
    a, b = (parts[f"lora_{side}"].spec.shape if f"lora_{side}" in parts else (0, 0) for side in "AB")
    found = []
    for name in names:
        *front, first, second = base[name].spec.shape
        if len(front) == 1 and a[0] % max(front[0], 1) == 0 and a[0] == b[1]:
            found += [Parameter(name, False)] * ((first, second) == (b[0], a[1]))
            found += [Parameter(name, True)] * ((second, first) == (b[0], a[1]))
    return found


def _way(fits: Mapping[str, list[Parameter]], base: Mapping[str, Expression]) -> bool:
    """Whether a parameter with as many inputs as outputs is [experts, in, out], as the others of the module."""
    ways = {
        each.turned
        for found in fits.values()
        for each in found
        if base[each.name].spec.shape[-1] != base[each.name].spec.shape[-2]
    }
    if len(ways) != 1:
        name = next(each.name for found in fits.values() for each in found)
        raise PlanError(
            "whether it is [experts, out, in] or [experts, in, out] is not told by its shape", tensor=name,
            hint="merge it with peft",
        )  # fmt: skip
    return ways.pop()


def adapted(
    made: dict[str, Expression],
    parameter: Parameter,
    parts: Mapping[str, Expression],
    scale: Scale,
    *,
    as_wide: bool,
) -> tuple[int, float]:
    """Put the merged parameter into `made`; the rank and scale that were used."""
    weight, (a, b) = made[parameter.name], (parts["lora_A"], parts["lora_B"])
    check_base(parameter.name, weight)
    experts = weight.spec.shape[0]
    rank = a.spec.shape[0] // experts
    used = scale(rank)
    right = reshaped(a, (experts, rank, a.spec.shape[1]))
    left = apply(PermuteAxes((2, 0, 1)), reshaped(b, (b.spec.shape[0], rank, experts)))[0]
    if parameter.turned:
        right, left = turned(left), turned(right)
    result = low_rank_sum(wide(weight) if as_wide else weight, right, left, used)
    made[parameter.name] = renamed(
        result if as_wide else in_dtype(result, weight.spec.dtype.name), parameter.name
    )
    return rank, used
