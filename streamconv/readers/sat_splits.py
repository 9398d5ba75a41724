"""How SAT splits a model's tensors among model-parallel ranks, which the name says: for joining, and for splitting.

Source: THUDM/SwissArmyTransformer: sat/mpu/layers.py and sat/model/transformer.py (which modules are split).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from streamconv.errors import PlanError
from streamconv.ops import Concat, Expression, Same, Split, apply

_CONFIG = "model_config.json"

# Below this, a vocabulary is not split among ranks.
SPLIT_VOCABULARY = 1000

SplitKind = Literal["rows", "columns", "fused", "pair", "vocabulary", "whole"]

_NAMES: tuple[tuple[str, SplitKind], ...] = (
    # Plain modules whose leaves are called as those of split ones.
    (r"mixins\.eva\.(linear_proj|conv|boi|eoi|pos_embed)\b.*", "whole"),
    (r"mixins\.(encoder|adaln_layer|final_layer|pos_embed|patch_embed)\..*", "whole"),
    (r"(.*\.)?attention\.query_key_value\.(weight|bias)", "fused"),
    (r"(.*\.)?vision_query_key_value_list\.\d+\.(weight|bias)", "fused"),
    (r"(.*\.)?cross_attention\.key_value\.(weight|bias)", "pair"),
    (r"(.*\.)?cross_attention\.query\.(weight|bias)", "rows"),
    (r"(.*\.)?mlp\.dense_h_to_4h(_gate)?(_\d+)?\.(weight|bias)", "rows"),
    (r"mixins\.mlp\.(vision_)?gate_proj\.\d+\.(weight|bias)", "rows"),
    (r"mixins\.mlp\.vision_dense_h_to_4h_list\.\d+\.(weight|bias)", "rows"),
    (r"mixins\.(swiglu|mlp)\.w2\.\d+\.(weight|bias)", "rows"),
    (r"mixins\.(lm|chatglm-final)\.lm_head\.weight", "rows"),
    (r"(.*\.)?(cross_)?attention\.dense\.weight", "columns"),
    (r"(.*\.)?mlp\.dense_4h_to_h(_\d+)?\.weight", "columns"),
    (r"mixins\.rotary\.vision_dense_list\.\d+\.weight", "columns"),
    (r"mixins\.mlp\.vision_dense_4h_to_h_list\.\d+\.weight", "columns"),
    (r"(.*\.)?word_embeddings\.weight", "vocabulary"),
)
"""Name -> how it is split among ranks, the first that matches; all else is whole in every rank."""

_SPLITS = tuple((re.compile(pattern), split) for pattern, split in _NAMES)


def join(name: str, parts: Sequence[Expression], config: Mapping[str, Any]) -> Expression:
    """One tensor from the ranks' parts of it.

    Raises:
        PlanError: they do not fit together.
    """
    split = split_of(name)
    if split == "vocabulary":
        split = "rows" if parts[0].spec.shape[0] * len(parts) >= SPLIT_VOCABULARY else "whole"
    if split == "whole" or not parts[0].spec.shape:
        (same,) = apply(Same(), *parts)
        return same
    if split in ("rows", "columns"):
        (whole,) = apply(Concat(0 if split == "rows" else 1), *parts)
        return whole
    ratios = (1, 1) if split == "pair" else fused_ratios(name, config)
    pieces = [apply(Split(0, _shares(part, ratios, name)), part) for part in parts]
    # All ranks' queries, then all ranks' keys, then all ranks' values.
    (whole,) = apply(Concat(0), *(piece[kind] for kind in range(len(ratios)) for piece in pieces))
    return whole


def split(name: str, whole: Expression, config: Mapping[str, Any], count: int) -> list[Expression]:
    """What each of `count` ranks has of a tensor.

    Raises:
        PlanError: it cannot be split so.
    """
    kind = split_of(name)
    if kind == "vocabulary":
        kind = "rows" if whole.spec.shape[0] >= SPLIT_VOCABULARY else "whole"
    if kind == "whole" or not whole.spec.shape:
        return [whole] * count
    if kind in ("rows", "columns"):
        return _equal(whole, 0 if kind == "rows" else 1, count)
    ratios = (1, 1) if kind == "pair" else fused_ratios(name, config)
    unit = whole.spec.shape[0] // sum(ratios)
    sizes = tuple(unit * ratio for ratio in ratios)
    kinds = [_equal(part, 0, count) for part in apply(Split(0, sizes), whole)]
    return [apply(Concat(0), *(parts[rank] for parts in kinds))[0] for rank in range(count)]


def _equal(tensor: Expression, axis: int, count: int) -> list[Expression]:
    size, rest = divmod(tensor.spec.shape[axis], count)
    if rest:
        raise PlanError(
            f"its {tensor.spec.shape[axis]} {'rows' if axis == 0 else 'columns'} do not divide by {count}",
            tensor=tensor.spec.name,
            hint="choose a --tp that divides them",
        )
    return list(apply(Split(axis, (size,) * count), tensor))


def split_of(name: str) -> SplitKind:
    """How a tensor is split among model-parallel ranks, by SAT's name for it."""
    bare = name.removeprefix("model.diffusion_model.").replace(".original.", ".")
    return next((split for pattern, split in _SPLITS if pattern.fullmatch(bare)), "whole")


def fused_ratios(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Shares of queries, keys and values in a fused projection; the vision tower has as many of each."""
    heads, groups = config.get("num_attention_heads"), config.get("num_multi_query_heads")
    if "mixins.eva." in name or not groups or not isinstance(heads, int) or not isinstance(groups, int):
        return (1, 1, 1)
    common = math.gcd(heads, groups)
    return (heads // common, groups // common, groups // common)


def _shares(part: Expression, ratios: Sequence[int], name: str) -> tuple[int, ...]:
    unit, rest = divmod(part.spec.shape[0], sum(ratios))
    if rest:
        raise PlanError(
            f"its {part.spec.shape[0]} rows are not in the ratios {':'.join(map(str, ratios))}",
            tensor=name,
            hint=f"see num_attention_heads and num_multi_query_heads in {_CONFIG}",
        )
    return tuple(unit * ratio for ratio in ratios)
