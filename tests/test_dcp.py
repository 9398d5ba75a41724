"""Checkpoints that torch.distributed.checkpoint and FSDP write on this machine, against the live tensors."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from comparing import same
from safetensors.torch import load_file

import streamconv
from streamconv.errors import CheckpointError, UsageError
from tests.training_runs.launch import launched

pytestmark = pytest.mark.slow

WORLDS = (2, 3, 4)
CASES = [(world, way) for world in WORLDS for way in ("fsdp", "tp", "replicated")] + [
    (4, "hybrid"),
    (4, "both"),
]
TRAINED = [(world, way) for world, way in CASES if way not in ("tp", "both")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str):
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    return lambda world: launched(shared / f"dcp_{world}", "tests.training_runs.dcp_worker", world)


@pytest.fixture
def copied(runs, tmp_path: Path):
    def copy(case: str, world: int = 2) -> Path:
        return Path(shutil.copytree(runs(world) / case, tmp_path / "checkpoint"))

    return copy


def converted(source: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    streamconv.convert(source, out, **options)
    return load_file(out / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []


def of_model(live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): each for name, each in live.items() if name.startswith("model.")}


@pytest.mark.parametrize(("world", "way"), CASES)
def test_whatever_way_it_was_sharded(runs, tmp_path: Path, world: int, way: str) -> None:
    run = runs(world) / way
    assert_same(
        converted(run / "checkpoint", tmp_path / "out"), of_model(load_file(run / "expected.safetensors"))
    )


@pytest.mark.parametrize(("world", "way"), TRAINED)
def test_what_the_optimizer_knows_comes_by_parameter(runs, tmp_path: Path, world: int, way: str) -> None:
    run = runs(world) / way
    live = load_file(run / "expected.safetensors")
    streamconv.convert(run / "checkpoint", tmp_path / "out", optimizer=True)
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        found = load_file(tmp_path / "out" / "optimizer" / moment / "model.safetensors")
        wanted = {
            name.removeprefix("optimizer.").removesuffix(f".{moment}"): each
            for name, each in live.items()
            if name.startswith("optimizer.") and name.endswith(f".{moment}")
        }
        assert len(wanted) == 7
        assert_same(found, wanted)
    assert (
        '"optimizer.param_groups.0.lr": 0.01'
        in (tmp_path / "out" / "optimizer" / "optimizer.json").read_text()
    )


@pytest.mark.parametrize(
    "variant", ["bare", "a-file-a-tensor", "threads", "safetensors", "sharded", "consolidated"]
)
def test_whatever_way_it_was_written(runs, tmp_path: Path, variant: str) -> None:
    run = runs(2) / "variants"
    live = load_file(run / "expected.safetensors")
    if variant in ("sharded", "consolidated"):  # its writer takes no integers
        live = {name: each for name, each in live.items() if each.is_floating_point()}
    assert_same(converted(run / variant, tmp_path / "out"), live)


@pytest.mark.parametrize("case", ["bf16", "tied"])
def test_dtypes_and_tied_names(runs, tmp_path: Path, case: str) -> None:
    run = runs(2) / case
    assert_same(converted(run / "checkpoint", tmp_path / "out"), load_file(run / "expected.safetensors"))


@pytest.mark.parametrize(("world", "way"), CASES)
def test_a_file_of_dtensors_for_each_rank(runs, tmp_path: Path, world: int, way: str) -> None:
    run = runs(world) / "ranks" / way
    assert_same(converted(run / "checkpoint", tmp_path / "out"), load_file(run / "expected.safetensors"))


def test_bytes_entries_are_kept_as_data(runs) -> None:
    contents = streamconv.open(runs(2) / "fsdp" / "checkpoint").contents
    assert contents.metadata["note"] == "second step"
    assert contents.metadata["step"] == 2


def test_accelerates_checkpoint_loads_in_transformers(runs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = runs(2) / "llama"
    streamconv.convert(run / "checkpoint-2", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(model.state_dict(), load_file(run / "expected.safetensors"))


def test_accelerates_optimizer_lies_beside_the_model(runs, tmp_path: Path) -> None:
    run = runs(2) / "llama"
    streamconv.convert(run / "checkpoint-2", tmp_path / "out", optimizer=True)
    live = load_file(run / "expected.safetensors")
    found = load_file(tmp_path / "out" / "optimizer" / "exp_avg" / "model.safetensors")
    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in live.items()
    }


@pytest.mark.parametrize("inside", ["checkpoint-2", "checkpoint-2/pytorch_model_fsdp_0"])
def test_either_directory_of_accelerates_can_be_given(runs, inside: str) -> None:
    contents = streamconv.open(runs(2) / "llama" / inside).contents
    assert len(contents) == 21
    assert contents.components[0].config is not None


# ----------------------------------------------------------------------------------- what is not whole


def test_a_save_that_was_interrupted(copied) -> None:
    checkpoint = copied("fsdp/checkpoint")
    (checkpoint / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata, which is written last"):
        streamconv.open(checkpoint)


def test_files_that_are_missing_or_short_are_all_named(copied) -> None:
    checkpoint = copied("fsdp/checkpoint", 3)
    (checkpoint / "__1_0.distcp").unlink()
    short = checkpoint / "__2_0.distcp"
    short.write_bytes(short.read_bytes()[:-7])
    with pytest.raises(CheckpointError) as caught:
        streamconv.open(checkpoint)
    assert "__1_0.distcp: it is named in the metadata and is not there" in str(caught.value)
    assert "__2_0.distcp: it has" in str(caught.value)


def test_files_of_another_save_are_told(copied, runs) -> None:
    checkpoint = copied("variants/bare")
    shutil.copy(runs(2) / "bf16" / "checkpoint" / "__1_0.distcp", checkpoint / "__1_0.distcp")
    with pytest.raises(CheckpointError):
        streamconv.open(checkpoint)


def changed(checkpoint: Path, change) -> None:
    """A checkpoint whose metadata says something else."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_a_gap_between_chunks(copied) -> None:
    def change(metadata) -> None:
        metadata.state_dict_metadata["embed.weight"].chunks.pop()

    checkpoint = copied("variants/bare")
    changed(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"embed.weight.*1 parts hold 247 elements, \[37, 13\] has 481"):
        streamconv.open(checkpoint)


