"""Putting together what ranks or shards hold: expressions of structural operations, nothing new to run."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.errors import PlanError
from streamconv.ops.expression import Expression, apply
from streamconv.ops.structural import Concat, Reshape, Same, Truncate
from streamconv.tensor import Shape


def gather_concat(parts: Sequence[Expression], axis: int) -> Expression:
    """Parts one after the other along `axis`, under the first's name (tensor parallelism).

    Raises:
        PlanError: their dtypes or other dimensions differ, or there are none.
    """
    (whole,) = apply(Concat(axis), *parts)
    return whole


def gather_flat(parts: Sequence[Expression], numel: int, shape: Shape) -> Expression:
    """A tensor of `shape` from flat parts: joined, and cut to its `numel` elements (ZeRO, FSDP).

    What is cut off is padding, whose content nobody promises; it is not looked at.

    Raises:
        PlanError: the parts have fewer elements, `shape` has not `numel`, or the parts are not flat.
    """
    held = sum(part.spec.numel for part in parts)
    name = parts[0].spec.name if parts else None
    for part in parts:
        if len(part.spec.shape) != 1:
            raise PlanError(
                f"gather of flat parts: '{part.spec.name}' is {list(part.spec.shape)}", tensor=name
            )
    if held < numel:
        raise PlanError(
            f"gather of {numel} elements from {len(parts)} parts that have {held}",
            tensor=name,
            hint="a part is missing, or the parts are of another tensor",
        )
    (joined,) = apply(Concat(0), *parts)
    (cut,) = apply(Truncate(0, numel), joined)
    (whole,) = apply(Reshape(shape), cut)
    return whole


def gather_replicated(parts: Sequence[Expression]) -> Expression:
    """The first of parts that must be equal, byte by byte; the run checks that they are (see `Same`).

    Raises:
        PlanError: their dtypes or shapes differ, or there are none.
    """
    (one,) = apply(Same(), *parts)
    return one
