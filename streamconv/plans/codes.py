"""Which tensors are the codes and the scales of quantised weights: by names, dtypes, and what the config says.

A quantised layer has its codes and all that they are read with in one module, beside nothing but a bias. Packed
experts are bare parameters, each with its scales beside it under a longer name.

Sources: the layouts of compressed-tensors 0.20, transformers 5.24 (fp8, mxfp4), GPTQModel 7.7, AutoAWQ 0.2.9,
bitsandbytes 0.50, HQQ 0.2.8, optimum-quanto 0.2.7, torchao 0.18, modelopt 0.47, ComfyUI and ChatGLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from streamconv.dtypes import DType
from streamconv.tensor import TensorSpec

# What is named so holds codes, whatever its dtype is: some formats type bytes as floating point.
_CODES = re.compile(
    r"packed|qweight|dqweight|W_q|_data(\._data)?|_weight_qdata|blocks|quant_state\..+|qzeros"
)
# Only quantised layers have these.
_CERTAIN = re.compile(
    rf"({_CODES.pattern})|scale_inv|absmax|quant_map|SCB|qscale_weight|scale_weight|comfy_quant"
)
# These make a layer a quantised one where it has codes by their dtype.
_SCALE = re.compile(r"(\w*_)?(scales?|zeros?|zero_point)(_\w+)?|_shift")
# Of a bare parameter.
_STEM = re.compile(r"(?P<stem>.+)_(?P<mark>scale_inv|scales?|blocks)")
BESIDE = re.compile(
    r"(k|v|q|p|kv|prob|\w*input|\w*output|\w*activation|qkv)_(global_)?scale\w*|qscale_act|scaled_fp8|scale_input"
)
"""Anywhere in a quantised model: scales of activations and of the KV cache."""
_BIAS = re.compile(r"bias|(?!weight_)\w+_bias")

# Configs of transformers, of older compressed-tensors, and of ChatGLM.
SAYS = ("quantization_config", "compression_config", "quantization_bit")


def quantised(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> dict[str, bool]:
    """The codes and scales among tensors, by name, and whether it is codes, which no cast can mean."""
    if not any(_coded(spec.dtype) for spec in specs.values()):
        return {}
    places = {name: place(name) for name in specs}
    certain, coded, around, scaled, several = set(), set(), set(), set(), set()
    first: dict[str, str] = {}
    for name, (layer, mark) in places.items():
        if first.setdefault(layer, name) is not name:
            several.add(layer)
        sure, scale = _meaning(mark)
        if sure:
            certain.add(layer)
        if scale:
            scaled.add(layer)
        elif _coded(dtype := specs[name].dtype):
            coded.add(layer)
            # Some formats have the codes of a layer under names of their own.
            if layer == name and "." in name and dtype.kind != "float":
                around.add(_parent(layer))
    # What looks like the scale of a bare parameter that is not there is its layer's: `dequant_scale`.
    alone = {_parent(layer) for layer in scaled - several if first[layer].startswith(f"{layer}_")}
    says = config is not None and any(_said(config))
    every = coded | around
    found = (certain & several) | (every if says else every & scaled | coded & alone)
    return (
        {
            name: _is_codes(mark, specs[name].dtype)
            for name, (layer, mark) in places.items()
            if _stays(name.rpartition(".")[2], layer in found or _parent(layer) in found)
        }
        if found
        else {}
    )


def place(name: str) -> tuple[str, str]:
    """The layer that a tensor is of, or the bare parameter; and what it is there (nothing: the weight itself)."""
    head, dot, tail = name.partition(".weight")
    if dot and tail[:1] in ("", ".", "_"):
        return head, tail[1:]
    head, _, leaf = name.rpartition(".")
    own, stem, mark = _read(leaf)
    return (head if own else f"{head}.{stem}" if stem else name), mark


# Names are many, and what stands at their ends is of a few kinds.
@lru_cache(maxsize=4096)
def _read(leaf: str) -> tuple[bool, str, str]:
    """Whether the last part of a name says what it is of its layer; if not, the parameter it belongs to; and what it is."""
    if leaf.startswith("_weight_") or _CERTAIN.fullmatch(leaf) or leaf in ("scale", "scales", "zero"):
        return True, "", leaf
    stem = _STEM.fullmatch(leaf)
    return (False, stem["stem"], stem["mark"]) if stem else (False, "", "")


@lru_cache(maxsize=4096)
def _meaning(mark: str) -> tuple[bool, bool]:
    """Whether only quantised layers have it, and whether it is a scale."""
    return _CERTAIN.fullmatch(mark) is not None, _SCALE.fullmatch(mark) is not None


@lru_cache(maxsize=4096)
def _stays(leaf: str, inside: bool) -> bool:
    """Whether a tensor of this name is codes or scales in a quantised model, and in a quantised layer if `inside`."""
    return (inside and not _BIAS.fullmatch(leaf)) or BESIDE.fullmatch(leaf) is not None


def _is_codes(mark: str, dtype: DType) -> bool:
    plain = dtype.kind == "float" and (dtype.bits >= 16 or dtype.name == "F8_E8M0")
    return not plain or not mark or _CODES.fullmatch(mark) is not None


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]


def _coded(dtype: DType) -> bool:
    """Whether a dtype is one that codes have."""
    return dtype.bits <= (8 if dtype.kind == "float" else 32) and dtype.kind in ("int", "uint", "float")


def _said(config: Mapping[str, Any]) -> Iterator[object]:
    """What a config says of quantising, also of its parts."""
    for key, value in config.items():
        if key in SAYS:
            yield value
        elif isinstance(value, Mapping):
            yield from _said(value)
