"""Checkpoint directories as published, with random weights in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference_models.configuration import ModelConfig

AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)
AnyModel = TypeVar("AnyModel", bound=nn.Module)
Form = Literal["safetensors", "bin"]

_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
# Attention and the gates then work away from the middle of their range, where mistakes would hardly show.
_GAIN = 1.2


def write(
    model_class: Callable[[AnyConfig, torch.dtype], AnyModel],
    directory: Path,
    config: AnyConfig,
    seed: int,
    dtype: torch.dtype,
    shards: int,
    form: Form,
    *,
    output: str,
) -> AnyModel:
    """Write a checkpoint with random weights; the model that it holds. `output` names what makes the logits."""
    if "torch_dtype" in {each.name for each in fields(config)}:
        changes: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
        config = replace(config, **changes)
    model = model_class(config, dtype)
    randomise(model, seed, output=output)
    write_checkpoint(directory, config, model.state_dict(), shards, form)
    return model


def load(
    model_class: Callable[[AnyConfig, torch.dtype], AnyModel], config_class: type[AnyConfig], directory: Path
) -> AnyModel:
    """The model that a checkpoint directory holds, of either form: all its tensors, and no others."""
    config = config_class.from_json(json.loads((directory / "config.json").read_text()))
    state: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        state |= load_file(file)
    for file in sorted(directory.glob("pytorch_model*.bin")):
        state |= torch.load(file, weights_only=True)
    model = model_class(config, next(tensor.dtype for tensor in state.values() if tensor.ndim > 1))
    model.load_state_dict(state, strict=True)
    model.eval().requires_grad_(requires_grad=False)
    return model


def randomise(model: nn.Module, seed: int, *, output: str | None) -> None:
    """Fill all parameters, so that a wrong mapping of any of them changes the logits visibly.

    Norm weights lie between 0.5 and 1.5, biases are not zero, matrices keep the size of what they multiply, and
    those of the parameter `output` give logits of order 1. Buffers stay. A parameter's values depend on the seed
    and its name alone.
    """
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if name == output:
            values = noise / math.sqrt(parameter.shape[-1])
        elif id(parameter) in embeddings:
            values = noise
        elif name.endswith("bias"):
            values = noise * 0.3
        elif parameter.ndim == 1:
            values = 0.5 + torch.rand(parameter.shape, generator=generator)
        else:
            values = noise * _GAIN / math.sqrt(parameter[0].numel())
        with torch.no_grad():
            parameter.copy_(values)
    model.eval().requires_grad_(requires_grad=False)


def write_checkpoint(
    directory: Path, config: ModelConfig, state: Mapping[str, Tensor], shards: int, form: Form
) -> None:
    """config.json, the weights in `shards` files (with an index if there are several), generation_config.json.

    Raises:
        ValueError: There are fewer tensors than shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config.to_json())
    if (generation := config.generation_config()) is not None:
        _write_json(directory / "generation_config.json", generation)
    if shards == 1:
        _save(state, directory / f"{_STEMS[form]}.{form}", form)
        return
    files: dict[str, str] = {}
    for number, names in enumerate(_parts(state, shards), 1):
        file = f"{_STEMS[form]}-{number:05}-of-{shards:05}.{form}"
        _save({name: state[name] for name in names}, directory / file, form)
        files |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": dict(sorted(files.items())),
    }
    _write_json(directory / f"{_STEMS[form]}.{form}.index.json", index)


def _parts(state: Mapping[str, Tensor], shards: int) -> list[list[str]]:
    """Names in their order, cut into runs of about equal bytes."""
    if not 0 < shards <= len(state):
        raise ValueError(f"{len(state)} tensors do not fill {shards} shards")
    names = list(state)
    share = sum(tensor.nbytes for tensor in state.values()) / shards
    parts: list[list[str]] = [[]]
    filled = 0
    for position, name in enumerate(names):
        short_of_names = len(names) - position == shards - len(parts)
        if parts[-1] and len(parts) < shards and (filled >= share * len(parts) or short_of_names):
            parts.append([])
        parts[-1].append(name)
        filled += state[name].nbytes
    return parts


def _save(tensors: Mapping[str, Tensor], file: Path, form: Form) -> None:
    if form == "safetensors":
        save_file(dict(tensors), file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


def _write_json(file: Path, contents: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n")
