"""How tensor-parallel ranks share a tensor: the kinds of splits, joined and split; and which tensor has which.

`join` and `split` undo each other for every kind. A tensor's name says which kind it has; each naming has a table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.errors import PlanError
from streamconv.ops import Concat, Expression, Same, Split, apply
from streamconv.tensor import Shape

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is split among ranks.

    Attributes:
        axis: the one that is cut into equal parts; None: every rank has all of the tensor.
        shares: for several tensors fused along that axis, each of which is cut by itself: the share of each, as a
            number or the name of a size (1 where there is no such size). Empty for one tensor.
        least: every rank has all of a tensor that is shorter than this along the axis.
    """

    axis: int | None
    shares: tuple[int | str, ...] = ()
    least: int = 0

    def cuts(self, shape: Shape) -> bool:
        """Whether a whole tensor of this shape is cut; one without the axis cannot be, and is to be refused."""
        if self.axis is None or not shape:
            return False
        return self.axis >= len(shape) or shape[self.axis] >= self.least

    def ratios(self, sizes: Sizes) -> tuple[int, ...]:
        """The shares as the smallest whole numbers."""
        numbers = [each if isinstance(each, int) else sizes.get(each, 1) for each in self.shares]
        return tuple(number // math.gcd(*numbers) for number in numbers)


WHOLE, ROWS, COLUMNS = Sharding(None), Sharding(0), Sharding(1)
PAIR, TRIPLE = Sharding(0, (1, 1)), Sharding(0, (1, 1, 1))
QKV = Sharding(0, ("heads", "kv_heads", "kv_heads"))
"""Queries, keys and values in one projection."""


def join(parts: Sequence[Expression], sharding: Sharding, sizes: Sizes) -> Expression:
    """One tensor from the ranks' parts of it, in the ranks' order. Where every rank has all of it, the copies must agree.

    Raises:
        PlanError: they do not fit together.
    """
    axis = sharding.axis or 0
    shape = [size * len(parts) if at == axis else size for at, size in enumerate(parts[0].spec.shape)]
    if not sharding.cuts(tuple(shape)):
        return apply(Same(), *parts)[0]
    _require_axis(parts[0], axis)
    if not sharding.shares:
        return apply(Concat(axis), *parts)[0]
    pieces = [_shared(part, sharding, sizes) for part in parts]
    return apply(Concat(axis), *(piece[kind] for kind in range(len(sharding.shares)) for piece in pieces))[0]


def split(whole: Expression, sharding: Sharding, count: int, sizes: Sizes) -> list[Expression]:
    """What each of `count` ranks has of a tensor.

    Raises:
        PlanError: it cannot be split so.
    """
    if count == 1 or not sharding.cuts(whole.spec.shape):
        return [whole] * count
    axis = sharding.axis or 0
    _require_axis(whole, axis)
    if not sharding.shares:
        return _equal(whole, axis, count)
    kinds = [_equal(part, axis, count) for part in _shared(whole, sharding, sizes)]
    return [apply(Concat(axis), *parts)[0] for parts in zip(*kinds, strict=True)]


def _shared(tensor: Expression, sharding: Sharding, sizes: Sizes) -> tuple[Expression, ...]:
    """The tensors that are fused in one."""
    axis, ratios = sharding.axis or 0, sharding.ratios(sizes)
    unit, rest = divmod(tensor.spec.shape[axis], sum(ratios))
    if rest:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items() if name in sharding.shares)
        raise PlanError(
            f"its {_counted(tensor, axis)} are not in the ratios {':'.join(map(str, ratios))}",
            tensor=tensor.spec.name,
            hint=f"the config says {said}" if said else None,
        )
    return tuple(apply(Split(axis, tuple(unit * ratio for ratio in ratios)), tensor))


def _equal(tensor: Expression, axis: int, count: int) -> list[Expression]:
    size, rest = divmod(tensor.spec.shape[axis], count)
    if rest:
        raise PlanError(
            f"its {_counted(tensor, axis)} do not divide by {count}",
            tensor=tensor.spec.name,
            hint="choose a number of ranks that divides them",
        )
    return list(apply(Split(axis, (size,) * count), tensor))


def _require_axis(tensor: Expression, axis: int) -> None:
    if axis >= len(tensor.spec.shape):
        raise PlanError(f"axis {axis} of {list(tensor.spec.shape)} is not there", tensor=tensor.spec.name)


def _counted(tensor: Expression, axis: int) -> str:
    kind = ("rows", "columns")[axis] if axis < 2 else f"elements of axis {axis}"
    return f"{tensor.spec.shape[axis]} {kind}"


