"""Readers: files and directories in, a `Checkpoint` out. Only headers are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamconv.errors import CheckpointError, UsageError, listed
from streamconv.readers import dcp, deepspeed, diffusers, meta, sat, sat_models, side_files, training
from streamconv.readers.checkpoint import Checkpoint, Component, Ignored
from streamconv.readers.files import open_file
from streamconv.readers.huggingface import Model, read_config, read_model
from streamconv.readers.huggingface import read_config_file as read_config_file
from streamconv.readers.mindspore import optimizer as mindspore_optimizer
from streamconv.readers.mindspore import ranks as mindspore_ranks
from streamconv.readers.mindspore import sharded as mindspore_sharded
from streamconv.shard import STEMS, parse_weight_name

FORMATS: dict[str, str] = {
    "safetensors": "a file, or a directory with or without an index",
    "torch zip": "`.bin`, `.pt`, `.pth`, `.ckpt` of PyTorch 1.6 and later, alone or sharded with an index",
    "torch legacy": "the same of earlier versions",
    "SAT": "a directory with `latest`, an iteration's directory, or one `.pt`; any number of model-parallel ranks",
    "DeepSpeed": "a directory with `latest`, or a save's directory: ZeRO 0 to 3, BF16_Optimizer, mixtures of experts, pipelines, universal checkpoints; any number of ranks",
    "DCP": "`torch.distributed.checkpoint` and FSDP: `.metadata` with `.distcp` files of either serialization, safetensors shards without an index, a file of DTensors a rank (verl, SkyRL, accelerate)",
    "MindSpore": "`.ckpt`, or a directory `rank_N` of it or of safetensors for each rank, joined as its strategy files say; MindFormers' `metadata.json` with shards; MindSpore's safetensors with any of their indexes",
    "diffusers pipeline": "a directory with `model_index.json`; all components in one run",
}
"""What is read, by the name that `Checkpoint.format` has, and in which forms."""

_TRACES: tuple[tuple[str, str], ...] = (
    (
        "latest",
        "a DeepSpeed or SAT checkpoint, whose saves are not in it: each node keeps its own ranks' files",
    ),
    ("latest_universal", "a universal DeepSpeed checkpoint, whose saves are not in it"),
    (
        "latest_checkpointed_iteration.txt",
        "a Megatron checkpoint, which is not read; a weight file in it may be",
    ),
)
"""Files that give training checkpoints away, where no reader has found one."""


_SIGNS = frozenset({"latest", "latest_universal", ".metadata", "latest_checkpointed_iteration.txt"})
"""Files by which a checkpoint of a training run is known from outside."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader cannot tell by itself.

    Attributes:
        root: where the state dict lies in a torch file, as a dotted path; None to look for it.
        ema: take the averaged weights, where a training run saved both.
        lora_scale: of a LoRA that lies unmerged in the checkpoint; None: 1 / rank.
        keep_lora: leave such a LoRA apart from the weights.
        weights: which copy a training checkpoint's weights are taken from; None: the F32 ones where there are any.
        optimizer: read what the optimizer knows of each parameter too.
        strategy: MindSpore's strategy file of the source, or a directory of them; None to look for them.
    """

    root: str | None = None
    ema: bool = False
    lora_scale: float | None = None
    keep_lora: bool = False
    weights: training.Weights | None = None
    optimizer: bool = False
    strategy: str | None = None


def open_checkpoint(path: str | Path, reading: Reading | None = None) -> Checkpoint:
    """Open a checkpoint: a weight file, a model directory, a diffusers pipeline, or a SAT directory.

    Args:
        path: the file or directory.
        reading: what the reader cannot tell by itself.

    Raises:
        UsageError: there is nothing at `path`.
        CheckpointError: what is there is damaged, or no checkpoint.
    """
    try:
        return _opened(Path(path).absolute(), reading or Reading())
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", file=str(error.filename or path)
        ) from error


def open_model(path: str | Path) -> Checkpoint:
    """Open what a conversion is to be like: a checkpoint, or a directory with no weights, only a config and the like.

    Raises:
        UsageError: there is nothing at `path`.
        CheckpointError: what is there is damaged, or neither.
    """
    directory = Path(path).absolute()
    config = read_config(directory) if directory.is_dir() else None
    if config is None or any(_is_model(entry.name) for entry in directory.iterdir()):
        return open_checkpoint(path)
    empty = Component("", STEMS[0], {}, config=config)
    return Checkpoint(directory, "config", (empty,), (), side_files.of_directory(directory, ())[0])


def _opened(found: Path, reading: Reading) -> Checkpoint:
    if found.is_file():
        return _of_file(found, reading)
    if not found.is_dir():
        raise UsageError("there is no such file or directory", file=str(found))
    for read in _DIRECTORIES:
        checkpoint = read(found, reading)
        if checkpoint is not None:
            return checkpoint
    weights = read_model(found, root=reading.root)
    if weights is not None and weights.component.config is None:
        weights = replace(weights, component=meta.with_params(weights.component, found))
    return _of_models(found, [weights] if weights else [], weights.format if weights else "")


def _deepspeed(path: Path, reading: Reading) -> Checkpoint | None:
    found = deepspeed.find(path)
    if found is None:
        return None
    model = deepspeed.read(found, weights=reading.weights, optimizer=reading.optimizer)
    return _of_training(found.root, model, "DeepSpeed", reading)


def _mindspore_ranks(path: Path, reading: Reading) -> Checkpoint | None:
    found = mindspore_ranks.find(path)
    if found is None:
        return None
    strategy = Path(reading.strategy).absolute() if reading.strategy else None
    return _of_training(path, mindspore_ranks.read(found, strategy), "MindSpore", reading)


def _mindspore_shards(path: Path, reading: Reading) -> Checkpoint | None:
    found = mindspore_sharded.find(path)
    return _of_training(path, mindspore_sharded.read(found), "MindSpore", reading) if found else None


def _dcp(path: Path, reading: Reading) -> Checkpoint | None:
    found = dcp.find(path)
    return (
        _of_training(found.root, dcp.read(found, optimizer=reading.optimizer), "DCP", reading)
        if found
        else None
    )


def _pipeline(path: Path, reading: Reading) -> Checkpoint | None:
    if not (path / diffusers.INDEX).is_file():
        return None
    models = diffusers.read_components(path, reading.root)
    kinds = ", ".join(dict.fromkeys(model.format for model in models))
    return _of_models(path, models, f"diffusers pipeline ({kinds})")


def _of_training(root: Path, model: training.TrainedModel, form: str, reading: Reading) -> Checkpoint:
    """A training run's model, with the config and the tokenizer that a trainer has put beside it."""
    notes = list(model.notes)
    if model.moments and not reading.optimizer:
        notes.append(f"what the optimizer keeps ({', '.join(model.moments)}) is left out (--optimizer)")
        model = replace(model, moments={})
    directory = root if root.is_dir() else root.parent
    beside = sorted(path.name for path in root.iterdir() if _is_model(path.name)) if root.is_dir() else []
    if beside:
        notes.append(f"{listed(beside, 1)} beside the save: not read; to convert that, give the file itself")
    return Checkpoint(
        root,
        form,
        training.components(model, read_config(directory)),
        model.files,
        side_files.beside_training(directory),
        metadata=model.metadata,
        notes=tuple(notes),
        texts=training.texts(model),
    )


