"""DeepSpeed checkpoints: every stage of ZeRO, experts, pipelines, universal ones. Only headers are read.

1. `directory`: which files there are.
2. `states`: what each of them says.
3. `partitions`: where a parameter's elements are among the ranks' files.
4. `model`: a model-parallel rank's tensors; `pipeline` and `universal`: those of other kinds of checkpoints.
5. `parallel`: one model of all ranks' tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from streamconv.errors import CheckpointError, UsageError, listed, located
from streamconv.ops import Expression
from streamconv.options.records import ReadingOptions, Trait, Weights
from streamconv.readers import state_dict, training
from streamconv.readers.checkpoint import Checkpoint, WeightFile
from streamconv.readers.deepspeed import model as rank_model
from streamconv.readers.deepspeed import parallel, pipeline, universal
from streamconv.readers.deepspeed.directory import (
    EXPERT,
    LAYER,
    MODEL,
    OPTIMIZER,
    PARTITIONED_MODEL,
    Found,
    Rank,
    find,
)
from streamconv.readers.deepspeed.states import (
    ModelState,
    OptimizerState,
    document,
    read_fragments,
    read_model,
    read_optimizer,
    read_tensors,
)
from streamconv.readers.format import Format, OneOfMany
from streamconv.readers.together import APART, read_all
from streamconv.readers.training import TrainedModel
from streamconv.storage.location import locate

__all__ = ["FORMAT", "Found", "find", "read"]

Tensors = Mapping[str, Expression]

_FILES = "files of the checkpoint"


def read(found: Found, reading: ReadingOptions) -> Checkpoint:
    """The model in a DeepSpeed checkpoint, and its optimizer state where that is wanted.

    Raises:
        CheckpointError: files are missing, damaged, or of several saves; what is wanted is not there.
    """
    if reading["root"] is not None:
        return training.checkpoint(found.root, _beside(found, reading["root"]), FORMAT.name, reading)
    model, traits = _model(found, reading)
    return training.checkpoint(found.root, model, FORMAT.name, reading, *traits)


def _beside(found: Found, root: str | None) -> TrainedModel:
    """A state dict that a training program has saved beside the engine's model; averaged weights, where none is named."""
    first, *more = found.files.first_models.values()
    if more:
        raise CheckpointError(
            "what lies beside the model of several model-parallel ranks is not put together", file=str(found.tag),
            hint="leave --root and --ema out",
        )  # fmt: skip
    with located(first.place):
        state = state_dict.flatten(document(first), root, ema=True)
    return TrainedModel(
        state.tensors,
        metadata=state.metadata,
        files=(first.place,),
        notes=(*found.notes, f"taken from '{state.root}' of {first.name}", *state.notes),
        unreadable=state.unreadable,
        reported=state.reported,
    )


def _model(found: Found, reading: ReadingOptions) -> tuple[TrainedModel, list[Trait]]:
    """The model that is wanted, and what the checkpoint has besides that options apply to."""
    files, where = found.files, str(found.tag)
    if not files.first_models and not files.whole:
        raise CheckpointError(
            "the first rank's model states (names and shapes) are missing",
            file=where,
            hint="mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt",
        )
    models = read_all(dict(sorted(files.first_models.items())), read_model, _FILES)
    rank_model.check_model_ranks(models, where)
    averaged = sorted({name for model in models.values() for name in model.averaged})
    traits = [
        trait
        for trait, holds in {
            Trait.TORCH: bool(models),
            Trait.MASTER: _has_masters(found, models),
            Trait.AVERAGED: bool(averaged),
        }.items()
        if holds
    ]
    if reading["ema"] and averaged:
        return _beside(found, None), []  # the options that choose among the engine's own have no effect
    model = _of_engine(found, models, reading["weights"], optimizer=reading["optimizer"])
    said = [f"averaged weights are at {listed(averaged)}: --ema takes them"] if averaged else []
    return replace(model, notes=(*found.notes, *said, *model.notes)), traits


