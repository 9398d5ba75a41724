"""The kinds of adapter that are merged: which tensors one has for a layer, and what it makes of the layer's weight.

Weights lie as layers of torch have them: [out, in], or [out, in, *window]. Formulas: huggingface/peft 0.21
(tuners/*/layer.py, `get_delta_weight` and `merge`); of `lora_mid` and whole differences KohakuBlueleaf/LyCORIS and
Comfy-Org/ComfyUI (comfy/weight_adapter/*.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.errors import PlanError
from streamconv.ops import (
    Affine,
    Concat,
    Expression,
    Fill,
    MultiplyAdd,
    Pad,
    PermuteAxes,
    RowNormalize,
    ScaleAll,
    ScaleRows,
    Split,
    Truncate,
    apply,
    reshaped,
    turned,
)
from streamconv.plans.adapters.sums import as_float, low_rank_sum, wide
from streamconv.tensor import Shape

Parts = Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that an adapter changes.

    Attributes:
        weight: as it is, [out, in, *window].
        parts: what the adapter has for it, by the names of `Kind.parts`.
        scale: what the update is multiplied by.
        config: the adapter's.
        shared: what the adapter has for all layers.
    """

    weight: Expression
    parts: Parts
    scale: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)
    shared: Parts = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        return self.weight.spec.shape


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of adapter.

    Attributes:
        name: as people say it.
        parts: what it has for a layer, all of it unless in `optional`.
        merge: the layer's new weight.
        formula: of that, for people.
        optional: parts that may be there.
        rank: part -> the axis that is as long as the rank; none where no rank acts on the scale.
        scaled: the part that takes an alpha which is a tensor; the first that is there.
        wide: whether the sum has to be made in F32, and rounded afterwards.
        bias: the layer's new bias, where it changes.
    """

    name: str
    parts: frozenset[str]
    merge: Callable[[Layer], Expression]
    formula: str
    optional: frozenset[str] = frozenset()
    rank: Mapping[str, int] = field(default_factory=dict)
    scaled: tuple[str, ...] = ()
    wide: bool = True
    bias: Callable[[Layer], Expression] | None = None


def kind_of(parts: Parts) -> Kind | None:
    """The kind that a layer's parts are of; None where there is none."""
    names = parts.keys() - ANYWHERE
    return next((kind for kind in KINDS if kind.parts <= names <= kind.parts | kind.optional), None)


# ------------------------------------------------------------------------------------------ pieces


def flat(tensor: Expression) -> Expression:
    """A tensor as a matrix of its first axis and the rest."""
    shape = tensor.spec.shape
    return reshaped(tensor, (shape[0], math.prod(shape[1:])))


def product(left: Expression, right: Expression, scale: float = 1.0) -> Expression:
    """`left @ right` in F32."""
    shape = (*left.spec.shape[:-1], right.spec.shape[-1])
    return low_rank_sum(apply(Fill("F32", shape, 0))[0], right, left, scale)


def times(tensor: Expression, factor: Expression) -> Expression:
    """Each slice of the first axis times its own number, in F32."""
    return apply(ScaleRows(), wide(tensor), as_float(reshaped(factor, (tensor.spec.shape[0],))))[0]


def times_one(tensor: Expression, factor: Expression) -> Expression:
    """All of a tensor times one number that is a tensor, in F32."""
    return apply(ScaleAll(), as_float(tensor), as_float(factor))[0]


def _identity(size: int) -> Expression:
    """The matrix with ones on its diagonal."""
    ones = apply(Pad(1, size + 1, 0), apply(Fill("F32", (size, 1), 1))[0])[0]
    return reshaped(apply(Truncate(0, size * size), reshaped(ones, (size * (size + 1),)))[0], (size, size))


# ----------------------------------------------------------------------------------------- formulas


