"""What a rule's program can call: operations over tensors, by the names that recipes use.

Each takes expressions and plain values and gives an expression, or a list of them. Axes count from 0. What is
made of several operations here needs no code of its own to be read backwards: its operations are inverted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import isfunction
from typing import Any

from streamconv.errors import UsageError
from streamconv.ops import (
    Affine,
    Alias,
    Cast,
    Concat,
    DequantBlocks,
    Exactness,
    Expression,
    Fill,
    Frequencies,
    Op,
    Pad,
    PermuteAxes,
    QuantBlocks,
    Reshape,
    RowNormalize,
    Same,
    Split,
    Stack,
    Take,
    Truncate,
    Unpack,
    Unstack,
    apply,
)

Tensors = list[Expression]


def split(tensor: Expression, axis: int, sizes: Sequence[int]) -> Tensors:
    """Parts of these sizes, which add up to the axis."""
    return _all(Split(axis, tuple(sizes)), tensor)


def chunk(tensor: Expression, axis: int, count: int) -> Tensors:
    """`count` equal parts; refused as a `split` whose sizes do not add up where the axis does not divide."""
    size = tensor.spec.shape[axis]
    if not 0 < count <= max(size, 1):
        raise UsageError(f"{count} parts of an axis of {size}", tensor=tensor.spec.name)
    return split(tensor, axis, [size // count] * count)


def concat(tensors: Sequence[Expression], axis: int = 0) -> Expression:
    """One after the other."""
    return _one(Concat(axis), *tensors)


def stack(tensors: Sequence[Expression], axis: int = 0) -> Expression:
    """Each as a slice of a new axis."""
    return _one(Stack(axis), *tensors)


def unstack(tensor: Expression, axis: int = 0) -> Tensors:
    """The slices of an axis."""
    return _all(Unstack(axis, tensor.spec.shape[axis]), tensor)


def reshape(tensor: Expression, shape: Sequence[int]) -> Expression:
    """The same elements in row-major order; one size may be -1."""
    return _one(Reshape(tuple(shape)), tensor)


def permute(tensor: Expression, axes: Sequence[int]) -> Expression:
    """Axis k of the result is axis `axes[k]` of the operand."""
    return _one(PermuteAxes(tuple(axes)), tensor)


def transpose(tensor: Expression) -> Expression:
    """The last two axes exchanged."""
    *rest, last = range(len(tensor.spec.shape))
    return permute(tensor, [*rest[:-1], last, rest[-1]])


def take(tensor: Expression, axis: int, runs: Sequence[Sequence[int]]) -> Expression:
    """Slices in the order of [start, step, count] runs."""
    return _one(Take(axis, tuple((start, step, count) for start, step, count in runs)), tensor)


def pad(tensor: Expression, axis: int, to: int, value: float = 0) -> Expression:
    """Grown at the end with a value."""
    return _one(Pad(axis, to, value), tensor)


def truncate(tensor: Expression, axis: int, to: int, value: float | None = None) -> Expression:
    """Cut at the end; with `value`, what is cut off must be that."""
    return _one(Truncate(axis, to, value), tensor)


def cast(tensor: Expression, dtype: str) -> Expression:
    """In another dtype."""
    return _one(Cast(dtype), tensor)


def copies(tensor: Expression, count: int = 2) -> Tensors:
    """The tensor under several names; backwards, they must be equal."""
    return _all(Alias(count), tensor)


def same(*tensors: Expression) -> Expression:
    """One of several tensors that must be equal; backwards, the tensor under each of their names."""
    return _one(Same(), *tensors)


def filled(shape: Sequence[int], value: float, dtype: str) -> Expression:
    """A new tensor."""
    return _one(Fill(dtype, tuple(shape), value))


def frequencies(base: float, dim: int, dtype: str, computed: str = "F32") -> Expression:
    """The rotary frequencies of `dim` channels, as models buffer them."""
    return _one(Frequencies(base, dim, dtype, computed))


def affine(tensor: Expression, scale: float, offset: float = 0.0) -> Expression:
    """`scale * x + offset`."""
    return _one(Affine(float(scale), float(offset)), tensor)


def dequant_blocks(
    weight: Expression, scale: Expression, block: Sequence[int], dtype: str = "BF16"
) -> Expression:
    """F8 weights times the scale of their block of `[rows, columns]`."""
    return _one(DequantBlocks((block[0], block[1]), dtype), weight, scale)


def dequant_mxfp4(blocks: Expression, scales: Expression, dtype: str = "BF16") -> Expression:
    """Packed 4-bit floats times the power of two of their 32: `[..., n, 16]` -> `[..., 32 * n]`."""
    *front, groups, size = blocks.spec.shape if len(blocks.spec.shape) > 1 else (0, 0)
    packed = reshape(blocks, [*front, groups * size])
    return _one(
        DequantBlocks((1, 2 * size), dtype), _one(Unpack(4, 2 * groups * size, "e2m1"), packed), scales
    )


def row_normalize(tensor: Expression, axis: int, eps: float) -> Expression:
    """Each vector along an axis divided by its length, or by `eps` where that is larger."""
    return _one(RowNormalize(axis, eps), tensor)


def quant_blocks(weight: Expression, block: Sequence[int], dtype: str = "F8_E4M3") -> Tensors:
    """F8 weights, and the F32 scale of each block of `[rows, columns]`."""
    return _all(QuantBlocks((block[0], block[1]), dtype), weight)


# ------------------------------------------------------------------------------ of several operations


def interleave(tensor: Expression, axis: int = 0) -> Expression:
    """The two halves of an axis taken in turns: a b c d e f -> a d b e c f."""
    return _regrouped(tensor, [2, tensor.spec.shape[axis] // 2], [1, 0], axis)


def deinterleave(tensor: Expression, axis: int = 0) -> Expression:
    """Even places first, then the odd ones: a b c d e f -> a c e b d f. Undoes `interleave`."""
    return _regrouped(tensor, [tensor.spec.shape[axis] // 2, 2], [1, 0], axis)


def split_heads(tensor: Expression, groups: int, parts: Sequence[int], head_dim: int) -> Tensors:
    """Rows that are grouped by key-value head, `parts` heads of each kind in a group, sorted by kind.

    `[groups * sum(parts) * head_dim, ...]` -> for each part `[groups * part * head_dim, ...]`: Falcon's and
    InternLM2's `(groups, queries + 2, head_dim)` with parts `[queries, 1, 1]`; BLOOM's and GPT-NeoX's
    `(heads, 3, head_dim)` with `[1, 1, 1]`.
    """
    rest = tensor.spec.shape[1:]
    grouped = reshape(tensor, [groups, sum(parts), head_dim, *rest])
    kinds = split(grouped, 1, parts)
    sizes = (groups * part * head_dim for part in parts)
    return [reshape(kind, [size, *rest]) for kind, size in zip(kinds, sizes, strict=True)]


def by_head(tensor: Expression, heads: int, kinds: int) -> Expression:
    """Rows sorted by kind (all queries, all keys, all values), sorted by head instead (q k v of each head)."""
    return _regrouped(tensor, [kinds, heads, tensor.spec.shape[0] // (kinds * heads)], [1, 0, 2])


def weave(tensors: Sequence[Expression], groups: int) -> Expression:
    """Rows of all tensors dealt in turns, each tensor's in `groups` runs: a b, c d e f in 2 -> a c d b e f."""
    rest = tensors[0].spec.shape[1:]
    runs = [reshape(tensor, [groups, tensor.spec.shape[0] // groups, *rest]) for tensor in tensors]
    return reshape(concat(runs, 1), [sum(tensor.spec.shape[0] for tensor in tensors), *rest])


def rotary_halves(tensor: Expression, heads: int) -> Expression:
    """Rows of each head from neighbouring pairs to half-split pairs (x0 y0 x1 y1 -> x0 x1 y0 y1).

    The first is how GPT-J, Meta's Llama and ChatGLM rotate, the second how transformers' Llama does.
    """
    return _regrouped(tensor, [heads, tensor.spec.shape[0] // heads // 2, 2], [0, 2, 1])


def rotary_pairs(tensor: Expression, heads: int) -> Expression:
    """Rows of each head from half-split pairs to neighbouring pairs. Undoes `rotary_halves`."""
    return _regrouped(tensor, [heads, 2, tensor.spec.shape[0] // heads // 2], [0, 2, 1])


def spread_half_rotary(tensor: Expression, heads: int, pairs: bool = True) -> Expression:
    """Rows of heads that rotate their first half, for a model that rotates half-split pairs of the whole.

    `pairs`: the source rotates neighbouring channels; otherwise the rotating half is itself half-split.

    Half-split pair j of the result is pair j of the rotating half for the first quarter of j, and holds still
    channels for the rest, whose frequency the target's config makes zero.
    """
    rows, *rest = tensor.spec.shape
    quarter = rows // heads // 4
    inner = list(range(3, 3 + len(rest)))
    turning, still = split(reshape(tensor, [heads, 2, 2 * quarter, *rest]), 1, [1, 1])
    if pairs:
        turning = permute(reshape(turning, [heads, quarter, 2, *rest]), [0, 2, 1, *inner])
    else:
        turning = reshape(turning, [heads, 2, quarter, *rest])
    still = reshape(still, [heads, 2, quarter, *rest])
    return reshape(concat([turning, still], 2), [rows, *rest])


def _regrouped(tensor: Expression, sizes: Sequence[int], order: Sequence[int], axis: int = 0) -> Expression:
    """An axis taken as several of these sizes, which are put into another order, as one again."""
    before, after = tensor.spec.shape[:axis], tensor.spec.shape[axis + 1 :]
    axes = [*range(axis), *(axis + each for each in order)]
    axes += range(len(axes), len(axes) + len(after))
    return reshape(permute(reshape(tensor, [*before, *sizes, *after]), axes), tensor.spec.shape)


def _one(op: Op, *operands: Expression) -> Expression:
    (result,) = _all(op, *operands)
    return result


def _all(op: Op, *operands: Expression) -> Tensors:
    for operand in operands:
        if not hasattr(operand, "spec"):
            raise UsageError(f"{op.name} needs a tensor, and is given {operand!r}")
    return list(apply(op, *operands))


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    name: each
    for name, each in vars().copy().items()
    if isfunction(each) and each.__module__ == __name__ and not name.startswith("_")
}
"""Every function by its name."""

EXACTNESS: Mapping[str, Exactness] = {
    "affine": Exactness.ROUNDING,
    "cast": Exactness.ROUNDING,
    "dequant_blocks": Exactness.ROUNDING,
    "dequant_mxfp4": Exactness.VALUE_EXACT,
    "quant_blocks": Exactness.LOSSY,
    "row_normalize": Exactness.LOSSY,
}
"""What functions do to values at the worst; those that are not here only move bytes."""