def test_chunks_that_overlap(copied) -> None:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    def change(metadata) -> None:
        chunk = metadata.state_dict_metadata["embed.weight"].chunks[1]
        chunk.offsets = torch.Size([18, 0])
        info = metadata.storage_data.pop(MetadataIndex("embed.weight", torch.Size([19, 0])))
        metadata.storage_data[MetadataIndex("embed.weight", torch.Size([18, 0]))] = info

    checkpoint = copied("variants/bare")
    changed(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"embed.weight.*overlap"):
        streamconv.open(checkpoint)


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd"])
def test_paths_that_leave_the_directory(copied, path: str) -> None:
    def change(metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = path

    checkpoint = copied("variants/bare")
    changed(checkpoint, change)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        streamconv.open(checkpoint)


def test_bytes_that_went_through_an_extension(copied) -> None:
    def change(metadata) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]

    checkpoint = copied("variants/bare")
    changed(checkpoint, change)
    with pytest.raises(CheckpointError, match="went through an extension"):
        streamconv.open(checkpoint)


def test_sizes_beyond_all_memory_are_refused_before_anything_is_read(copied) -> None:
    def change(metadata) -> None:
        metadata.state_dict_metadata["embed.weight"].size = torch.Size([1 << 40, 1 << 40])

    checkpoint = copied("variants/bare")
    changed(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"embed.weight.*not understood"):
        streamconv.open(checkpoint)


