"""Which tensors of a state dict can be read, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sized

from streamconv.errors import CheckpointError, Problem
from streamconv.ops import Expression
from streamconv.readers import numpy_arrays
from streamconv.readers.pickle import describe
from streamconv.readers.torch_rebuild import unsupported

_FLAT_PARAMETERS = ("flat_param", "_flat_param")
_FLAT = (
    "it is a flat parameter of FSDP1, whose parts only the running model knows; save with "
    "StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT"
)


def flat_parameter(name: str) -> str | None:
    """Why a tensor of this name cannot be read, where it is one of FSDP1's flat parameters."""
    return _FLAT if name.rpartition(".")[2].startswith(_FLAT_PARAMETERS) else None


def read_leaf(leaf: object) -> Expression | str:
    """A tensor of the tree, or why it cannot be read."""
    if isinstance(leaf, Expression):
        return leaf
    problem = unsupported(leaf)
    return numpy_arrays.read(leaf) if problem is None else problem.reason


def require_some(tensors: Sized, unreadable: Mapping[str, str]) -> None:
    """Refuse a state dict of which no tensor can be read.

    Raises:
        CheckpointError: there are only such; a problem for each.
    """
    if unreadable and not tensors:
        problems = [Problem(why, tensor=describe(name, quote="")) for name, why in unreadable.items()]
        raise CheckpointError(f"tensors that cannot be read: {len(problems)}", problems=problems)
