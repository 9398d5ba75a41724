"""What is converted: a small checkpoint of each format, and the command lines that convert it.

`python -m tests.faults.sources DIRECTORY` makes the checkpoints, in a process of its own: it needs torch, and the process
that injects faults is forked for each run.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversion.

    Attributes:
        source: the directory of a checkpoint that this module makes, or a file in one.
        options: of the command line.
        target: the name of the destination.
    """

    source: str
    options: tuple[str, ...] = ()
    target: str = "out"

    @property
    def deletes(self) -> bool:
        """Whether the source goes on the way."""
        return "--delete-source" in self.options


def _scenario(source: str, options: str = "", target: str = "out") -> Scenario:
    return Scenario(source, tuple(options.split()), target)


SCENARIOS = {
    "safetensors, re-sharded": _scenario("llama", "--max-shard 300KB"),
    "safetensors, hashed": _scenario("llama", "--max-shard 400KB --checksum"),
    "safetensors, cast": _scenario("llama", "--max-shard 200KB --dtype BF16 --dtype *norm*=F32"),
    "safetensors to torch": _scenario("llama", "--to torch --max-shard 300KB"),
    "safetensors to torch, cast": _scenario("llama", "--to torch --max-shard 300KB --dtype F16"),
    "safetensors to MindSpore": _scenario("llama", "--to mindspore"),
    "safetensors to MindSpore ranks": _scenario("llama", "--to mindspore --recipe auto --tp 2 --pp 2"),
    "safetensors to MindSpore's": _scenario("llama", "--to mindspore-safetensors --max-shard 400KB"),
    "safetensors to FP8": _scenario("llama-bf16", "--recipe bf16-fp8 --max-shard 200KB"),
    "torch zip": _scenario("torch-zip", "--max-shard 300KB"),
    "torch zip, cast": _scenario("torch-zip", "--max-shard 200KB --dtype BF16"),
    "torch legacy": _scenario("torch-legacy", "--max-shard 300KB"),
    "torch legacy to zip": _scenario("torch-legacy", "--to torch --max-shard 300KB --dtype F16"),
    "DeepSpeed ZeRO 1": _scenario("zero-1", "--max-shard 300KB"),
    "DeepSpeed ZeRO 2": _scenario("zero-2", "--max-shard 200KB --dtype BF16"),
    "DeepSpeed ZeRO 3": _scenario("zero-3", "--max-shard 300KB"),
    "DeepSpeed ZeRO 3 to torch": _scenario("zero-3", "--to torch --max-shard 200KB --dtype BF16"),
    "DCP": _scenario("dcp", "--max-shard 300KB"),
    "DCP, cast": _scenario("dcp", "--max-shard 200KB --dtype F16"),
    "SAT ranks by recipe": _scenario("sat", "--recipe sat-cogvlm --max-shard 200KB"),
    "to SAT ranks by recipe": _scenario("cogvlm", "--recipe sat-cogvlm --reverse --to sat --tp 2"),
    "SAT ranks, joined": _scenario("sat", "--max-shard 300KB"),
    "MindSpore": _scenario("mindspore", "--max-shard 300KB"),
    "MindSpore ranks": _scenario("mindspore-ranks", "--max-shard 300KB --dtype BF16"),
    "diffusers pipeline": _scenario("pipeline", "--dtype F16 --max-shard 200KB"),
    "diffusers pipeline, copied": _scenario("pipeline", "--max-shard 200KB"),
    "GPT-2, split by recipe": _scenario("gpt2", "--recipe gpt2-split --max-shard 200KB"),
    "ChatGLM to Llama by recipe": _scenario(
        "chatglm", "--recipe chatglm-llama --max-shard 200KB --dtype F32"
    ),
    "safetensors, source deleted": _scenario("llama", "--max-shard 300KB --delete-source --yes"),
    "safetensors, cast, source deleted": _scenario(
        "llama", "--max-shard 200KB --dtype BF16 --delete-source --yes --allow-loss"
    ),
    "DeepSpeed ZeRO 3, source deleted": _scenario(
        "zero-3", "--max-shard 300KB --delete-source --yes --allow-loss"
    ),
    "SAT ranks by recipe, source deleted": _scenario(
        "sat", "--recipe sat-cogvlm --max-shard 200KB --delete-source --yes --allow-loss"
    ),
    "diffusers pipeline, source deleted": _scenario("pipeline", "--to torch --delete-source --yes"),
    "one safetensors file": _scenario("llama", "--dtype BF16", "one.safetensors"),
    "one torch file": _scenario("torch-zip", "", "one.bin"),
    "one MindSpore file": _scenario("llama", "", "one.ckpt"),
}


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 640,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def llama() -> State:
    """A Llama's tensors: half a million numbers."""
    import torch

    hidden, inner, words = 96, 256, 640
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(4):
        before = f"model.layers.{layer}."
        shapes |= {
            before + "self_attn.q_proj.weight": (hidden, hidden),
            before + "self_attn.k_proj.weight": (hidden // 2, hidden),
            before + "self_attn.v_proj.weight": (hidden // 2, hidden),
            before + "self_attn.o_proj.weight": (hidden, hidden),
            before + "mlp.gate_proj.weight": (inner, hidden),
            before + "mlp.up_proj.weight": (inner, hidden),
            before + "mlp.down_proj.weight": (hidden, inner),
            before + "input_layernorm.weight": (hidden,),
            before + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def of_table(architecture: Any, config: dict[str, Any]) -> State:
    """Every tensor of an architecture's table."""
    import torch

    generator = torch.Generator().manual_seed(1)
    declared = architecture.tensors(architecture.sizes_of(config))
    return {
        name: torch.randn(each.shape, generator=generator)
        for name, each in declared.items()
        if not each.optional
    }


def make(base: Path) -> None:
    """Every checkpoint that a scenario names."""
    import torch

    from streamconv.families.cogvlm import SAT_COGVLM

    state = llama()
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    _safetensors(base / "llama", state, LLAMA, shards=3)
    _safetensors(base / "llama-bf16", half, LLAMA | {"torch_dtype": "bfloat16"}, shards=2)
    _torch(base / "torch-zip", state, legacy=False)
    _torch(base / "torch-legacy", state, legacy=True)
    _deepspeed(base, state)
    _dcp(base / "dcp", state)
    config = _COGVLM
    whole = of_table(SAT_COGVLM, config)
    whole["mixins.rotary.rotary_emb.inv_freq"] = torch.rand(64 // config["num_attention_heads"] // 2)
    _sat(base / "sat-whole", whole, config)
    _pipeline(base / "pipeline")
    _of_families(base)
    _converted(base)


def _config(directory: Path, config: dict[str, Any], name: str = "config.json") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(config, indent=2))


def _safetensors(
    directory: Path, state: State, config: dict[str, Any], shards: int, stem: str = "model"
) -> None:
    from safetensors.torch import save_file

    _config(directory, config)
    names = list(state)
    files = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{stem}.safetensors"
        part = names[shard::shards]
        save_file({name: state[name].contiguous() for name in part}, directory / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _torch(directory: Path, state: State, *, legacy: bool) -> None:
    import torch

    _config(directory, LLAMA)
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


def _deepspeed(base: Path, state: State) -> None:
    from bench.deepspeed_layout import Layout, write

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for stage in (1, 2, 3):
        write(base / f"zero-{stage}", Layout(shapes, stage, 3), state)


def _dcp(directory: Path, state: State) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": state}, checkpoint_id=directory, no_dist=True)


_EVA = {
    "model_class": "EVA2CLIPModel", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 1,
    "inner_hidden_size": 128, "max_sequence_length": 5, "use_final_layernorm": False, "layernorm_epsilon": 1e-6,
    "image_size": [28, 28], "in_channels": 3, "patch_size": 14,
}  # fmt: skip
_COGVLM: dict[str, Any] = {
    "model_type": "sat-cogvlm", "model_class": "CogVLMModel", "num_layers": 2, "hidden_size": 64,
    "num_attention_heads": 8, "vocab_size": 1024, "inner_hidden_size": 192, "use_bias": False, "eva_args": _EVA,
    "text_processor_version": "chat",
}  # fmt: skip


def _sat(directory: Path, state: State, config: dict[str, Any]) -> None:
    """One rank, as SAT writes it."""
    import torch

    (directory / "100").mkdir(parents=True)
    (directory / "latest").write_text("100")
    torch.save({"module": state}, directory / "100" / "mp_rank_00_model_states.pt")
    shown = {key: value for key, value in config.items() if key != "model_type"}
    _config(directory, {**shown, "model_parallel_size": 1}, "model_config.json")


def _pipeline(directory: Path) -> None:
    import torch

    generator = torch.Generator().manual_seed(2)
    parts = {"transformer": ("Transformer2DModel", 24), "vae": ("AutoencoderKL", 9)}
    index: dict[str, Any] = {"_class_name": "Pipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for part, (kind, count) in parts.items():
        state = {f"blocks.{i}.weight": torch.randn(96, 128 + i, generator=generator) for i in range(count)}
        _safetensors(directory / part, state, {}, shards=2, stem="diffusion_pytorch_model")
        (directory / part / "config.json").write_text(json.dumps({"_class_name": kind}))
        index[part] = ["diffusers", kind]
    _config(directory / "scheduler", {"_class_name": "DDIMScheduler"}, "scheduler_config.json")
    _config(directory, index, "model_index.json")


def _of_families(base: Path) -> None:
    from streamconv.families.every import RECIPES

    gpt2 = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 96, "n_layer": 4, "n_head": 4,
        "n_positions": 128, "vocab_size": 512, "torch_dtype": "float32",
    }  # fmt: skip
    chatglm = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": 4, "hidden_size": 96,
        "ffn_hidden_size": 256, "num_attention_heads": 4, "kv_channels": 24, "multi_query_attention": True,
        "multi_query_group_num": 2, "padded_vocab_size": 512, "seq_length": 256, "layernorm_epsilon": 1e-5,
        "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True, "post_layer_norm": True,
        "original_rope": True, "apply_residual_connection_post_layernorm": False, "torch_dtype": "float32",
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    for name, recipe, config in (("gpt2", "gpt2-split", gpt2), ("chatglm", "chatglm-llama", chatglm)):
        source = next(each.source for each in RECIPES if each.name == recipe)
        _safetensors(base / name, of_table(source, config), config, shards=2)


def _converted(base: Path) -> None:
    """What is as this program writes it."""
    import streamconv

    streamconv.convert(base / "llama", base / "mindspore", to="mindspore")
    streamconv.convert(base / "llama", base / "mindspore-ranks", to="mindspore", recipe="auto", tp=2, pp=2)
    streamconv.convert(base / "sat-whole", base / "cogvlm", recipe="sat-cogvlm")
    streamconv.convert(base / "cogvlm", base / "sat", recipe="sat-cogvlm", reverse=True, to="sat", tp=2)
    for made in base.glob("*/.streamconv"):
        shutil.rmtree(made)  # a checkpoint like any other


if __name__ == "__main__":
    make(Path(sys.argv[1]))
