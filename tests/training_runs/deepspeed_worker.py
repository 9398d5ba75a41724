"""One rank of the runs that write DeepSpeed checkpoints: `python -m ... OUT WORLD`, with torchrun's environment.

For each case: OUT/<case>/checkpoint as DeepSpeed writes it, and OUT/<case>/expected.safetensors with the live
tensors (`weights/NAME`, `model/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`), gathered by DeepSpeed itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.comm.torch as deepspeed_torch
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file

from tests.training_runs import deepspeed_models, deepspeed_parallel
from tests.training_runs.models import Odd, randomised

# DeepSpeed compiles an operation for shared memory at its first start; gloo does without.
deepspeed_torch.build_shm_op = lambda: None


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        config: DeepSpeed's, without what all have in common.
        tied, frozen: of the model.
        groups: parameter groups.
        steps: optimizer steps before the save.
    """

    config: dict[str, Any]
    tied: bool = True
    frozen: bool = True
    groups: int = 1
    steps: int = 2
    extra: dict[str, Any] = field(default_factory=dict)


BF16 = {"bf16": {"enabled": True}}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    """The part of a config that says how to partition."""
    return {"zero_optimization": {"stage": stage, **options}}


CASES: dict[str, Case] = {
    "stage0": Case({**zero(0)}),
    "stage0-bf16": Case({**zero(0), **BF16}),
    "stage0-bf16-frozen-none": Case({**zero(0), **BF16}, frozen=False),
    "stage1": Case({**zero(1)}),
    "stage1-bf16-frozen-tied": Case({**zero(1), **BF16}),
    "stage1-bf16-optimizer": Case({**zero(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}}, groups=2),
    "stage2-bf16-two-groups": Case({**zero(2), **BF16}, groups=2),
    "stage2-fp32-untied": Case({**zero(2)}, tied=False, frozen=False),
    "stage2-aligned-round-robin": Case(
        {**zero(2, round_robin_gradients=True, parameter_alignment=True), **BF16}, groups=2
    ),
    "stage1-elastic": Case({**zero(1, elastic_checkpoint=True), **BF16}, groups=2),
    "stage3-bf16": Case({**zero(3, stage3_param_persistence_threshold=0), **BF16}),
    "stage3-sub-groups": Case(
        {**zero(3, sub_group_size=200, stage3_param_persistence_threshold=50), **BF16}, groups=2
    ),
    "stage3-fp32-untied": Case({**zero(3)}, tied=False, frozen=False),
}

UNIVERSAL = ("stage2-bf16-two-groups", "stage3-sub-groups")
"""Of which a universal checkpoint is made too."""


def main(out: Path, wanted: list[str]) -> None:
    """Write all cases."""
    deepspeed.init_distributed("gloo")
    for name, case in CASES.items():
        if not wanted or name in wanted:
            run(out / name, case)
    others = {
        "moe": deepspeed_parallel.mixture,
        "llama": deepspeed_models.llama,
        "cogvideox": deepspeed_models.cogvideox,
    }
    if torch.distributed.get_world_size() % 2 == 0:
        others["pipeline"] = deepspeed_parallel.pipeline
    else:
        del others["moe"]
    for name, other in others.items():
        if not wanted or name in wanted:
            other(out / name)
    if torch.distributed.get_rank() == 0:
        for name in UNIVERSAL:
            if not wanted or name in wanted:
                universal(out / name / "checkpoint")
    torch.distributed.barrier()


def universal(checkpoint: Path) -> None:
    """Make a universal checkpoint beside a save, with DeepSpeed's own program."""
    from deepspeed.checkpoint import ds_to_universal

    tag = (checkpoint / "latest").read_text()
    target = checkpoint.parent / "universal" / f"{tag}_universal"
    arguments = [
        "--input_folder",
        str(checkpoint / tag),
        "--output_folder",
        str(target),
        "--inject_missing_state",
    ]
    sys.argv = ["ds_to_universal", "--num_extract_workers", "1", "--num_merge_workers", "1", *arguments]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def run(out: Path, case: Case) -> None:
    """Train and save one case."""
    model = randomised(Odd(tied=case.tied, frozen=case.frozen), 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = (
        [{"params": trained}]
        if case.groups == 1
        else [
            {"params": [each for each in trained if each.ndim > 1], "weight_decay": 0.1},
            {"params": [each for each in trained if each.ndim == 1], "weight_decay": 0.0},
        ]
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.config,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(100 + engine.global_rank)
    for _ in range(case.steps):
        loss = engine(torch.randint(0, 37, (1, 5)))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / "checkpoint"))
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Done at the first step for the groups that had a state by then; ask again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    expected = {key: value.detach().clone().contiguous() for key, value in live(engine)}
    if engine.global_rank == 0:
        save_file(expected, out / "expected.safetensors")
    torch.distributed.barrier()


def live(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What DeepSpeed itself says that the tensors are. All ranks must ask."""
    module = engine.module
    stage = engine.zero_optimization_stage()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield f"model/{name}", parameter.data.clone()
        else:
            yield f"model/{name}", parameter.data.clone()
        if parameter.requires_grad and stage > 0:
            yield f"weights/{name}", safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)
    for name, buffer in module.named_buffers():
        if name != "hidden":
            yield f"model/{name}", buffer


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
