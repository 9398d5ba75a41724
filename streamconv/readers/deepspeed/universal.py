"""Universal checkpoints: one directory per parameter, each tensor whole in a file of its own.

    zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt     {'param': tensor, ...}, step.pt

Source: deepspeedai/DeepSpeed: deepspeed/checkpoint/ds_to_universal.py, deepspeed/checkpoint/constants.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from streamconv.errors import CheckpointError, Problems
from streamconv.ops import Expression, Reshape, apply, renamed
from streamconv.readers import moments
from streamconv.readers.deepspeed.states import ModelState
from streamconv.readers.files import load_torch
from streamconv.readers.together import read_all
from streamconv.storage.location import Location

WEIGHTS = "fp32"
_STATES = ("exp_avg", "exp_avg_sq")
_PARAMETER = "param"


def read(
    whole: Mapping[str, Location], models: Sequence[ModelState], *, optimizer: bool
) -> dict[str, dict[str, Expression]]:
    """State (`fp32`, `exp_avg`, ...) -> parameter -> tensor, of the trained parameters.

    Args:
        whole: parameter -> its directory; empty where there is no universal checkpoint.
        models: names and shapes.
        optimizer: whether to read the optimizer state too.

    Raises:
        CheckpointError: files are damaged, or states are missing; all problems at once.
    """
    states = (WEIGHTS, *_STATES) if optimizer else (WEIGHTS,)
    wanted = {
        (state, name): directory / f"{state}.pt"
        for name, directory in whole.items()
        for state in states
        if state == WEIGHTS or (directory / f"{state}.pt").is_file()
    }
    opened = read_all(wanted, _parameter, "parameters of the universal checkpoint")
    result = moments.collected((*place, tensor) for place, tensor in opened.items())
    return {state: _trained(found, models) for state, found in result.items()}


def _trained(found: Mapping[str, Expression], models: Sequence[ModelState]) -> dict[str, Expression]:
    """The parameters that a universal checkpoint was made for, in their shapes.

    What stands beside them (buffers, second names of tied parameters, parameters that are not trained) was put
    there from the model's own states, widened; those are taken from there. Of stage 3, tensors are flat rows.

    Args:
        found: parameter -> tensor.
        models: names and shapes; where there are none, all is taken as it is.

    Raises:
        CheckpointError: parameters are missing, or have other sizes.
    """
    shapes = {name: shape for model in models for group in model.shapes for name, shape in group.items()}
    if not shapes:
        return dict(found)
    problems = Problems()
    result: dict[str, Expression] = {}
    for name, shape in shapes.items():
        with problems.collecting(tensor=name):
            tensor = found.get(name)
            if tensor is None:
                raise CheckpointError("it is missing from the universal checkpoint")
            # With tensor parallelism the model's states have parts, and the tensors here are whole.
            if len(tensor.spec.shape) == 1 and len(models) == 1 and tensor.spec.shape != shape:
                if tensor.spec.numel != prod(shape):
                    raise CheckpointError(f"it has {tensor.spec.numel} elements, not those of {list(shape)}")
                tensor = apply(Reshape(shape), tensor)[0]
            result[name] = renamed(tensor, name)
    problems.report("the universal checkpoint is not complete")
    return result


def _parameter(path: Location) -> Expression:
    found = load_torch(path).content
    # Of stage 3 it is the tensor alone.
    tensor = found.get(_PARAMETER) if isinstance(found, dict) else found
    if not isinstance(tensor, Expression):
        raise CheckpointError(f"it holds no tensor called '{_PARAMETER}'")
    return tensor
