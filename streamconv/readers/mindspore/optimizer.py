"""What MindSpore's optimizers keep among a model's parameters, recognised by the names.

Source: mindspore-ai/mindspore: mindspore/python/mindspore/nn/optim/adam.py (`adam_m`, `adam_v`), and
mindspore-lab/mindformers: mindformers/core/callback/callback.py (what training saves).
"""

from __future__ import annotations

from collections.abc import Mapping

from streamconv.ops import Expression
from streamconv.readers import moments

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
    slots = {name: slot for name in tensors for slot in SLOTS if name.startswith(slot)}
    model = {name: tensor for name, tensor in tensors.items() if name not in slots}
    own = ((name, _STATES[slot], slot) for name, slot in slots.items() if slot in _STATES)
    return model, moments.collected(
        (state, name.removeprefix(slot), tensors[name]) for name, state, slot in own
    )
