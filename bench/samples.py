"""Synthetic checkpoints: a Llama with random weights, sharded as Hugging Face does it, of any size.

The weights are random blocks laid end to end, so that making a sample takes as long as writing it. Names,
shapes and config are those of `LlamaForCausalLM`, so that transformers and mergekit load it as any model.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy

DType = Literal["F32", "BF16"]

_ITEM = {"F32": 4, "BF16": 2}
_TORCH = {"F32": "float32", "BF16": "bfloat16"}

# (hidden, intermediate, heads, key-value heads, vocabulary), widest first; the depth follows from the size.
_WIDTHS = (
    (8192, 28672, 64, 8, 32000),
    (4096, 11008, 32, 32, 32000),
    (2048, 5632, 32, 4, 32000),
    (1024, 2816, 16, 4, 16000),
    (512, 1408, 8, 4, 8000),
    (128, 352, 4, 2, 1000),
)
_FEWEST_LAYERS = 8

# Bytes of randomness; tensors take it from changing places, so that no two begin alike.
_BLOCK = 32 << 20
_STEP = 4099 * 4

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Llama:
    """The numbers of a Llama's config."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    layers: int

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes in the model's order."""
        key_value = self.hidden // self.heads * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in (
                ("self_attn.q_proj", (self.hidden, self.hidden)),
                ("self_attn.k_proj", (key_value, self.hidden)),
                ("self_attn.v_proj", (key_value, self.hidden)),
                ("self_attn.o_proj", (self.hidden, self.hidden)),
                ("mlp.gate_proj", (self.intermediate, self.hidden)),
                ("mlp.up_proj", (self.intermediate, self.hidden)),
                ("mlp.down_proj", (self.hidden, self.intermediate)),
                ("input_layernorm", (self.hidden,)),
                ("post_attention_layernorm", (self.hidden,)),
            ):
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self, dtype: DType) -> dict[str, Any]:
        """What `config.json` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 4096,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": _TORCH[dtype],
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


def llama_of(size: int, dtype: DType) -> Llama:
    """The widest Llama of several layers that takes about `size` bytes."""
    for width in _WIDTHS:
        bare, one = Llama(*width, layers=0).parameters, Llama(*width, layers=1).parameters
        layers = round((size / _ITEM[dtype] - bare) / (one - bare))
        if layers >= _FEWEST_LAYERS or width == _WIDTHS[-1]:
            break
    return Llama(*width, layers=max(layers, 1))


def write_llama(directory: Path, size: int, dtype: DType, shard: int) -> int:
    """Make a sharded safetensors checkpoint.

    Args:
        directory: is made.
        size: bytes of all tensors, about.
        dtype: of all tensors.
        shard: the most bytes in a file.

    Returns:
        Bytes of all its files.
    """
    directory.mkdir(parents=True)
    model = llama_of(size, dtype)
    (directory / "config.json").write_text(json.dumps(model.config(dtype), indent=2) + "\n")
    shards = _shards(list(model.tensors()), _ITEM[dtype], shard)
    block = random_block(dtype)
    names: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, tensors, dtype, block)
        names |= {name: file for name, _ in tensors}
    total = model.parameters * _ITEM[dtype]
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return size_of(directory)


def write_tensor(path: Path, shape: Shape, dtype: DType) -> None:
    """Make a safetensors file of one tensor, `weight`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, [("weight", shape)], dtype, random_block(dtype))


def write_hollow(directory: Path, tensors: int, shards: int, shape: Shape) -> None:
    """Make a checkpoint whose headers are whole and whose tensors are holes: planning reads no more."""
    directory.mkdir(parents=True)
    names: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        inside = [(f"model.layers.{n}.weight", shape) for n in range(number, tensors, shards)]
        header, size = _header(inside, "BF16")
        with (directory / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + size)
        names |= {name: file for name, _ in inside}
    index = {"metadata": {"total_size": tensors * math.prod(shape) * 2}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Shape]], dtype: DType, block: bytes) -> None:
    """Write a file whose tensors are filled from `block`."""
    header, _ = _header(tensors, dtype)
    endless = memoryview(block)
    with path.open("wb", buffering=0) as out:
        _write(out.fileno(), memoryview(header))
        for number, (name, shape) in enumerate(tensors):
            left = math.prod(shape) * _ITEM[dtype]
            start = (number * 7919 + len(name)) * _STEP % len(block)
            while left:
                piece = endless[start : start + left]
                _write(out.fileno(), piece)
                left -= len(piece)
                start = 0
        os.fsync(out.fileno())


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _header(tensors: Sequence[tuple[str, Shape]], dtype: DType) -> tuple[bytes, int]:
    sizes = [math.prod(shape) * _ITEM[dtype] for _, shape in tensors]
    ends = list(itertools.accumulate(sizes))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, shape), size, end in zip(tensors, sizes, ends, strict=True):
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end - size, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends[-1] if ends else 0


def _shards(tensors: list[tuple[str, Shape]], item: int, limit: int) -> list[list[tuple[str, Shape]]]:
    shards: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = math.prod(tensor[1]) * item
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def random_block(dtype: DType) -> bytes:
    """Finite numbers as trained weights have them: normal, a few hundredths wide."""
    values = numpy.random.default_rng(0).standard_normal(_BLOCK // 4, numpy.float32) * numpy.float32(0.02)
    if dtype == "F32":
        return values.tobytes()
    halves = (values.view(numpy.uint32) >> 16).astype(numpy.uint16)
    return numpy.concatenate([halves, halves[::-1]]).tobytes()
