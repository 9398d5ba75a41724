"""An optimizer's state per parameter, out of what `Optimizer.state_dict()` gives, and as parts of a checkpoint.

    {"state": {KEY: {"step", "exp_avg", ...}}, "param_groups": [{"lr", ..., "params": [KEY, ...]}]}

A key is the name of a parameter, or a number: then the names are in the groups (`param_names`), or nowhere. Where they
are nowhere, the parameters are taken to be in the order of the model's, and their shapes have to fit in one way only.

Source: pytorch/pytorch: torch/optim/optimizer.py (`state_dict`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from streamconv.errors import CheckpointError, listed
from streamconv.ops import Expression, renamed
from streamconv.readers import tree
from streamconv.readers.checkpoint import Component
from streamconv.shard import STEMS
from streamconv.tensor import Shape

_DIRECTORY = "optimizer"
_SETTINGS = "optimizer.json"
_DEEPEST = 4

STEP = "step"
"""What an optimizer counts, for each parameter by itself."""

Tensors = Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class Moments:
    """What an optimizer knows.

    Attributes:
        states: `exp_avg` and the like -> parameter -> tensor, mostly of the parameter's shape.
        settings: the optimizer's; plain JSON values.
        notes: one line each.
    """

    states: Mapping[str, Tensors] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def components(states: Mapping[str, Tensors]) -> Iterator[Component]:
    """A component for each kind of optimizer state: `optimizer/exp_avg/` and so on."""
    for state, tensors in states.items():
        yield Component(f"{_DIRECTORY}/{state}", STEMS[0], tensors, kind="optimizer")


def texts(states: Mapping[str, Tensors], settings: Mapping[str, Any]) -> dict[str, str]:
    """Files to write beside the optimizer state: the optimizer's settings, and the step."""
    if not states:
        return {}
    return {
        f"{_DIRECTORY}/{_SETTINGS}": orjson.dumps(dict(settings), option=orjson.OPT_INDENT_2).decode() + "\n"
    }


def collected(found: Iterable[tuple[str, str, Expression | str]]) -> dict[str, dict[str, Expression]]:
    """State -> parameter -> tensor, called as its parameter; from states, parameters and tensors, or why
    one cannot be read.

    Raises:
        CheckpointError: there are two of one state of a parameter, or one that cannot be read.
    """
    states: dict[str, dict[str, Expression]] = {}
    for state, parameter, tensor in found:
        if isinstance(tensor, str):
            raise CheckpointError(f"its {state}: {tensor}", tensor=parameter, hint="leave --optimizer out")
        if states.setdefault(state, {}).setdefault(parameter, made := renamed(tensor, parameter)) is not made:
            raise CheckpointError(
                f"several optimizers have the {state} of this parameter", tensor=parameter,
                hint="leave --optimizer out",
            )  # fmt: skip
    return states


def read(content: object, places: Sequence[str], model: Tensors) -> Moments:
    """The optimizer state in a tree.

    Args:
        content: the tree.
        places: where optimizer state is in it.
        model: the parameters.

    Raises:
        CheckpointError: whose state it is cannot be said, or several optimizers have state of one parameter.
    """
    found: list[tuple[str, str, Expression]] = []
    settings: list[object] = []
    notes: list[str] = []
    counts: dict[str, dict[str, int | float]] = {}
    for optimizer in _optimizers(tree.at(content, place) for place in places):
        state, groups = optimizer["state"], optimizer["param_groups"]
        if not isinstance(state, dict) or not isinstance(groups, (list, tuple)):
            continue
        names = _names(state, [group for group in groups if isinstance(group, dict)], model, notes)
        settings += (
            tree.plain({key: value for key, value in group.items() if key not in ("params", "param_names")})
            for group in groups
            if isinstance(group, dict)
        )
        for key, own in state.items():
            parameter = names.get(key)
            if parameter is None or not isinstance(own, dict):
                continue
            tensors = {str(word): each for word, each in own.items() if isinstance(each, Expression)}
            found += ((word, parameter, tensor) for word, tensor in tensors.items())
            for word, value in own.items():
                if isinstance(value, (int, float)):
                    counts.setdefault(str(word), {})[parameter] = value
    said = {
        word: next(iter(own.values())) if len(set(own.values())) == 1 else own for word, own in counts.items()
    }
    told = {"param_groups": settings} if settings else {}
    states = collected(found)
    return Moments(states, said | told, (*dict.fromkeys(notes), *of_other_shapes(states, model)))


