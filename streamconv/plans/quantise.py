"""A model quantised without data: its linear layers rounded to nearest, in the formats of compressed-tensors.

Codes, scales and names are those of llm-compressor 0.14 without data (entrypoints/model_free), byte for byte, and the
config is what transformers 5 and vLLM read. What stays as it is, is named in the config: embeddings, heads, norms, routers,
parts for images or sound, and what is asked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy

from streamconv import dtypes
from streamconv.errors import Problem, UsageError, count, listed
from streamconv.ops import Concat, Expression, GlobalScale, Pack, QuantBlocks, apply
from streamconv.ops.constant import constant
from streamconv.plans.codes import SAYS
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.layer import FLOATS
from streamconv.plans.plan import Targets
from streamconv.plans.recipe import Making
from streamconv.plans.roles import Role, having, words
from streamconv.tensor import TensorSpec

_BLOCK = 128
_VERSION = "0.20.0"  # of compressed-tensors, whose layout it is


@dataclass(frozen=True, slots=True)
class Form:
    """One way to quantise.

    Attributes:
        name: of the recipe.
        title: what it makes, in words.
        format: what compressed-tensors calls it.
        weights, activations: the config's words for them; an engine rounds activations while it runs.
        make: the parts of a layer, by what comes after its name, from its weight and those that are fused with it.
        group: the columns that have a scale, of weights or activations, which must divide all; None where they need not.
    """

    name: str
    title: str
    format: str
    weights: Mapping[str, Any]
    make: Callable[[Expression, tuple[Expression, ...]], dict[str, Expression]]
    activations: Mapping[str, Any] | None = None
    group: int | None = None


def _blocks(
    weight: Expression, _: tuple[Expression, ...], *, dtype: str, rule: str, block: tuple[int, int]
) -> dict[str, Expression]:
    made, scale = apply(QuantBlocks(_sized(block, weight), dtype, rule), weight)
    return {"weight": made, "weight_scale": scale}


def _sized(block: tuple[int, int], weight: Expression) -> tuple[int, int]:
    """A block whose width of 0 is all columns."""
    return block[0], block[1] or max(weight.spec.shape[1], 1)


def _integers(weight: Expression, _: tuple[Expression, ...], *, group: int) -> dict[str, Expression]:
    made, scale = apply(QuantBlocks((1, group), "I4", "own"), weight)
    (packed,) = apply(Pack(4, "I32", "offset"), made)
    shape = numpy.array(weight.spec.shape, "<i8").tobytes()
    held = constant(TensorSpec("", dtypes.by_name("I64"), (2,)), shape)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": held}


def _floats(
    weight: Expression, fused: tuple[Expression, ...], *, group: int, rule: str
) -> dict[str, Expression]:
    others = []
    if rule == "global":
        whole = apply(Concat(0), *fused)[0] if len(fused) > 1 else weight
        others = [apply(GlobalScale(), whole)[0]]
    made, scale = apply(QuantBlocks((1, group), "E2M1", rule), weight, *others)
    (packed,) = apply(Pack(4, "U8", "e2m1"), made)
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        **({"weight_global_scale": others[0]} if others else {}),
    }


_ROUNDED = {"dynamic": True, "symmetric": True}
_FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
_BY_TOKEN = {"num_bits": 8, "strategy": "token", **_ROUNDED}

FORMS = (
    Form(
        "quantise-fp8-block", "FP8 in blocks of 128 x 128", "float-quantized",
        {**_FLOAT8, "strategy": "block", "block_structure": [_BLOCK, _BLOCK]},
        partial(_blocks, dtype="F8_E4M3", rule="own", block=(_BLOCK, _BLOCK)),
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": _BLOCK, **_ROUNDED}, group=_BLOCK,
    ),
    Form(
        "quantise-fp8", "FP8 by row", "float-quantized", {**_FLOAT8, "strategy": "channel"},
        partial(_blocks, dtype="F8_E4M3", rule="own", block=(1, 0)), {"type": "float", **_BY_TOKEN},
    ),
    Form(
        "quantise-int8", "INT8 by row", "int-quantized", {**_FLOAT8, "type": "int", "strategy": "channel"},
        partial(_blocks, dtype="I8", rule="own", block=(1, 0)), {"type": "int", **_BY_TOKEN},
    ),
    Form(
        "quantise-int4", "INT4 by group of 128", "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _BLOCK, "dynamic": False, "symmetric": True},
        partial(_integers, group=_BLOCK), group=_BLOCK,
    ),
    Form(
        "quantise-nvfp4", "NVFP4", "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": False, "symmetric": True,
         "scale_dtype": "torch.float8_e4m3fn"},
        partial(_floats, group=16, rule="global"), group=16,
    ),
    Form(
        "quantise-mxfp4", "MXFP4", "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": False, "symmetric": True,
         "scale_dtype": "torch.uint8"},
        partial(_floats, group=32, rule="power"), group=32,
    ),
)  # fmt: skip


_OWN = (Role.HEAD, Role.EMBEDDING, Role.LOOKED_UP, Role.ROUTER)


@dataclass
class _Chosen:
    """Which tensors are quantised, and which of those that could be are not."""

    weights: dict[str, Expression] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)


def quantised(
    targets: Targets, making: Making, findings: Findings, *, form: Form, fused: Sequence[re.Pattern[str]]
) -> tuple[Targets, dict[str, Any] | None]:
    """Every linear layer of a model quantised, all other tensors, and the config that says so.

    `fused`: the names of weights that are computed with as one, and which then share the scale of their scales; the group
    `where` is what is alike in those of one layer.

    Raises:
        UsageError: it is quantised already, or has nothing to quantise.
    """
    if any(key in (making.config or {}) for key in SAYS):
        raise UsageError("it is quantised already", hint="make it plain first, with --recipe dequantise")
    _require_rows(targets)
    chosen = _chosen(targets, making, findings)
    if not chosen.weights:
        raise UsageError("there is no linear layer to quantise", hint="see --ignore")
    together: dict[tuple[int | str, str], list[Expression]] = defaultdict(list)
    places = {name: _place(name, fused) for name in chosen.weights}
    for name, place in places.items():
        together[place].append(chosen.weights[name])
    made: dict[str, tuple[tuple[str, ...], Expression]] = {}
    problems = []
    for name, (origins, tensor) in targets.items():
        if name not in chosen.weights:
            made[name] = origins, tensor
            continue
        _, columns = tensor.spec.shape
        if form.group is not None and columns % form.group:
            problems.append(
                Problem(
                    f"its {columns} columns are not divided by groups of {form.group}",
                    tensor=name,
                    hint="leave it as it is with --ignore",
                )
            )
            continue
        stem, parts = name.removesuffix("weight"), form.make(tensor, tuple(together[places[name]]))
        made.update((stem + part, (origins, each)) for part, each in parts.items())
    findings.problems += grouped(problems)
    findings.notes.append(
        f"quantised: {count(len(chosen.weights), 'weight')} to {form.title}, each rounded to nearest, without data"
    )
    if chosen.kept:
        findings.notes.append(f"not quantised: {count(len(chosen.kept), 'layer')}, {listed(chosen.kept)}")
    if chosen.packed:
        findings.notes.append(
            f"experts in one tensor stay as they are, {count(len(chosen.packed), 'tensor')} such as {chosen.packed[0]}: a recipe "
            "may take them apart first"
        )
    config = (
        None
        if making.config is None
        else {**making.config, "quantization_config": _config(form, [*chosen.kept, *_left_out(targets)])}
    )
    return made, config


def _chosen(targets: Targets, making: Making, findings: Findings) -> _Chosen:
    chosen = _Chosen()
    own = {name for role in _OWN for name in having(role, targets)}
    own |= {name for name in targets if having(Role.LEFT_OUT, [name.removesuffix(".weight")])}
    parts = {part for name in targets for part in name.split(".")[:-1]}
    towers = set(having(Role.TOWER, parts))
    ignored = {name for name in targets if any(pattern.match(name) is not None for pattern in making.ignore)}
    for pattern in making.ignore:
        if not any(pattern.match(name) is not None for name in targets):
            findings.problems.append(Problem(f"--ignore '{pattern.text}' matches no tensor"))
    for name, (_, tensor) in targets.items():
        spec = tensor.spec
        if spec.dtype.name not in FLOATS:
            continue
        if len(spec.shape) == 3 and name not in ignored and not name.endswith((".weight", ".bias")):
            chosen.packed.append(name)
        module = name.removesuffix(".weight")
        if len(spec.shape) != 2 or module == name or module.endswith("norm"):
            continue
        if name in own or name in ignored or not towers.isdisjoint(name.split(".")):
            chosen.kept.append(module)
        else:
            chosen.weights[name] = tensor
    return chosen


def _require_rows(targets: Targets) -> None:
    """Refuse a model whose matrices are [in, out]: no layer of compressed-tensors is.

    Raises:
        UsageError: it is one.
    """
    for name in having(Role.TURNED, targets):
        shape = targets[name][1].spec.shape
        if len(shape) == 2 and shape[0] < shape[1]:
            raise UsageError(
                f"its matrices lie [in, out], such as '{name}' {list(shape)}, and no library reads such layers quantised",
                hint="quantise a model whose layers are [out, in]",
            )


def _left_out(targets: Targets) -> list[str]:
    """What a config has to say of heads that are the embedding, and in no file: readers look for their scales."""
    if having(Role.HEAD, targets) or not having(Role.EMBEDDING, targets):
        return []
    return [f"re:.*{word}$" for word in words(Role.LEFT_OUT)]


def _place(name: str, fused: Sequence[re.Pattern[str]]) -> tuple[int | str, str]:
    """What is one for the weights that a weight is fused with, itself among them."""
    found = (
        (kind, match["where"]) for kind, pattern in enumerate(fused) if (match := pattern.fullmatch(name))
    )
    return next(found, (name, ""))


def _config(form: Form, kept: list[str]) -> dict[str, Any]:
    group = {
        "targets": ["Linear"], "format": form.format, "weights": dict(form.weights),
        "input_activations": None if form.activations is None else dict(form.activations), "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form.format, "quantization_status": "compressed",
        "version": _VERSION, "config_groups": {"group_0": group}, "ignore": kept, "kv_cache_scheme": None,
        "global_compression_ratio": None, "transform_config": {},
    }  # fmt: skip
