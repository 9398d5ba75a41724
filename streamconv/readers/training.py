"""What readers of training checkpoints give: the model, and the optimizer's state of each of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from streamconv.ops import Expression
from streamconv.readers.checkpoint import Component
from streamconv.shard import STEMS

Weights = Literal["master", "model"]
"""Which copy of the weights: the optimizer's in F32, or the model's own."""

_OPTIMIZER = "optimizer"
_SETTINGS = "optimizer.json"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model out of a training run.

    Attributes:
        tensors: by name.
        moments: the optimizer's state (`exp_avg`, ...) -> parameter -> tensor of the parameter's shape.
        scalars: the optimizer's settings and its step; plain JSON values.
        metadata: what else the files say; plain JSON values.
        files: every file that was read, absolute.
        notes: one line each.
    """

    tensors: Mapping[str, Expression]
    moments: Mapping[str, Mapping[str, Expression]] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def components(model: TrainedModel, config: Mapping[str, Any] | None) -> tuple[Component, ...]:
    """The model as a component, and each state of the optimizer as one more: `optimizer/exp_avg/` and so on."""
    states = (
        Component(f"{_OPTIMIZER}/{state}", STEMS[0], tensors, kind="optimizer")
        for state, tensors in model.moments.items()
    )
    return Component("", STEMS[0], model.tensors, config=config), *states


def texts(model: TrainedModel) -> dict[str, str]:
    """Files to write beside the states of the optimizer: its settings, and the step."""
    if not model.moments:
        return {}
    settings = orjson.dumps(dict(model.scalars), option=orjson.OPT_INDENT_2).decode() + "\n"
    return {f"{_OPTIMIZER}/{_SETTINGS}": settings}
