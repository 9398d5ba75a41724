"""What operations refuse of their operands and fields, each with a PlanError that names the operation."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import PlanError, UsageError
from streamconv.ops.arrays import numpy
from streamconv.tensor import Shape, TensorSpec

POWERS_OF_TWO = "F8_E8M0"
"""A float by kind, without sign or zero: nothing can be rounded to it, and no arithmetic ends in it."""


def check_axis(op: str, axis: int, operand: TensorSpec) -> int:
    """The axis, if the operand has it."""
    if not 0 <= axis < len(operand.shape):
        raise PlanError(f"{op} on axis {axis} of shape {list(operand.shape)}", tensor=operand.name)
    return axis


def check_float(op: str, *operands: TensorSpec) -> None:
    """Refuse operands that are not floats of whole bytes, with sign and zero."""
    for operand in operands:
        dtype = operand.dtype
        if dtype.kind != "float" or dtype.packed or dtype.name == POWERS_OF_TWO:
            raise PlanError(
                f"{op} of '{operand.name}', which is {dtype}: it computes with floats",
                tensor=operands[0].name,
                hint="cast it first" if dtype.kind in ("bool", "int", "uint") else None,
            )


def check_dtype(
    op: str, operand: TensorSpec, allowed: Sequence[str], tensor: str, hint: str | None = None
) -> None:
    """Refuse an operand of a dtype that is not one of `allowed`; the error is about `tensor`."""
    if operand.dtype.name not in allowed:
        raise PlanError(
            f"{op} of '{operand.name}', which is {operand.dtype}: {' or '.join(allowed)} expected",
            tensor=tensor,
            hint=hint,
        )


def check_number(op: str, value: float, meaning: str, tensor: str) -> None:
    """Refuse a number that F32 cannot hold: beyond its range, or so small that it would be 0 there."""
    if not fits(value):
        raise PlanError(f"{op} with {meaning} {value}, which F32 cannot hold", tensor=tensor)


def fits(value: float) -> bool:
    """Whether F32 has a finite value for this number, and one that is 0 only for 0."""
    with numpy.errstate(all="ignore"):
        held = float(numpy.float32(value))
    return abs(held) < float("inf") and (held == 0) == (value == 0)


def check_scales(
    weight: TensorSpec, scale: TensorSpec, wanted: Shape, what: str, hint: str | None = None
) -> None:
    """Refuse scales of another shape than `wanted`; `what` says which operation needs them for which weight."""
    if scale.shape != wanted:
        raise PlanError(
            f"{what} needs scales {list(wanted)}: '{scale.name}' is {list(scale.shape)}",
            tensor=weight.name,
            hint=hint,
        )


def parsed(what: str, text: str, tensor: str | None = None) -> DType:
    """The dtype that `text` names; `what` begins the message about one that there is not, as `cast to`."""
    try:
        return dtypes.parse(text)
    except UsageError as error:
        raise PlanError(f"{what} {error.headline.message}", tensor=tensor, hint=error.headline.hint) from None


def target_of(op: str, text: str, allowed: Sequence[str], tensor: str) -> DType:
    """The dtype that `text` names, if it is one of `allowed`."""
    found = parsed(f"{op} to", text, tensor)
    if found.name not in allowed:
        raise PlanError(f"{op} to {found}: it makes {' or '.join(allowed)}", tensor=tensor)
    return found
