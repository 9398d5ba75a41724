"""Averaged weights that do not stand for a whole model by themselves: without names, or only of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamconv.errors import CheckpointError, listed
from streamconv.ops import Expression
from streamconv.readers.moments import only_way
from streamconv.readers.pickle import describe
from streamconv.readers.state_dict.candidates import COUNTERS, Candidate
from streamconv.readers.state_dict.place import Place, shape_of
from streamconv.readers.tree import children


def require_model(place: Place, candidates: Sequence[Candidate]) -> None:
    """Refuse averaged weights without names where nothing beside them has names.

    Raises:
        CheckpointError: no place is a model.
    """
    if all(each.own or each.averaged or each.rank == COUNTERS for each in candidates):
        raise CheckpointError(
            f"the averaged weights at {describe(place.name)} have no names, and no model is beside them that has",
            hint="save them with the names of the model, or give the file that has both",
        )


def by_order(place: Place, root: str, model: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """A model with averaged weights that are a list without names, in the order of its parameters; and a note of it.

    Args:
        place: the list.
        root: the dotted place of the model.
        model: its leaves by name.

    Raises:
        CheckpointError: shapes do not say which parameters they are.
    """
    averaged = [child for _, child in children(place.value) if isinstance(child, Expression)]
    weights = {name: leaf for name, leaf in model.items() if isinstance(leaf, Expression)}
    found = only_way([each.spec.shape for each in averaged], [each.spec.shape for each in weights.values()])
    if root == place.name or found is None:
        raise CheckpointError(
            f"the averaged weights at {describe(place.name)} have no names, and their shapes do not say which of the "
            f"{len(weights)} tensors of the model they are",
            hint="leave --ema out",
        )
    names = list(weights)
    leaves = {**model} | {names[at]: each for at, each in zip(found, averaged, strict=True)}
    note = (
        f"averaged weights at {describe(place.name)} have no names, and are taken to be in the model's order"
    )
    return leaves, note


def completed(
    averaged: dict[str, object], root: str, model: Mapping[str, object]
) -> tuple[dict[str, object], str]:
    """Averaged weights with what is of the model and has no average, such as its buffers; and a note of it.

    Args:
        averaged: the weights by name.
        root: the dotted place of the model.
        model: its leaves by name.
    """
    own = {_bare(name): leaf for name, leaf in model.items()}
    known = {_bare(name): name for name in averaged}
    rest = [name for name in own if name not in known]
    if not rest or not all(
        name in own and shape_of(own[name]) == shape_of(averaged[full]) for name, full in known.items()
    ):
        return averaged, ""
    whole = {name: averaged.get(known.get(_bare(name), ""), leaf) for name, leaf in model.items()}
    return whole, f"tensors without an average are those of {describe(root)}: {listed(rest)}"


def _bare(name: str) -> str:
    return name.removeprefix("module.")
