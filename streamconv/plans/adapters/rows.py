"""Single rows of an embedding that were trained: they take the place of the base's.

peft saves the new rows as they are, in the order of the indices in its config. (huggingface/peft 0.21:
tuners/trainable_tokens/layer.py; a head that is the embedding has the same rows then, and stays so.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.errors import PlanError
from streamconv.ops import Concat, Expression, Split, apply, in_dtype, renamed
from streamconv.plans.adapters.adapter import Adapter

PART = "trainable_tokens_delta"
_MOST = 1 << 15


def stay_tied(modules: Mapping[str, Mapping[str, Expression]], module: str) -> bool:
    """Whether a module has such rows, and no other module has any of its own."""
    return PART in modules[module] and sum(PART in parts for parts in modules.values()) == 1


def replaced(
    made: dict[str, Expression], name: str, module: str, parts: Mapping[str, Expression], adapter: Adapter
) -> None:
    """Put a weight with its new rows into `made`.

    Raises:
        PlanError: the config does not say which rows they are, or the base has not those.
    """
    rows = parts[PART]
    if name not in made:
        raise PlanError(
            "the adapter changes rows of it, and the base has no such weight", file=adapter.path, tensor=name
        )
    weight, indices = made[name], _indices(adapter.config, module)
    if len(indices) != rows.spec.shape[0] or len(set(indices)) != len(indices) or len(indices) > _MOST:
        raise PlanError(
            f"the adapter has {rows.spec.shape[0]} rows for it, and its config names {len(set(indices))}",
            tensor=name,
        )
    height = weight.spec.shape[0]
    if any(not 0 <= index < height for index in indices):
        raise PlanError(
            f"the adapter has a row {max(indices)} for it, and the base {height} rows", tensor=name
        )
    rows = in_dtype(rows, weight.spec.dtype.name)
    new = dict(zip(indices, apply(Split(0, (1,) * len(indices)), rows), strict=True))
    sizes, at = [], 0
    for index in sorted(indices):
        sizes += [index - at, 1]
        at = index + 1
    sizes.append(height - at)
    kept = apply(Split(0, tuple(size for size in sizes if size)), weight)
    pieces, at = [], 0
    for piece in kept:
        pieces.append(new.get(at, piece) if piece.spec.shape[0] == 1 else piece)
        at += piece.spec.shape[0]
    made[name] = renamed(apply(Concat(0), *pieces)[0], name)


def _indices(config: Mapping[str, Any], module: str) -> list[int]:
    stated = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(stated, Mapping):
        stated = next((value for key, value in stated.items() if f".{module}".endswith(f".{key}")), None)
    if not isinstance(stated, list) or not all(isinstance(each, int) for each in stated):
        raise PlanError("the adapter's config does not say which rows its rows are", tensor=module)
    return stated
