"""Conversions between architectures, side by side with moving as many bytes and doing nothing to them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy

from bench import races
from bench.measure import Contender, race, remove
from bench.options import Options, streamconv
from bench.report import Section, megabytes
from streamconv import dtypes
from streamconv.families.chatglm import CHATGLM
from streamconv.tensor import Shape

_BLOCK = 64 << 20
_SHARD = 2_000_000_000

Tensors = Mapping[str, tuple[str, Shape]]
"""Name -> (dtype, shape)."""


def families(options: Options) -> list[Section]:
    """ChatGLM3 to Llama against `cp -r`."""
    return [_chatglm(options)]


def _chatglm(options: Options) -> Section:
    source, out = options.directory / "chatglm-source", options.directory / "chatglm-out"
    config = _chatglm_config(options.size)
    tensors = {
        name: ("F16", declared.shape) for name, declared in CHATGLM.tensors(CHATGLM.sizes_of(config)).items()
    }
    size = write_model(source, tensors, config, left_out=["transformer.rotary_pos_emb.inv_freq"])
    contenders = [
        Contender(
            races.OURS,
            streamconv(source, out, "--to-arch", "llama", "--quiet"),
            source,
            out,
        ),
        Contender("cp -r", ["cp", "-r", str(source), str(out)], source, out),
    ]
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    remove(source)
    remove(out)
    return races.section(
        "ChatGLM3 to Llama",
        f"ChatGLM3-6B's shapes, layers: {config['num_layers']}, {megabytes(size)} of F16: fused projections are split, "
        "the heads of queries and keys permuted. `cp -r` moves as many bytes in their order.",
        contenders, measured, reference="cp -r", goal=None, options=options,
    )  # fmt: skip


def _chatglm_config(size: int) -> dict[str, Any]:
    """ChatGLM3-6B's config, with as many layers as make about `size` bytes of F16."""
    bare, layer = 2 * 65024 * 4096 * 2, 203_960_832 * 2
    return {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 4096, "ffn_hidden_size": 13696,
        "num_layers": max(round((size - bare) / layer), 1), "num_attention_heads": 32, "kv_channels": 128,
        "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 8192,
        "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False, "torch_dtype": "float16",
    }  # fmt: skip


def write_model(
    directory: Path, tensors: Tensors, config: Mapping[str, Any], left_out: Collection[str] = (),
    contents: Mapping[str, bytes] = MappingProxyType({}),
) -> int:  # fmt: skip
    """A sharded safetensors checkpoint with random contents, but for those given; returns its bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    random = numpy.random.default_rng(0).standard_normal(_BLOCK // 4, numpy.float32) * numpy.float32(0.02)
    blocks = {
        "F32": random.tobytes(),
        "F16": random.astype(numpy.float16).tobytes(),
        "BF16": random.astype(dtypes.by_name("BF16").numpy).tobytes(),
        "I32": random.tobytes(),
        "I64": b"",
        "F8_E4M3": random.astype(dtypes.by_name("F8_E4M3").numpy).tobytes(),
    }
    held = {name: entry for name, entry in tensors.items() if name not in left_out}
    shards: list[dict[str, tuple[str, Shape]]] = [{}]
    sizes = [0]
    for name, entry in held.items():
        if sizes[-1] and sizes[-1] + _nbytes(entry) > _SHARD:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = entry
        sizes[-1] += _nbytes(entry)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {}
        offset = 0
        for name, entry in shard.items():
            header[name] = {
                "dtype": entry[0],
                "shape": entry[1],
                "data_offsets": [offset, offset + _nbytes(entry)],
            }
            offset += _nbytes(entry)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, entry in shard.items():
                _fill(out, contents.get(name, blocks[entry[0]]), _nbytes(entry))
        index |= dict.fromkeys(shard, file)
    document = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))
    return sum(sizes)


def _nbytes(entry: tuple[str, Shape]) -> int:
    return math.prod(entry[1]) * dtypes.by_name(entry[0]).itemsize


def _fill(out: Any, block: bytes, nbytes: int) -> None:
    for start in range(0, nbytes, len(block)):
        out.write(block[: nbytes - start])
