"""One rank of the runs that write checkpoints with torch.distributed.checkpoint: `python -m ... OUT`.

For each case: OUT/<case>/checkpoint, and OUT/expected_<model>.safetensors with the live tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.training_runs.models import LLAMA, Odd, randomised

World = int
Parallel = Callable[[torch.nn.Module], None]


def fsdp(module: torch.nn.Module) -> None:
    """Dim 0 over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in (module.first, module.second):
        fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)


def hybrid(module: torch.nn.Module) -> None:
    """Two replicas of two shards."""
    fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def tensor(module: torch.nn.Module) -> None:
    """Columns and rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(module, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def both(module: torch.nn.Module) -> None:
    """Tensor parallel and FSDP: rectangles."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(module, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    fully_shard(module, mesh=mesh["dp"])


def main(out: Path) -> None:
    """Write all cases of this number of ranks."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    ways: dict[str, Parallel] = {"fsdp": fsdp, "tp": tensor, "replicated": lambda module: None}
    if world == 4:
        ways |= {"hybrid": hybrid, "both": both}
    for name, way in ways.items():
        if name in ("tp", "both"):  # sizes that do not divide cannot be trained, but are saved
            _untrained(out / name, way)
        else:
            _trained(out / name, way)
        _rank_files(out / "ranks" / name, way)
    _verl(out / "verl")
    if world == 2:
        _variants(out)
        _llama(out / "llama")


def _live(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors; all ranks must ask."""
    whole = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, torch.Tensor):
            whole[name] = value.detach().clone().contiguous()
    return whole


def _expect(out: Path, state: dict[str, Any]) -> None:
    whole = _live(state)
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        save_file(whole, out / "expected.safetensors")
    dist.barrier()


def _model(way: Parallel, *, tied: bool = False) -> torch.nn.Module:
    model = randomised(Odd(tied=tied, frozen=True), 21)
    way(model)
    return model


def _trained(out: Path, way: Parallel) -> None:
    """Model and optimizer, two steps in."""
    model = _model(way)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    torch.manual_seed(3)
    for _ in range(2):
        model(torch.randint(0, 37, (2, 5))).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "note": "second step",
        "step": 2,
    }
    flat = {f"model.{name}": value for name, value in state["model"].items()}
    for name, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    _expect(out, flat)
    dcp.save(state, storage_writer=FileSystemWriter(out / "checkpoint"))


def _untrained(out: Path, way: Parallel) -> None:
    state = get_model_state_dict(_model(way))
    _expect(out, {f"model.{name}": value for name, value in state.items()})
    dcp.save({"model": state}, storage_writer=FileSystemWriter(out / "checkpoint"))


def _variants(out: Path) -> None:
    """Other ways to save one model."""
    model = _model(fsdp)
    state = get_model_state_dict(model)
    _expect(out / "variants", state)
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    dcp.save(state, storage_writer=FileSystemWriter(out / "variants" / "bare"))
    dcp.save(
        state,
        storage_writer=FileSystemWriter(out / "variants" / "a-file-a-tensor", single_file_per_rank=False),
    )
    dcp.save(state, storage_writer=FileSystemWriter(out / "variants" / "threads", thread_count=3))
    dcp.save(
        {**state, "text": "beside"},
        storage_writer=FileSystemWriter(
            out / "variants" / "safetensors", serialization_format=SerializationFormat.SAFETENSORS
        ),
    )
    where = {name: 1 + index % 2 for index, name in enumerate(floats)}
    dcp.save(
        floats,
        storage_writer=HuggingFaceStorageWriter(
            str(out / "variants" / "sharded"), fqn_to_index_mapping=where, save_distributed=True
        ),
    )
    dcp.save(
        floats,
        storage_writer=HuggingFaceStorageWriter(
            str(out / "variants" / "consolidated"), fqn_to_index_mapping=where, save_distributed=True,
            enable_consolidation=True,
        ),
    )  # fmt: skip
    low = {name: value.to(torch.bfloat16) for name, value in floats.items()}
    _expect(out / "bf16", low)
    dcp.save(low, storage_writer=FileSystemWriter(out / "bf16" / "checkpoint"))
    tied = get_model_state_dict(_model(fsdp, tied=True))
    _expect(out / "tied", tied)
    dcp.save(tied, storage_writer=FileSystemWriter(out / "tied" / "checkpoint"))


def _rank_files(out: Path, way: Parallel) -> None:
    """What verl and SkyRL write: a file a rank, with its parts."""
    own = dict(get_model_state_dict(_model(way)))
    _expect(out, own)
    (out / "checkpoint").mkdir(exist_ok=True)
    name = f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(own, out / "checkpoint" / name)
    dist.barrier()


def _verl(out: Path) -> None:
    """The same with the state of the optimizer beside it, as verl's FSDPCheckpointManager saves both."""
    model = randomised(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False)), 5)
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.ones(4, 5)).sum().backward()
        optimizer.step()
    own, state = model.state_dict(), optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    flat = dict(own)
    for key, values in state["state"].items():
        flat |= {f"optimizer.{names[key]}.{word}": value for word, value in values.items()}
    _expect(out, flat)
    (out / "checkpoint").mkdir(exist_ok=True)
    last = f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(own, out / "checkpoint" / f"model_{last}")
    torch.save(state, out / "checkpoint" / f"optim_{last}")
    dist.barrier()


def _llama(out: Path) -> None:
    """What accelerate writes for a model of transformers, and what torchtitan calls the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = randomised(LlamaForCausalLM(LlamaConfig(**LLAMA)), 31).to(torch.bfloat16)
    config = model.config
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = get_model_state_dict(model)
    _expect(out, state)
    checkpoint = out / "checkpoint-2"
    if dist.get_rank() == 0:
        config.save_pretrained(checkpoint)
    dist.barrier()
    dcp.save({"model": state}, storage_writer=FileSystemWriter(checkpoint / "pytorch_model_fsdp_0"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(model, optimizer)},
        storage_writer=FileSystemWriter(checkpoint / "optimizer_0"),
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