def _of_engine(
    found: Found, models: Mapping[int, ModelState], weights: Weights | None, *, optimizer: bool
) -> TrainedModel:
    """The engine's own model, put together from all ranks, with its optimizer state where that is wanted.

    Raises:
        CheckpointError: files are missing, or hold nothing of what is wanted.
    """
    files, where = found.files, str(found.tag)
    chosen = _chosen(found, models, weights)
    states: dict[Rank, OptimizerState] = {}
    wanted = chosen == "master" or optimizer
    if files.optimizer and wanted:
        states = read_all(
            dict(sorted(files.optimizer.items())), partial(read_optimizer, moments=optimizer), _FILES
        )
        rank_model.check_complete(files, states)
    notes: list[str] = []
    whole = universal.read(files.whole, list(models.values()), optimizer=optimizer) if wanted else {}
    gathered = _gathered(models, states, unnamed=chosen == "master" and not whole)
    complete: Tensors = whole.pop(universal.WEIGHTS, {})
    if chosen == "model":
        ranks, complete = _own(found, models), {}
    else:
        ranks = _united(found, models, [complete or trained for trained, _ in gathered], notes)
    joined = _joined(ranks, complete, models, where)
    moments: Mapping[str, Tensors] = whole or {
        state: _join([by_state[state] for _, by_state in gathered], models, where)
        for state in (gathered[0][1] if gathered else {})
        if all(state in by_state for _, by_state in gathered)
    }
    if optimizer and not moments:
        raise CheckpointError(
            "it has no optimizer state per parameter",
            file=where,
            hint="none is saved before the first step, and stage 0 saves it without names",
        )
    if not joined:
        raise CheckpointError("no weights are in it", file=where)
    notes.append(_source(chosen, states, joined))
    if len(ranks) > 1:
        notes.append(f"{len(ranks)} model-parallel ranks are joined")
    return TrainedModel(
        joined,
        moments,
        _settings(states),
        dict(next(iter(models.values())).scalars) if models else {},
        (*(model.path for model in models.values()), *(state.path for state in states.values())),
        tuple(notes),
        unreadable={
            name: why
            for model in models.values()
            for name, why in model.unreadable.items()
            if name not in joined
        },
    )


def _has_masters(found: Found, models: Mapping[int, ModelState]) -> bool:
    """Whether any file has F32 weights of the optimizer; those of stage 0 are beside the model, without names."""
    return bool(found.files.optimizer or found.files.whole) or any(model.loose for model in models.values())


def _settings(states: Mapping[Rank, OptimizerState]) -> dict[str, Any]:
    """The optimizer's settings, and the step."""
    first = next(iter(states.values()), None)
    if first is None:
        return {}
    return dict(first.scalars) | ({} if first.step is None else {"step": first.step})


def _joined(
    ranks: Sequence[Tensors], whole: Tensors, models: Mapping[int, ModelState], where: str
) -> Tensors:
    """One model from all ranks' tensors; those of a universal checkpoint (`whole`) need no joining."""
    if not ranks:
        return whole
    shared = {alias: name for model in models.values() for alias, name in model.shared.items()}
    first = {name: tensor for rank in reversed(ranks) for name, tensor in rank.items()}
    done = {name: each for name, each in first.items() if name in whole or shared.get(name) in whole}
    rest = _join([{name: rank[name] for name in rank if name not in done} for rank in ranks], models, where)
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {name: done[name] if name in done else rest[name] for name in names}


def _join(ranks: Sequence[Tensors], models: Mapping[int, ModelState], where: str) -> Tensors:
    info = next((model.universal for model in models.values() if model.universal), {})
    degree = next((model.tensor_parallel for model in models.values() if model.tensor_parallel), None)
    return parallel.join(ranks, degree, info, where)


def _chosen(found: Found, models: Mapping[int, ModelState], weights: Weights | None) -> Weights:
    if weights == "master" and not _has_masters(found, models):
        raise CheckpointError(
            "it has no F32 weights, because it holds no optimizer state",
            file=str(found.tag),
            hint="leave --weights out",
        )
    # The F32 weights of stage 0 have no names: they are taken only on request.
    named = found.files.optimizer or found.files.whole
    return weights or ("master" if named else "model")


def _gathered(
    models: Mapping[int, ModelState], states: Mapping[Rank, OptimizerState], *, unnamed: bool
) -> list[tuple[Tensors, Mapping[str, Tensors]]]:
    """The F32 weights and their optimizer state, per model-parallel rank."""
    if not states:
        return [(rank_model.unnamed_masters(model) if unnamed else {}, {}) for model in models.values()]
    result: list[tuple[Tensors, Mapping[str, Tensors]]] = []
    for number, model in models.items():
        own = [state for (of, _), state in states.items() if of == number]
        result.append(rank_model.masters(own, model))
    return result


