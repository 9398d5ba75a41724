"""What one model-parallel rank of a DeepSpeed checkpoint holds: its weights and their optimizer state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import PurePosixPath

from streamconv.errors import CheckpointError, Problem, Problems, listed
from streamconv.ops import Expression, renamed
from streamconv.readers.deepspeed import partitions
from streamconv.readers.deepspeed.directory import Files, partitions_of
from streamconv.readers.deepspeed.states import Flats, ModelState, OptimizerState
from streamconv.readers.moments import only_way
from streamconv.readers.together import APART, Missing
from streamconv.tensor import Shape, Stored

_LOCAL_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")
_MAX_RANKS = 1 << 20
_MIXED = "the files are of several saves, or one is damaged: copy the checkpoint again"


def check_complete(files: Files, states: Mapping[tuple[int, int], OptimizerState]) -> None:
    """Look for signs that files are missing or not of one save.

    Raises:
        CheckpointError: a problem for each.
    """
    problems = Problems()
    for model in sorted({model for model, _ in files.optimizer} | set(files.first_models)):
        own = {rank: state for (of, rank), state in states.items() if of == model}
        with problems.collecting(str(next(iter(files.optimizer.values())).parent)):
            for what, there in (("partitions", own), ("model states", model in files.first_models)):
                if not there:
                    raise CheckpointError(
                        f"of model-parallel rank {model}, the {what} are missing", hint=APART
                    )
            ranks = max([max(own) + 1, *(count for state in own.values() for count in state.partition_count)])
            if ranks > _MAX_RANKS:
                raise CheckpointError(
                    f"it is said to be split among {ranks} ranks", file=next(iter(own.values())).path
                )
            missing = Missing(own, ranks)
            if missing:
                some = partitions_of(files.optimizer, model, islice(missing, 5))
                more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
                raise CheckpointError(
                    f"{len(missing)} of {ranks} files with partitions of the weights are missing: {listed(some)}{more}",
                    hint=f"{APART}; --weights model may do without them",
                )
    problems += _odd_ones_out(states.values())
    problems.report("the checkpoint is not complete, or not of one save")


def check_model_ranks(models: Mapping[int, ModelState], where: str) -> None:
    """Compare the model-parallel ranks that are there with the number that they give.

    Raises:
        CheckpointError: some are missing.
    """
    said = [count for model in models.values() if type(count := model.scalars.get("mp_world_size")) is int]
    count = max([*(number + 1 for number in models), *said], default=0)
    missing = Missing(models, count)
    if models and missing:
        raise CheckpointError(
            f"of {count} model-parallel ranks, the model states of {listed(missing)} are missing",
            file=where,
            hint=APART,
        )


def _odd_ones_out(states: Iterable[OptimizerState]) -> Iterable[Problem]:
    """A problem for each file that disagrees with the first."""
    first, *rest = states
    for state in rest:
        for what, own, others in (
            ("was written by DeepSpeed", state.version, first.version),
            ("is of ZeRO stage", state.stage, first.stage),
            ("says that its groups are split among", state.partition_count, first.partition_count),
            ("has a number of groups of", len(state.flats), len(first.flats)),
            ("was saved at step", state.step, first.step),
        ):
            if own != others:
                yield Problem(
                    f"{what} {own}; {PurePosixPath(first.path).name}: {others}", file=state.path, hint=_MIXED
                )


def masters(
    states: Sequence[OptimizerState], model: ModelState
) -> tuple[dict[str, Stored], dict[str, dict[str, Stored]]]:
    """The F32 weights and their optimizer state, from all ranks' partitions.

    Args:
        states: in the order of the ranks, complete.
        model: names and shapes.

    Raises:
        CheckpointError: the partitions do not hold what the shapes say.
    """
    if not model.shapes:
        raise CheckpointError(
            "it does not say which parameters are in the partitions ('param_shapes')",
            file=model.path,
            hint="DeepSpeed has written that since 0.3.17; with an older one, load and save the checkpoint with "
            "a newer one, or take --weights model",
        )
    weights = _gathered(states, [state.flats for state in states], model, check=True)
    moments = {}
    for name in states[0].moments:
        if all(name in state.moments for state in states):
            flats = [state.moments[name] for state in states]
            moments[name] = _gathered(states, flats, model, check=False)
    return weights, moments


def _gathered(
    states: Sequence[OptimizerState], flats: Sequence[Flats], model: ModelState, *, check: bool
) -> dict[str, Stored]:
    first = states[0]
    if first.stage == 3:
        return partitions.gather_pieces(flats, model.shapes, model.path)
    if len(model.shapes) != len(first.flats):
        raise CheckpointError(
            f"it lists the parameters of {len(model.shapes)} groups; {PurePosixPath(first.path).name} holds "
            f"{len(first.flats)}",
            file=model.path,
            hint=_MIXED,
        )
    result: dict[str, Stored] = {}
    for group, shapes in enumerate(model.shapes):
        gaps = first.gaps[group] if group < len(first.gaps) else ()
        for ranks, expert_rank in _sharers(states, group):
            parts = [flats[rank][group] for rank in ranks]
            known = states if check else ()
            noted = [
                known[rank].slices[group] if group < len(known[rank].slices) else {}
                for rank in ranks
                if known
            ]
            found = partitions.gather_rows(parts, shapes, gaps, noted, states[ranks[0]].path)
            if expert_rank is None:
                result.update(found)
            else:
                result.update(_with_global_experts(found, shapes, expert_rank))
    return result


def _sharers(states: Sequence[OptimizerState], group: int) -> list[tuple[Sequence[int], int | None]]:
    """Which ranks share a group's parameters: all, or, of experts, those that have the same ones."""
    counts = states[0].partition_count
    count = counts[group] if group < len(counts) else len(states)
    if count == len(states) or count == 0:
        return [(range(len(states)), None)]
    if len(states) % count:
        raise CheckpointError(
            f"a group is split among {count} ranks, and there are {len(states)}",
            file=states[0].path,
            hint=_MIXED,
        )
    expert_parallel = len(states) // count
    return [(range(rank, len(states), expert_parallel), rank) for rank in range(expert_parallel)]


