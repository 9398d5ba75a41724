"""How ranks share a model: the kinds of splits, joined and split; and what a naming says of which tensor has which.

`join` and `split` undo each other for every kind. The namings are registered from above.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import PlanError
from streamconv.ops import Concat, Expression, Same, Split, apply
from streamconv.tensor import Shape

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is split among ranks.

    Attributes:
        axis: the one that is cut into equal parts; None: every rank has all of the tensor.
        shares: for several tensors fused along that axis, each of which is cut by itself: the share of each, as a
            number or the name of a size (1 where there is no such size). Empty for one tensor.
        least: every rank has all of a tensor that is shorter than this along the axis.
    """

    axis: int | None
    shares: tuple[int | str, ...] = ()
    least: int = 0

    def cuts(self, shape: Shape) -> bool:
        """Whether a whole tensor of this shape is cut; one without the axis cannot be, and is to be refused."""
        if self.axis is None or not shape:
            return False
        return self.axis >= len(shape) or shape[self.axis] >= self.least

    def ratios(self, sizes: Sizes) -> tuple[int, ...]:
        """The shares as the smallest whole numbers."""
        numbers = [each if isinstance(each, int) else sizes.get(each, 1) for each in self.shares]
        return tuple(number // math.gcd(*numbers) for number in numbers)


WHOLE, ROWS, COLUMNS = Sharding(None), Sharding(0), Sharding(1)
PAIR, TRIPLE = Sharding(0, (1, 1)), Sharding(0, (1, 1, 1))
QKV = Sharding(0, ("heads", "kv_heads", "kv_heads"))
"""Queries, keys and values in one projection."""


def join(parts: Sequence[Expression], sharding: Sharding, sizes: Sizes) -> Expression:
    """One tensor from the ranks' parts of it, in the ranks' order. Where every rank has all of it, the copies must agree.

    Raises:
        PlanError: they do not fit together.
    """
    axis = sharding.axis or 0
    shape = [size * len(parts) if at == axis else size for at, size in enumerate(parts[0].spec.shape)]
    if not sharding.cuts(tuple(shape)):
        return apply(Same(), *parts)[0]
    _require_axis(parts[0], axis)
    if not sharding.shares:
        return apply(Concat(axis), *parts)[0]
    pieces = [_shared(part, sharding, sizes) for part in parts]
    return apply(Concat(axis), *(piece[kind] for kind in range(len(sharding.shares)) for piece in pieces))[0]


def split(whole: Expression, sharding: Sharding, count: int, sizes: Sizes) -> list[Expression]:
    """What each of `count` ranks has of a tensor.

    Raises:
        PlanError: it cannot be split so.
    """
    if count == 1 or not sharding.cuts(whole.spec.shape):
        return [whole] * count
    axis = sharding.axis or 0
    _require_axis(whole, axis)
    if not sharding.shares:
        return _equal(whole, axis, count)
    kinds = [_equal(part, axis, count) for part in _shared(whole, sharding, sizes)]
    return [apply(Concat(axis), *parts)[0] for parts in zip(*kinds, strict=True)]


def _shared(tensor: Expression, sharding: Sharding, sizes: Sizes) -> tuple[Expression, ...]:
    """The tensors that are fused in one."""
    axis, ratios = sharding.axis or 0, sharding.ratios(sizes)
    unit, rest = divmod(tensor.spec.shape[axis], sum(ratios))
    if rest:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items() if name in sharding.shares)
        raise PlanError(
            f"its {_counted(tensor, axis)} are not in the ratios {':'.join(map(str, ratios))}",
            tensor=tensor.spec.name,
            hint=f"the config says {said}" if said else None,
        )
    return tuple(apply(Split(axis, tuple(unit * ratio for ratio in ratios)), tensor))


def _equal(tensor: Expression, axis: int, count: int) -> list[Expression]:
    size, rest = divmod(tensor.spec.shape[axis], count)
    if rest:
        raise PlanError(
            f"its {_counted(tensor, axis)} do not divide by {count}",
            tensor=tensor.spec.name,
            hint="choose a number of ranks that divides them",
        )
    return list(apply(Split(axis, (size,) * count), tensor))


def _require_axis(tensor: Expression, axis: int) -> None:
    if axis >= len(tensor.spec.shape):
        raise PlanError(f"axis {axis} of {list(tensor.spec.shape)} is not there", tensor=tensor.spec.name)


def _counted(tensor: Expression, axis: int) -> str:
    kind = ("rows", "columns")[axis] if axis < 2 else f"elements of axis {axis}"
    return f"{tensor.spec.shape[axis]} {kind}"


# ----------------------------------------------------------------------------------------------- namings


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the names that one program gives to tensors say which rank has what of them.

    Attributes:
        rows: name, as a regular expression, -> its sharding; the first that matches.
        otherwise: that of all other names; None: it is not known.
        without: what does not count in a name.
        sizes: what shares are counted in -> the config's key for it. Where a config lacks one, all are alike.
        layer: a regular expression of the names in layers; its group is the layer's number.
        first: of what comes before the layers; all else comes behind them.
    """

    rows: Mapping[str, Sharding]
    otherwise: Sharding | None
    without: tuple[str, ...] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    layer: str = ""
    first: str = ""

    def sharding(self, name: str) -> Sharding | None:
        """A tensor's; None where it is not known."""
        bare, rows = self.bare(name), self.rows.items()
        return next((found for pattern, found in rows if re.fullmatch(pattern, bare)), self.otherwise)

    def bare(self, name: str) -> str:
        """What counts in a name."""
        for text in self.without:
            name = name.replace(text, "")
        return name

    def sizes_of(self, config: Mapping[str, Any]) -> Sizes:
        """What shares are counted in; empty: there are as many of each."""
        sizes: dict[str, Any] = {name: config.get(key) for name, key in self.sizes.items()}
        return sizes if all(isinstance(size, int) and size > 0 for size in sizes.values()) else {}

    def stages(self, names: Collection[str], count: int) -> dict[str, int]:
        """Which of `count` stages of a pipeline has each tensor: layers in equal runs, the first ones longer.

        Raises:
            PlanError: there are fewer layers than stages.
        """
        matches = {name: re.fullmatch(self.layer, name) for name in names}
        layers = {name: int(match[1]) for name, match in matches.items() if match}
        total = max(layers.values(), default=-1) + 1
        if count > max(total, 1):
            raise PlanError(f"{total} layers cannot make {count} stages of a pipeline")
        ends = {name: 0 if re.fullmatch(self.first, name) else count - 1 for name in names}
        return ends | {name: layer * count // total for name, layer in layers.items()}


NAMINGS: dict[str, Naming] = {}
"""The namings that are registered, by the program that they are of."""
