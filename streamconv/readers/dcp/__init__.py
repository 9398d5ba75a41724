"""Checkpoints of torch.distributed.checkpoint and FSDP, in all forms that ranks write them. Only headers are read.

1. `metadata` and `streams`: `.metadata` with `__R_N.distcp` files.
2. `sharded_safetensors`: shards as safetensors, without an index.
3. `rank_files`: one file per rank, with DTensors.
4. `chunks`: one tensor from parts of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from streamconv.errors import CheckpointError, listed, located
from streamconv.ops import Expression, renamed
from streamconv.options.records import ReadingOptions
from streamconv.readers import moments, parts, state_dict, training, tree
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.dcp import metadata, rank_files, sharded_safetensors, streams
from streamconv.readers.dcp.metadata import Entry, Metadata
from streamconv.readers.format import Format, OneOfMany
from streamconv.readers.state_dict import readable
from streamconv.readers.torch_rebuild import Unsupported
from streamconv.readers.training import TrainedModel
from streamconv.storage.location import Location
from streamconv.tensor import Extent, Stored

__all__ = ["FORMAT", "Found", "find", "read"]

Form = Literal["distcp", "sharded safetensors", "rank files"]

_OPTIMIZER_DIRECTORY = re.compile(r"(?:optimizer|optim)(_\d+)?")
_STATE = re.compile(r"(?:[^.]+\.)*?state\.(?P<name>.+)\.(?P<state>[^.]+)")
_GROUPS = re.compile(r"(?:[^.]+\.)*?param_groups\.")


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
    model = _model(found, reading)
    return training.checkpoint(found.root, model, FORMAT.name, reading)


def _model(found: Found, reading: ReadingOptions) -> TrainedModel:
    if found.form == "sharded safetensors":
        shards = sharded_safetensors.files(found.path)
        whole = sharded_safetensors.read(shards)
        return TrainedModel(whole, files=tuple(map(str, shards)), notes=(f"{len(shards)} shards are joined",))
    if found.form == "rank files":
        return rank_files.read(rank_files.files(found.path), reading)
    return _distcp(found, reading)


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


def _distcp(found: Found, reading: ReadingOptions) -> TrainedModel:
    said = metadata.read(found.path)
    with located(str(found.path)):
        state = state_dict.select(
            _tree(said), reading["root"], ema=reading["ema"], optimizer=reading["optimizer"]
        )
        read = {
            name: readable.flat_parameter(name) or readable.read_leaf(leaf)
            for name, leaf in state.leaves.items()
        }
        unreadable = {name: why for name, why in read.items() if isinstance(why, str)}
        origins = {name: leaf.spec.name for name, leaf in read.items() if isinstance(leaf, Stored)}
        tensors = streams.tensors({name: said.tensors[name] for name in origins.values()})
        named: dict[str, Expression] = {}
        for name, origin in origins.items():
            tensor = tensors[origin]
            if isinstance(tensor, str):
                unreadable[name] = tensor
            else:
                named[name] = renamed(tensor, name)
        readable.require_some(named, unreadable)
    files = [str(found.path / metadata.FILE)]
    values = _values(said)
    settings = {name: value for name, value in values.items() if _is_setting(name, state.optimizers)}
    own: dict[str, dict[str, Expression]] = {}
    if reading["optimizer"]:
        source, places = said, state.optimizers
        if found.optimizer is not None:
            source = metadata.read(found.optimizer)
            places = state_dict.optimizers(_tree(source))
            files.append(str(found.optimizer / metadata.FILE))
            settings = {name: value for name, value in _values(source).items() if _is_setting(name, places)}
        own = _moments(source, places, named)
        if places and not own.keys() - {moments.STEP}:
            raise CheckpointError(
                "it has no optimizer state by the names of its parameters", file=str(found.path),
                hint="save it as torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives it",
            )  # fmt: skip
    others = {name: value for name, value in values.items() if name not in settings}
    notes = list(state.notes)
    notes += moments.of_other_shapes(own, named)
    if state.root:
        notes.append(f"'{state.root}.', the key that the model was saved under, is taken off the names")
    return TrainedModel(
        named,
        own,
        settings,
        others,
        tuple(files),
        tuple(notes),
        unreadable=unreadable,
        reported=state.reported,
    )


def _tree(said: Metadata) -> dict[str, object]:
    """The state that was saved, as a tree: for each tensor one without elements, called as its entry."""
    top: dict[str, object] = {}
    leaves: dict[str, object] = {name: _stand_in(entry) for name, entry in said.tensors.items()}
    leaves |= {name: Unsupported(why) for name, why in said.unreadable.items()}
    for name, leaf in (leaves | dict(said.objects)).items():
        keys = said.paths.get(name, ())
        keys = keys if len(keys) > 1 else _keys(name)
        inner = top
        for key in keys[:-1]:
            following = inner.setdefault(key, {})
            if not isinstance(following, dict):
                break
            inner = following
        else:
            if keys[-1] not in inner:
                inner[keys[-1]] = leaf
                continue
        top[name] = leaf
    return top


def _keys(name: str) -> tuple[str, ...]:
    """The keys of an entry where who wrote it put dots into one, as torchtitan does, or where its version did not say."""
    first, dot, rest = name.partition(".")
    return (first, rest) if dot and parts.own_state(first, None) else (name,)


def _stand_in(entry: Entry) -> Expression:
    return Stored(entry.spec, (Extent(entry.spec.name, 0, entry.spec.nbytes),))


def _values(said: Metadata) -> dict[str, object]:
    return {name: tree.plain(value) for name, value in streams.objects(said.objects).items()}


def _rest(name: str, places: Iterable[str]) -> str | None:
    """What follows the place of optimizer state in a name; None for other names."""
    for place in places:
        if not place or name.startswith(f"{place}."):
            return name[len(place) + 1 :] if place else name
    return None


def _is_setting(name: str, places: Iterable[str]) -> bool:
    rest = _rest(name, places)
    return rest is not None and _GROUPS.match(rest) is not None


def _moments(
    said: Metadata, places: Iterable[str], model: Mapping[str, Expression]
) -> dict[str, dict[str, Expression]]:
    """State -> parameter -> tensor, of all states that belong to parameters one by one."""
    wanted: dict[str, tuple[str, str]] = {}
    for name in said.tensors:
        match = _STATE.fullmatch(_rest(name, places) or "")
        parameter = match["name"] if match else ""
        parameter = parameter if parameter in model else parameter.removeprefix("model.")
        if match and parameter in model:
            wanted[name] = (match["state"], parameter)
    found = streams.tensors({name: said.tensors[name] for name in wanted})
    return moments.collected((*wanted[name], tensor) for name, tensor in found.items())


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