def _with_global_experts(
    found: Mapping[str, Stored], shapes: Mapping[str, Shape], rank: int
) -> dict[str, Stored]:
    """Every rank numbers its own experts from 0; the model numbers all of them."""
    local: dict[str, int] = {}
    for name in shapes:
        if match := _LOCAL_EXPERT.fullmatch(name):
            local[match[1]] = max(local.get(match[1], 0), int(match[2]) + 1)
    result = {}
    for name, tensor in found.items():
        match = _LOCAL_EXPERT.fullmatch(name)
        whole = f"{match[1]}{int(match[2]) + rank * local[match[1]]}{match[3]}" if match else name
        result[whole] = Stored(tensor.spec, tensor.extents)
    return result


def unnamed_masters(model: ModelState) -> dict[str, Expression]:
    """The F32 weights of stage 0, which are a list without names, in the order of the parameters.

    Raises:
        CheckpointError: their number or their shapes do not identify the parameters.
    """
    if not model.loose:
        return {}
    first_of: dict[Expression, str] = {}
    for name, tensor in model.module.items():
        if name not in model.buffers and name not in model.shared:
            first_of.setdefault(renamed(tensor, ""), name)
    distinct = list(first_of.values())
    wanted = [tensor.spec.shape for tensor in model.loose]
    having = [model.module[name].spec.shape for name in distinct]
    # Frozen parameters are not in the list, so its shapes are matched with a subsequence of the model's.
    found = only_way(wanted, having)
    if found is None:
        raise CheckpointError(
            f"the {len(wanted)} F32 weights of stage 0 have no names, and their shapes do not say which of the "
            f"{len(having)} parameters they belong to",
            file=model.path,
            hint="take --weights model",
        )
    return {
        distinct[at]: renamed(tensor, distinct[at]) for at, tensor in zip(found, model.loose, strict=True)
    }


def frozen(
    model: ModelState, fragments: Sequence[Mapping[str, Expression]], *, split: bool
) -> dict[str, Expression]:
    """Parameters that are not trained, which have no partitions. Stage 1 has them in `module` alone.

    Args:
        model: names and shapes.
        fragments: what each rank has of them; in stages below 3 the first has all.
        split: whether each rank has a part of them (stage 3).

    Raises:
        CheckpointError: the parts are too short.
    """
    result: dict[str, Expression] = {}
    for name, shape in model.frozen_shapes.items():
        pieces = [own[name] for own in fragments if name in own]
        stored = [piece for piece in pieces if isinstance(piece, Stored)]
        if split and len(stored) == len(fragments):
            result[name] = partitions.gather_frozen(stored, name, shape)
        elif not split and pieces and pieces[0].spec.shape == shape:
            result[name] = pieces[0]
    return result


def united(
    model: ModelState,
    trained: Mapping[str, Expression],
    still: Mapping[str, Expression],
    *,
    split: bool,
) -> tuple[dict[str, Expression], list[str]]:
    """All tensors of a rank in the order of the model, and notes on them.

    Args:
        model: what the model itself has.
        trained: the F32 weights.
        still: what is not trained.
        split: whether `model.module` has empty tensors in place of parameters (stage 3).

    Raises:
        CheckpointError: parameters that no file has elements of.
    """
    tensors: dict[str, Expression] = {}
    lost: list[str] = []
    copies: list[str] = []
    known = {**trained, **still, **trained}  # what is trained comes first, and goes before what is not
    bare = {name: renamed(tensor, "") for name, tensor in model.module.items()}
    same: dict[Expression, str] = {
        tensor: name for name in trained if isinstance(tensor := bare.get(name), Stored) and tensor.extents
    }
    for name, tensor in model.module.items():
        others = (name, model.shared.get(name), same.get(bare[name]))
        other = next((other for other in others if other in known), None)
        tensors[name] = tensor if other is None else renamed(known[other], name)
        if other is None and name not in model.buffers:
            if not split:
                copies.append(name)
            elif tensor.spec.numel == 0:
                lost.append(name)
    if lost:
        raise CheckpointError(
            f"{len(lost)} parameters have no elements in any file: {listed(lost)}",
            file=model.path,
            hint="tied names that the run has not noted, or files of another save",
        )
    for name, tensor in known.items():
        tensors.setdefault(name, tensor)
    if not copies:
        return tensors, []
    dtypes = ", ".join(sorted({tensors[name].spec.dtype.name for name in copies}))
    note = (
        f"{len(copies)} tensors are not trained, so that no optimizer has them: they are the model's own, "
        f"{dtypes} ({listed(copies)})"
    )
    return tensors, [note]


def of_module(model: ModelState) -> Mapping[str, Expression]:
    """The model's own tensors, in the dtype that it was trained in."""
    empty = [
        name
        for name, tensor in model.module.items()
        if tensor.spec.numel == 0 and any(prod(shapes.get(name, (0,))) for shapes in model.shapes)
    ]
    if empty:
        raise CheckpointError(
            f"the model's own tensors are empty, as stage 3 saves them: {listed(empty)}",
            file=model.path,
            hint="take the F32 weights with --weights master, and --dtype to make them smaller",
        )
    return model.module
