"""Valid checkpoints of every format, tiny, by the libraries that own the formats. Each function fills a directory."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1]))  # the tests' own helpers are modules of that directory

import numpy
import torch
import torch.distributed.checkpoint as dcp
import watched
from reference_models import baichuan, chatglm, internlm2, qwen
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import SerializationFormat

import streamconv
from bench import deepspeed_layout
from streamconv.errors import ConversionError

TIME = 1_700_000_000_000_000_000
"""When all files were written, in nanoseconds: plans know their sources by it."""

State = dict[str, torch.Tensor]
Seed = Callable[[Path], None]

SHAPES = {
    "embed.weight": (7, 4),
    "layers.0.w.weight": (4, 4),
    "layers.1.w.weight": (4, 4),
    "norm.weight": (3,),
}


def state() -> State:
    """A few tensors."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def varied() -> State:
    """Every kind of dtype, views, scalars, empty ones."""
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "a.weight": whole, "a.t": whole.T, "b": whole[1:3, ::2], "h": whole.bfloat16(), "i": torch.arange(5), "s": torch.tensor(1.5),
        "e": torch.zeros(0, 3), "u": torch.arange(9, dtype=torch.uint8), "f8": whole.to(torch.float8_e4m3fn),
        "c": torch.ones(2, dtype=torch.complex64), "bool": torch.tensor([True, False]), "x": torch.ones(1).expand(4),
    }  # fmt: skip


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "torch_dtype": "float32"}  # fmt: skip


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _contiguous(tensors: State) -> State:
    return {name: each.contiguous().clone() for name, each in tensors.items()}


def safetensors_file(place: Path) -> None:
    """One file of safetensors with a config."""
    save_file(_contiguous(varied()), place / "model.safetensors", {"format": "pt"})
    _json(place / "config.json", {"model_type": "toy", "hidden_size": 6})


def safetensors_index(place: Path) -> None:
    """Two shards with an index, a config, and files of a tokenizer."""
    names = list(SHAPES)
    where = {name: f"model-{1 + at % 2:05d}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: each for name, each in state().items() if where[name] == file}, place / file)
    _json(place / "model.safetensors.index.json", {"metadata": {"total_size": 252}, "weight_map": where})
    _json(place / "config.json", CONFIG)
    _json(place / "generation_config.json", {"eos_token_id": [2, 3]})
    _json(
        place / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"1": {"content": "x"}}},
    )


def bin_index(place: Path) -> None:
    """Two files of torch.save with an index."""
    names = list(SHAPES)
    where = {name: f"pytorch_model-{1 + at % 2:05d}-of-00002.bin" for at, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: each for name, each in state().items() if where[name] == file}, place / file)
    _json(place / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": where})


def torch_zip(place: Path) -> None:
    """A state dict of every kind of tensor."""
    torch.save(varied(), place / "pytorch_model.bin")


def torch_training(place: Path) -> None:
    """A training checkpoint: a model, averaged weights, an optimizer's state, and what else there is."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "ema": dict(model.state_dict()),
               "numpy": numpy.arange(6.0).reshape(2, 3), "args": {"lr": 0.1, "layers": [1, 2]}}  # fmt: skip
    torch.save(content, place / "last.pt")


def torch_protocol_4(place: Path) -> None:
    """A module's parameters, pickled by protocol 4."""
    torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "p": torch.nn.Parameter(torch.ones(2))}, place / "m.ckpt",
               pickle_protocol=4)  # fmt: skip


def numpy_arrays(place: Path) -> None:
    """Arrays of NumPy among the tensors, in either order, masked, of several types."""
    arrays = {"w": numpy.arange(12.0).reshape(3, 4), "f": numpy.asfortranarray(numpy.ones((2, 3), "f4")), "i": numpy.arange(3),
              "h": numpy.ones(4, "f2"), "big": numpy.arange(4).astype(">i4"), "s": numpy.float64(2)}  # fmt: skip
    torch.save({"state_dict": {**arrays, "t": torch.ones(2)}}, place / "model.pt")
    torch.save({**arrays, "t": torch.ones(2)}, place / "model2.pt", pickle_protocol=5)


def torch_legacy(place: Path) -> None:
    """The format of torch before 1.6."""
    torch.save(varied(), place / "model.pt", _use_new_zipfile_serialization=False)


def torch_legacy_training(place: Path) -> None:
    """The same of a structure."""
    torch.save(
        {"model": state(), "epoch": 1, "w": numpy.ones(3)},
        place / "last.pt",
        _use_new_zipfile_serialization=False,
    )