def _lora(layer: Layer) -> Expression:
    a, b = layer.parts["lora_A"], layer.parts["lora_B"]
    if mid := layer.parts.get("lora_mid"):
        a, b = _window(mid, a), b
    merged = low_rank_sum(flat(layer.weight), flat(a), flat(b), layer.scale)
    if magnitude := layer.parts.get("lora_magnitude_vector"):
        size = magnitude.spec.shape
        if magnitude.spec.numel != layer.shape[0] or (len(size) == 2 and size[0] == 1 < size[1]):
            raise PlanError(
                f"its magnitudes are {list(size)}: one for each of {layer.shape[0]} rows expected",
                tensor=layer.weight.spec.name,
            )
        merged = times(apply(RowNormalize(1, 1e-30), merged)[0], magnitude)
    return reshaped(merged, layer.shape)


def _window(mid: Expression, a: Expression) -> Expression:
    """Tucker's form of a convolution's right factor: mid [r, r, *window] over a [r, in, 1, 1] -> [r, in, *window]."""
    rank, inner, *window = mid.spec.shape
    size = math.prod(window)
    spread = reshaped(mid, (rank, inner, size))
    parts = apply(PermuteAxes((0, 2, 1)), spread)[0]  # [r, window, r]
    made = product(reshaped(parts, (rank * size, inner)), flat(a))
    columns = made.spec.shape[1]
    return apply(PermuteAxes((0, 2, 1)), reshaped(made, (rank, size, columns)))[0]


def _adalora(layer: Layer) -> Expression:
    a = times(layer.parts["lora_A"], layer.parts["lora_E"])
    return _lora(replace(layer, parts={**layer.parts, "lora_A": a}))


def _loha(layer: Layer) -> Expression:
    first, second = (
        _loha_side(*(layer.parts.get(f"hada_{name.format(number)}") for name in ("w{}_a", "w{}_b", "t{}")))
        for number in (1, 2)
    )
    flat_weight = flat(layer.weight)
    factors = [reshaped(each, flat_weight.spec.shape) for each in (first, second)]
    return reshaped(apply(MultiplyAdd(layer.scale), flat_weight, *factors)[0], layer.shape)


def _loha_side(a: Expression | None, b: Expression | None, core: Expression | None) -> Expression:
    """A [out, r] @ b [r, in]; with a core [r, r, *window], a is [r, out], and the result [out, in, *window]."""
    if a is None or b is None:
        raise PlanError("a product of LoHa lacks a factor")
    if core is None:
        return product(a, b)
    rank, inner, *window = core.spec.shape
    size = math.prod(window)
    spread = apply(PermuteAxes((0, 2, 1)), reshaped(core, (rank, inner, size)))[0]
    made = product(reshaped(spread, (rank * size, inner)), b)  # [r * window, in]
    return _over_window(product(turned(a), reshaped(made, (rank, size * b.spec.shape[1]))), size)


