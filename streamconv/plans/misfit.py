"""Whether a config that the user names can be that of a model: by the architecture's table, or by what configs share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from streamconv.errors import Problem, UsageError, a
from streamconv.ops import Expression
from streamconv.plans import registry, roles
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
        return grouped([*_layers(config, [*tensors, *gone]), *_embeddings(config, tensors), *inner])
    against = [_against(side, declared, tensors, gone) for side, declared in tables]
    _, problems = max(against, key=lambda each: (not each[1], each[0]))
    return problems


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