def zero_2(place: Path) -> None:
    """DeepSpeed, ZeRO 2."""
    deepspeed_layout.write(place, deepspeed_layout.Layout(SHAPES, 2, 2), state())


def zero_3(place: Path) -> None:
    """DeepSpeed, ZeRO 3."""
    deepspeed_layout.write(place, deepspeed_layout.Layout(SHAPES, 3, 2), state())


def zero_pipeline(place: Path) -> None:
    """DeepSpeed, two stages of a pipeline."""
    for stage in range(2):
        own = {
            f"{stage}.{name}": each for name, each in state().items() if name.startswith(f"layers.{stage}")
        }
        shapes = {name: tuple(each.shape) for name, each in own.items()}
        tag = deepspeed_layout.write(
            place, deepspeed_layout.Layout(shapes, 2, 1, stage, {"module": None}), own
        )
        torch.save(own, tag / f"layer_{1 + stage:02d}-model_states.pt")


def universal(place: Path) -> None:
    """DeepSpeed's universal checkpoint."""
    tag = deepspeed_layout.write(place, deepspeed_layout.Layout(SHAPES, 2, 1), state())
    for path in tag.glob("*optim_states.pt"):
        path.unlink()
    for name, tensor in state().items():
        (tag / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, tag / "zero" / name / "fp32.pt")
    (place / "latest_universal").write_text(tag.name)


def distributed(place: Path) -> None:
    """torch's distributed checkpoint."""
    dcp.save(
        {"model": state(), "optim": {"step": 3}, "odd": [1, {"x": torch.ones(2)}]},
        checkpoint_id=place,
        no_dist=True,
    )


def distributed_safetensors(place: Path) -> None:
    """The same with files of safetensors in it."""
    writer = dcp.FileSystemWriter(place, serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(state(), storage_writer=writer, no_dist=True)


def rank_files(place: Path) -> None:
    """A file of DTensors for each rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.arange(16.0).reshape(4, 4)
        part = DTensor.from_local(whole[2 * rank : 2 * rank + 2].clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape,
                                  stride=whole.stride())  # fmt: skip
        torch.save({"w": part}, place / f"model_world_size_2_rank_{rank}.pt")
        dist.destroy_process_group()


def sat(place: Path) -> None:
    """SAT, two ranks."""
    (place / "7").mkdir()
    for rank in range(2):
        own = {f"mixins.{name}.mlp.dense_h_to_4h.weight": each for name, each in state().items()}
        torch.save({"module": own, "iteration": 7}, place / "7" / f"mp_rank_{rank:02d}_model_states.pt")
    (place / "latest").write_text("7")
    _json(place / "model_config.json", {"model_parallel_size": 2, "num_layers": 2})


def _to_mindspore(place: Path, to: str, **options: Any) -> None:
    source = place.with_name(f"{place.name}.source")
    source.mkdir()
    tensors = {"model.tok_embeddings.embedding_weight": torch.ones(8, 4), "model.layers.0.attention.wq.weight": torch.ones(8, 4),
               "model.layers.1.attention.wo.weight": torch.ones(4, 8).bfloat16(), "lm_head.weight": torch.ones(8, 4)}  # fmt: skip
    save_file(tensors, source / "model.safetensors")
    streamconv.convert(source, place, to=to, engine="inline", **options)
    for path in (place / ".streamconv").iterdir():
        path.unlink()
    (place / ".streamconv").rmdir()


def mindspore_ckpt(place: Path) -> None:
    """MindSpore's own file."""
    _to_mindspore(place, "mindspore", crc=True)


def mindspore_safetensors(place: Path) -> None:
    """Files of safetensors with MindSpore's index."""
    _to_mindspore(place, "mindspore-safetensors", max_shard=200)


def mindspore_ranks(place: Path) -> None:
    """A file for each rank, with a strategy in JSON."""
    _to_mindspore(place, "mindspore", tp=2, pp=2)


def mindspore_safetensors_ranks(place: Path) -> None:
    """The same as safetensors."""
    _to_mindspore(place, "mindspore-safetensors", tp=2)


def mindspore_strategies(place: Path) -> None:
    """Ranks with strategies as MindSpore writes them."""
    from test_mindspore import GRID, ranks_by_hand, strategy_file

    ranks_by_hand(place, [*GRID])
    for rank in range(4):
        (place / "strategy").mkdir(exist_ok=True)
        strategy_file(place / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", GRID)


def mindspore_sharded(place: Path) -> None:
    """MindFormers' shards with their metadata."""
    from test_mindspore import SHARDED, sharded

    sharded(place / "iteration_00000070", SHARDED)


def pipeline(place: Path) -> None:
    """A pipeline of diffusers."""
    _json(place / "model_index.json", {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
                                       "text_encoder": ["transformers", "CLIPTextModel"]})  # fmt: skip
    for name, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (place / name).mkdir()
        save_file(state(), place / name / f"{stem}.safetensors")
        _json(place / name / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 8})
    _json(place / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})


