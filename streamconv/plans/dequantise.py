"""A quantised model made plain: each layer by the scheme that its own tensors show, whatever the config says of others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from streamconv.errors import PlanError, Problem, StreamconvError, UsageError, count
from streamconv.ops import Expression, in_dtype
from streamconv.plans.architecture import Config
from streamconv.plans.codes import BESIDE, SAYS, place, quantised
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.layer import FLOAT8, FLOATS, Layer
from streamconv.plans.plan import Check, Dropped, Targets
from streamconv.plans.recipe import Files, Making, Surroundings, keep_files
from streamconv.plans.schemes import plain, scheme_of
from streamconv.plans.told import FILES, Told, told_by

FOUND_BY = (
    "*_scale_inv", "*.weight_packed", "*.qweight", "*.weight_scale", "*_blocks", "*.weight.absmax", "*.SCB", "*.qscale_weight",
    "*.scale_weight", "*._weight_qdata",
)  # fmt: skip
"""What one of is among the names of a model that can be made plain."""

# Parts of a layer that do not begin with its weight's name, besides those that are known everywhere.
_OF_LAYERS = ("g_idx", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")

_REFUSED = {
    "marlin-24": "half of its weights are left out in a pattern",
    "sparse": "weights are left out in a pattern",
    "transform_config": "its weights are rotated, together with what comes before them",
}

_DTYPE_KEYS = ("dtype", "torch_dtype")
_AS_TORCH = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plain_config(config: Config) -> dict[str, Any]:
    """A config that says nothing of quantising, also of its parts, and that says a dtype."""
    said = {} if any(key in config for key in _DTYPE_KEYS) else {"dtype": "bfloat16"}
    return _unquantised(config) | said


def _unquantised(config: Config) -> dict[str, Any]:
    return {
        key: _unquantised(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in SAYS
    }


def without_settings(around: Surroundings) -> Files:
    """Side files but those that say how weights are quantised."""
    kept = keep_files(around)
    gone = {name: "the weights are quantised no more" for name in around.names if name in FILES}
    return Files(kept.texts, {**kept.left_out, **gone}, kept.notes)


def dequantised(
    targets: Targets, making: Making, findings: Findings
) -> tuple[Targets, dict[str, Any] | None]:
    """Every quantised weight of a model as it is, all other tensors, and the config that says so.

    Raises:
        UsageError: none is quantised.
        PlanError: the model is quantised in a way that is not read here.
    """
    told = told_by(making)
    _refuse(told)
    _refuse_foreign(told)
    layers = _layers(targets)
    made: dict[str, tuple[tuple[str, ...], Expression]] = {}
    notes: dict[str, None] = {}
    checks: list[tuple[str, Expression, Expression]] = []
    known: Counter[str] = Counter()
    problems: list[Problem] = []
    against: list[str] = []
    for whole, names in layers.items():
        parts = {part: targets[name][1] for part, name in names.items()}
        scheme = scheme_of(parts, told.method)
        name = names.get("") or (f"{whole}.weight" if _is_module(whole, names.values()) else whole)
        layer = Layer(name, parts, told, _dtype(making, name), notes, checks)
        origins = tuple(origin for each in names.values() for origin in targets[each][0])
        if parts.keys() == {""} and parts[""].spec.dtype.name in FLOAT8 and told.ignores(layer.module):
            made[name] = origins, in_dtype(parts[""], layer.dtype)
            continue
        if scheme is None and not _coded(parts):
            made.update((name, targets[name]) for name in names.values())
            continue
        try:
            made[name] = origins, plain(layer)
        except StreamconvError as error:
            problems += error.problems
            continue
        known[scheme.name if scheme else ""] += 1
        if told.ignores(layer.module):
            against.append(name)
    problems += _lost(made, making.config)
    findings.problems += grouped(problems)
    findings.dropped += _of_activations(targets, layers)
    if not known and not problems:
        raise UsageError(
            "no tensor is quantised in a way that is read here", hint="docs/quantised.md has what is read"
        )
    _tell(findings, known, notes, against, checks)
    return made, None if making.config is None else plain_config(making.config)


def _of_activations(targets: Targets, layers: Mapping[str, Mapping[str, str]]) -> Iterator[Dropped]:
    """What is no part of a layer."""
    taken = {name for names in layers.values() for name in names.values()}
    for name, (origins, _) in targets.items():
        if name not in taken:
            yield from (Dropped(origin, "a scale of activations or of the KV cache") for origin in origins)


def _lost(made: Targets, config: Config | None) -> list[Problem]:
    """Codes that stay without what they are read with."""
    left = quantised({name: tensor.spec for name, (_, tensor) in made.items()}, config)
    coded = {name: made[name][1].spec.dtype for name, codes in left.items() if codes}
    return [
        Problem(
            f"it is {dtype}, the codes of a quantised weight, and its scales are not there",
            tensor=name,
            hint="is a shard missing?",
        )
        for name, dtype in coded.items()
        if dtype.bits <= 8
    ]


def _tell(
    findings: Findings, known: Mapping[str, int], notes: Collection[str], against: Sequence[str],
    checks: Collection[tuple[str, Expression, Expression]],
) -> None:  # fmt: skip
    """What was made plain, what is to be known of it, and what the run must check."""
    findings.notes += (
        f"dequantised: {count(number, 'weight')} of {scheme}" for scheme, number in known.items()
    )
    findings.notes += notes
    if against:
        findings.notes.append(
            f"the config says that layers were not quantised which are, by their tensors: {count(len(against), 'layer')}, "
            f"such as {against[0]}"
        )
    findings.checks += (
        Check(f"'{left.spec.name}': {meaning}", left, right) for meaning, left, right in checks
    )


def _layers(targets: Targets) -> dict[str, dict[str, str]]:
    """The names of each layer's tensors, by what they are of it; those of activations are left out."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in targets:
        head, _, leaf = name.rpartition(".")
        if leaf in _OF_LAYERS:
            found[head][leaf] = name
            continue
        layer, part = place(name)
        if BESIDE.fullmatch(leaf) and not (layer == head and part.startswith("_")):
            continue
        if part in found.get(layer, {}):
            layer, part = name, ""
        found[layer][part] = name
    return found


