"""An adapter merged into the weights that it was trained for, as expressions.

Sums are made in F32 and rounded once. The scale is alpha / rank, or alpha / sqrt(rank) where the adapter says so
(rsLoRA). (huggingface/peft 0.21: tuners/*/{config,layer,model}.py, utils/other.py for patterns.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from streamconv.errors import PlanError, UsageError, count, listed
from streamconv.ops import Expression, in_dtype, renamed, turned
from streamconv.plans.adapters import packed, rows
from streamconv.plans.adapters.adapter import Adapter
from streamconv.plans.adapters.beginnings import refuse_beginning
from streamconv.plans.adapters.kinds import (
    Kind,
    Layer,
    added_bias,
    kind_of,
    times_one,
)
from streamconv.plans.adapters.replacing import replaced
from streamconv.plans.adapters.sums import check_base, merged, wide
from streamconv.plans.adapters.ties import untied
from streamconv.plans.file_patterns import matches
from streamconv.plans.findings import Findings
from streamconv.plans.roles import Role, having
from streamconv.plans.wrappers import left_off
from streamconv.readers.checkpoint import Component
from streamconv.tensor import Shape

UNSUPPORTED = {
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts on part of a prompt only, which no merged weight does",
    "arrow_config": "it chooses among adapters at run time",
    "use_qalora": "it was trained for quantised weights",
    "use_bdlora": "it is made of blocks",
    "kasa_config": "it cuts off singular values of the base",
    "velora_config": "its update is projected",
    "monteclora_config": "it draws its update by chance",
    "coft": "its rotation is held near to none",
}
"""Settings of peft that change what the merged weight is, in ways that are not done here."""

TYPES = frozenset({
    "LORA", "ADALORA", "LOHA", "LOKR", "IA3", "HIRA", "VERA", "OFT", "BEFT", "LN_TUNING", "TRAINABLE_TOKENS",
})  # fmt: skip
"""Types of peft that are merged."""

NEVER = {
    "PROMPT_TUNING": "it puts tokens before a prompt",
    "MULTITASK_PROMPT_TUNING": "it puts tokens before a prompt",
    "P_TUNING": "it puts tokens before a prompt",
    "PREFIX_TUNING": "it puts keys and values before those of a prompt",
    "CPT": "it puts tokens before a prompt",
    "CARTRIDGE": "it puts keys and values before those of a prompt",
    "ADAPTION_PROMPT": "it adds attention to tokens of its own",
    "POLY": "it chooses among adapters by the task",
    "XLORA": "it weighs adapters by the input",
    "LILY": "its layers share factors by the input",
    "SHADOW": "it runs beside the model",
}
"""Types of peft that no weight of the base can hold, and why."""


def merge(component: Component, adapter: Adapter, findings: Findings, *, as_wide: bool) -> Component:
    """A component, its tensors by the names that the adapter's training knew, with the adapter merged into them.

    `as_wide` gives merged weights in F32, because they are to be written so.

    Raises:
        UsageError: the adapter is of a kind that cannot be merged.
        PlanError: its tensors do not fit the base; all of them at once.
    """
    _require_mergeable(adapter)
    modules, replacing = adapter.modules, adapter.replacing
    # Where the adapter was trained on a model without its head.
    prefix = left_off([f"{module}.weight" for module in modules] or replacing, component.tensors)
    changed = [f"{module}.weight" for module in modules if not rows.stay_tied(modules, module)]
    component = untied(
        component, [_in_base(name, prefix, component) for name in (*changed, *replacing)], findings
    )
    base = component.tensors
    # First, because the adapter still changes a base that was saved along with it.
    taken = {_in_base(name, prefix, component): tensor for name, tensor in replacing.items()}
    component, added = replaced(component, taken, adapter.path)
    made = dict(component.tensors)
    for module, parts in modules.items():
        if rows.PART in parts:
            rows.replaced(made, _in_base(f"{module}.weight", prefix, component), module, parts, adapter)
    layers = {module: parts for module, parts in modules.items() if rows.PART not in parts}
    inside = packed.parameters(layers, base, prefix, adapter)
    is_turned = _turned_squares(
        {_in_base(f"{each}.weight", prefix, component): layers[each] for each in layers}, base, adapter
    )
    updates = (
        partial(packed.adapted, made, inside[module], parts, partial(scale_of, module, adapter=adapter), as_wide=as_wide)
        if module in inside
        else partial(
            _adapted, made, _in_base(f"{module}.weight", prefix, component), module, parts, adapter,
            is_turned=is_turned, as_wide=as_wide,
        )
        for module, parts in layers.items()
    )  # fmt: skip
    said = merged("the adapter", updates, _names(layers))
    other = len(modules) - len(layers)
    findings.notes.extend(adapter.notes)
    findings.notes.append(
        f"an adapter of {said}"
        + (f"; rows taken from it: of {count(other, 'tensor')}" if other else "")
        + (f"; taken from it as they are: {count(len(replacing), 'tensor')}" if replacing else "")
        + (f", of which the base lacks {listed(added, 3)}" if added else "")
    )
    return replace(component, tensors=made)


def _require_mergeable(adapter: Adapter) -> None:
    """Refuse an adapter that no weight can hold, or that is not computed here.

    Raises:
        UsageError: it is one.
    """
    config = adapter.config
    kind = config.get("peft_type", "LORA")
    if kind in NEVER:
        raise UsageError(
            f"the adapter is {kind}: {NEVER[kind]}, which no weight of the base can hold, and nothing merges",
            file=adapter.path,
            hint="convert the base without --lora, and load the adapter as it is beside the result (PeftModel.from_pretrained)",
        )
    if kind not in TYPES:
        raise UsageError(
            f"the adapter is {kind}, which is not merged here", file=adapter.path,
            hint=f"merge it with peft; merged here are {', '.join(sorted(TYPES))}",
        )  # fmt: skip
    reasons = [reason for key, reason in UNSUPPORTED.items() if config.get(key)]
    if kind == "OFT" and config.get("use_cayley_neumann") is not True:
        reasons.append("its rotation is made by inverting a matrix (use_cayley_neumann is not true)")
    if reasons:
        raise UsageError(
            f"the adapter cannot be merged: {'; '.join(reasons)}",
            file=adapter.path,
            hint="merge it with peft",
        )
    refuse_beginning(adapter)
    if adapter.unknown:
        raise UsageError(
            "the adapter cannot be merged: it has parts of no kind that is known, such as this one",
            file=adapter.path, tensor=adapter.unknown[0], hint="merge it with peft",
        )  # fmt: skip


def _names(layers: Mapping[str, Mapping[str, Expression]]) -> str:
    """The kinds of layers, as they are said; nothing for plain LoRA."""
    kinds = Counter(kind.name for parts in layers.values() if (kind := kind_of(parts)))
    return ", ".join(kinds) + " of " if kinds.keys() - {"LoRA", "DoRA"} else ""


def _in_base(name: str, prefix: str, component: Component) -> str:
    """What the base calls a tensor of the adapter's."""
    return prefix + name if prefix + name in component.tensors else name


