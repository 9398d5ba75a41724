"""Training checkpoints in which one value at a time is something odd: an error that says so, or the same model."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import streamconv
from bench.deepspeed_layout import Layout, write
from streamconv.errors import StreamconvError

SHAPES = {"embed.weight": (7, 4), "b.norm.weight": (3,)}
ODD: tuple[Any, ...] = (
    None, -1, 1 << 70, 2.5, "text", b"bytes", [], {}, (), [[]], [-1], {"x": -1}, (1 << 62, 1 << 62), True, "../x",
    torch.zeros(0), torch.zeros(2, 3), float("nan"),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a structure of dicts, lists and records."""
    if path:
        yield path
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, inner in items:
        yield from places(inner, (*path, key))


def with_odd(document: Any, path: tuple[Any, ...], odd: Any) -> Any:
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = odd
    return changed


def survives(directory: Path, **options: Any) -> bool:
    """Whether it can be opened and planned; anything but our own errors goes through."""
    try:
        streamconv.plan(directory, **options)
    except StreamconvError as error:
        assert str(error)
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_deepspeed(tmp_path: Path, stage: int, kind: str) -> None:
    tag = write(
        tmp_path / "run", Layout(SHAPES, stage, 2), {name: torch.randn(each) for name, each in SHAPES.items()}
    )
    path = min(tag.glob(f"*{kind}.pt"))
    document = torch.load(path, weights_only=False)
    every = [(place, odd) for place in places(document) for odd in ODD]
    refused = 0
    for place, odd in random.Random(stage).sample(every, min(250, len(every))):
        torch.save(with_odd(document, place, odd), path)
        refused += not survives(tmp_path / "run", optimizer=True)
    assert refused > 20


def test_distributed_checkpoints(tmp_path: Path) -> None:
    state = {"model": {name: torch.randn(each) for name, each in SHAPES.items()}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    path = tmp_path / "run" / ".metadata"
    original = pickle.loads(path.read_bytes())
    chooser = random.Random(4)
    refused = 0
    for _ in range(300):
        changed = copy.deepcopy(original)
        records = [
            changed,
            *changed.state_dict_metadata.values(),
            *changed.storage_data.values(),
            *changed.storage_data,
        ]
        records += [
            chunk for each in changed.state_dict_metadata.values() for chunk in getattr(each, "chunks", [])
        ]
        record = chooser.choice(records)
        key = chooser.choice([*record.__dict__] or ["none"])
        object.__setattr__(record, key, chooser.choice(ODD[:-3]))
        try:
            path.write_bytes(pickle.dumps(changed))
        except (TypeError, AttributeError):
            continue
        refused += not survives(tmp_path / "run")
    assert refused > 50


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes(tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    values = {name: torch.randn(each) for name, each in SHAPES.items()}
    write(tmp_path / "deepspeed", Layout(SHAPES, 2, 2), values)
    dcp.save({"model": values}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "source").mkdir()
    save_file(values, tmp_path / "source" / "model.safetensors")
    streamconv.convert(tmp_path / "source", tmp_path / "mindspore", to="mindspore", tp=1, crc=True)
    shutil.rmtree(tmp_path / "mindspore" / ".streamconv")
    for directory in (tmp_path / "deepspeed", tmp_path / "dcp", tmp_path / "mindspore"):
        files = [path for path in directory.rglob("*") if path.is_file()]
        for _ in range(40):
            path = chooser.choice(files)
            data = path.read_bytes()
            damaged = bytearray(data)
            for _ in range(chooser.randint(1, 6)):
                damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
            path.write_bytes(
                damaged[: chooser.randint(1, len(damaged))] if chooser.random() < 0.3 else damaged
            )
            survives(directory)
            path.write_bytes(data)
        assert survives(directory)


@pytest.mark.slow
def test_strategies(tmp_path: Path) -> None:
    tensors = {"model.layers.0.attention.wq.weight": torch.randn(8, 4), "lm_head.weight": torch.randn(8, 4)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    streamconv.convert(tmp_path / "source", tmp_path / "run", to="mindspore", tp=2)
    path = tmp_path / "run" / "strategy.json"
    document = json.loads(path.read_text())
    odd_values = [
        odd for odd in ODD if isinstance(odd, (type(None), int, str, list, dict)) and odd != 1 << 70
    ]
    odd_values += [[1 << 20, 1 << 20], [1024] * 80, [[0], [0]], [0, 0], [1 << 19]]
    for place in places(document):
        for odd in odd_values:
            path.write_text(json.dumps(with_odd(document, place, odd)))
            survives(tmp_path / "run", source_strategy=path)
            survives(tmp_path / "source", to="mindspore", strategy=path)


def test_mindformers_metadata(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_file({"w": torch.randn(2, 2)}, tmp_path / "run" / "model-0000000-0000001.safetensors")
    document = {
        "state_dict_metadata": {
            "w": {"global_shape": [2, 2], "chunk": [{"global_offset": [0, 0], "local_shape": [2, 2]}]}
        },
        "storage_data": {
            "('w', (0, 0))": [{"file_name": "model-0000000-0000001.safetensors", "storage_rank": 0}]
        },
    }
    path = tmp_path / "run" / "metadata.json"
    path.write_text(json.dumps(document))
    assert survives(tmp_path / "run")
    for place in places(document):
        for odd in (None, -1, 2.5, "text", [], {}, [[]], [-1], True, "../x", [1 << 40, 1 << 40]):
            path.write_text(json.dumps(with_odd(document, place, odd)))
            survives(tmp_path / "run")
    for identifier in (
        "('w', (0, 0)",
        "w",
        "((((" * 1000,
        "('w', (0, 'x'))",
        "('w', (-1, 0))",
        "__import__('os')",
    ):
        path.write_text(
            json.dumps({**document, "storage_data": {identifier: document["storage_data"]["('w', (0, 0))"]}})
        )
        assert not survives(tmp_path / "run")


def test_rectangles_that_are_many_and_form_no_grid(tmp_path: Path) -> None:
    # A pinwheel cannot be cut in two anywhere.
    from streamconv.dtypes import BY_NAME
    from streamconv.readers.chunks import Part, assemble
    from streamconv.tensor import Extent, Stored, TensorSpec

    def part(row: int, column: int, rows: int, columns: int) -> Part:
        spec = TensorSpec("w", BY_NAME["F32"], (rows, columns))
        return Part((row, column), Stored(spec, (Extent("/x", 0, spec.nbytes),)))

    pinwheel = [part(0, 0, 1, 2), part(0, 2, 2, 1), part(2, 1, 1, 2), part(1, 0, 2, 1), part(1, 1, 1, 1)]

    def whole(rows: int) -> TensorSpec:
        return TensorSpec("w", BY_NAME["F32"], (rows, rows))

    with pytest.raises(StreamconvError, match="form no grid"):
        assemble(whole(3), pinwheel)
    grid = [part(row, column, 1, 1) for row in range(150) for column in range(150)]
    assert assemble(whole(150), grid).spec.shape == (150, 150)
    steps = [part(step, 0, 1, step + 1) for step in range(400)] + [
        part(step, step + 1, 1, 399 - step) for step in range(399)
    ]
    assert assemble(whole(400), steps).spec.shape == (400, 400)
    with pytest.raises(StreamconvError, match="not as many axes"):
        assemble(TensorSpec("w", BY_NAME["F32"], (9,)), pinwheel)
