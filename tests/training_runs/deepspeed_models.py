"""Models of libraries under DeepSpeed, saved as their trainers save them."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

from tests.training_runs.models import COGVIDEOX, LLAMA, randomised


def llama(out: Path) -> None:
    """A `checkpoint-2` of the Hugging Face trainer: stage 3, a config beside the save."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = randomised(LlamaForCausalLM(LlamaConfig(**LLAMA)), 11)
    model.config.save_pretrained(out / "checkpoint-2")
    (out / "checkpoint-2" / "tokenizer_config.json").write_text("{}\n")
    engine = _saved(
        model, {"stage": 3, "stage3_param_persistence_threshold": 20}, out / "checkpoint-2", "global_step2"
    )
    expected = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            expected[name] = parameter.data.clone()
    if engine.global_rank == 0:
        save_file(expected, out / "expected.safetensors")


def cogvideox(out: Path) -> None:
    """A fine-tune with diffusers and accelerate: the transformer alone, under the tag `pytorch_model`."""
    from diffusers import CogVideoXTransformer3DModel

    model = randomised(CogVideoXTransformer3DModel(**COGVIDEOX), 12)
    engine = _saved(model, {"stage": 2}, out / "checkpoint-2", "pytorch_model")
    if engine.global_rank == 0:
        save_file(
            {name: each.clone() for name, each in engine.module.state_dict().items()},
            out / "expected.safetensors",
        )


def _saved(model: torch.nn.Module, zero: dict[str, object], out: Path, tag: str) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config
    )
    engine.save_checkpoint(str(out), tag=tag)
    return engine
