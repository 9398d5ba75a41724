"""One model from what several model-parallel ranks hold of it.

A tensor's name says how it is split: by the patterns in `universal_checkpoint_info` where the run has written it,
otherwise by the naming that is registered for it.
Source: deepspeedai/DeepSpeed: deepspeed/checkpoint/ds_to_universal.py (`merge_tp_slices`),
deepspeed/checkpoint/constants.py (keys).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamconv.errors import CheckpointError, PlanError, Problem, Problems, listed
from streamconv.ops import Expression, Truncate, apply, renamed
from streamconv.readers import splits
from streamconv.readers.splits import COLUMNS, NAMINGS, PAIR, ROWS, WHOLE, Sharding

_PATTERNS: Mapping[str, Sharding] = {
    "tp_replicated_parameter_patterns": WHOLE,
    # Averaged by DeepSpeed; copies that differ are an error here, not a mean.
    "parameter_to_average_patterns": WHOLE,
    "parameter_with_2_sub_params_cat_dim_0": PAIR,
    "parameter_with_row_parallelism_patterns": COLUMNS,
}
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
    problems = Problems()
    unknown: list[str] = []
    for name, found in parts.items():
        degree = tensor_parallel or len(found)
        sharding = _sharding(name, info) if degree > 1 else WHOLE
        with problems.collecting(tensor=name):
            if len(found) % degree:
                raise CheckpointError(
                    f"{len(found)} model-parallel ranks have it, of which {degree} share a tensor",
                    hint="files of ranks are missing",
                )
            if sharding is None:
                unknown.append(name)
            else:
                result[name] = renamed(_whole(name, found, degree, sharding, info), name)
    if unknown:
        problems.append(
            Problem(
                f"how {listed(unknown)} are split among the tensor-parallel ranks is not known",
                hint="save a universal checkpoint, whose patterns say it, or convert the ranks' files one by one",
            )
        )
    problems.report(f"the {len(ranks)} model-parallel ranks in {where} do not join")
    return result


def _whole(
    name: str, found: Sequence[Expression], degree: int, sharding: Sharding, info: Mapping[str, Any]
) -> Expression:
    """One tensor of all ranks' parts; a tied one is in the first and in the last stage of a pipeline."""
    try:
        stages = [splits.join(found[at : at + degree], sharding, {}) for at in range(0, len(found), degree)]
        if sharding is ROWS:
            stages = [_unpadded(name, stage, info) for stage in stages]
        return splits.join(stages, WHOLE, {}) if len(stages) > 1 else stages[0]
    except PlanError as error:
        shapes = listed(list(part.spec.shape) for part in found)
        raise CheckpointError(f"its parts {shapes} do not fit together: {error.headline.message}") from error


def _sharding(name: str, info: Mapping[str, Any]) -> Sharding | None:
    if not info:
        return NAMINGS["deepspeed"].sharding(name)
    if any(info.get(key) for key in _BEYOND):
        return None
    return next((found for key, found in _PATTERNS.items() if _matches(info.get(key), name)), ROWS)


def _unpadded(name: str, whole: Expression, info: Mapping[str, Any]) -> Expression:
    """A vocabulary without the rows that pad it to a multiple."""
    rows = info.get(_VOCABULARY_SIZE)
    if type(rows) is not int or rows >= whole.spec.shape[0] or not _matches(info.get(_VOCABULARY), name):
        return whole
    return apply(Truncate(0, rows), whole)[0]


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