def _is_model(name: str) -> bool:
    parsed = parse_weight_name(name)
    return parsed is not None and parsed.naming.stem in STEMS


def _sat(path: Path, reading: Reading) -> Checkpoint | None:
    """A SAT checkpoint: a directory of one, or of the parts of a CogVideoX as they are distributed."""
    parts = {name: path / name for name in ("transformer", "vae")}
    inside = sat.find(parts["transformer"], ema=reading.ema) if parts["transformer"].is_dir() else None
    found = inside or sat.find(path, ema=reading.ema)
    model = _sat_model(found, reading) if found else None
    if found is None or model is None:
        return None
    components = sat_models.components(model.tensors, model.config, str(found.iteration), reading.lora_scale)
    files, notes = list(model.files), list(model.notes)
    autoencoder = next(
        (
            place / "3d-vae.pt"
            for place in (parts["vae"], path, found.root)
            if (place / "3d-vae.pt").is_file()
        ),
        None,
    )
    if autoencoder is not None and components[0].directory == "transformer":
        file = open_file(str(autoencoder), None)
        notes += file.notes
        files.append(file.path)
        components = sat_models.with_autoencoder(components, file.tensors)
        notes.append("the autoencoder is taken from 3d-vae.pt")
    notes += sat_models.described(components)
    return Checkpoint(path, "SAT", components, tuple(files), (), (), model.metadata, tuple(notes))


