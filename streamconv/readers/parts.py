"""What the parts of a training checkpoint are, by their keys and by what they hold: one table for all containers.

A key says it where training programs agree on words. Where they do not, structure does: optimizers, schedulers and
random generators of torch write the same keys everywhere (pytorch/pytorch: torch/optim/optimizer.py `state_dict`,
torch/optim/lr_scheduler.py, torch/optim/swa_utils.py `AveragedModel`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from streamconv.ops import Expression
from streamconv.readers import numpy_arrays
from streamconv.readers.pickle import Record, describe
from streamconv.readers.tree import children, is_tensor, text

OPTIMIZER = "optimizer state"
RANDOM = "random state"
_SCHEDULER = "the state of a learning-rate scheduler"

_MODEL = frozenset(
    {
        "model", "model_dict", "model_state", "model_state_dict", "model_states", "model_weights", "module", "net",
        "network", "params", "state_dict", "weights",
    }
)  # fmt: skip
"""Keys that training programs keep the model under, whatever it is. A role (`generator`, `student`) is none."""

_OWN: tuple[tuple[str, str], ...] = (
    (r".*optim(?!i[sz]ed|al).*|opt(_?[a-z]|_?\d+|_(state|states|state_dict|gen|dis|disc))?|.*fp32_from_fp16.*", OPTIMIZER),
    (r".*sched(ule|uler|ulers|ules)?(_.*|\d*)", _SCHEDULER),
    (r"(grad_|amp_|loss_)?scaler(s|_.*)?|amp", "the state of a gradient scaler"),
    (r"(.*_)?rngs?(_.*)?|random(_.*)?|.*_seed|.*_manual_seed|seeds?", RANDOM),
    (r".*data_?(loader|iter|iterator)s?(_.*)?|(.*_)?sampler(_.*)?", "the state of a dataloader"),
    (r"callbacks|loops|train(er|ing)?_state(_dict)?|averaging_state|progress", "the state of a trainer"),
    (r"criterion(_.*)?|loss(es)?(_.*)?|metrics?(_.*)?|class_weights?", "a loss or its weights"),
    (r"grad(s|ients)?", "gradients"),
    # Lightning's WeightAveraging puts the averaged weights in their place.
    (r"current_model_state", "the weights of the last step"),
)  # fmt: skip
"""Keys of what training programs keep beside a model, in lower case, and what that is."""
_ANY_OWN = re.compile("|".join(f"(?P<own{row}>{pattern})" for row, (pattern, _) in enumerate(_OWN)))

_MOMENT = r"exp_avg|exp_avg_sq|exp_avg_sq_row|exp_avg_sq_col|max_exp_avg_sq|momentum_buffer"
_FLAT_OPTIMIZER = re.compile(rf"(.*[._])?optim(izer)?(_\d+)?\..*|(.*\.)?({_MOMENT})(\..*)?")
"""Names, in a flat state dict, of an optimizer's tensors: distributed optimizers prefix theirs."""
_FLAT_MOMENT = re.compile(rf"(.+\.)({_MOMENT})")
_FLAT_RANDOM = re.compile(r"((.*_)?rng(_states?)?(_cuda|_cpu)?|random_state)(/.*)?")

_AVERAGED = re.compile(r"(.*[_.])?(ema|swa|averaged?|polyak|shadow)([_.\d].*)?")
"""Keys of averaged copies of a model's weights."""

_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "exp_inf", "acc_delta"})
_STEPS = frozenset({"base_lrs", "_step_count", "last_epoch"})
_GENERATORS = ((5056,), (16,))
"""Shapes of torch's random states: CPU, CUDA."""
_COUNT, _WRAPPED, _AVERAGE = "n_averaged", "module.", "ema_model."


def is_model(key: str) -> bool:
    """Whether training programs keep the model under a key, whatever kind of model it is."""
    return key.lower() in _MODEL


@lru_cache(1 << 12)
def is_averaged(key: str) -> bool:
    """Whether a key is that of averaged weights."""
    return _AVERAGED.fullmatch(key.lower()) is not None


def averages_inside(value: object) -> frozenset[str]:
    """Keys of averaged weights that no word says: Lightning's `WeightAveraging` puts them where the model's are.

    Source: Lightning-AI/pytorch-lightning: src/lightning/pytorch/callbacks/weight_averaging.py.
    """
    is_lightning = isinstance(value, dict) and "averaging_state" in value and "current_model_state" in value
    return frozenset({"state_dict"} if is_lightning else ())


def average_prefix(value: object) -> str | None:
    """What is before every name in the state of a module that averages another one; None for other values.

    That is torch's `AveragedModel`, and `EMA` of lucidrains/ema-pytorch (ema_pytorch/ema_pytorch.py).
    """
    names = {text(key) for key, _ in children(value)} if isinstance(value, (dict, Record)) else set()
    if _COUNT in names and all(name == _COUNT or name.startswith(_WRAPPED) for name in names):
        return _WRAPPED
    return _AVERAGE if "initted" in names and any(name.startswith(_AVERAGE) for name in names) else None