def of_other_shapes(states: Mapping[str, Tensors], model: Tensors) -> Iterator[str]:
    """What is to be noted of states that have not the shapes of their parameters, as factors and codes have not."""
    names = [
        state
        for state, own in states.items()
        if any(tensor.spec.shape not in (model[name].spec.shape, ()) for name, tensor in own.items())
    ]
    if names:
        yield f"optimizer state of other shapes than its parameters is written as it is: {listed(names)}"


def _optimizers(places: Iterable[object]) -> Iterator[dict[object, Any]]:
    """Every state of an optimizer at some places or in what is there."""
    todo = deque((place, 0) for place in places)
    while todo:
        value, depth = todo.popleft()
        if isinstance(value, dict) and "state" in value and "param_groups" in value:
            yield value
        elif depth < _DEEPEST:
            todo += (
                (child, depth + 1) for _, child in tree.children(value) if isinstance(child, (dict, list))
            )


def _names(
    state: Mapping[object, object], groups: Sequence[Mapping[object, Any]], model: Tensors, notes: list[str]
) -> dict[object, str]:
    """Key of the state -> parameter."""
    named: dict[object, str] = {key: key for key in state if isinstance(key, str) and key in model}
    if named:
        return named
    result: dict[object, str] = {}
    for group in groups:
        keys = [key for key in group.get("params", ()) if key in state]
        said = group.get("param_names")
        if isinstance(said, (list, tuple)) and len(said) == len(group["params"]):
            result |= {key: name for key, name in zip(group["params"], said, strict=True) if name in model}
            continue
        shapes = [_shape(state[key]) for key in keys]
        result |= zip(keys, _by_order(shapes, model), strict=True)
        notes.append(
            "the optimizer's state has no names: its parameters are taken to be in the order of the model's"
        )
    return result


def _shape(state: object) -> Shape:
    """The shape of a parameter, as its state has it."""
    shapes = [
        value.spec.shape
        for value in (state.values() if isinstance(state, dict) else ())
        if isinstance(value, Expression)
    ]
    return max(shapes, key=len, default=())


def _by_order(shapes: Sequence[Shape], model: Tensors) -> list[str]:
    """The parameters of some shapes in the model's order, if there is one way only."""
    distinct: dict[Expression, str] = {}
    for name, tensor in model.items():
        distinct.setdefault(renamed(tensor, ""), name)
    names, having = list(distinct.values()), [tensor.spec.shape for tensor in distinct]
    found = only_way(shapes, having)
    if found is None:
        raise CheckpointError(
            f"the optimizer's state of {len(shapes)} parameters has no names, and their shapes do not say which of the "
            f"{len(having)} tensors they belong to",
            hint="leave --optimizer out",
        )
    return [names[at] for at in found]


def only_way(wanted: Sequence[Shape], having: Sequence[Shape]) -> list[int] | None:
    """The positions of the subsequence of `having` that equals `wanted`; None where there is none, or several.

    The earliest and the latest are compared: where they agree, there is only one.
    """
    first = _earliest(wanted, having)
    last = [len(having) - 1 - at for at in reversed(_earliest(wanted[::-1], having[::-1]))]
    return first if first == last and len(first) == len(wanted) else None


def _earliest(wanted: Sequence[Shape], having: Sequence[Shape]) -> list[int]:
    found: list[int] = []
    for at, shape in enumerate(having):
        if len(found) < len(wanted) and shape == wanted[len(found)]:
            found.append(at)
    return found
