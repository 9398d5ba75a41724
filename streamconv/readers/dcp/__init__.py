"""Checkpoints of torch.distributed.checkpoint and FSDP, in all forms that ranks write them. Only headers are read.

1. `metadata` and `streams`: `.metadata` with `__R_N.distcp` files.
2. `sharded_safetensors`: shards as safetensors, without an index.
3. `rank_files`: one file per rank, with DTensors.
4. `chunks`: one tensor from parts of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from streamconv.errors import CheckpointError, listed
from streamconv.ops import Expression, renamed
from streamconv.options import ReadingOptions
from streamconv.readers import state_dict, training
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.dcp import metadata, rank_files, sharded_safetensors, streams
from streamconv.readers.dcp.metadata import Metadata
from streamconv.readers.format import Format, OneOfMany
from streamconv.readers.training import TrainedModel
from streamconv.storage.location import Location

__all__ = ["FORMAT", "Found", "find", "read"]

Form = Literal["distcp", "sharded safetensors", "rank files"]

_OPTIMIZER_DIRECTORY = re.compile(r"(?:optimizer|optim)(_\d+)?")
_STATE = re.compile(r"(?:optimizer|optim)\w*\.state\.(?P<name>.+)\.(?P<state>[^.]+)")
_GROUPS = re.compile(r"(?:optimizer|optim)\w*\.param_groups\..+")
_FLAT = "flat_param"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was found.

    Attributes:
        root: the directory with the config and the tokenizer, where a trainer has put them.
        path: the directory with the files.
        form: of the files.
        optimizer: the directory with the optimizer state, or None where it is not apart.
    """

    root: Location
    path: Location
    form: Form
    optimizer: Location | None = None


def find(path: Location, _: ReadingOptions) -> Found | None:
    """The checkpoint in a directory, or in its only subdirectory with one, as trainers write it; None without any.

    Raises:
        CheckpointError: the save is not complete, or there are several.
    """
    form = _form(path)
    if form is not None:
        above = path.parent
        beside = path / "huggingface" if (path / "huggingface" / "config.json").is_file() else path
        root = above if (above / "config.json").is_file() and beside == path else beside
        return Found(root, path, form, _optimizer_of(path))
    inside = {
        entry.name: found for entry in path.entries() if entry.is_directory() and (found := _form(entry))
    }
    models = {name: found for name, found in inside.items() if not _OPTIMIZER_DIRECTORY.fullmatch(name)}
    if not models or any(
        (path / name).is_file() for name in ("model.safetensors.index.json", "model_index.json")
    ):
        return None
    if "sharded" in models:
        return None  # whole files are beside it
    if len(models) > 1:
        raise CheckpointError(
            "there are several checkpoints in it", file=str(path),
            hint=f"give one of the directories: {listed(reversed(models))}",
        )  # fmt: skip
    ((name, found),) = models.items()
    return Found(path, path / name, found, _optimizer_of(path / name))


def read(found: Found, reading: ReadingOptions) -> Checkpoint:
    """The model in a checkpoint, and its optimizer state where that is wanted.

    Raises:
        CheckpointError: files are missing or damaged, or parts do not fit together; all problems at once.
    """
    return training.checkpoint(
        found.root, _model(found, optimizer=reading["optimizer"]), FORMAT.name, reading
    )


def _model(found: Found, *, optimizer: bool) -> TrainedModel:
    if found.form == "sharded safetensors":
        shards = sharded_safetensors.files(found.path)
        whole = sharded_safetensors.read(shards)
        return TrainedModel(whole, files=tuple(map(str, shards)), notes=(f"{len(shards)} shards are joined",))
    if found.form == "rank files":
        ranks = rank_files.files(found.path)
        whole = rank_files.read(ranks)
        files = tuple(str(path) for path in ranks.values())
        return TrainedModel(whole, files=files, notes=(f"the parts of {len(ranks)} ranks are joined",))
    return _distcp(found, optimizer=optimizer)


def _form(path: Location) -> Form | None:
    """What kind of checkpoint lies directly in a directory."""
    if (path / metadata.FILE).is_file():
        return "distcp"
    if sharded_safetensors.files(path):
        return "sharded safetensors"
    if rank_files.files(path):
        return "rank files"
    if any(path.glob("__*_*.distcp")):
        raise CheckpointError(
            f"there is no {metadata.FILE}, which is written last", file=str(path),
            hint="the save was interrupted, or the file, which is hidden, was not copied",
        )  # fmt: skip
    return None


