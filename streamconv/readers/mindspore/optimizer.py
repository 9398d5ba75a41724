"""What MindSpore's optimizers keep among a model's parameters, recognised by the names.

Source: mindspore-ai/mindspore: mindspore/python/mindspore/nn/optim/adam.py (`adam_m`, `adam_v`), and
mindspore-lab/mindformers: mindformers/core/callback/callback.py (what training saves).
"""

from __future__ import annotations

from collections.abc import Mapping

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
"""Prefixes of the names of tensors that are not weights."""


def apart(
    tensors: Mapping[str, Expression],
) -> tuple[dict[str, Expression], dict[str, dict[str, Expression]]]:
    """The model's tensors, and the optimizer state as `training.TrainedModel` has it; accumulated gradients are left out."""
    model: dict[str, Expression] = {}
    moments: dict[str, dict[str, Expression]] = {}
    for name, tensor in tensors.items():
        slot = next((slot for slot in _STATES if name.startswith(slot)), None)
        if slot is not None:
            parameter = name.removeprefix(slot)
            moments.setdefault(_STATES[slot], {})[parameter] = renamed(tensor, parameter)
        elif not name.startswith(_GRADIENTS):
            model[name] = tensor
    return model, moments