def _is_module(layer: str, names: Collection[str]) -> bool:
    return any(name.startswith(f"{layer}.") for name in names)


def _coded(parts: Mapping[str, Expression]) -> bool:
    """Whether a layer of no scheme is quantised all the same: it has codes beside what only such layers have."""
    specs = {
        f"x.weight{'_' * bool(part)}{part}" if part not in _OF_LAYERS else f"x.{part}": each.spec
        for part, each in parts.items()
    }
    return len(parts) > 1 and any(quantised(specs, None).values())


def _dtype(making: Making, name: str) -> str:
    """The dtype of a plain weight: what is asked for where that is one that weights are made into; else the model's."""
    asked = making.dtype(name)
    if asked is not None and asked.name in FLOATS:
        return asked.name
    return next((_AS_TORCH[said] for said in _said(making.config or {}) if said in _AS_TORCH), "BF16")


def _said(config: Config) -> Iterator[str]:
    yield from (str(config[key]).removeprefix("torch.") for key in _DTYPE_KEYS if key in config)
    yield from (
        each
        for key, value in config.items()
        if key not in SAYS and isinstance(value, Mapping)
        for each in _said(value)
    )


def _refuse(told: Told) -> None:
    """Refuse what no tensor shows."""
    settings = told.settings
    formats = [settings.get("format"), *(each.get("format") for each in told.groups)]
    for text in formats:
        for sign, why in _REFUSED.items():
            if isinstance(text, str) and text.startswith(sign):
                raise PlanError(
                    f"its format is {text}: {why}", hint="its own library may save it unquantised"
                )
    for key in ("transform_config", "sparsity_config"):
        said = settings.get(key)
        if isinstance(said, Mapping) and said.get("format") != "dense" and said:
            why = _REFUSED.get(key, _REFUSED["sparse"])
            raise PlanError(f"its config has a {key}: {why}", hint="its own library may save it unquantised")


def _refuse_foreign(told: Told) -> None:
    """Refuse layouts that a file's metadata names, and that tensors do not show."""
    said = told.entries.get("_quantization_metadata")
    layers = said.get("layers") if isinstance(said, Mapping) else None
    for name, each in layers.items() if isinstance(layers, Mapping) else ():
        form = each.get("format") if isinstance(each, Mapping) else None
        if not str(form).startswith("float8") or each.get("convrot"):
            raise PlanError(
                f"the metadata of its file says {form} of it, whose layout is not read here", tensor=str(name)
            )
