"""Files that training programs write beside a model, by their names: none of them holds weights.

Source: huggingface/accelerate: src/accelerate/utils/constants.py, checkpointing.py; huggingface/transformers:
src/transformers/trainer.py; verl-project/verl: verl/utils/checkpoint/fsdp_checkpoint_manager.py.
"""

from __future__ import annotations

import re

_NUMBER = r"(_\d+)*"
_TORCH = r"\.(bin|pt|pth|pkl)"

_TABLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (rf"optim(izer)?(_states?)?{_NUMBER}{_TORCH}", "the state of an optimizer"),
        (r"optim_world_size_\d+_rank_\d+\.pt", "the state of an optimizer"),
        (rf"(lr_)?scheduler{_NUMBER}{_TORCH}", "the state of a learning-rate scheduler"),
        (rf"(grad_)?scaler{_NUMBER}{_TORCH}", "the state of a gradient scaler"),
        (rf"(random_states?|rng_states?){_NUMBER}{_TORCH}", "random state"),
        (rf"(sampler|dl_state_dict|dataloader){_NUMBER}{_TORCH}", "the state of a dataloader"),
        (r"extra_state_world_size_\d+_rank_\d+\.pt", "the state of a training run"),
        (rf"custom_checkpoint{_NUMBER}\.pkl", "an object of a training program"),
        (rf"training_args{_TORCH}", "the arguments of a training run"),
    )
)


def what_it_is(name: str) -> str | None:
    """What a file is that a training program writes beside a model; None for other names."""
    return next((what for pattern, what in _TABLE if pattern.fullmatch(name)), None)