# ------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Table:
    """Which tensor is split how, in one naming.

    Attributes:
        rows: name, as a regular expression, -> its sharding; the first that matches.
        without: what does not count in a name.
    """

    rows: Mapping[str, Sharding]
    without: tuple[str, ...] = ()

    def find(self, name: str) -> Sharding | None:
        """A tensor's sharding; None where the table does not know the name."""
        for text in self.without:
            name = name.replace(text, "")
        return next((found for pattern, found in self.rows.items() if re.fullmatch(pattern, name)), None)


SAT = Table(
    {
        # Plain modules whose leaves are called as those of split ones.
        r"mixins\.eva\.(linear_proj|conv|boi|eoi|pos_embed)\b.*": WHOLE,
        r"mixins\.(encoder|adaln_layer|final_layer|pos_embed|patch_embed)\..*": WHOLE,
        r"mixins\.eva\..*attention\.query_key_value\.(weight|bias)": TRIPLE,
        r"(.*\.)?attention\.query_key_value\.(weight|bias)": QKV,
        r"(.*\.)?vision_query_key_value_list\.\d+\.(weight|bias)": QKV,
        r"(.*\.)?cross_attention\.key_value\.(weight|bias)": PAIR,
        r"(.*\.)?cross_attention\.query\.(weight|bias)": ROWS,
        r"(.*\.)?mlp\.dense_h_to_4h(_gate)?(_\d+)?\.(weight|bias)": ROWS,
        r"mixins\.mlp\.(vision_)?gate_proj\.\d+\.(weight|bias)": ROWS,
        r"mixins\.mlp\.vision_dense_h_to_4h_list\.\d+\.(weight|bias)": ROWS,
        r"mixins\.(swiglu|mlp)\.w2\.\d+\.(weight|bias)": ROWS,
        r"mixins\.[\w-]+\.lm_head\.weight": ROWS,
        r"(.*\.)?(cross_)?attention\.dense\.weight": COLUMNS,
        r"(.*\.)?mlp\.dense_4h_to_h(_\d+)?\.weight": COLUMNS,
        r"mixins\.rotary\.vision_dense_list\.\d+\.weight": COLUMNS,
        r"mixins\.mlp\.vision_dense_4h_to_h_list\.\d+\.weight": COLUMNS,
        r"(.*\.)?word_embeddings\.weight": Sharding(0, least=1000),
    },
    without=("model.diffusion_model.", "original."),
)
"""SAT's modules; all else is whole. Source: THUDM/SwissArmyTransformer: sat/mpu/layers.py, sat/model/transformer.py."""

DEEPSPEED = Table(
    {
        r"(.*\.)?(word_embeddings|embed_tokens|embed_in|lm_head|embed_out|final_linear)\.weight": ROWS,
        r"(.*\.)?(query_key_value|dense_h_to_4h|[qkv]_proj|gate_proj|up_proj|w1|w3)\.(weight|bias)": ROWS,
        r"(.*\.)?(attention\.dense|self_attention\.dense|dense_4h_to_h|o_proj|down_proj|w2)\.weight": COLUMNS,
        r"(.*\.)?(attention\.dense|self_attention\.dense|dense_4h_to_h|o_proj|down_proj|w2)\.bias": WHOLE,
        r"(.*\.)?(\w*norm\w*|ln_\w+|position_embeddings|rotary_emb)(\.\w+)?": WHOLE,
        r"(.*\.)?\w*norm\.\w+": WHOLE,
    }
)
"""Megatron-DeepSpeed, GPT-NeoX, and Hugging Face's models under AutoTP; other names are unknown. Source:
deepspeedai/DeepSpeed: deepspeed/module_inject/auto_tp.py."""

MINDFORMERS = Table(
    {
        r".*\.(wq|wk|wv|w1|w3|q_proj|k_proj|v_proj|gate_proj|up_proj|linear_q|linear_k|linear_v|q2l_proj|l2q_proj|lkv2kv)"
        r"\.(weight|bias)": ROWS,
        r".*\.(tok_embeddings|word_embeddings|embedding_table)\.?(embedding_weight|weight|embedding_table)?": ROWS,
        r"(.*\.)?(lm_head|output_layer)\.weight": ROWS,
        r".*\.(wo|w2|o_proj|down_proj|linear_proj|linear_fc2)\.weight": COLUMNS,
    }
)
"""MindFormers' names; all else is whole."""
