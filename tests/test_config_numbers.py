"""No number in a config, of any family, makes lists or long loops: the tensors that there are bound them.

Each is tried as one of two huge ones, in turn; with `STREAMCONV_CONFIG_NUMBERS=all`, as both.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

import streamconv
from streamconv import families
from streamconv.errors import StreamconvError
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 32, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64, "n_inner": 32}  # fmt: skip
HUGE = (400_000_000, 1 << 62)
ALL = os.environ.get("STREAMCONV_CONFIG_NUMBERS") == "all"
MOST = 64 << 20
"""Bytes; a plan of these models takes less than one MiB."""


def real(architecture: Architecture) -> list[str]:
    """Those of its model types that transformers has a class for."""
    return [model_type for model_type in architecture.model_types if model_type in CONFIG_MAPPING]


def config_of(architecture: Architecture) -> dict[str, Any]:
    """A small config of the real class."""
    model_type = real(architecture)[0]
    config = AutoConfig.for_model(model_type)
    for key, value in TINY.items():
        if hasattr(config, key):
            with suppress(Exception):  # some of them are properties
                setattr(config, key, value)
    found = {key: value for key, value in config.to_dict().items() if value is not None}
    return {**found, "model_type": model_type, "architectures": [architecture.classes[0]]}


def write(directory: Path, architecture: Architecture, config: Mapping[str, Any]) -> None:
    """A file with holes in place of weights."""
    header: dict[str, Any] = {}
    end = 0
    for name, declared in architecture.tensors(architecture.sizes_of(config)).items():
        if not declared.optional:
            size = 4
            for each in declared.shape:
                size *= each
            header[name] = {"dtype": "F32", "shape": list(declared.shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def numbers(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all numbers in a config."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if type(inner) is int:
            yield (*way, key)
        elif isinstance(inner, dict | list):
            yield from numbers(inner, (*way, key))


def peak() -> int:
    """The most memory that this process has held since it was asked to forget."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


SIDES = [
    (recipe, reverse)
    for recipe in families.recipes()
    for reverse, side in ((False, recipe.source), (True, recipe.target))
    if side is not None and real(side) and side.classes and not (reverse and recipe.one_way)
]
"""Those sides of recipes that transformers has a class for."""


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "reverse"), SIDES, ids=[f"{each.name}-{way}" for each, way in SIDES])
def test_a_huge_number_is_planned_or_refused_in_a_moment(
    recipe: Recipe, reverse: bool, tmp_path: Path
) -> None:
    side = recipe.target if reverse else recipe.source
    assert side is not None
    config = config_of(side)
    write(tmp_path, side, config)
    for turn, way in enumerate(numbers(config)):
        for huge in HUGE if ALL else HUGE[turn % 2 :][:1]:
            changed = copy.deepcopy(config)
            inner: Any = changed
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = huge
            (tmp_path / "config.json").write_text(json.dumps(changed))
            Path("/proc/self/clear_refs").write_text("5")
            before, began = peak(), time.process_time()
            with suppress(StreamconvError):
                streamconv.plan(tmp_path, recipe=recipe.name, reverse=reverse)
            assert peak() - before < MOST, f"{way} = {huge}"
            assert time.process_time() - began < 60, f"{way} = {huge}"  # where it is a loop, it takes minutes
