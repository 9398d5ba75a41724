"""Runs of DeepSpeed's other kinds of parallelism: experts and pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from tests.training_runs.models import randomised

EXPERTS = 4


class Expert(torch.nn.Module):
    """A small feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(13, 7)
        self.down = torch.nn.Linear(7, 13)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, 13] to the same."""
        return self.down(torch.relu(self.up(states)))


class Mixture(torch.nn.Module):
    """Two layers of experts between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = torch.nn.Linear(13, 13)
        self.layers = torch.nn.ModuleList(
            MoE(13, Expert(), num_experts=EXPERTS, ep_size=2, k=1) for _ in range(2)
        )
        self.outward = torch.nn.Linear(13, 5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Mean of all outputs."""
        states = self.inward(states)
        for layer in self.layers:
            states = states + layer(states)[0]
        return self.outward(states).float().mean()


def mixture(out: Path) -> None:
    """Experts on two (of W) ranks, ZeRO 2, BF16."""
    torch.manual_seed(7)
    model = Mixture()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(50 + engine.global_rank)
    for _ in range(2):
        loss = engine(torch.randn(2, 3, 13, dtype=torch.bfloat16))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / "checkpoint"))
    rank = engine.global_rank
    expected = {}
    for name, parameter in engine.module.named_parameters():
        expected[f"model/{_global_expert(name, rank)}"] = parameter.data.clone()
        expected[f"weights/{_global_expert(name, rank)}"] = safe_get_full_fp32_param(parameter)
    if rank < 2:  # further ranks hold the same experts again
        save_file(expected, out / f"expected_{rank}.safetensors")
    torch.distributed.barrier()


def _global_expert(name: str, rank: int) -> str:
    parts = name.split(".")
    if "deepspeed_experts" in parts:
        at = parts.index("deepspeed_experts") + 1
        parts[at] = str(int(parts[at]) + rank % 2 * (EXPERTS // 2))
    return ".".join(parts)


class Block(torch.nn.Module):
    """A layer of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(13, 13)
        self.norm = torch.nn.LayerNorm(13)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, 13] to the same."""
        return self.norm(states + self.mix(states))


def _embedded(layer: torch.nn.Embedding, states: torch.Tensor) -> torch.Tensor:
    return states @ layer.weight.T


def pipeline(out: Path) -> None:
    """Two stages, tied embedding, ZeRO 1, BF16."""
    torch.manual_seed(3)
    layers: list[Any] = [
        TiedLayerSpec("embed", torch.nn.Embedding, 37, 13),
        LayerSpec(Block),
        lambda states: states * 1.0,
        LayerSpec(Block),
        LayerSpec(Block),
        TiedLayerSpec("embed", torch.nn.Embedding, 37, 13, forward_fn=_embedded),
    ]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda logits, labels: logits.float().mean())
    randomised(model, 5)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}], lr=1e-2)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train_batch(iter(_batches()))
    engine.save_checkpoint(str(out / "checkpoint"))
    expected = {}
    for name, parameter in engine.module.named_parameters():
        expected[f"model/{name}"] = parameter.data.clone()
        expected[f"weights/{name}"] = safe_get_full_fp32_param(parameter)
    save_file(expected, out / f"expected_{engine.global_rank}.safetensors")
    torch.distributed.barrier()


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield torch.arange(5), torch.arange(5)