def test_code_in_metadata_does_not_run(copied, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    checkpoint = copied("variants/bare")
    changed(checkpoint, lambda metadata: setattr(metadata, "planner_data", {"x": Trap()}))
    assert len(streamconv.open(checkpoint)) == 11
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("world", [2, 3])
def test_the_optimizer_beside_the_files_of_ranks_comes_by_parameter(runs, tmp_path: Path, world: int) -> None:
    run = runs(world) / "verl"
    live = load_file(run / "expected.safetensors")
    streamconv.convert(run / "checkpoint", tmp_path / "out", optimizer=True)
    assert_same(
        load_file(tmp_path / "out" / "model.safetensors"),
        {name: each for name, each in live.items() if not name.startswith("optimizer.")},
    )
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        wanted = {
            name.removeprefix("optimizer.").removesuffix(f".{moment}"): each
            for name, each in live.items()
            if name.endswith(f".{moment}")
        }
        assert len(wanted) == 3
        assert_same(load_file(tmp_path / "out" / "optimizer" / moment / "model.safetensors"), wanted)
    assert '"lr": 0.01' in (tmp_path / "out" / "optimizer" / "optimizer.json").read_text()
    assert any("--optimizer" in note for note in streamconv.plan(run / "checkpoint").notes)


def test_a_rank_of_the_optimizer_that_is_missing_is_named(copied) -> None:
    checkpoint = copied("verl/checkpoint", 3)
    (checkpoint / "optim_world_size_3_rank_1.pt").unlink()
    with pytest.raises(CheckpointError, match="of 3 ranks, 1 are missing"):
        streamconv.open(checkpoint, optimizer=True)
    assert len(streamconv.open(checkpoint)) == 3


def test_missing_shards_and_ranks_are_named(copied, runs, tmp_path: Path) -> None:
    ranks = copied("ranks/fsdp/checkpoint", 3)
    (ranks / "model_world_size_3_rank_1.pt").unlink()
    with pytest.raises(CheckpointError, match="of 3 ranks, 1 are missing"):
        streamconv.open(ranks)
    shards = Path(shutil.copytree(runs(2) / "variants" / "sharded", tmp_path / "sharded"))
    for path in shards.glob("shard-00001-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="parts hold"):
        streamconv.open(shards)


@pytest.mark.parametrize(
    "name",
    [
        "variants/bare/__0_0.distcp",
        "variants/bare/.metadata",
        "variants/sharded/shard-00001-model-00001-of-00002.safetensors",
        "ranks/fsdp/checkpoint/model_world_size_2_rank_0.pt",
    ],
)
def test_one_file_of_many_is_not_taken_for_the_model(runs, name: str) -> None:
    with pytest.raises(UsageError, match="give the directory"):
        streamconv.open(runs(2) / name)


def test_flat_parameters_of_fsdp1_are_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(
        {"model": {"_fsdp_wrapped_module.flat_param": torch.zeros(7)}},
        checkpoint_id=tmp_path / "run",
        no_dist=True,
    )
    with pytest.raises(CheckpointError, match="flat parameter of FSDP1"):
        streamconv.open(tmp_path / "run")


def test_wrappers_are_taken_out_of_the_names(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {f"_fsdp_wrapped_module.layer.{index}.weight": torch.randn(3, index + 1) for index in range(3)}
    dcp.save({"state_dict": state, "optimizer": {"step": 3}}, checkpoint_id=tmp_path / "run", no_dist=True)
    found = converted(tmp_path / "run", tmp_path / "out")
    assert_same(found, {name.removeprefix("_fsdp_wrapped_module."): each for name, each in state.items()})


def test_several_checkpoints_in_a_directory_are_named(copied) -> None:
    checkpoint = copied("variants/bare")
    parent = checkpoint.parent / "run"
    shutil.copytree(checkpoint, parent / "step-10")
    shutil.copytree(checkpoint, parent / "step-20")
    with pytest.raises(CheckpointError, match="give one of the directories: step-20, step-10"):
        streamconv.open(parent)


def test_thousands_of_parts_are_planned_from_headers(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {f"layers.{index}.weight": torch.empty(3, 2) for index in range(3000)}
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    assert len(streamconv.plan(tmp_path / "run").tensors) == 3000
