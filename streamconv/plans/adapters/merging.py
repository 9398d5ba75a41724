"""A LoRA of peft merged into the weights that it was trained for, as expressions: W + scale * B @ A.

The sum is made in F32 and rounded once. The scale is alpha / rank, or alpha / sqrt(rank) where the adapter says so
(rsLoRA). (huggingface/peft 0.21: tuners/lora/{config,layer,dora}.py, utils/other.py for patterns, utils/save_and_load.py
for names.)
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from streamconv.errors import PlanError, UsageError, count, listed
from streamconv.ops import (
    Cast,
    Expression,
    Fill,
    PermuteAxes,
    Reshape,
    RowNormalize,
    ScaleRows,
    apply,
    renamed,
)
from streamconv.plans.adapters.sums import as_float, check_base, low_rank_sum, merged
from streamconv.plans.adapters.ties import untied
from streamconv.plans.findings import Findings
from streamconv.plans.roles import Role, having
from streamconv.plans.wrappers import FACTORS, left_off, plain
from streamconv.readers.checkpoint import Component

_PREFIX = "base_model.model."
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>{FACTORS})(?P<rest>(\.[^.]+)*)")

# Settings of peft that change what the merged weight is, in ways that are not done here.
_UNSUPPORTED = {
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are not weights of layers, such as packed experts",
    "trainable_token_indices": "it changes single rows of the embedding",
    "alora_invocation_tokens": "it acts on part of a prompt only, which no merged weight does",
    "arrow_config": "it chooses among adapters at run time",
    "use_qalora": "it was trained for quantised weights",
    "use_bdlora": "it is made of blocks",
    "kasa_config": "it cuts off singular values of the base",
}

# Ways to begin training that take from the base what the factors begin with: the sum is right for that base alone. peft
# makes the changed base again when it loads the adapter, but for LoRA-GA's, which needs the gradients.
_CHANGES_BASE = re.compile(r"(?P<kind>pissa|olora|corda|lora_ga|loftq)(_.*)?", re.IGNORECASE)

# A group that repeats, in a pattern from a file, may take forever to match.
_LONGEST_PATTERN = 256
_SLOW = re.compile(r"[)\]][*+?{]|[*+?}][*+?{]")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as peft saves it.

    Attributes:
        tensors: by their names in the file.
        config: `adapter_config.json`.
        path: named in messages.
        scale: instead of alpha / rank, where given.
    """

    tensors: Mapping[str, Expression]
    config: Mapping[str, Any]
    path: str
    scale: float | None = None


def merge(component: Component, adapter: Adapter, findings: Findings, *, wide: bool) -> Component:
    """A component, its tensors by the names that the adapter's training knew, with the adapter merged into them.

    `wide` gives merged weights in F32, because they are to be written so.

    Raises:
        UsageError: the adapter is of a kind that cannot be merged.
        PlanError: its tensors do not fit the base; all of them at once.
    """
    kind = adapter.config.get("peft_type")
    reasons = [reason for key, reason in _UNSUPPORTED.items() if adapter.config.get(key)]
    if kind != "LORA" or reasons:
        wrong = (
            f"cannot be merged: {'; '.join(reasons)}" if kind == "LORA" else f"is {kind}; only LORA is merged"
        )
        raise UsageError(f"the adapter {wrong}", file=adapter.path, hint="merge it with peft")
    _check_beginning(adapter)
    modules: dict[str, dict[str, Expression]] = defaultdict(dict)
    replacing: dict[str, Expression] = {}
    for name, tensor in adapter.tensors.items():
        found = _PART.fullmatch(name.removeprefix(_PREFIX))
        if found is None:
            replacing[plain(name.removeprefix(_PREFIX))] = tensor
        else:
            bias = ".bias" if found["rest"].endswith(".bias") else ""
            modules[found["module"]][found["part"] + bias] = tensor
    # Where the adapter was trained on a model without its head.
    prefix = left_off([f"{module}.weight" for module in modules] or replacing, component.tensors)
    changed = [f"{module}.weight" for module in modules] + [*replacing]
    component = untied(component, [_in_base(name, prefix, component) for name in changed], findings)
    base = component.tensors
    made = dict(base)
    # First, because the adapter still changes a base that was saved along with it.
    added = []
    for name, tensor in replacing.items():
        if ".lora_" in name:
            raise UsageError(
                "the adapter cannot be merged: it has parts that plain LoRA has not, such as this one",
                file=adapter.path, tensor=name, hint="merge it with peft",
            )  # fmt: skip
        target = _in_base(name, prefix, component)
        if target not in base:
            added.append(target)
        made[target] = renamed(tensor, target)
    transposed = _transposed(
        modules, {_in_base(f"{each}.weight", prefix, component): each for each in modules}, base, adapter
    )
    updates = (
        partial(_adapted, made, prefix, module, parts, adapter, transposed=transposed, wide=wide)
        for module, parts in modules.items()
    )
    said = merged("the adapter", updates)
    findings.notes.append(
        f"an adapter of {said}"
        + (f"; taken from it as they are: {count(len(replacing), 'tensor')}" if replacing else "")
        + (f", of which the base lacks {listed(added, 3)}" if added else "")
    )
    return replace(component, tensors=made)


