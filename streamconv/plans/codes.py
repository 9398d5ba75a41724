"""Which tensors are the codes and the scales of quantised weights: by names, dtypes, and what the config says.

A quantised layer has its codes and all that they are read with in one module, beside nothing but a bias. Packed
experts are bare parameters, each with its scales beside it under a longer name.

Sources: the layouts of compressed-tensors 0.20, transformers 5.24 (fp8, mxfp4), GPTQModel 7.7, AutoAWQ 0.2.9,
bitsandbytes 0.50, HQQ 0.2.8, optimum-quanto 0.2.7, torchao 0.18, modelopt 0.47, ComfyUI and ChatGLM.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
# Anywhere in a quantised model: scales of activations and of the KV cache.
_BESIDE = re.compile(
    r"(k|v|q|p|kv|prob|\w*input|\w*output|\w*activation|qkv)_(global_)?scale\w*|qscale_act|scaled_fp8|scale_input"
)
_BIAS = re.compile(r"bias|(?!weight_)\w+_bias")

# Configs of transformers, of older compressed-tensors, and of ChatGLM.
_SAYS = ("quantization_config", "compression_config", "quantization_bit")


def quantised(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> dict[str, bool]:
    """The codes and scales among tensors, by name, and whether it is codes, which no cast can mean."""
    if not any(_coded(spec.dtype) for spec in specs.values()):
        return {}
    places = {name: _place(name) for name in specs}
    layers: dict[str, list[_Part]] = defaultdict(list)
    for name, (layer, mark) in places.items():
        part = _Part(mark, specs[name].dtype)
        layers[layer].append(part)
        # Some formats have the codes of a layer under names of their own.
        if layer == name and "." in name and part.coded and part.dtype.kind != "float":
            layers[_parent(layer)].append(part)
    says = config is not None and any(_said(config))
    found = {layer for layer, parts in layers.items() if _is_quantised(parts, says)}
    return {
        name: _Part(mark, specs[name].dtype).is_codes
        for name, (layer, mark) in places.items()
        if _stays(name.rpartition(".")[2], not found.isdisjoint((layer, _parent(layer))), bool(found))
    }


class _Part(NamedTuple):
    """A tensor of a layer: what it is there by its name (nothing: the weight itself), and its dtype."""

    mark: str
    dtype: DType

    @property
    def coded(self) -> bool:
        return _coded(self.dtype) and not _SCALE.fullmatch(self.mark)

    @property
    def is_codes(self) -> bool:
        plain = self.dtype.kind == "float" and (self.dtype.bits >= 16 or self.dtype.name == "F8_E8M0")
        return not plain or not self.mark or _CODES.fullmatch(self.mark) is not None


def _place(name: str) -> tuple[str, str]:
    """The layer that a tensor is of, or the bare parameter; and what it is there."""
    head, dot, tail = name.partition(".weight")
    if dot and tail[:1] in ("", ".", "_"):
        return head, tail[1:]
    head, _, leaf = name.rpartition(".")
    if leaf.startswith("_weight_") or _CERTAIN.fullmatch(leaf) or leaf in ("scale", "scales", "zero"):
        return head, leaf
    stem = _STEM.fullmatch(leaf)
    return (f"{head}.{stem['stem']}", stem["mark"]) if stem else (name, "")


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]


def _is_quantised(parts: Sequence[_Part], says: bool) -> bool:
    """Whether a layer with these parts is quantised, in a model whose config says that some are, or does not."""
    if len(parts) > 1 and any(_CERTAIN.fullmatch(part.mark) for part in parts):
        return True
    return any(part.coded for part in parts) and (says or any(_SCALE.fullmatch(part.mark) for part in parts))


def _stays(leaf: str, inside: bool, anywhere: bool) -> bool:
    """Whether a tensor of this name is codes or scales, `inside` a quantised layer or `anywhere` beside some."""
    return (inside and not _BIAS.fullmatch(leaf)) or (anywhere and _BESIDE.fullmatch(leaf) is not None)


def _coded(dtype: DType) -> bool:
    """Whether a dtype is one that codes have."""
    return dtype.bits <= (8 if dtype.kind == "float" else 32) and dtype.kind in ("int", "uint", "float")


def _said(config: Mapping[str, Any]) -> Iterator[object]:
    """What a config says of quantising, also of its parts."""
    for key, value in config.items():
        if key in _SAYS:
            yield value
        elif isinstance(value, Mapping):
            yield from _said(value)
