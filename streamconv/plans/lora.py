"""A LoRA adapter of peft merged into the weights that it was trained for, as expressions.

    W + scale * B @ A        scale = alpha / rank, or alpha / sqrt(rank) where the adapter says so (rsLoRA)

The sum is made in F32 and rounded once. peft rounds the product to the adapter's dtype first; the results differ
by that.

Source: huggingface/peft 0.21: tuners/lora/{config,layer,dora}.py, utils/other.py (patterns), utils/save_and_load.py
(names).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from streamconv.errors import PlanError, Problem, UsageError, listed
from streamconv.ops import (
    Cast,
    Expression,
    Fill,
    LowRankAdd,
    PermuteAxes,
    Reshape,
    RowNormalize,
    ScaleRows,
    apply,
    renamed,
)
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.wrappers import left_off

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<rest>(\.[^.]+)*)"
)

# Settings of peft that change what the merged weight is, in ways that are not done here.
_UNSUPPORTED = {
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are not weights of layers, such as packed experts",
    "trainable_token_indices": "it changes single rows of the embedding",
    "alora_invocation_tokens": "it acts on part of a prompt only, which no merged weight does",
    "arrow_config": "it chooses among adapters at run time",
    "use_qalora": "it was trained for quantised weights",
    "use_bdlora": "it is made of blocks",
}

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


def merge(
    base: Mapping[str, Expression], adapter: Adapter, findings: Findings, *, wide: bool
) -> Mapping[str, Expression]:
    """The base's tensors, by the names that the adapter's training knew, with the adapter merged into them.

    `wide` gives merged weights in F32, because they are to be written so.

    Raises:
        UsageError: the adapter is of a kind that cannot be merged.
        PlanError: its tensors do not fit the base; all of them at once.
    """
    _check(adapter)
    modules: dict[str, dict[str, Expression]] = defaultdict(dict)
    replacing: dict[str, Expression] = {}
    for name, tensor in adapter.tensors.items():
        found = _PART.fullmatch(name.removeprefix(_PREFIX))
        if found is None:
            replacing[_plain(name.removeprefix(_PREFIX))] = tensor
        else:
            bias = ".bias" if found["rest"].endswith(".bias") else ""
            modules[found["module"]][found["part"] + bias] = tensor
    # Where the adapter was trained on a model without its head.
    prefix = left_off([f"{module}.weight" for module in modules] or replacing, base)
    made = dict(base)
    # First, because the adapter still changes a base that was saved along with it.
    added = []
    for name, tensor in replacing.items():
        target = prefix + name if prefix + name in base else name
        if target not in base:
            added.append(target)
        made[target] = renamed(tensor, target)
    problems: list[Problem] = []
    used: list[tuple[int, float]] = []
    for module, parts in modules.items():
        name = f"{prefix}{module}.weight"
        if name not in base:
            problems.append(_orphan(module, base, adapter))
            continue
        try:
            used.append(_merge(made, name, module, parts, adapter, wide=wide))
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError("the adapter does not fit", problems=grouped(problems))
    findings.notes.append(
        f"an adapter of {described(used)}"
        + (f"; {len(replacing)} tensors are taken from it as they are" if replacing else "")
        + (f", of which the base lacks {listed(added, 3)}" if added else "")
    )
    return made


def _check(adapter: Adapter) -> None:
    kind = adapter.config.get("peft_type")
    reasons = [reason for key, reason in _UNSUPPORTED.items() if adapter.config.get(key)]
    wrong = f"cannot be merged: {'; '.join(reasons)}" if reasons else ""
    if kind != "LORA":
        wrong = f"is {kind}, not LORA; only LoRA is merged"
    if wrong:
        raise UsageError(f"the adapter {wrong}", file=adapter.path, hint="merge it with peft")


def _merge(
    made: dict[str, Expression],
    name: str,
    module: str,
    parts: Mapping[str, Expression],
    adapter: Adapter,
    *,
    wide: bool,
) -> tuple[int, float]:
    """Put the merged weight (and bias) of one layer into `made`; the rank and scale that were used."""
    weight = made[name]
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = (parts.get(f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB")
    if a is None or b is None:
        raise PlanError("the adapter has only one of its two factors", tensor=name)
    if weight.spec.dtype.kind != "float" or weight.spec.dtype.bits < 16:
        raise PlanError(
            f"the base is {weight.spec.dtype}, quantised",
            tensor=name,
            hint="merge into the weights that are not quantised",
        )
    rank = a.spec.shape[0]
    scale = _scale(module, rank, adapter)
    dora = parts.get("lora_magnitude_vector")
    original = weight.spec.dtype
    if dora is not None or (wide and original.bits < 32):
        weight = apply(Cast("F32"), weight)[0]
    across = embedding or bool(adapter.config.get("fan_in_fan_out"))
    if len(a.spec.shape) == len(b.spec.shape) == 2 and across:
        # The base has the transpose of B @ A, which is the transpose of A times that of B.
        a, b = _turned(b), _turned(a)
    shape = weight.spec.shape
    if len(shape) > 2:  # a convolution: its window lies in A
        flat = (shape[0], math.prod(shape[1:]))
        weight = apply(Reshape(flat), weight)[0]
        a = apply(Reshape((rank, a.spec.numel // max(rank, 1))), a)[0]
        b = apply(Reshape((b.spec.shape[0], b.spec.numel // max(b.spec.shape[0], 1))), b)[0]
    result = apply(LowRankAdd(scale), weight, as_float(a), as_float(b))[0]
    if dora is not None:
        if embedding or len(shape) > 2 or across:
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
    factor = apply(Reshape((length, 1)), as_float(bias))[0]
    one = apply(Fill("F32", (1, 1), 1))[0]
    merged = apply(LowRankAdd(scale), column, one, factor)[0]
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


def _plain(name: str) -> str:
    """A replaced tensor's name without what peft wraps around it."""
    return re.sub(r"\.(modules_to_save\.[^.]+|original_module|base_layer)(?=\.)", "", name)


def _orphan(module: str, base: Mapping[str, Expression], adapter: Adapter) -> Problem:
    near = get_close_matches(f"{module}.weight", base, n=1, cutoff=0.0)
    return Problem(
        "the adapter changes it, and the base has no such weight",
        file=adapter.path,
        tensor=f"{module}.weight",
        hint=f"the nearest is '{near[0]}'; is it the base that the adapter was trained on?" if near else None,
    )


def _turned(tensor: Expression) -> Expression:
    return apply(PermuteAxes((1, 0)), tensor)[0]


def as_float(tensor: Expression) -> Expression:
    """A factor in a dtype that can be calculated with."""
    return tensor if tensor.spec.dtype.bits >= 16 else apply(Cast("F32"), tensor)[0]


def described(used: Collection[tuple[int, float]]) -> str:
    """What was merged, in words, from the rank and the scale of each product."""
    ranks, scales = (
        ", ".join(f"{value:g}" for value in sorted({each[at] for each in used})) or "none" for at in (0, 1)
    )
    return f"rank {ranks} is merged into {len(used)} weights with scale {scales}"