def _sat_model(found: sat.SatDirectory, reading: Reading) -> sat.SatModel | None:
    return sat.read(found, lora_scale=reading.lora_scale, keep_lora=reading.keep_lora)


_PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".*zero_pp_rank_\d+_mp_rank_\d+.*\.pt"), "one rank's file of a DeepSpeed checkpoint"),
    (re.compile(r"layer_\d+(?:_expert_|-model).*states\.pt"), "a part of a DeepSpeed checkpoint"),
    (re.compile(r"__\d+_\d+\.distcp|\.metadata"), "a part of a checkpoint of torch.distributed.checkpoint"),
    (re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors"), "one rank's file of a sharded checkpoint"),
    (re.compile(r"model_world_size_\d+_rank_\d+\.pt"), "one rank's file of a sharded checkpoint"),
)
"""Names of files that hold parts of tensors, or nothing of them, and what they are."""


def _of_file(path: Path, reading: Reading) -> Checkpoint:
    part = next((what for pattern, what in _PARTS if pattern.fullmatch(path.name)), None)
    if part is not None and reading.root is None:
        raise UsageError(f"this is {part}", file=str(path), hint=f"give the directory: {path.parent}")
    file = open_file(str(path), reading.root)
    if reading.root is None and sat.is_ours(file.tensors):
        model = _sat_model(sat.alone(path), reading)
        if model is not None:
            made = sat_models.components(model.tensors, model.config, str(path), reading.lora_scale)
            notes = (*model.notes, *sat_models.described(made))
            return Checkpoint(path, "SAT", made, model.files, (), (), model.metadata, notes)
    if file.format == "MindSpore" and any(
        name.startswith(mindspore_optimizer.SLOTS) for name in file.tensors
    ):
        told = mindspore_optimizer.apart(file.tensors)
        trained = training.TrainedModel(told.model, told.moments, {}, file.metadata, (file.path,), file.notes)
        return _of_training(path, trained, "MindSpore", reading)
    named = parse_weight_name(path.name)
    naming = named.naming if named is not None and named.naming.stem in STEMS else None
    component = Component(
        "",
        naming.stem if naming else STEMS[0],
        file.tensors,
        naming.variant if naming else None,
        read_config(path.parent),
    )
    if component.config is None:
        component = meta.with_params(component, path.parent)
    components: tuple[Component, ...] = (component,)
    if component.config is None and sat_models.is_autoencoder(file.tensors):
        components = sat_models.components(file.tensors, None, str(path))
    return Checkpoint(
        path,
        file.format,
        components,
        (str(path),),
        side_files.beside_file(path),
        metadata=file.metadata,
        notes=file.notes,
    )


def _of_models(path: Path, models: list[Model], form: str) -> Checkpoint:
    if not models:
        raise CheckpointError("no weights are in this directory", file=str(path), hint=_hint(path))
    files = tuple(file for model in models for file in model.files)
    copied, left = side_files.of_directory(path, files)
    reasons = {ignored.path: ignored for ignored in left}
    metadata: dict[str, Any] = {}
    for model in models:
        prefix = f"{model.component.directory}/" if model.component.directory else ""
        metadata.update((prefix + key, value) for key, value in model.metadata.items())
        for ignored in model.ignored:
            reasons[prefix + ignored.path] = Ignored(prefix + ignored.path, ignored.reason)
    return Checkpoint(
        path,
        form,
        tuple(model.component for model in models),
        files,
        copied,
        tuple(reasons[name] for name in sorted(reasons)),
        metadata,
        tuple(note for model in models for note in model.notes),
    )


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory is worth naming to one who has given the directory above it."""
    names = {entry.name for entry in path.iterdir()}
    return not names.isdisjoint(_SIGNS) or any(_is_model(name) for name in names)


def _hint(path: Path) -> str:
    for name, what in _TRACES:
        if (path / name).exists():
            return f"it looks like {what}"
    inside = [entry.name for entry in sorted(path.iterdir()) if entry.is_dir() and _is_checkpoint(entry)]
    if inside:
        return f"there are checkpoints one level down, give one of them: {listed(reversed(inside))}"
    return "safetensors files and files of torch.save are what is looked for"


_DIRECTORIES: tuple[Callable[[Path, Reading], Checkpoint | None], ...] = (
    _sat,
    _deepspeed,
    _mindspore_ranks,
    _mindspore_shards,
    _dcp,
    _pipeline,
)
"""Readers of directories that are more than a model's files; the first that finds its own takes it."""
