"""A LoRA merged into the weights that it was trained for, as expressions: W + scale * B @ A.

The sum is made in F32 and rounded once.

- An adapter of peft lies by itself. Its scale is alpha / rank, or alpha / sqrt(rank) where it says so (rsLoRA). peft
  rounds the product to the adapter's dtype first; the results differ by that. (huggingface/peft 0.21:
  tuners/lora/{config,layer,dora}.py, utils/other.py for patterns, utils/save_and_load.py for names.)
- A LoRA of SAT lies unmerged in its checkpoint. It has factors for each part of a weight's rows, and on each rank for
  that rank's part of the weight. (THUDM/SwissArmyTransformer: sat/model/finetune/lora2.py.)
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

from streamconv.errors import PlanError, Problem, UsageError, count, listed
from streamconv.ops import (
    Cast,
    Concat,
    Expression,
    Fill,
    LowRankAdd,
    PermuteAxes,
    Reshape,
    RowNormalize,
    ScaleRows,
    Split,
    apply,
    renamed,
)
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.wrappers import FACTORS, left_off, plain
from streamconv.readers.checkpoint import Component
from streamconv.readers.sat import LORA
from streamconv.readers.splits import NAMINGS, WHOLE, join, split

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


def merge(
    base: Mapping[str, Expression], adapter: Adapter, findings: Findings, *, wide: bool
) -> Mapping[str, Expression]:
    """The base's tensors, by the names that the adapter's training knew, with the adapter merged into them.

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
    prefix = left_off([f"{module}.weight" for module in modules] or replacing, base)
    made = dict(base)
    # First, because the adapter still changes a base that was saved along with it.
    added = []
    for name, tensor in replacing.items():
        if ".lora_" in name:
            raise UsageError(
                "the adapter cannot be merged: it has parts that plain LoRA has not, such as this one",
                file=adapter.path, tensor=name, hint="merge it with peft",
            )  # fmt: skip
        target = prefix + name if prefix + name in base else name
        if target not in base:
            added.append(target)
        made[target] = renamed(tensor, target)
    updates = (
        partial(_adapted, made, prefix, module, parts, adapter, wide=wide)
        for module, parts in modules.items()
    )
    merged = _merged("the adapter", updates)
    findings.notes.append(
        f"an adapter of {merged}"
        + (f"; taken from it as they are: {count(len(replacing), 'tensor')}" if replacing else "")
        + (f", of which the base lacks {listed(added, 3)}" if added else "")
    )
    return made


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
    *, wide: bool,
) -> tuple[int, float]:  # fmt: skip
    """Put the merged weight (and bias) of one layer into `made`; the rank and scale that were used."""
    name = f"{prefix}{module}.weight"
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
    _check_base(name, weight)
    rank = a.spec.shape[0]
    scale = _scale(module, rank, adapter)
    dora = parts.get("lora_magnitude_vector")
    original = weight.spec.dtype
    if dora is not None or (wide and original.bits < 32):
        weight = apply(Cast("F32"), weight)[0]
    across = embedding or bool(adapter.config.get("fan_in_fan_out"))
    if len(a.spec.shape) == len(b.spec.shape) == 2 and across:
        # The base has the transpose of B @ A, which is the transpose of A times that of B.
        a, b = (apply(PermuteAxes((1, 0)), factor)[0] for factor in (b, a))
    shape = weight.spec.shape
    if len(shape) > 2:  # a convolution: its window lies in A
        flat = (shape[0], math.prod(shape[1:]))
        weight = apply(Reshape(flat), weight)[0]
        a = apply(Reshape((rank, a.spec.numel // max(rank, 1))), a)[0]
        b = apply(Reshape((b.spec.shape[0], b.spec.numel // max(b.spec.shape[0], 1))), b)[0]
    result = _sum(weight, a, b, scale)
    if dora is not None:
        if embedding or len(shape) > 2 or across:
            raise PlanError("DoRA is merged for linear layers only", tensor=name, hint="merge it with peft")
        magnitude = apply(Reshape((dora.spec.numel,)), dora)[0]
        result = apply(ScaleRows(), apply(RowNormalize(1, 1e-30), result)[0], _as_float(magnitude))[0]
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
    merged = _sum(column, apply(Fill("F32", (1, 1), 1))[0], factor, scale)
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


# ------------------------------------------------------------------------- what lies in a checkpoint of SAT


class _Factor(NamedTuple):
    """Which factor of a module: of which rank, of which part of the rows, and which side of the product."""

    rank: int
    part: int
    side: str


_Factors = Mapping[_Factor, Expression]


def settle(component: Component, scale: float | None, findings: Findings, *, keep: bool) -> Component:
    """The component with the LoRA that lies in it merged into the weights, or kept, with a config that describes it.

    Without a `scale` the product is multiplied by 1 / rank, as SAT's alpha of 1 means.

    Raises:
        PlanError: it cannot be merged, or not be kept apart; all problems at once.
    """
    modules: dict[str, dict[_Factor, Expression]] = defaultdict(dict)
    made: dict[str, Expression] = {}
    for name, tensor in component.tensors.items():
        found = LORA.fullmatch(name)
        if found and found["side"]:
            if len(tensor.spec.shape) != 2 or not tensor.spec.numel:
                raise PlanError(f"a LoRA factor of {list(tensor.spec.shape)} is not a matrix", tensor=name)
            factor = _Factor(int(found["rank"] or 0), int(found["part"]), found["side"])
            modules[found["module"]][factor] = tensor
        else:
            target = f"{found['module']}.{found['leaf']}" if found else name
            made[target] = renamed(tensor, target)
    if keep:
        return _described(component, modules, scale) if modules else component
    if not modules:
        return replace(component, tensors=made)
    present, config = component.tensors.keys(), component.config or {}
    updates = (
        partial(_updated, made, present, module, each, scale, config) for module, each in modules.items()
    )
    assumed = " (alpha / rank; no file says alpha, SAT's default is 1: --lora-scale)"
    merged = _merged("the unmerged LoRA", updates)
    findings.notes.append(f"an unmerged LoRA of {merged}{assumed if scale is None else ''}")
    return replace(component, tensors=made)


def _described(component: Component, modules: Mapping[str, _Factors], scale: float | None) -> Component:
    """The component, with what its LoRA is in the config."""
    for module, factors in modules.items():
        if any(factor.rank for factor in factors):
            raise PlanError(
                "a LoRA that is split among ranks cannot be kept apart: the ranks' factors differ",
                tensor=module,
                hint="merge it into the weights",
            )
    settings = {"lora_rank": _rank(next(iter(modules.values())))} | (
        {} if scale is None else {"lora_scale": scale}
    )
    return replace(component, config={**(component.config or {}), **settings})


def _rank(factors: _Factors) -> int:
    """The rank of the products of one module, which all have one."""
    return next(tensor.spec.shape["BA".index(factor.side) - 1] for factor, tensor in factors.items())


def _updated(
    made: dict[str, Expression], present: Collection[str], module: str, factors: _Factors, scale: float | None,
    config: Mapping[str, Any],
) -> tuple[int, float]:  # fmt: skip
    """Put a weight with its products into `made`, each rank's into that rank's part; the rank and scale of all."""
    name = f"{module}.weight"
    if f"{module}.original.weight" not in present:
        raise PlanError(
            f"there are LoRA factors for {module}, and no weights to add them to",
            tensor=module,
            hint="a LoRA saved alone cannot be merged; give the checkpoint with the base weights",
        )
    _check_base(name, made[name])
    rank = _rank(factors)
    scale = 1 / rank if scale is None else scale
    ranks, parts = (len({factor[axis] for factor in factors}) for axis in (0, 1))
    wanted = {_Factor(each, part, side) for each in range(ranks) for part in range(parts) for side in "AB"}
    if factors.keys() != wanted:
        raise PlanError("parts of its LoRA factors are missing", tensor=name)
    naming = NAMINGS["sat"]
    sharding, sizes = naming.sharding(name) or WHOLE, naming.sizes_of(config)
    pieces = []
    for number, piece in enumerate(split(made[name], sharding, ranks, sizes)):
        left, right = ([factors[_Factor(number, part, side)] for part in range(parts)] for side in "BA")
        rows = apply(Split(0, tuple(factor.spec.shape[0] for factor in left)), piece)
        sums = [_sum(*each, scale) for each in zip(rows, right, left, strict=True)]
        pieces.append(apply(Concat(0), *sums)[0] if parts > 1 else sums[0])
    made[name] = renamed(join(pieces, sharding, sizes) if ranks > 1 else pieces[0], name)
    return rank, scale


# ------------------------------------------------------------------------------------------------ both


def _merged(what: str, updates: Iterable[Callable[[], tuple[int, float]]]) -> str:
    """Make the updates of all weights, each of which gives its rank and scale; what was merged, in words.

    Raises:
        PlanError: of all that does not fit.
    """
    used: list[tuple[int, float]] = []
    problems: list[Problem] = []
    for update in updates:
        try:
            used.append(update())
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(f"{what} does not fit", problems=grouped(problems))
    ranks, scales = (
        ", ".join(f"{value:g}" for value in sorted({each[at] for each in used})) or "none" for at in (0, 1)
    )
    return f"rank {ranks} is merged into {len(used)} weights with scale {scales}"


def _check_base(name: str, weight: Expression) -> None:
    if weight.spec.dtype.kind != "float" or weight.spec.dtype.bits < 16:
        raise PlanError(
            f"the base is {weight.spec.dtype}, quantised",
            tensor=name,
            hint="merge into weights that are not quantised, also after QLoRA",
        )


def _sum(weight: Expression, a: Expression, b: Expression, scale: float) -> Expression:
    return apply(LowRankAdd(scale), weight, _as_float(a), _as_float(b))[0]


def _as_float(tensor: Expression) -> Expression:
    """A factor in a dtype that can be calculated with."""
    return tensor if tensor.spec.dtype.bits >= 16 else apply(Cast("F32"), tensor)[0]