def own_state(key: str, value: object) -> str | None:
    """What a part is, where it is the training program's own and not the model's."""
    return _by_word(key) or _by_structure(value)


@lru_cache(1 << 14)
def _by_word(key: str) -> str | None:
    match = _ANY_OWN.fullmatch(key.lower())
    return _OWN[int(str(match.lastgroup).removeprefix("own"))][1] if match else None


def own_tensor(name: str) -> bool:
    """Whether a tensor in a flat state dict is the training program's, by its name."""
    return bool(_FLAT_OPTIMIZER.fullmatch(name) or _FLAT_RANDOM.fullmatch(name))


def own_kind(name: str) -> str:
    """What a tensor is that `own_tensor` says is the training program's."""
    return RANDOM if _FLAT_RANDOM.fullmatch(name) else OPTIMIZER


def may_be_own(name: str) -> bool:
    """Whether a tensor's name in a flat state dict asks for a closer look: what else is there decides."""
    return name == _COUNT or name[-2:] == ".m" or own_tensor(name)


def moment_prefix(name: str) -> str | None:
    """What is before the word in the name of a parameter's optimizer state, also in that of its `step`."""
    match = _FLAT_MOMENT.fullmatch(name)
    return match[1] if match else None


def is_random(key: str, tensor: object) -> bool:
    """Whether a tensor is the state of a random generator."""
    bits = isinstance(tensor, Expression) and tensor.spec.dtype.name == "U8"
    return _by_word(key) == RANDOM or (
        bits and isinstance(tensor, Expression) and tensor.spec.shape in _GENERATORS
    )


def is_incidental(key: str, tensor: object) -> bool:
    """Whether a tensor is one that lies beside a model: a counter or a random state."""
    shape = tensor.spec.shape if isinstance(tensor, Expression) else numpy_arrays.shape_of(tensor)
    return is_random(key, tensor) or shape == ()


def is_beside(key: str, tensor: object) -> bool:
    """Whether a tensor lies beside a model, by its key or by what it is: it makes no state dict by itself."""
    return is_incidental(key, tensor) or _by_word(key) is not None


def what_it_is(value: object) -> str:
    """A file's content that holds no weights, in words."""
    state = _by_structure(value)
    if state is not None:
        return state
    if isinstance(value, Record):
        return f"an object of {value.cls}"
    kinds = {own_state(text(key), child) for key, child in children(value)}
    return kinds.pop() or describe(value) if len(kinds) == 1 else describe(value)


def _by_structure(value: object) -> str | None:
    if isinstance(value, (list, tuple)):
        return RANDOM if value and isinstance(value[0], str) and value[0] == "MT19937" else None
    if not isinstance(value, (dict, Record)):
        return None
    members = {text(key): child for key, child in children(value)}
    if "state" in members and "param_groups" in members:
        return OPTIMIZER
    if (
        members.keys() & _MOMENTS
        or _is_of_mlx(members)
        or _holds_moments(members.values())
        or _holds_moments(_inside(members))
    ):
        return OPTIMIZER
    if len(members.keys() & _STEPS) >= 2:
        return _SCHEDULER
    if {"scale", "growth_factor", "growth_interval"} <= members.keys():
        return "the state of a gradient scaler"
    if "bit_generator" in members:
        return RANDOM
    return RANDOM if _all_random(members) else None


def _is_of_mlx(members: Mapping[str, object]) -> bool:
    """Whether tensors are two for each parameter, as mlx has them (ml-explore/mlx: python/mlx/optimizers)."""
    states = {key for key, child in members.items() if is_tensor(child) and not is_incidental(key, child)}
    return len(states) > 1 and all(
        key[-2:] in (".m", ".v") and {f"{key[:-1]}m", f"{key[:-1]}v"} <= states for key in states
    )


def _all_random(members: Mapping[str, object]) -> bool:
    """Whether what holds tensors among members are states of random generators, at least one by itself."""
    tensors = [(key, child) for key, child in members.items() if is_tensor(child)]
    if not tensors or not all(is_random(key, child) for key, child in tensors):
        return False
    inner = [(key, child) for key, child in members.items() if isinstance(child, dict)]
    return all(own_state(key, child) == RANDOM for key, child in inner)


def _inside(members: Mapping[str, object]) -> Iterable[object]:
    """What is below `state`, as an optimizer alone has it."""
    return (child for _, child in children(members.get("state")))


def _holds_moments(values: Iterable[object]) -> bool:
    """Whether the first of values that is a mapping holds an optimizer's state of one parameter."""
    first = next((value for value in values if isinstance(value, dict)), None)
    return first is not None and not _MOMENTS.isdisjoint(_texts(first))


def _texts(keys: Collection[object]) -> set[str]:
    return {key for key in keys if isinstance(key, str)}
