"""Quantised weights to BF16, side by side with reading and writing as many bytes, and with the usual ways."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from bench import races
from bench.families import write_model
from bench.measure import Contender, files_of, race, remove
from bench.options import Options, streamconv
from bench.report import Section, megabytes
from streamconv.tensor import Shape

_HIDDEN, _WIDE, _KEYS, _VOCABULARY = 4096, 14336, 1024, 32000
_LINEAR = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN), "self_attn.k_proj": (_KEYS, _HIDDEN), "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN), "mlp.gate_proj": (_WIDE, _HIDDEN), "mlp.up_proj": (_WIDE, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _WIDE),
}  # fmt: skip
_GROUP = 32

_Tensors = dict[str, tuple[str, Shape]]


def quantised(options: Options) -> list[Section]:
    """INT4 in the scheme of Kimi-K2 to BF16, and FP8 in blocks to BF16."""
    return [
        _section(
            options,
            "INT4 to BF16",
            "four bits and a BF16 scale for each 32, as Kimi-K2's experts have (compressed-tensors, pack-quantized)",
            0.5625,
            _int4,
            {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
                "ignore": ["lm_head"],
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                    "num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP, "symmetric": True, "dynamic": False,
                }}},
            },
        ),
        _section(
            options,
            "FP8 to BF16",
            "a byte and an F32 scale for each block of 128 x 128, as DeepSeek-V3 has",
            1.0,
            _fp8,
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        ),
    ]  # fmt: skip


def _section(
    options: Options, title: str, scheme: str, width: float, parts: Any, says: dict[str, Any]
) -> Section:
    name = title.split()[0].lower()
    source, out = options.directory / f"{name}-source", options.directory / f"{name}-out"
    a_layer = sum(rows * columns for rows, columns in _LINEAR.values())
    layers = max(round(options.size / 3 / (a_layer * width)), 1)
    tensors: _Tensors = {}
    contents: dict[str, bytes] = {}
    for layer in range(layers):
        for module, shape in _LINEAR.items():
            for part, entry, held in parts(shape):
                key = f"model.layers.{layer}.{module}.{part}"
                tensors[key] = entry
                if held is not None:
                    contents[key] = held
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = ("BF16", (_HIDDEN,))
    tensors |= {
        "model.embed_tokens.weight": ("BF16", (_VOCABULARY, _HIDDEN)), "model.norm.weight": ("BF16", (_HIDDEN,)),
        "lm_head.weight": ("BF16", (_VOCABULARY, _HIDDEN)),
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _HIDDEN, "intermediate_size": _WIDE,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False, "dtype": "bfloat16", "quantization_config": says,
    }  # fmt: skip
    size = write_model(source, tensors, config, contents=contents)
    made = 2 * (layers * a_layer + 2 * _VOCABULARY * _HIDDEN)
    contenders = [
        Contender(races.OURS, streamconv(source, out, "--recipe", "dequantise", "--quiet"), source, out),
        Contender("dd", races.dd(files_of(source), out, made / size), source, out),
        *(
            []
            if options.bare
            else [
                Contender(
                    "transformers, dequantised on load", _script("dequantised", source, out), source, out
                ),
                *(
                    [
                        Contender(
                            "compressed-tensors, a file at a time",
                            _script("decompressed", source, out),
                            source,
                            out,
                        )
                    ]
                    if name == "int4"
                    else []
                ),
            ]
        ),
    ]
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    remove(source)
    remove(out)
    return races.section(
        title,
        f"A Llama of {layers} layers, {megabytes(size)} to {megabytes(made)}: {scheme}. `dd` reads all of the input in blocks "
        "of 8 MiB, then writes as many zeros as there is output, and computes nothing.",
        contenders, measured, reference="dd", goal=1.2, options=options,
    )  # fmt: skip


def _int4(shape: Shape) -> Iterator[tuple[str, tuple[str, Shape], bytes | None]]:
    rows, columns = shape
    yield "weight_packed", ("I32", (rows, columns // 8)), None
    yield "weight_scale", ("BF16", (rows, columns // _GROUP)), None
    yield "weight_shape", ("I64", (2,)), numpy.array(shape, "<i8").tobytes()


def _fp8(shape: Shape) -> Iterator[tuple[str, tuple[str, Shape], bytes | None]]:
    rows, columns = shape
    yield "weight", ("F8_E4M3", shape), None
    yield "weight_scale_inv", ("F32", (rows // 128, columns // 128)), None


def _script(name: str, *arguments: Path) -> list[str]:
    return [sys.executable, "-m", "bench.baselines", name, *map(str, arguments)]