def _turned_squares(
    layers: Mapping[str, Mapping[str, Expression]], base: Mapping[str, Expression], adapter: Adapter
) -> bool:
    """Whether square weights are [in, out], as those that are not square are, and as the config says where there are none.

    What the config says is that of the last module in training, which may be a head.
    """
    found = set()
    for name, parts in layers.items():
        shape = base[name].spec.shape if name in base and not having(Role.HEAD, [name]) else ()
        made = _made(parts, shape) if len(shape) == 2 else None
        if made is not None and made[0] != made[1] and shape in (made, made[::-1]):
            found.add(shape != made)
    said = bool(adapter.config.get("fan_in_fan_out"))
    return said if len(found) != 1 else found.pop()


def _made(parts: Mapping[str, Expression], shape: Shape) -> tuple[int, ...] | None:
    """The [out, in] of the layer that has these parts, whose weight has this shape in one order or the other."""
    if (factor := parts.get("ia3_l")) is not None and len(shape) == 2:
        size, of_rows = factor.spec.numel, factor.spec.shape[0] != 1
        return shape if shape[0 if of_rows else 1] == size else shape[::-1]
    for left, right in (("lora_B", "lora_A"), ("hada_w1_a", "hada_w1_b"), ("hira_B", "hira_A")):
        if left in parts and right in parts:
            return parts[left].spec.shape[0], math.prod(parts[right].spec.shape[1:])
    return None


