"""A model's tensors as MindSpore's ranks hold them: the mirror of what `readers.mindspore.ranks` joins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, Split, apply, renamed
from streamconv.plans.placement import Output
from streamconv.plans.plan import Targets, TextFile
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
from streamconv.readers.mindspore.strategy import Layout

_FILE = "rank_{rank}/checkpoint_{rank}"
"""Where a rank's weights go, without the suffix: as MindFormers names what it loads."""

_STRATEGY = "strategy.json"

_MOST_PARTS = 4_000_000

_ROWS, _COLUMNS = (0,), (1,)
_NAMES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r".*\.(wq|wk|wv|w1|w3|q_proj|k_proj|v_proj|gate_proj|up_proj|linear_q|linear_k|linear_v|q2l_proj|l2q_proj|lkv2kv)\.(weight|bias)", _ROWS),
    (r".*\.(tok_embeddings|word_embeddings|embedding_table)\.?(embedding_weight|weight|embedding_table)?", _ROWS),
    (r"(.*\.)?(lm_head|output_layer)\.weight", _ROWS),
    (r".*\.(wo|w2|o_proj|down_proj|linear_proj|linear_fc2)\.weight", _COLUMNS),
)  # fmt: skip
"""Name -> the axis that tensor parallelism cuts, the first that matches; all else is whole in every rank."""

_CUT = tuple((re.compile(pattern), axes) for pattern, axes in _NAMES)
_LAYER = re.compile(r"(?:.*\.)?(?:layers|blocks|encoder|h)\.(\d+)\..*")
_FIRST = re.compile(r"(.*\.)?(tok_embeddings|word_embeddings|embedding\w*|wte|wpe)\b.*")


@dataclass(frozen=True, slots=True)
class Split2D:
    """Tensor-parallel ranks, and stages of a pipeline."""

    tensor: int = 1
    pipeline: int = 1


def ranks(made: Transformed, wanted: Wanted, output: Output) -> Iterator[Transformed]:
    """A directory a rank, and the strategy that says what is in them."""
    how = wanted.strategy
    if how is None:
        how = layouts(made.targets, Split2D(wanted.ranks, wanted.stages))
        output.texts.append(TextFile(_STRATEGY, strategy_json(how)))
    for rank, targets in enumerate(rank_parts(made.targets, how)):
        component = replace(made.component, stem=_FILE.format(rank=rank))
        yield replace(made, component=component, targets=targets, shared={})


def layouts(targets: Targets, wanted: Split2D) -> dict[str, Layout]:
    """How tensors are split among ranks, by MindFormers' names for them.

    Raises:
        PlanError: sizes do not divide; all of them at once.
    """
    layers = [int(match[1]) for name in targets if (match := _LAYER.fullmatch(name))]
    count = max(layers, default=-1) + 1
    if wanted.pipeline > max(count, 1):
        raise PlanError(f"{count} layers cannot make {wanted.pipeline} stages of a pipeline")
    result: dict[str, Layout] = {}
    problems: list[Problem] = []
    for name, (_, expression) in targets.items():
        shape = expression.spec.shape
        cut = (
            next((axes for pattern, axes in _CUT if pattern.fullmatch(name)), ()) if wanted.tensor > 1 else ()
        )
        axes = tuple((0,) if axis in cut else () for axis in range(len(shape)))
        odd = [axis for axis in cut if axis < len(shape) and shape[axis] % wanted.tensor]
        problems += (
            Problem(f"axis {axis} of {list(shape)} does not divide by {wanted.tensor}", tensor=name,
                    hint="choose a --tp that divides it")
            for axis in odd
        )  # fmt: skip
        result[name] = Layout((_stage(name, count, wanted.pipeline),), (wanted.tensor,), axes)
    if problems:
        raise PlanError(f"it cannot be split among {wanted.tensor} ranks", problems=problems)
    return result


def rank_parts(targets: Targets, how: Mapping[str, Layout]) -> list[Targets]:
    """For each rank of all stages, its part of every target that it has.

    Args:
        targets: whole.
        how: layouts by name; targets without one are whole in every rank.

    Raises:
        PlanError: shapes do not divide, or the layouts are of another model; all problems at once.
    """
    known = {name: layout for name, layout in how.items() if name in targets}
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
    if count * stages * len(targets) > _MOST_PARTS:
        raise PlanError(
            f"{count * stages} ranks with {len(targets)} tensors each are more than {_MOST_PARTS} parts",
            hint="no machine has so many; see --tp, --pp and the strategy",
        )
    ranks: list[dict[str, tuple[tuple[str, ...], Expression]]] = [{} for _ in range(count * stages)]
    problems: list[Problem] = []
    for name, (sources, whole) in targets.items():
        layout = known.get(name, Layout(tuple(range(stages)), (count,), ()))
        try:
            pieces = _pieces(whole, layout.counts(len(whole.spec.shape)))
        except PlanError as error:
            problems += error.problems
            continue
        for stage in layout.stages:
            for rank in range(count):
                part = pieces[layout.part(rank, len(whole.spec.shape))]
                ranks[stage * count + rank][name] = (sources, renamed(part, name))
    if problems:
        raise PlanError("tensors cannot be split as the strategy says", problems=problems)
    return list(ranks)


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
        size, rest = divmod(whole.spec.shape[axis], count)
        if rest:
            raise PlanError(
                f"axis {axis} of {list(whole.spec.shape)} does not divide by {count}", tensor=whole.spec.name
            )
        pieces = {
            (*index, at): part
            for index, piece in pieces.items()
            for at, part in enumerate(apply(Split(axis, (size,) * count), piece) if count > 1 else (piece,))
        }
    return pieces
