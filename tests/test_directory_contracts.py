"""Formats of several files keep the contract of readers; a format of one file has it in its own test."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from reader_contract import FLOATS, NAMES, SAFETENSORS, TORCH_DTYPES, ReaderContract, Shape, State, part, raw
from safetensors.torch import save_file
from test_mindspore import DTYPES as MINDSPORE
from test_mindspore import record, sharded, strategy_file
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import deepspeed_layout
from streamconv.options.records import ReadingOptions
from streamconv.readers.mindspore.ckpt import DTYPES as MINDSPORE_NAMES

# A contract, many times over: run it when this is what you change.
pytestmark = pytest.mark.slow

WITHOUT_EMPTY: tuple[Shape, ...] = ((), (1,), (7,), (3, 5), (2, 3, 4))


class TestHuggingFace(ReaderContract):
    holds = SAFETENSORS

    def write(self, state: State, directory: Path) -> Path:
        save_torch_state_dict(state, directory, max_shard_size=4000)
        return directory


class TestPipeline(ReaderContract):
    holds = SAFETENSORS
    hints = ("model_index.json",)

    def called(self, name: str) -> str:
        return f"{'text_encoder' if hash_of(name) else 'unet'}/{name}"

    def write(self, state: State, directory: Path) -> Path:
        (directory / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
        for component in ("text_encoder", "unet"):
            own = {name: each for name, each in state.items() if self.called(name).startswith(component)}
            if own:
                (directory / component).mkdir()
                save_torch_state_dict(
                    own,
                    directory / component,
                    filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
                    max_shard_size=4000,
                )
        return directory


def hash_of(name: str) -> int:
    """0 or 1, by the name alone."""
    return sum(name.encode()) % 2


# ------------------------------------------------------------------------------------- DCP and FSDP


class TestDistcp(ReaderContract):
    form: ClassVar = SerializationFormat.TORCH_SAVE

    def write(self, state: State, directory: Path) -> Path:
        writer = FileSystemWriter(
            directory, single_file_per_rank=len(state) > 10, serialization_format=self.form
        )
        dcp.save(state, storage_writer=writer, no_dist=True)
        return directory


class TestDistcpOfSafetensors(TestDistcp):
    holds = SAFETENSORS
    form = SerializationFormat.SAFETENSORS


class TestShardedSafetensors(ReaderContract):
    holds = tuple(name for name in FLOATS if name in SAFETENSORS)

    def write(self, state: State, directory: Path) -> Path:
        where = {name: 1 + number % 2 for number, name in enumerate(state)}
        writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=where, save_distributed=True)
        dcp.save(state, storage_writer=writer, no_dist=True)
        return directory


class TestRankFiles(ReaderContract):
    """A file of DTensors for each rank, by torch in the place of one rank after the other."""

    @pytest.fixture(autouse=True)
    def no_group(self) -> Iterator[None]:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()

    def write(self, state: State, directory: Path) -> Path:
        for rank in range(2):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
            mesh = init_device_mesh("cpu", (2,))
            own = {}
            for name, whole in state.items():
                local, placement = (part(whole, 0, rank, 2), Shard(0)) if whole.ndim else (whole, Replicate())
                own[name] = DTensor.from_local(
                    local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
                )
            torch.save(own, directory / f"model_world_size_2_rank_{rank}.pt")
            dist.destroy_process_group()
        return directory


# ------------------------------------------------------------------------------------- DeepSpeed, SAT


class TestZeroStage2(ReaderContract):
    stage = 2
    holds = ("F32",)
    hints = ("latest",)

    def write(self, state: State, directory: Path) -> Path:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        deepspeed_layout.write(directory, deepspeed_layout.Layout(shapes, self.stage, 3), state)
        return directory


class TestZeroStage3(TestZeroStage2):
    stage = 3

    def files(self, path: Path) -> list[Path]:
        """Other ranks' model states hold nothing where all parameters are trained."""
        return [file for file in super().files(path) if not re.match(r"zero_pp_rank_[1-9]", file.name)]


class TestZeroStage2OwnWeights(TestZeroStage2):
    """What the model itself holds, in BF16 as trained, with the rest as it is."""

    holds = TORCH_DTYPES
    reading = ReadingOptions(weights="model")

    def write(self, state: State, directory: Path) -> Path:
        super().write({"trained": torch.ones(8)}, directory)
        path = next(directory.rglob("mp_rank_00_model_states.pt"))
        document = torch.load(path, weights_only=False)
        torch.save({**document, "module": state}, path)
        return directory

    def files(self, path: Path) -> list[Path]:
        return [file for file in super().files(path) if "optim_states" not in file.name]


class TestStagesOfAPipeline(TestZeroStage2OwnWeights):
    """Two stages, a layer each, whose tensors have local names in the layer's file."""

    def called(self, name: str) -> str:
        return f"{1 + 2 * hash_of(name)}.{name}"

    def write(self, state: State, directory: Path) -> Path:
        for stage in range(2):
            own = {name: each for name, each in state.items() if hash_of(name) == stage}
            shapes = {self.called(name): tuple(each.shape) for name, each in own.items()}
            tag = deepspeed_layout.write(
                directory, deepspeed_layout.Layout(shapes, 2, 1, stage, {"module": None})
            )
            torch.save(own, tag / f"layer_{1 + 2 * stage:02d}-model_states.pt")
        return directory