def _in_base(name: str, prefix: str, component: Component) -> str:
    """What the base calls a tensor of the adapter's."""
    return prefix + name if prefix + name in component.tensors else name


def _transposed(
    modules: Mapping[str, Mapping[str, Expression]],
    names: Mapping[str, str],
    base: Mapping[str, Expression],
    adapter: Adapter,
) -> bool:
    """Whether square weights are [in, out], as those that are not square are, and as the config says where there are none.

    What the config says is that of the last module in training, which may be a head.
    """
    found = set()
    for name, module in names.items():
        a, b = (modules[module].get(f"lora_{side}") for side in "AB")
        if a is None or b is None or name not in base or having(Role.HEAD, [name]):
            continue
        shape, made = base[name].spec.shape, (b.spec.shape[0], a.spec.shape[-1])
        if made[0] != made[1] and shape in (made, made[::-1]):
            found.add(shape != made)
    said = bool(adapter.config.get("fan_in_fan_out"))
    return said if len(found) != 1 else found.pop()


def _check_beginning(adapter: Adapter) -> None:
    """Refuse an adapter that is to be added to another base than the one that its config names.

    Source: huggingface/peft 0.21: tuners/lora/layer.py (`update_layer`: what changes `base_layer.weight`).
    """
    found = _CHANGES_BASE.fullmatch(str(adapter.config.get("init_lora_weights")))
    if found is None:
        return
    ways = ["merge it with peft"] if found["kind"].lower() != "lora_ga" else []
    if found["kind"].lower() != "loftq":
        ways.append(
            "save it from training with save_pretrained(..., path_initial_model_for_weight_conversion=DIR)"
        )
    raise UsageError(
        f"the adapter cannot be merged: init_lora_weights is '{found[0]}', which changed the weights of the base before "
        "training, and it belongs to those",
        file=adapter.path,
        hint=f"{', or '.join(ways)}; where SRC is that changed base, set it to true in adapter_config.json",
    )