def _optimizer_of(path: Location) -> Location | None:
    """Where accelerate keeps the optimizer state of a model."""
    number = re.fullmatch(r"pytorch_model_fsdp_(\d+)", path.name)
    beside = path.parent / f"optimizer_{number[1]}" if number else None
    return beside if beside is not None and (beside / metadata.FILE).is_file() else None


def _distcp(found: Found, *, optimizer: bool) -> TrainedModel:
    said = metadata.read(found.path)
    states = {name for name in said.tensors if _is_training(said, name)}
    flat = [name for name in said.tensors if name.rpartition(".")[2].startswith(_FLAT)]
    if flat:
        raise CheckpointError(
            "it is a flat parameter of FSDP1, whose parts only the running model knows", tensor=flat[0],
            file=str(found.path), hint="save with StateDictType.SHARDED_STATE_DICT",
        )  # fmt: skip
    model = {name: entry for name, entry in said.tensors.items() if name not in states}
    if not model:
        raise CheckpointError(
            "it holds no weights, only optimizer state or the state of the run", file=str(found.path),
            hint="give the directory with the model",
        )  # fmt: skip
    outer = _outer(said, model)
    tensors = streams.tensors(model)
    named = {
        name.removeprefix(outer): renamed(tensor, name.removeprefix(outer))
        for name, tensor in tensors.items()
    }
    notes = [f"'{outer}', the key that the model was saved under, is taken off the names"] if outer else []
    files = [str(found.path / metadata.FILE)]
    values = {name: state_dict.plain(value) for name, value in streams.objects(said.objects).items()}
    moments: dict[str, dict[str, Expression]] = {}
    settings = {name: value for name, value in values.items() if _GROUPS.fullmatch(name)}
    if optimizer:
        source = said
        if found.optimizer is not None:
            source = metadata.read(found.optimizer)
            files.append(str(found.optimizer / metadata.FILE))
            apart = streams.objects(source.objects)
            settings = {
                name: state_dict.plain(value) for name, value in apart.items() if _GROUPS.fullmatch(name)
            }
        moments = _moments(source, named)
    others = {name: value for name, value in values.items() if name not in settings}
    return TrainedModel(named, moments, settings, others, tuple(files), tuple(notes))


def _is_training(said: Metadata, name: str) -> bool:
    """Whether a tensor is the training program's own, not the model's."""
    first = said.paths.get(name, (name,))[0]
    return state_dict.is_training(first) or state_dict.is_training(name.partition(".")[0])


def _outer(said: Metadata, model: Mapping[str, object]) -> str:
    """The key, with its dot, that the model's state dict was saved under; empty where it was the top."""
    tops = {said.paths[name][0] for name in model if len(said.paths.get(name, ())) > 1}
    if len(tops) == 1 and all(len(said.paths.get(name, ())) > 1 for name in model):
        (top,) = tops
        if state_dict.is_model(top):
            return f"{top}."
    return ""


def _moments(said: Metadata, model: Mapping[str, Expression]) -> dict[str, dict[str, Expression]]:
    """State -> parameter -> tensor, of all states that have the shape of their parameter."""
    wanted: dict[str, tuple[str, str]] = {}
    for name, entry in said.tensors.items():
        match = _STATE.fullmatch(name)
        parameter = match["name"] if match else ""
        parameter = parameter if parameter in model else parameter.removeprefix("model.")
        if (
            match
            and parameter in model
            and entry.spec.shape == model[parameter].spec.shape
            and entry.spec.shape
        ):
            wanted[name] = (match["state"], parameter)
    found = streams.tensors({name: said.tensors[name] for name in wanted})
    result: dict[str, dict[str, Expression]] = {}
    for name, tensor in found.items():
        state, parameter = wanted[name]
        result.setdefault(state, {})[parameter] = renamed(tensor, parameter)
    return result


FORMAT = Format(
    "DCP",
    "`torch.distributed.checkpoint` and FSDP: `.metadata` with `.distcp` files of either serialization, safetensors "
    "shards without an index, a file of DTensors per rank (verl, SkyRL, accelerate)",
    find,
    read,
    signs={metadata.FILE: "a checkpoint of torch.distributed.checkpoint"},
    parts=(
        OneOfMany(
            re.compile(r"__\d+_\d+\.distcp|\.metadata"),
            "a part of a checkpoint of torch.distributed.checkpoint",
        ),
        OneOfMany(sharded_safetensors.NAME, "one rank's file of a sharded checkpoint"),
        *(OneOfMany(names, "one rank's file of a sharded checkpoint") for names in rank_files.NAMES),
    ),
)