def _own(found: Found, models: Mapping[int, ModelState]) -> Sequence[Tensors]:
    """The model's own tensors, per model-parallel rank."""
    if found.files.layers:
        return pipeline.read(found.files.layers, models.values())
    ranks = {number: dict(rank_model.of_module(model)) for number, model in models.items()}
    wanted = {key: path for key, path in sorted(found.files.experts.items()) if key[2] in ranks}
    for (_, _, number), own in read_all(wanted, read_tensors, _FILES).items():
        ranks[number].update(own)
    return list(ranks.values())


def _united(
    found: Found, models: Mapping[int, ModelState], trained: Sequence[Tensors], notes: list[str]
) -> Sequence[Tensors]:
    """Per model-parallel rank: the F32 weights, and the model's own tensors where the optimizer has none."""
    partitioned = found.files.partitioned
    result = []
    for (number, model), own in zip(models.items(), trained, strict=True):
        fragments: Sequence[Tensors] = [model.frozen]
        if partitioned and model.frozen_shapes:
            # Parameters that are not trained are split among the ranks' model states.
            own_files = {rank: path for rank, path in partitioned.items() if rank[0] == number}
            fragments = list(read_all(dict(sorted(own_files.items())), read_fragments, _FILES).values())
            ranks = [rank for of, rank in (*partitioned, *found.files.optimizer) if of == number]
            count = max([*(rank + 1 for rank in ranks), *_said(model)])
            if len(fragments) != count:
                raise CheckpointError(
                    f"of {count} ranks, {len(fragments)} have their model states here; parameters that are not "
                    "trained are split among all of them",
                    file=str(found.tag),
                    hint=APART,
                )
        still = rank_model.frozen(model, fragments, split=bool(partitioned))
        tensors_of_rank, said = rank_model.united(model, own, still, split=bool(partitioned))
        result.append(tensors_of_rank)
        notes += (note for note in said if note not in notes)
    return result


def alone(file: WeightFile, _: ReadingOptions) -> None:
    """No single file is a checkpoint of a DeepSpeed run: the model states of its only rank are a plain torch file.

    Raises:
        UsageError: by what it says of itself, other files hold the rest of the model.
    """
    ranks = file.metadata.get("mp_world_size")
    many = f"of {ranks} model-parallel ranks" if isinstance(ranks, int) and ranks > 1 else ""
    many = many or ("and its experts are in files of their own" if file.metadata.get("num_experts") else "")
    if many and MODEL.fullmatch(locate(file.path).name):
        raise UsageError(
            f"this is one rank's file of a DeepSpeed checkpoint, {many}",
            file=file.path,
            hint=f"give the directory: {locate(file.path).parent}",
        )


def _said(model: ModelState) -> list[int]:
    """The number of data-parallel ranks as the model's state has it; empty where it does not say."""
    said = model.scalars.get("dp_world_size")
    return [said] if type(said) is int else []


def _source(chosen: Weights, states: Mapping[Rank, OptimizerState], joined: Tensors) -> str:
    """Where the weights come from, as a note."""
    if chosen == "master":
        first = next(iter(states.values()), None)
        if first is None:
            return "weights are the optimizer's, in F32"
        stage = f"ZeRO stage {first.stage}" if first.stage else "BF16_Optimizer"
        return f"weights are the optimizer's, in F32, gathered from {len(states)} ranks' partitions ({stage})"
    dtypes = sorted({tensor.spec.dtype.name for tensor in joined.values()})
    return f"weights are the model's own ({', '.join(dtypes)}), not the optimizer's"


FORMAT = Format(
    "DeepSpeed",
    "a directory with `latest`, or a save's directory: ZeRO 0 to 3, BF16_Optimizer, mixtures of experts, pipelines, "
    "universal checkpoints; any number of ranks",
    find,
    read,
    alone,
    signs={
        "latest": "a DeepSpeed or SAT checkpoint, whose saves are not in it: each node keeps its own ranks' files",
        "latest_universal": "a universal DeepSpeed checkpoint, whose saves are not in it",
    },
    parts=(
        OneOfMany(OPTIMIZER, "one rank's file of a DeepSpeed checkpoint"),
        OneOfMany(PARTITIONED_MODEL, "one rank's file of a DeepSpeed checkpoint"),
        OneOfMany(MODEL, "one of the model-parallel ranks of a checkpoint of DeepSpeed or SAT"),
        OneOfMany(EXPERT, "a part of a DeepSpeed checkpoint"),
        OneOfMany(LAYER, "a part of a DeepSpeed checkpoint"),
    ),
)