def _adapted(
    made: dict[str, Expression], prefix: str, module: str, parts: Mapping[str, Expression], adapter: Adapter,
    *, transposed: bool, wide: bool,
) -> tuple[int, float]:  # fmt: skip
    """Put the merged weight (and bias) of one layer into `made`; the rank and scale that were used."""
    name = f"{prefix}{module}.weight"
    name = name if name in made else f"{module}.weight"
    if name not in made:
        near = get_close_matches(f"{module}.weight", made, n=1, cutoff=0.0)
        raise PlanError(
            "the adapter changes it, and the base has no such weight",
            file=adapter.path,
            tensor=f"{module}.weight",
            hint=f"the nearest is '{near[0]}'; is it the base that the adapter was trained on?"
            if near
            else None,
        )
    weight = made[name]
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = (parts.get(f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB")
    if a is None or b is None:
        raise PlanError("the adapter has only one of its two factors", tensor=name)
    check_base(name, weight)
    rank = a.spec.shape[0]
    scale = _scale(module, rank, adapter)
    dora = parts.get("lora_magnitude_vector")
    original = weight.spec.dtype
    if dora is not None or (wide and original.bits < 32):
        weight = apply(Cast("F32"), weight)[0]
    straight, across = (b.spec.shape[0], a.spec.shape[-1]), (a.spec.shape[-1], b.spec.shape[0])
    turned = embedding or (weight.spec.shape == across and (straight != across or transposed))
    if len(a.spec.shape) == len(b.spec.shape) == 2 and turned:
        # The base has the transpose of B @ A, which is the transpose of A times that of B.
        a, b = (apply(PermuteAxes((1, 0)), factor)[0] for factor in (b, a))
    shape = weight.spec.shape
    if len(shape) > 2:  # a convolution: its window lies in A
        flat = (shape[0], math.prod(shape[1:]))
        weight = apply(Reshape(flat), weight)[0]
        a = apply(Reshape((rank, a.spec.numel // max(rank, 1))), a)[0]
        b = apply(Reshape((b.spec.shape[0], b.spec.numel // max(b.spec.shape[0], 1))), b)[0]
    result = low_rank_sum(weight, a, b, scale)
    if dora is not None:
        if embedding or len(shape) > 2 or turned:
            raise PlanError("DoRA is merged for linear layers only", tensor=name, hint="merge it with peft")
        magnitude = apply(Reshape((dora.spec.numel,)), dora)[0]
        result = apply(ScaleRows(), apply(RowNormalize(1, 1e-30), result)[0], as_float(magnitude))[0]
        if not wide:
            result = apply(Cast(original.name), result)[0]
    if len(shape) > 2:
        result = apply(Reshape(shape), result)[0]
    made[name] = renamed(result, name)
    if "lora_B.bias" in parts:
        _merge_bias(made, name.removesuffix("weight") + "bias", parts["lora_B.bias"], scale)
    return rank, scale


def _merge_bias(made: dict[str, Expression], name: str, bias: Expression, scale: float) -> None:
    """Bias + scale * the factor's bias, as a product of rank one."""
    if name not in made:
        raise PlanError("the adapter has a bias for it, and the base has none", tensor=name)
    length = bias.spec.numel
    column = apply(Reshape((length, 1)), made[name])[0]
    factor = apply(Reshape((length, 1)), bias)[0]
    merged = low_rank_sum(column, apply(Fill("F32", (1, 1), 1))[0], factor, scale)
    made[name] = renamed(apply(Reshape((length,)), merged)[0], name)


def _scale(module: str, rank: int, adapter: Adapter) -> float:
    if adapter.scale is not None:
        return adapter.scale
    config = adapter.config
    stated = _for_module(config.get("rank_pattern"), module, config.get("r"))
    alpha = _for_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PlanError(
            "the adapter's config has no lora_alpha", tensor=module, hint="give the scale with --lora-scale"
        )
    if stated != rank:
        raise PlanError(
            f"the adapter's config says that its rank is {stated}; its factors have {rank}", tensor=module
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _for_module(patterns: Any, module: str, default: Any) -> Any:
    """What a table of patterns says for a module, as peft reads such tables."""
    for pattern, value in (patterns or {}).items():
        if len(pattern) > _LONGEST_PATTERN or _SLOW.search(pattern):
            raise PlanError(
                f"the adapter's pattern '{pattern[:60]}' repeats a group, which is not followed",
                tensor=module,
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise PlanError(
                f"the adapter's pattern '{pattern}' is not a regular expression: {error}", tensor=module
            ) from None
    return default
