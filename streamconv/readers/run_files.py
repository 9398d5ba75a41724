"""Files that training programs write beside a model, by their names: none of them holds weights.

Source: huggingface/accelerate: src/accelerate/utils/constants.py, checkpointing.py; huggingface/transformers:
src/transformers/trainer.py; verl-project/verl: verl/utils/checkpoint/fsdp_checkpoint_manager.py.
"""

from __future__ import annotations

import re

_NUMBER = r"([-_.]?\d+|[-_](rank|step|epoch)_?\d+|[-_]\d+[-_]of[-_]\d+)*"
_ANY = r"\.(bin|pt|pth|pkl|ckpt|safetensors)"

_TABLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), what)
    for pattern, what in (
        (rf"optim(izer)?s?(_states?)?{_NUMBER}{_ANY}", "the state of an optimizer"),
        (r"optim_world_size_\d+_rank_\d+\.pt", "the state of an optimizer"),
        (rf"(lr_)?scheduler{_NUMBER}{_ANY}", "the state of a learning-rate scheduler"),
        (rf"(grad_|amp_|loss_)?scaler{_NUMBER}{_ANY}", "the state of a gradient scaler"),
        (rf"(random_states?|rng_states?){_NUMBER}{_ANY}", "random state"),
        (rf"(sampler|dl_state_dict|dataloader){_NUMBER}{_ANY}", "the state of a dataloader"),
        (r"extra_state_world_size_\d+_rank_\d+\.pt", "the state of a training run"),
        (rf"(train(er|ing)?_state|progress){_NUMBER}{_ANY}", "the state of a training run"),
        (rf"custom_checkpoint{_NUMBER}\.pkl", "an object of a training program"),
        (rf"training_args{_ANY}", "the arguments of a training run"),
    )
)


def what_it_is(name: str) -> str | None:
    """What a file is that a training program writes beside a model; None for other names."""
    return next((what for pattern, what in _TABLE if pattern.fullmatch(name)), None)
