"""Whether a config that the user names can be that of a model: by the architecture's table, or by what configs share.

What no tensor shows, such as the number of heads, is held against the source's own config.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from streamconv.errors import Problem, UsageError, a
from streamconv.ops import Expression
from streamconv.plans import formula, registry, roles
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.findings import grouped
from streamconv.plans.mapping import differences
from streamconv.plans.table import Declared
from streamconv.plans.wrappers import left_off

_INNER = (
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "moe_intermediate_size",
)
# Sizes that no tensor shows: its sides are products of them, or they are in none.
_UNSEEN = re.compile(
    r"(\w+_)?(heads?|head_dim|experts_per_tok(en)?|topk_group|n_group)|moe_top_?k|multi_query_group_num|\w*query_groups"
)
# What changes values, and is often changed on purpose.
_VALUES = re.compile(
    r"rope_(?!local)\w+|rotary_\w+|partial_rotary_factor|(\w+_)?eps(ilon)?|hidden_act|activation_function|sliding_window"
    r"|(\w+_)?(softcapping|multiplier)"
)
_ROPE = ("rope_scaling", "rope_parameters")
_INDEX = re.compile(r"(.*?)(?:^|\.)(\d+)\.")
_HINT = "is it this model's config? --allow-mismatch takes it all the same"


def misfits(config: Config, tensors: Mapping[str, Expression], gone: Collection[str] = ()) -> list[Problem]:
    """Why a config cannot be that of a model with these tensors; empty where nothing speaks against it.

    `gone`: further names that the model has.
    """
    if not any(config.get(key) for key in ("model_type", "architectures", "_class_name")):
        return [Problem("the config says of no model that it is its own: it has no model_type", hint=_HINT)]
    sides = registry.architectures_of(config)
    tables = [(side, declared) for side in sides if (declared := _declared(side, config))]
    if not tables:
        inner = [] if gone else _inner(config, tensors)
        names = [*tensors, *gone]
        return grouped(
            [*_layers(config, names), *_of_another(config, names), *_embeddings(config, tensors), *inner]
        )
    against = [_against(side, declared, tensors, gone) for side, declared in tables]
    _, problems = max(against, key=lambda each: (not each[1], each[0]))
    return problems


def contradictions(own: Config, told: Config, whose: str) -> tuple[list[Problem], list[str]]:
    """Where two configs of one model differ in what its tensors do not show: sizes, and notes of what changes values.

    Args:
        own: that of the source, in the naming of the other.
        told: that which is taken.
        whose: where that comes from.
    """
    ours, theirs = _stated(own), _stated(told)
    problems, notes = [], []
    for key in ours.keys() & theirs.keys():
        said, other = ours[key], theirs[key]
        if said == other or type(said) is not type(other):
            continue
        message = f"{key} is {said} by the source's own config, and {other} by that of {whose}"
        if _VALUES.fullmatch(key.rpartition(".")[2]):
            notes.append(message)
        else:
            problems.append(Problem(f"{message}; no tensor shows it", hint=_HINT))
    return sorted(problems, key=str), sorted(notes)


def _stated(config: Config) -> dict[str, Any]:
    """What a config says that no tensor shows, also for its parts, by key; a table knows what its keys amount to."""
    stated: dict[str, Any] = {}
    read: set[str] = set()
    for side in registry.architectures_of(config):
        with suppress(UsageError):
            sizes = side.sizes_of(config)
            unseen = {name: sizes[name] for name in sizes.keys() - side.shown if type(sizes[name]) is int}
            stated |= {next(iter(side.stated({name: size})), name): size for name, size in unseen.items()}
            read |= frozenset().union(*map(formula.names_in, side.sizes.values()))
    # transformers 5 gathers what 4 says by itself, and in `rope_scaling`.
    said = {
        name: each
        for key in _ROPE
        if isinstance(value := config.get(key), Mapping)
        for name, each in value.items()
    }
    said = {name if name.startswith("rope_") else f"rope_{name}": each for name, each in said.items()}
    for key, value in {**config, **said}.items():
        if key in _ROPE:
            continue
        if isinstance(value, Mapping) and not _VALUES.fullmatch(key):
            stated |= {f"{key}.{name}": each for name, each in _stated(value).items()}
        elif _VALUES.fullmatch(key):
            stated[key] = float(value) if type(value) is int else value
        elif _UNSEEN.fullmatch(key) and type(value) is int and key not in read:
            stated[key] = value
    return stated


def untold(config: Config) -> str | None:
    """What is to be noted where no table says which names a model of a config has."""
    if any(_declared(side, config) for side in registry.architectures_of(config)):
        return None
    label = config.get("model_type") or config.get("_class_name") or config.get("architectures")
    return (
        f"no table here has the names of a model of '{label}': layers and sizes are those of the config, and whether "
        "its library loads these names is not checked"
    )


def _against(
    architecture: Architecture,
    declared: Mapping[str, Declared],
    tensors: Mapping[str, Expression],
    gone: Collection[str],
) -> tuple[int, list[Problem]]:
    """How many of an architecture's names there are, and what speaks against it."""
    base = left_off(tensors, declared) if not tensors.keys() & declared.keys() else ""
    named = {base + name: tensor for name, tensor in tensors.items()}
    taken = {base + name for name in gone}
    shared = len(named.keys() & declared.keys())
    if not shared:
        message = f"{a(architecture.title)} has no such tensor, and none of the others; it has '{next(iter(declared))}'"
        return 0, [Problem(message, tensor=next(iter(tensors)), hint=_HINT)]
    # A model without its head lacks what is not of its base.
    wanted = {
        name: each
        for name, each in declared.items()
        if name.startswith(base) and (name in named or name not in taken)
    }
    odd = "{title} of this config has no such tensor"
    missing = "is missing; {title} of this config has it"
    found = differences(named, named, wanted, architecture, odd=odd, missing=missing)
    return shared, [replace(problem, hint=_HINT) for problem in found]