def _adapted(
    made: dict[str, Expression], name: str, module: str, parts: Mapping[str, Expression], adapter: Adapter,
    *, is_turned: bool, as_wide: bool,
) -> tuple[int, float]:  # fmt: skip
    """Put the merged weight (and bias) of one layer into `made`; the rank and scale that were used."""
    kind = kind_of(parts)
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    if embedding:
        parts = {part.replace("_embedding", ""): tensor for part, tensor in parts.items()}
        kind = kind_of(parts)
    if kind is None:
        if sum(part in parts for part in ("lora_A", "lora_B")) == 1:
            raise PlanError("the adapter has only one of its two factors", tensor=name)
        raise PlanError(
            f"the adapter has {', '.join(sorted(parts))} for it, which is no kind that is known", tensor=name
        )
    bias = f"{name.removesuffix('weight')}bias"
    only_bias = kind.name == "BEFT"
    if name not in made and not only_bias:
        near = get_close_matches(f"{module}.weight", made, n=1, cutoff=0.0)
        raise PlanError(
            "the adapter changes it, and the base has no such weight",
            file=adapter.path,
            tensor=f"{module}.weight",
            hint=f"the nearest is '{near[0]}'; is it the base that the adapter was trained on?"
            if near
            else None,
        )
    rank = next((parts[part].spec.shape[axis] for part, axis in kind.rank.items() if part in parts), 0)
    scale = scale_of(module, rank, adapter=adapter, own="alpha" in parts, kind=kind)
    if "alpha" in parts:
        parts = _with_alpha(parts, kind)
    layer = Layer(made[bias if only_bias else name], parts, scale, adapter.config, adapter.shared)
    if not only_bias:
        made[name] = renamed(
            _weight(layer, kind, embedding=embedding, is_turned=is_turned, as_wide=as_wide), name
        )
    change = kind.bias or (added_bias if {"lora_B.bias", "diff_b"} & parts.keys() else None)
    if change is not None and (bias in made or kind.name != "IA3"):
        if bias not in made:
            raise PlanError("the adapter has a bias for it, and the base has none", tensor=bias)
        before = made[bias]
        merged_bias = change(replace(layer, weight=before, scale=scale if "lora_B.bias" in parts else 1.0))
        made[bias] = renamed(in_dtype(merged_bias, before.spec.dtype.name), bias)
    return rank, scale


def _weight(layer: Layer, kind: Kind, *, embedding: bool, is_turned: bool, as_wide: bool) -> Expression:
    """The new weight of a layer, as it lies in the base."""
    before = layer.weight
    check_base(before.spec.name, before)
    if as_wide or kind.wide:
        layer = replace(layer, weight=wide(before))
    shape = layer.shape
    straight = _made(layer.parts, shape) or shape
    across = len(shape) == 2 and (
        embedding or (shape == straight[::-1] and (straight[0] != straight[1] or is_turned))
    )
    if across:
        layer = replace(layer, weight=turned(layer.weight))
    made = kind.merge(layer)
    if across:
        made = turned(made)
    return made if as_wide else in_dtype(made, before.spec.dtype.name)


def _with_alpha(parts: Mapping[str, Expression], kind: Kind) -> Mapping[str, Expression]:
    """Parts of which one is multiplied by alpha, which lies beside them as a tensor."""
    part = next((each for each in kind.scaled if each in parts), None)
    if part is None or not any(each in parts for each in kind.rank):  # of two whole factors, it means nothing
        return parts
    return {**parts, part: times_one(wide(parts[part]), wide(parts["alpha"]))}


def scale_of(
    module: str, rank: int, *, adapter: Adapter, own: bool = False, kind: Kind | None = None
) -> float:
    """What the product of a module's factors is multiplied by; with an alpha of its own, besides that."""
    if kind is not None and not kind.scaled:
        return 1.0
    if adapter.scale is not None:
        return adapter.scale
    config = adapter.config
    if own:
        return 1 / rank if rank else 1.0
    if not config:  # a file without a config and without an alpha: alpha is the rank
        return 1.0
    stated = _for_module(config.get("rank_pattern"), module, config.get("r"))
    alpha = _for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha")))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PlanError(
            "the adapter's config has no lora_alpha", tensor=module, hint="give the scale with --lora-scale"
        )
    if kind is not None and kind.name == "AdaLoRA":
        return float(alpha) / (float(config.get("init_r", 12)) + 1e-5)
    rank = rank or stated
    if stated != rank:
        raise PlanError(
            f"the adapter's config says that its rank is {stated}; its factors have {rank}", tensor=module
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _for_module(patterns: Any, module: str, default: Any) -> Any:
    """What a table of patterns says for a module, as peft reads such tables."""
    for pattern, value in (patterns or {}).items():
        if matches(pattern, module, "adapter_config.json", form=r"(.*\.)?({})$"):
            return value
    return default