def sentence_transformers(place: Path) -> None:
    """A model of sentence-transformers."""
    _json(place / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                                   {"idx": 1, "name": "1", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}])  # fmt: skip
    save_file(state(), place / "model.safetensors")
    _json(place / "config.json", CONFIG)
    (place / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, place / "2_Dense" / "model.safetensors")
    _json(place / "2_Dense" / "config.json", {"in_features": 2})


def _sentencepiece(**options: Any) -> bytes:
    from test_tokenizers import KINDS, trained

    return trained(**{**KINDS["bpe"], **options})


def chatglm_model(place: Path) -> None:
    """ChatGLM with its tokenizer."""
    chatglm.write(place, chatglm.Config(seq_length=32))
    (place / "tokenizer.model").write_bytes(_sentencepiece(vocab_size=330))
    _json(place / "tokenizer_config.json", {"name_or_path": "THUDM/chatglm3-6b", "remove_space": False})


def baichuan_model(place: Path) -> None:
    """Baichuan with its tokenizer."""
    baichuan.write(place)
    (place / "tokenizer.model").write_bytes(_sentencepiece(vocab_size=330))
    _json(place / "tokenizer_config.json", {"add_bos_token": True, "eos_token": {"content": "</s>"}, "model_max_length": 64,
                                            "added_tokens_decoder": {"400": {"content": "<x>"}}})  # fmt: skip
    _json(place / "special_tokens_map.json", {"bos_token": "<s>"})


def internlm2_model(place: Path) -> None:
    """InternLM2."""
    internlm2.write(place, form="safetensors")


def qwen_model(place: Path) -> None:
    """Qwen's first generation with its list of ranks."""
    qwen.write(place)
    (place / "qwen.tiktoken").write_bytes(_ranks())


