"""One rank of a sample: `python -m bench.dcp_sample RANK WORLD MEETING OUT BYTES`. A Llama under FSDP, with its optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench import samples


def main(rank: int, world: int, meeting: Path, out: Path, size: int) -> None:
    """Write this rank's part: F32 weights, and as much again twice for the moments."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(rank)

    def part(shape: tuple[int, ...]) -> DTensor:
        rows = torch.empty(shape[0]).chunk(world)[rank].numel()
        local = torch.empty(rows, *shape[1:]).uniform_(-0.05, 0.05, generator=generator)
        return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=_strides(shape))

    shapes = dict(samples.llama_of(size, "F32").tensors())
    state = {
        "model": {name: part(shape) for name, shape in shapes.items()},
        "optimizer": {
            f"state.{name}.{moment}": part(shape)
            for name, shape in shapes.items()
            for moment in ("exp_avg", "exp_avg_sq")
        },
    }
    dcp.save(state, checkpoint_id=out)
    dist.destroy_process_group()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], 1) if len(shape) == 2 else (1,)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