class TestMixtureOfExperts(TestZeroStage2OwnWeights):
    """Half of the tensors in the model's states, half in the file of one of two experts."""

    def called(self, name: str) -> str:
        expert = sum(name.encode()) // 2 % 2
        return f"moe.experts.deepspeed_experts.{expert}.{name}" if hash_of(name) else name

    def write(self, state: State, directory: Path) -> Path:
        super().write({name: each for name, each in state.items() if self.called(name) == name}, directory)
        (tag,) = (path for path in directory.iterdir() if path.is_dir())
        for expert in range(2):
            named = {self.called(name): each for name, each in state.items()}
            own = {name: each for name, each in named.items() if f".deepspeed_experts.{expert}." in name}
            torch.save(own, tag / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt")
        return directory


class TestUniversal(TestZeroStage2):
    """Each parameter whole in a directory of its own, beside the model's states."""

    names = tuple(name for name in NAMES if "/" not in name)
    hints = ("latest", "latest_universal")

    def write(self, state: State, directory: Path) -> Path:
        super().write(state, directory)
        (tag,) = (path for path in directory.iterdir() if path.is_dir())
        for path in tag.glob("*optim_states.pt"):
            path.unlink()
        for name, tensor in state.items():
            (tag / "zero" / name).mkdir(parents=True)
            torch.save(self.saved(tensor), tag / "zero" / name / "fp32.pt")
        (directory / "latest_universal").write_text(tag.name)
        return directory

    def saved(self, tensor: torch.Tensor) -> object:
        return {"param": tensor}


class TestUniversalOfStage3(TestUniversal, TestZeroStage3):
    """A flat row alone, whose shape the model's states say."""

    def saved(self, tensor: torch.Tensor) -> object:
        return tensor.reshape(-1)


class TestSat(ReaderContract):
    """Two model-parallel ranks, each with half of the rows."""

    hints = ("latest",)

    def called(self, name: str) -> str:
        return f"mixins.{name}.mlp.dense_h_to_4h.weight"

    def write(self, state: State, directory: Path) -> Path:
        (directory / "7").mkdir()
        for rank in range(2):
            own = {
                self.called(name): part(whole, 0, rank, 2) if whole.ndim else whole
                for name, whole in state.items()
            }
            torch.save({"module": own}, directory / "7" / f"mp_rank_{rank:02d}_model_states.pt")
        (directory / "latest").write_text("7")
        (directory / "model_config.json").write_text('{"model_parallel_size": 2}')
        return directory


# ----------------------------------------------------------------------------------------- MindSpore


def saved_ckpt(state: State, path: Path) -> None:
    """By MindSpore's own message; its `Tensor` takes neither every dtype nor every NaN unchanged."""
    kinds = {name: kind for kind, name in MINDSPORE_NAMES.items()}
    names = {str(tensor): kinds[name] for name, tensor in MINDSPORE.items()}
    path.write_bytes(
        b"".join(
            record(name, names[str(each.dtype)], list(each.shape), raw(each)) for name, each in state.items()
        )
    )


class TestMindSporeCkpt(ReaderContract):
    holds = tuple(MINDSPORE)
    shapes = WITHOUT_EMPTY

    def write(self, state: State, directory: Path) -> Path:
        saved_ckpt(state, directory / "net.ckpt")
        return directory / "net.ckpt"


class TestMindSporeSafetensors(ReaderContract):
    holds = tuple(MINDSPORE)

    def write(self, state: State, directory: Path) -> Path:
        files = {name: f"part{number % 2}.safetensors" for number, name in enumerate(state)}
        for file in set(files.values()):
            own = {name: each for name, each in state.items() if files[name] == file}
            save_file(own, directory / file, {"format": "ms"})
        (directory / "param_name_map.json").write_text(json.dumps(files))
        return directory


class TestMindSporeRanks(ReaderContract):
    """Two ranks, each with half of the rows where they divide."""

    holds = tuple(MINDSPORE)
    shapes = WITHOUT_EMPTY

    def write(self, state: State, directory: Path) -> Path:
        halved = {name for name, each in state.items() if each.ndim and each.shape[0] % 2 == 0}
        for rank in range(2):
            place = directory / "checkpoint" / f"rank_{rank}"
            place.mkdir(parents=True)
            own = {name: part(each, 0, rank, 2) if name in halved else each for name, each in state.items()}
            saved_ckpt(own, place / "net.ckpt")
        (directory / "strategy").mkdir()
        maps = {
            name: ([2], [[0 if name in halved and axis == 0 else -1] for axis in range(each.ndim)], 0, 0)
            for name, each in state.items()
        }
        strategy_file(directory / "strategy" / "ckpt_strategy_rank_0.ckpt", maps)
        return directory / "checkpoint"


class TestMindFormersShards(ReaderContract):
    holds = SAFETENSORS
    hints = ("latest_checkpointed_iteration.txt",)

    def write(self, state: State, directory: Path) -> Path:
        sharded(directory / "iteration_00000070", state, (2, 1))
        return directory
