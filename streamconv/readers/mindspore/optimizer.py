"""What MindSpore's optimizers keep among a model's parameters, told by the names.

Source: mindspore-ai/mindspore: mindspore/python/mindspore/nn/optim/adam.py (`adam_m`, `adam_v`), and
mindspore-lab/mindformers: mindformers/core/callback/callback.py (what training saves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.ops import Expression, renamed

COUNTERS = frozenset(
    {
        "append_epoch_num", "cur_epoch_num", "cur_step_num", "epoch_num", "global_batch_size", "global_step",
        "loss_scale", "step_num",
    }
)  # fmt: skip
"""Scalars that training keeps beside weights."""

_STATES = {"adam_m.": "exp_avg", "adam_v.": "exp_avg_sq"}
_GRADIENTS = "accu_grads."

SLOTS = (*_STATES, _GRADIENTS)
"""How the names of what is no weight begin."""


@dataclass(frozen=True, slots=True)
class Told:
    """A save, told apart: the model's tensors, and the optimizer's states as `training.TrainedModel` has them."""

    model: dict[str, Expression]
    moments: dict[str, dict[str, Expression]]


def apart(tensors: Mapping[str, Expression]) -> Told:
    """The model's tensors and the optimizer's; gradients that were being summed up are neither."""
    told = Told({}, {})
    for name, tensor in tensors.items():
        slot = next((slot for slot in _STATES if name.startswith(slot)), None)
        if slot is not None:
            parameter = name.removeprefix(slot)
            told.moments.setdefault(_STATES[slot], {})[parameter] = renamed(tensor, parameter)
        elif not name.startswith(_GRADIENTS):
            told.model[name] = tensor
    return told
