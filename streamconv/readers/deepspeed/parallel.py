"""One model from what several model-parallel ranks hold of it.

How a tensor is split, its name says. Where the run has written `universal_checkpoint_info`, that decides;
otherwise the names of Megatron-DeepSpeed and GPT-NeoX, and of Hugging Face's models under AutoTP.
Source: deepspeedai/DeepSpeed: deepspeed/checkpoint/ds_to_universal.py (`merge_tp_slices`),
deepspeed/checkpoint/constants.py (keys), deepspeed/module_inject/auto_tp.py (which layers are split how).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamconv.errors import CheckpointError, PlanError, Problem, listed
from streamconv.ops import Concat, Expression, Same, Split, Truncate, apply, renamed

Joiner = Callable[[Sequence[Expression]], Expression]


def _rows(parts: Sequence[Expression]) -> Expression:
    return apply(Concat(0), *parts)[0]


def _columns(parts: Sequence[Expression]) -> Expression:
    return apply(Concat(1), *parts)[0]


def _replicated(parts: Sequence[Expression]) -> Expression:
    return apply(Same(), *parts)[0]


def _two_rows(parts: Sequence[Expression]) -> Expression:
    """Each part holds its share of two tensors, such as gate and up."""
    halves = [apply(Split(0, (part.spec.shape[0] // 2,) * 2), part) for part in parts]
    return _rows([half[which] for which in (0, 1) for half in halves])


_NAMES: tuple[tuple[str, Joiner], ...] = (
    (r"(.*\.)?(word_embeddings|embed_tokens|embed_in|lm_head|embed_out|final_linear)\.weight", _rows),
    (r"(.*\.)?(query_key_value|dense_h_to_4h|[qkv]_proj|gate_proj|up_proj|w1|w3)\.(weight|bias)", _rows),
    (r"(.*\.)?(attention\.dense|self_attention\.dense|dense_4h_to_h|o_proj|down_proj|w2)\.weight", _columns),
    (r"(.*\.)?(attention\.dense|self_attention\.dense|dense_4h_to_h|o_proj|down_proj|w2)\.bias", _replicated),
    (r"(.*\.)?(\w*norm\w*|ln_\w+|position_embeddings|rotary_emb)(\.\w+)?", _replicated),
    (r"(.*\.)?\w*norm\.\w+", _replicated),
)
"""Name -> how its parts are joined, the first that matches."""

_KNOWN = tuple((re.compile(pattern), joiner) for pattern, joiner in _NAMES)

_PATTERNS: tuple[tuple[str, Joiner], ...] = (
    ("tp_replicated_parameter_patterns", _replicated),
    # Averaged by DeepSpeed; copies that differ are an error here, not a mean.
    ("parameter_to_average_patterns", _replicated),
    ("parameter_with_2_sub_params_cat_dim_0", _two_rows),
    ("parameter_with_row_parallelism_patterns", _columns),
)
_VOCABULARY = "vocabulary_parameter_patterns"
_VOCABULARY_SIZE = "original_vocab_size"
_BEYOND = ("parameter_with_sub_params", "affine_map")

# What patterns in a checkpoint may consist of. A regular expression from a file could take for ever.
_PLAIN = re.compile(r"(?:[\w.-]|\\\.|\\d\+|\.\*|\^|\$)*")

_LONGEST_PATTERN = 512
_MOST_STARS = 3


def join(
    ranks: Sequence[Mapping[str, Expression]],
    tensor_parallel: int | None,
    info: Mapping[str, Any],
    where: str,
) -> dict[str, Expression]:
    """One model's tensors.

    Args:
        ranks: what each model-parallel rank holds, in their order.
        tensor_parallel: how many ranks share a tensor; None (of older versions) where every rank that has a name
            shares it.
        info: `universal_checkpoint_info`, or empty.
        where: named in errors.

    Raises:
        CheckpointError: parts do not fit together, or the way to join them is not known; all problems at once.
    """
    if len(ranks) == 1:
        return dict(ranks[0])
    parts: dict[str, list[Expression]] = {}
    for rank in ranks:
        for name, tensor in rank.items():
            parts.setdefault(name, []).append(tensor)
    result: dict[str, Expression] = {}
    problems: list[Problem] = []
    unknown: list[str] = []
    for name, found in parts.items():
        degree = tensor_parallel or len(found)
        if len(found) % degree:
            message = f"{len(found)} model-parallel ranks have it, of which {degree} share a tensor"
            problems.append(Problem(message, tensor=name, hint="files of ranks are missing"))
            continue
        joiner = _joiner(name, info) if degree > 1 else _replicated
        if joiner is None:
            unknown.append(name)
            continue
        try:
            # A tied tensor is in the first and in the last stage of a pipeline.
            stages = [joiner(found[at : at + degree]) for at in range(0, len(found), degree)]
            result[name] = renamed(_replicated(stages) if len(stages) > 1 else stages[0], name)
        except (PlanError, IndexError) as error:
            reason = error.headline.message if isinstance(error, PlanError) else "its parts have no such axis"
            shapes = listed(list(part.spec.shape) for part in found)
            problems.append(Problem(f"its parts {shapes} do not fit together: {reason}", tensor=name))
    if unknown:
        problems.append(
            Problem(
                f"how {listed(unknown)} are split among the tensor-parallel ranks is not known",
                hint="save a universal checkpoint, whose patterns say it, or convert the ranks' files one by one",
            )
        )
    if problems:
        raise CheckpointError(
            f"the {len(ranks)} model-parallel ranks in {where} do not join", problems=problems
        )
    return result


def _joiner(name: str, info: Mapping[str, Any]) -> Joiner | None:
    if not info:
        return next((joiner for pattern, joiner in _KNOWN if pattern.fullmatch(name)), None)
    if any(info.get(key) for key in _BEYOND):
        return None
    for key, joiner in _PATTERNS:
        if _matches(info.get(key), name):
            return joiner
    size = info.get(_VOCABULARY_SIZE)
    if _matches(info.get(_VOCABULARY), name) and type(size) is int:
        return lambda parts: _unpadded(_rows(parts), size)
    return _rows


def _unpadded(whole: Expression, rows: int) -> Expression:
    return apply(Truncate(0, rows), whole)[0] if rows < whole.spec.shape[0] else whole


def _matches(patterns: object, name: str) -> bool:
    if not isinstance(patterns, (list, tuple)):
        return False
    for pattern in patterns:
        usual = (
            isinstance(pattern, str)
            and len(pattern) <= _LONGEST_PATTERN
            and pattern.count("*") <= _MOST_STARS
        )
        if not usual or not _PLAIN.fullmatch(pattern):
            raise CheckpointError(
                f"the pattern {str(pattern)[:100]!r} in 'universal_checkpoint_info' is none of the usual ones",
                hint="literals, '.', '\\.', '.*' and '\\d+' are understood",
            )
        if re.match(pattern, name):
            return True
    return False