def _declared(architecture: Architecture, config: Config) -> Mapping[str, Declared]:
    """What a model of a config has, by the architecture's table; empty where the config leaves out sizes."""
    try:
        return architecture.tensors(architecture.sizes_of(config))
    except UsageError:
        return {}


def _layers(config: Config, names: Collection[str]) -> list[Problem]:
    """No stack of layers is as high as a config says."""
    counts = roles.layers(config)
    stacks: dict[str, int] = defaultdict(int)
    for name in names:
        if match := _INDEX.match(name):
            stacks[match[1]] = max(stacks[match[1]], int(match[2]) + 1)
    if not counts or not stacks or {*counts} & {*stacks.values()}:
        return []
    highest = max(stacks, key=lambda stack: stacks[stack])
    return [
        Problem(f"there are {stacks[highest]} of '{highest}'; the config says {counts[0]} layers", hint=_HINT)
    ]


def _of_another(config: Config, names: Collection[str]) -> list[Problem]:
    """No name is one that layers of the config's model type have."""
    marks = registry.layers_of(config)
    label = config.get("model_type")
    for mark in (mark[1:] for mark in marks if mark.startswith("!")):
        if odd := next(filter(_standing([mark]), names), None):
            message = f"layers of a model of '{label}' have no such tensor ({mark})"
            return [Problem(message, tensor=odd, hint=_HINT)]
    marks = tuple(mark for mark in marks if not mark.startswith("!"))
    if not marks or any(map(_standing(marks), names)):
        return []
    message = f"no tensor is called as the layers of a model of '{label}' are ({' or '.join(marks)})"
    return [Problem(message, tensor=next(iter(names), None), hint=_HINT)]


def _standing(marks: Collection[str]) -> Callable[[str], object]:
    """What finds one of some marks in a name."""
    patterns = ("[0-9]+".join(map(re.escape, mark.split("#"))) for mark in marks)
    return re.compile(rf"(^|\.)({'|'.join(patterns)})(\.|$)").search


def _embeddings(config: Config, tensors: Mapping[str, Expression]) -> list[Problem]:
    """Embeddings of other sizes than a config says."""
    rows, width = config.get("vocab_size"), roles.width(config)
    if rows is None or width is None:
        return []
    return [
        Problem(
            f"it is {list(tensors[name].spec.shape)}; the config says {[rows, width]}",
            tensor=name,
            hint=_HINT,
        )
        for name in roles.having(roles.Role.EMBEDDING, tensors)
        if tensors[name].spec.shape != (rows, width)
    ]


def _inner(config: Config, tensors: Mapping[str, Expression]) -> list[Problem]:
    """No tensor is as wide as a config says that layers are inside; mixtures of experts have other widths there."""
    if any(config.get(key) for key in (*_EXPERTS, "quantization_config")):
        return []
    sizes = {size for tensor in tensors.values() for size in tensor.spec.shape}
    return [
        Problem(f"no tensor has a side of {config[key]}; the config says that {key}", hint=_HINT)
        for key in _INNER
        # Some have two of them in one.
        if type(config.get(key)) is int and sizes.isdisjoint({config[key], 2 * config[key]})
    ]