def _over_window(made: Expression, size: int) -> Expression:
    """[out, window * in] as [out, in * window]."""
    out, columns = made.spec.shape
    swapped = apply(PermuteAxes((0, 2, 1)), reshaped(made, (out, size, columns // size)))[0]
    return reshaped(swapped, (out, columns))


def _lokr(layer: Layer) -> Expression:
    """W + scale * kron(w1, w2): a product of rank one, where a row of W is a block of it that w1 has one number for."""
    first = _lokr_side(layer.parts, "1")
    second = _lokr_side(layer.parts, "2")
    (a, c), (p, q, *window) = first.spec.shape, second.spec.shape
    rest = math.prod(window)
    if (a * p, c * q * rest) != (layer.shape[0], math.prod(layer.shape[1:])):
        raise PlanError(
            f"its Kronecker product is [{a * p}, {c * q}], and the weight {list(layer.shape)}",
            tensor=layer.weight.spec.name,
        )
    blocks = apply(PermuteAxes((0, 2, 1, 3, 4)), reshaped(layer.weight, (a, p, c, q, rest)))[0]
    merged = low_rank_sum(
        reshaped(blocks, (a * c, p * q * rest)), reshaped(second, (1, p * q * rest)), reshaped(first, (a * c, 1)),
        layer.scale,
    )  # fmt: skip
    back = apply(PermuteAxes((0, 2, 1, 3, 4)), reshaped(merged, (a, c, p, q, rest)))[0]
    return reshaped(back, layer.shape)


def _lokr_side(parts: Parts, number: str) -> Expression:
    whole, core = parts.get(f"lokr_w{number}"), parts.get(f"lokr_t{number}")
    if whole is not None:
        return whole
    a, b = (parts.get(f"lokr_w{number}_{side}") for side in "ab")
    if a is None or b is None:
        raise PlanError(f"its Kronecker product lacks the factor w{number}")
    if core is None:
        return product(a, b)
    made = _loha_side(a, b, core)
    _, _, *window = core.spec.shape
    return reshaped(made, (a.spec.shape[1], b.spec.shape[1], *window))


def _ia3(layer: Layer) -> Expression:
    factor = layer.parts["ia3_l"]
    if factor.spec.shape[0] != 1 or layer.shape[0] == 1:
        return times(layer.weight, factor)
    swapped = apply(PermuteAxes((1, 0)), flat(layer.weight))[0]
    return reshaped(apply(PermuteAxes((1, 0)), times(swapped, factor))[0], layer.shape)


def _ia3_bias(layer: Layer) -> Expression:
    factor = layer.parts["ia3_l"]
    return layer.weight if factor.spec.numel != layer.weight.spec.numel else times(layer.weight, factor)


def _hira(layer: Layer) -> Expression:
    made = product(layer.parts["hira_B"], layer.parts["hira_A"])
    return apply(MultiplyAdd(1.0), layer.weight, layer.weight, reshaped(made, layer.shape))[0]


def _vera(layer: Layer) -> Expression:
    right, left = (layer.shared.get(f"vera_{side}") for side in "AB")
    if right is None or left is None:
        raise PlanError(
            "the adapter has no vera_A and vera_B, which all its layers share: peft draws them by chance again",
            tensor=layer.weight.spec.name,
            hint="save it with save_projection=True",
        )
    out, columns = layer.shape
    a = times(apply(Truncate(1, columns), right)[0], layer.parts["vera_lambda_d"])
    b = times(apply(Truncate(0, out), left)[0], layer.parts["vera_lambda_b"])
    return low_rank_sum(layer.weight, a, b, 1.0)


def _oft(layer: Layer) -> Expression:
    """W times a rotation of each block of columns: R = 1 + 2 Q + 2 Q^2 + ... + Q^k, with Q skew."""
    upper = layer.parts["oft_R"]
    blocks, elements = upper.spec.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    count = math.prod(layer.shape) // layer.shape[0] // size
    terms = int(layer.config.get("num_cayley_neumann_terms", 5))
    terms = 4 if terms == 3 else terms  # as it is counted there
    skew = _skew(wide(upper), size)
    one = _identity(size)
    ones = reshaped(one, (1, size, size))
    ones = apply(Concat(0), *[ones] * blocks)[0] if blocks > 1 else ones
    rotation = ones
    power = ones
    for number in range(1, terms):
        power = product(power, skew) if number > 1 else skew
        last = number == terms - 1 and number > 2
        rotation = low_rank_sum(rotation, ones, power, 1.0 if last else 2.0)
    if blocks not in (1, count):
        raise PlanError(
            f"it has rotations of {blocks} blocks of {size}, and the weight is {list(layer.shape)}",
            tensor=layer.weight.spec.name,
        )
    rows = reshaped(layer.weight, (layer.shape[0], count, size))
    parts = apply(PermuteAxes((1, 0, 2)), rows)[0]  # [blocks, out, size]
    if blocks == 1:
        parts = reshaped(parts, (1, count * layer.shape[0], size))
    made = reshaped(product(parts, turned(rotation)), (count, layer.shape[0], size))
    return reshaped(apply(PermuteAxes((1, 0, 2)), made)[0], layer.shape)


def _skew(upper: Expression, size: int) -> Expression:
    """What lies above the diagonal, row by row [n, size (size - 1) / 2], as skew matrices [n, size, size]."""
    blocks = upper.spec.shape[0]
    rows = apply(Split(1, tuple(size - 1 - row for row in range(size - 1))), upper)
    lines = []
    for row, line in enumerate(rows):
        zeros = apply(Fill("F32", (blocks, row + 1), 0))[0]
        lines.append(reshaped(apply(Concat(1), zeros, line)[0], (blocks, 1, size)))
    lines.append(apply(Fill("F32", (blocks, 1, size), 0))[0])
    above = apply(Concat(1), *lines)[0]
    below = apply(Affine(-1.0, 0.0), turned(above))[0]
    ones = reshaped(_identity(size), (1, size, size))
    return low_rank_sum(above, below, apply(Concat(0), *[ones] * blocks)[0] if blocks > 1 else ones, 1.0)


def _difference(layer: Layer) -> Expression:
    ones = apply(Fill("F32", layer.shape, 1))[0]
    return apply(MultiplyAdd(layer.scale), layer.weight, reshaped(layer.parts["diff"], layer.shape), ones)[0]


def _added(layer: Layer, part: str) -> Expression:
    """A bias and what is added to it, as a product of rank one."""
    length = layer.weight.spec.numel
    one = apply(Fill("F32", (1, 1), 1))[0]
    made = low_rank_sum(
        reshaped(layer.weight, (length, 1)), one, reshaped(layer.parts[part], (length, 1)), layer.scale
    )
    return reshaped(made, layer.shape)


def _beft_bias(layer: Layer) -> Expression:
    return _added(layer, "beft_bias")


def added_bias(layer: Layer) -> Expression:
    """A bias with that of the second factor, or with a whole difference."""
    return _added(layer, "lora_B.bias" if "lora_B.bias" in layer.parts else "diff_b")


def _same(layer: Layer) -> Expression:
    return layer.weight


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


ANYWHERE = _set("alpha", "lora_B.bias", "diff_b")
"""Parts that kinds have in common."""

KINDS: tuple[Kind, ...] = (
    Kind("LoRA", _set("lora_A", "lora_B"), _lora, "W + s B A", _set("lora_mid"), {"lora_A": 0}, ("lora_B",), wide=False),
    Kind(
        "DoRA", _set("lora_A", "lora_B", "lora_magnitude_vector"), _lora, "m V / |V|, V = W + s B A, by rows",
        _set("lora_mid"), {"lora_A": 0}, ("lora_B",),
    ),
    Kind("AdaLoRA", _set("lora_A", "lora_B", "lora_E"), _adalora, "W + s B (E A)", _set(), {}, ("lora_B",)),
    Kind(
        "LoHa", _set("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha, "W + s (a1 b1) * (a2 b2)",
        _set("hada_t1", "hada_t2"), {"hada_w1_b": 0}, ("hada_w1_a",), wide=False,
    ),
    *(
        Kind(
            "LoKr", _set(*first, *second), _lokr, "W + s kron(w1, w2)", _set("lokr_t2"),
            {"lokr_w2_b": 0, "lokr_w1_b": 0}, ("lokr_w1", "lokr_w1_a"), wide=False,
        )
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    Kind("IA3", _set("ia3_l"), _ia3, "W * l, by rows or columns", bias=_ia3_bias),
    Kind("HiRA", _set("hira_A", "hira_B"), _hira, "W + W * (B A)", wide=False),
    Kind("VeRA", _set("vera_lambda_b", "vera_lambda_d"), _vera, "W + (b B) (d A), A and B of all layers", wide=False),
    Kind("OFT", _set("oft_R"), _oft, "W R, R by Cayley-Neumann"),
    Kind("BEFT", _set("beft_bias"), _same, "bias + b", wide=False, bias=_beft_bias),
    Kind("full difference", _set("diff"), _difference, "W + D", wide=False),
)  # fmt: skip
"""Every kind that is merged. The first whose parts a layer has is its kind."""
