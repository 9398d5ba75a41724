"""A model's tensors as MindSpore's ranks hold them: the mirror of what `readers.mindspore.ranks` joins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from streamconv.errors import PlanError
from streamconv.ops import Expression
from streamconv.readers.mindspore.strategy import Layout
from streamconv.readers.splits import MINDFORMERS, WHOLE, Sharding, split
from streamconv.writers.ranks import Part, Tensors, Whole, dealt

_FILE = "rank_{rank}/checkpoint_{rank}"
"""Where a rank's weights go, without the suffix: as MindFormers names what it loads."""

_STRATEGY = "strategy.json"

_MOST_PARTS = 4_000_000

_LAYER = re.compile(r"(?:.*\.)?(?:layers|blocks|encoder|h)\.(\d+)\..*")
_FIRST = re.compile(r"(.*\.)?(tok_embeddings|word_embeddings|embedding\w*|wte|wpe)\b.*")


def ranks(whole: Whole) -> list[Part]:
    """One directory per rank, and the strategy that describes them, where none was given."""
    how, texts = whole.strategy, {}
    if how is None:
        how = layouts(whole.tensors, whole.ranks, whole.stages)
        texts = {_STRATEGY: strategy_json(how)}
    return [
        Part(tensors, _FILE.format(rank=rank), texts=texts if rank == 0 else {})
        for rank, tensors in enumerate(rank_parts(whole.tensors, how))
    ]


def layouts(tensors: Tensors, ranks: int, stages: int) -> dict[str, Layout]:
    """How tensors are split among tensor-parallel ranks and stages of a pipeline, by MindFormers' names for them.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    layers = (int(match[1]) for name in tensors if (match := _LAYER.fullmatch(name)))
    count = max(layers, default=-1) + 1
    if stages > max(count, 1):
        raise PlanError(f"{count} layers cannot make {stages} stages of a pipeline")
    result: dict[str, Layout] = {}
    for name, expression in tensors.items():
        cut = (MINDFORMERS.find(name) or WHOLE).axis if ranks > 1 else None
        axes = tuple((0,) if axis == cut else () for axis in range(len(expression.spec.shape)))
        result[name] = Layout((_stage(name, count, stages),), (ranks,), axes)
    return result


def rank_parts(tensors: Tensors, how: Mapping[str, Layout]) -> list[Tensors]:
    """For each rank of all stages, its part of every tensor that it has; those without a layout are whole in each.

    Raises:
        PlanError: shapes do not divide, or the layouts are of another model; all problems at once.
    """
    known = {name: layout for name, layout in how.items() if name in tensors}
    if not known:
        raise PlanError(
            "the strategy lists none of these tensors",
            hint="it is of another model, or names are not MindFormers'",
        )
    devices = {layout.ranks for layout in known.values()}
    if len(devices) != 1:
        raise PlanError(f"the strategy has stages of {sorted(devices)} ranks")
    (count,) = devices
    stages = max(stage for layout in known.values() for stage in layout.stages) + 1
    if count * stages * len(tensors) > _MOST_PARTS:
        raise PlanError(
            f"{count * stages} ranks with {len(tensors)} tensors each are more than {_MOST_PARTS} parts",
            hint="no machine has so many; see --tp, --pp and the strategy",
        )

    def parts(name: str, whole: Expression) -> Mapping[int, Expression]:
        layout = known.get(name, Layout(tuple(range(stages)), (count,), ()))
        dimensions = len(whole.spec.shape)
        pieces = _pieces(whole, layout.counts(dimensions))
        return {
            stage * count + rank: pieces[layout.part(rank, dimensions)]
            for stage in layout.stages
            for rank in range(count)
        }

    return dealt(tensors, count * stages, parts)


def strategy_json(how: Mapping[str, Layout]) -> str:
    """The strategy as a file that MindSpore reads; of several stages, merged as its own tool does."""
    several = any(layout.stages != (0,) for layout in how.values())
    items = {
        f"{stage}-{name}" if several else name: {
            "dev_matrix": list(layout.grid),
            "tensor_map": [axes[0] if axes else -1 for axes in layout.axes],
            "param_split_shape": [],
            "indices_offset": [],
            "field": 0,
            "opt_weight_shard_step": 0,
            "opt_weight_shard_size": 0,
        }
        for name, layout in how.items()
        for stage in layout.stages
    }
    document = {"current_stage": 0, "parallel_strategy_item": {}, "parallel_layout_item": items}
    return json.dumps(document, indent=1) + "\n"


def _stage(name: str, layers: int, stages: int) -> int:
    """The stage of a tensor: layers in equal runs, the first ones longer; what is around them at both ends."""
    match = _LAYER.fullmatch(name)
    if match:
        return int(match[1]) * stages // max(layers, 1)
    return 0 if _FIRST.fullmatch(name) else stages - 1


def _pieces(whole: Expression, counts: tuple[int, ...]) -> dict[tuple[int, ...], Expression]:
    """Index along each axis -> the part there."""
    pieces: dict[tuple[int, ...], Expression] = {(): whole}
    for axis, count in enumerate(counts):
        pieces = {
            (*index, at): part
            for index, piece in pieces.items()
            for at, part in enumerate(split(piece, Sharding(axis), count, {}))
        }
    return pieces