def llama_model(place: Path) -> None:
    """A Llama by transformers, with a `tokenizer.json`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(**{key: CONFIG[key] for key in CONFIG if key != "architectures"})
    ).save_pretrained(place)
    _json(place / "tokenizer.json", {"version": "1.0", "added_tokens": [{"id": 1, "content": "<s>"}],
                                     "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": []}})  # fmt: skip
    _json(place / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"})


def _ranks() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"th", b"the"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def tokenizers(place: Path) -> None:
    """Tokenizers alone: of sentencepiece in both kinds, and a list of ranks."""
    from test_tokenizers import KINDS, trained

    for name, kind in (("bpe", "bpe"), ("unigram", "unigram nfkc"), ("own", "bpe with own pieces")):
        (place / f"{name}.model").write_bytes(trained(**KINDS[kind]))
    (place / "qwen.tiktoken").write_bytes(_ranks())
    _json(place / "settings.json", {"add_bos_token": True, "eos_token": {"content": "</s>"}, "chat_template": "{{ x }}",
                                    "added_tokens_decoder": {"3": {"content": "<x>"}}})  # fmt: skip


def recipe(place: Path) -> None:
    """A recipe, a file of edits, and a model that they are for."""
    heads, hidden, layers = 2, 4, 2
    tensors = {"wte.weight": torch.ones(8, hidden), "norm.weight": torch.ones(hidden)}
    for layer in range(layers):
        tensors |= {
            f"h.{layer}.attn.qkv.weight": torch.ones(3 * hidden, hidden),
            f"h.{layer}.norm.weight": torch.ones(hidden),
        }
    save_file(tensors, place / "model.safetensors")
    _json(
        place / "config.json",
        {"model_type": "mine", "n_head": heads, "n_embd": hidden, "n_layer": layers, "vocab_size": 8},
    )
    (place / "recipe.toml").write_text(RECIPE)
    (place / "edits.toml").write_text(EDITS)


EDITS = """\
drop = ["*.norm.weight"]
dtype = "BF16"
[rename]
"h.*" = "layers.*"
[dtypes]
"*.weight" = "F32"
"""
RECIPE = """\
name = "mine-llama"
title = "Mine -> Llama"
found_by = ["h.0.attn.qkv.weight"]
[config]
model_type = "'llama'"
num_attention_heads = "n_head"
head_dim = "head_dim or n_embd // n_head"
rope_theta = "10000.0 if n_layer > 1 else 2 ** 3"
[source]
name = "mine"
model_types = ["mine"]
tensors = '''
wte.weight [vocab, hidden]
norm.weight [hidden]
h.{i}.attn.qkv.weight [3 * hidden, hidden]
h.{i}.norm.weight [hidden]
?h.{i}.attn.inv_freq [hidden // heads // 2]
'''
[source.sizes]
hidden = "n_embd"
heads = "n_head"
layers = "n_layer"
vocab = "vocab_size"
[source.counts]
i = "layers"
[rename]
"wte.weight" = "model.embed_tokens.weight"
"norm.weight" = "model.norm.weight"
[[rule]]
source = "h.{i}.attn.qkv.weight"
target = "model.layers.{i}.self_attn.{q,k,v}_proj.weight"
program = "q, k, v = chunk(x, 0, 3)"
[[rule]]
source = "h.{i}.norm.weight"
target = "model.layers.{i}.input_layernorm.weight"
program = "input_layernorm = reshape(x, [hidden])"
[[rule]]
source = "h.{i}.attn.inv_freq"
reason = "a buffer that models compute"
optional = true
"""


def _source(place: Path) -> Path:
    source = place / "source"
    source.mkdir()
    tensors = {name: each.repeat(9, 1) if each.ndim > 1 else each for name, each in state().items()}
    save_file(tensors, source / "model.safetensors")
    _json(source / "config.json", {"model_type": "toy", "hidden_size": 4})
    for path in source.iterdir():
        os.utime(path, ns=(TIME, TIME))
    return source


@cache
def shards() -> Mapping[str, State]:
    """The weights of a source that is deleted as it is converted, by file."""
    tensors = {name: each.repeat(9, 1) if each.ndim > 1 else each for name, each in state().items()}
    return {
        f"model-{at + 1:05d}-of-{len(tensors):05d}.safetensors": {name: each}
        for at, (name, each) in enumerate(tensors.items())
    }


def _shards(place: Path) -> Path:
    source = place / "source"
    source.mkdir()
    for file, tensors in shards().items():
        save_file(tensors, source / file)
    where = {name: file for file, tensors in shards().items() for name in tensors}
    _json(source / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    _json(source / "config.json", {"model_type": "toy", "hidden_size": 4})
    for path in source.iterdir():
        os.utime(path, ns=(TIME, TIME))
    return source


class _StopError(Exception):
    pass


def unfinished(place: Path) -> None:
    """A conversion that was stopped: its plan, its journal, what it has written."""

    def stop(progress: Any) -> None:
        if progress.bytes_done > 60:
            raise _StopError

    with contextlib.suppress(_StopError), patch("streamconv.running.progress._REPORT_EVERY", 0):
        streamconv.convert(
            _source(place), place / "out", dtype="BF16", max_shard=100, engine="inline", progress=stop
        )
    assert (place / "out" / ".streamconv" / "plan.json").is_file()


def finished(place: Path) -> None:
    """A conversion that has ended: its record."""
    streamconv.convert(
        _source(place), place / "out", dtype="BF16", max_shard=300, engine="inline", checksum=True
    )


def finished_ranks(place: Path) -> None:
    """The same of a directory of ranks, without a change of dtype."""
    streamconv.convert(_source(place), place / "out", to="mindspore", tp=2, engine="inline")


def half_deleted(place: Path) -> None:
    """A conversion that was stopped when it had deleted one of the files of its source, and noted the next."""
    source = _shards(place)
    failing = watched.Failing("remove", OSError(errno.EIO, "Input/output error"), 1, "source/model")
    with watched.watching(failing), small_steps(), contextlib.suppress(ConversionError):
        streamconv.convert(source, place / "out", max_shard=300, engine="inline", delete_source=True)
    assert len(list(source.glob("*.safetensors"))) == len(shards()) - 1


def deleted(place: Path) -> None:
    """A conversion that has deleted its source."""
    source = _shards(place)
    streamconv.convert(source, place / "out", max_shard=300, engine="inline", delete_source=True)
    assert not list(source.glob("*.safetensors"))


def small_steps() -> Any:
    """Have each file of a source be deleted alone."""
    return patch("streamconv.running.freeing._STEP_BYTES", 1)
