"""Layouts that a CPU cannot train, written as DeepSpeed lays them out: many ranks, tensor parallelism, large files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from comparing import same
from safetensors.torch import load_file

import streamconv
from bench.deepspeed_layout import Layout, write
from streamconv.errors import CheckpointError, StreamconvError
from streamconv.tensor import Stored

SHAPES = {"embed_tokens.weight": (37, 12), "a.weight": (5, 7), "scale": (1,), "b.norm.weight": (3,)}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 64, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_number_of_ranks(tmp_path: Path, stage: int, ranks: int) -> None:
    # More ranks than elements: most of them hold padding, or nothing at all.
    values = random_weights(SHAPES)
    write(tmp_path / "run", Layout(SHAPES, stage, ranks), values)
    streamconv.convert(tmp_path / "run", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == values.keys()
    assert all(same(found[name], values[name]) for name in values)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_of_tens_of_gigabytes_is_planned_from_headers(tmp_path: Path, stage: int) -> None:
    shapes = {f"layers.{layer}.weight": (8192, 28673) for layer in range(24)}
    write(tmp_path / "run", Layout(shapes, stage, 7))
    checkpoint = streamconv.open(tmp_path / "run").contents
    for tensor in checkpoint.values():
        assert isinstance(tensor, Stored)
        assert len(tensor.extents) <= (7 if stage == 3 else 2)
        assert sum(extent.length for extent in tensor.extents) == 8192 * 28673 * 4
    everywhere = [
        (extent.file, extent.offset, extent.offset + extent.length)
        for tensor in checkpoint.values()
        for extent in tensor.extents
    ]
    everywhere.sort()
    assert all(one[0] != two[0] or one[2] <= two[1] for one, two in pairwise(everywhere))
    assert max(end for _, _, end in everywhere) > 1 << 33


WHOLE = {
    "word_embeddings.weight": (32, 8),
    "layers.0.attention.query_key_value.weight": (24, 8),
    "layers.0.attention.query_key_value.bias": (24,),
    "layers.0.attention.dense.weight": (8, 8),
    "layers.0.attention.dense.bias": (8,),
    "layers.0.input_layernorm.weight": (8,),
}
COLUMNS = {"layers.0.attention.dense.weight"}
REPLICATED = {"layers.0.attention.dense.bias", "layers.0.input_layernorm.weight"}


def part_of(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    if name in REPLICATED:
        return whole
    return whole.chunk(ranks, 1 if name in COLUMNS else 0)[rank].contiguous()


def tensor_parallel(directory: Path, values: dict[str, torch.Tensor], ranks: int, extra=None) -> None:
    for rank in range(ranks):
        parts = {name: part_of(name, whole, rank, ranks) for name, whole in values.items()}
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        write(directory, Layout(shapes, 2, 3, rank, extra), parts)


@pytest.mark.parametrize("weights", ["master", "model"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_are_joined_by_the_names(tmp_path: Path, ranks: int, weights: str) -> None:
    values = random_weights(WHOLE)
    tensor_parallel(tmp_path / "run", values, ranks)
    streamconv.convert(tmp_path / "run", tmp_path / "out", weights=weights)
    found = load_file(tmp_path / "out" / "model.safetensors")
    dtype = torch.float32 if weights == "master" else torch.bfloat16
    assert found.keys() == values.keys()
    assert all(same(found[name], values[name].to(dtype)) for name in values)


def test_the_patterns_that_a_run_has_written_decide(tmp_path: Path) -> None:
    values = {f"odd.{name}": tensor for name, tensor in random_weights(WHOLE).items()}
    renamed = {name.removeprefix("odd."): name for name in values}
    info = {
        "original_vocab_size": 29,
        "vocabulary_parameter_patterns": [r"odd\.word_embeddings\.weight"],
        "parameter_with_row_parallelism_patterns": [r"odd\.layers\.\d+\.attention\.dense\.weight"],
        "tp_replicated_parameter_patterns": [r".*dense\.bias", r".*layernorm.*"],
    }
    for rank in range(2):
        parts = {renamed[name]: part_of(name, values[renamed[name]], rank, 2) for name in WHOLE}
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        write(tmp_path / "run", Layout(shapes, 2, 2, rank, {"universal_checkpoint_info": info}), parts)
    streamconv.convert(tmp_path / "run", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = values | {"odd.word_embeddings.weight": values["odd.word_embeddings.weight"][:29]}
    assert all(same(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("weights", ["master", "model"])
@pytest.mark.parametrize(
    "lost", ["mp_rank_00_model", "mp_rank_01_model", "mp_rank_00_optim", "mp_rank_01_optim"]
)
def test_a_model_parallel_rank_that_is_missing(tmp_path: Path, lost: str, weights: str) -> None:
    tensor_parallel(tmp_path / "run", random_weights(WHOLE), 2, {"mp_world_size": 2})
    for path in (tmp_path / "run").glob(f"*/*{lost}*"):
        path.unlink()
    if weights == "model" and "optim" in lost:
        assert len(streamconv.open(tmp_path / "run", weights="model")) == len(WHOLE)
        return
    with pytest.raises(CheckpointError, match=r"model-parallel rank.*missing"):
        streamconv.open(tmp_path / "run", weights=weights)


def test_parts_that_nobody_knows_how_to_join_are_listed(tmp_path: Path) -> None:
    values = random_weights({"strange.weight": (8, 8), "stranger.weight": (8, 8)})
    tensor_parallel(tmp_path / "run", values, 2)
    with pytest.raises(CheckpointError, match=r"how strange.weight, stranger.weight are split"):
        streamconv.open(tmp_path / "run")


def test_a_pattern_that_could_take_for_ever_is_not_tried(tmp_path: Path) -> None:
    info = {"tp_replicated_parameter_patterns": ["(a+)+$"]}
    tensor_parallel(tmp_path / "run", random_weights(WHOLE), 2, {"universal_checkpoint_info": info})
    with pytest.raises(CheckpointError, match="none of the usual ones"):
        streamconv.open(tmp_path / "run")


def test_copies_that_differ_among_ranks_fail_the_conversion(tmp_path: Path) -> None:
    values = random_weights(WHOLE)
    tensor_parallel(tmp_path / "run", values, 2)
    parts = {name: part_of(name, whole, 1, 2) for name, whole in values.items()}
    parts["layers.0.input_layernorm.weight"] = parts["layers.0.input_layernorm.weight"] + 1
    write(tmp_path / "run", Layout({name: tuple(part.shape) for name, part in parts.items()}, 2, 3, 1), parts)
    with pytest.raises(StreamconvError, match="input_layernorm"):
        streamconv.convert(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_experts_that_are_split_among_replica_groups_are_refused(tmp_path: Path) -> None:
    extra = {"ds_autoep_layers": [{"checkpoint_format": "zero3_partitioned"}]}
    write(tmp_path / "run", Layout(SHAPES, 3, 2, extra=extra), random_weights(SHAPES))
    with pytest.raises(CheckpointError, match="AutoEP under stage 3"):
        streamconv.open(tmp_path / "run")
