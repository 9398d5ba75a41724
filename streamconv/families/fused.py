"""Fused projections of queries, keys and values taken apart, and fused again: GPT-2, BLOOM, GPT-NeoX, Falcon.

BLOOM's, GPT-NeoX's and Falcon's own order is by head or by group of heads, as Megatron has it. GPT-2's is not, and
its matrices are `[in, out]`; it has a recipe for that order too.

Facts: huggingface/transformers 5.23.0: GPT2Attention, BloomAttention._reshape, GPTNeoXAttention,
FalconAttention._split_heads; see also the architectures' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamconv.families.bloom import BLOOM, BLOOM_SPLIT
from streamconv.families.falcon import FALCON, FALCON_SPLIT
from streamconv.families.gpt2 import GPT2, GPT2_PER_HEAD, GPT2_SPLIT
from streamconv.families.neox import NEOX, NEOX_SPLIT
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.recipe import ConfigMap, Recipe, Remark, Rule, drop

_LEAVES = ("weight", "bias")
_TITLES = {
    "split": "one fused projection -> queries, keys and values apart",
    "per-head": "one fused projection -> the same in the order of heads, as Megatron has it",
}
_BY_HEAD = "q, k, v = split_heads(x, heads, [1, 1, 1], head_dim)"


def _layout(name: str) -> ConfigMap:
    def make(config: Config) -> dict[str, Any]:
        return {**config, "qkv_layout": name}

    return make


def _without_layout(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "qkv_layout"}


def _unchanged(source: Architecture, target: Architecture, differ: Sequence[str] = ()) -> tuple[Rule, ...]:
    """Rules for what both tables have alike."""
    theirs = {line.name.text for line in target.lines}
    names = dict.fromkeys(line.name.text for line in source.lines)
    return tuple(Rule(name, name) for name in names if name in theirs and name not in differ)


def _recipe(
    name: str, source: Architecture, target: Architecture, rules: Sequence[Rule], differ: Sequence[str] = ()
) -> Recipe:
    fused_name = rules[0].sources["x"].text
    return Recipe(
        name=name,
        title=f"{source.title}: {_TITLES[target.name]}",
        source=source,
        target=target,
        rules=(*rules, *_unchanged(source, target, differ)),
        config=_layout(target.name),
        config_back=_without_layout,
        remarks=(
            Remark("True", "no class of transformers reads this form; qkv_layout in the config names it"),
        ),
        found_by=(fused_name,),
    )


def _split(block: str, fused_name: str, program: str, when: str = "") -> tuple[Rule, ...]:
    return tuple(
        Rule(
            f"{block}.{fused_name}.{leaf}",
            {part: f"{block}.{part}_proj.{leaf}" for part in "qkv"},
            program,
            when=when,
        )
        for leaf in _LEAVES
    )


_GPT2 = "transformer.h.{i}.attn"
_GPT2_MATRICES = ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GPT2_TURNED = tuple(
    Rule(f"transformer.h.{{i}}.{name}", f"transformer.h.{{i}}.{name}", "x = transpose(x)")
    for name in _GPT2_MATRICES
)
_GPT2_BUFFERS = tuple(
    drop(f"{_GPT2}.{name}", "a mask that models compute", optional=True) for name in ("bias", "masked_bias")
)
_GPT2_DIFFER = tuple(f"transformer.h.{{i}}.{name}" for name in _GPT2_MATRICES)
_NEOX = "gpt_neox.layers.{i}.attention"
_NEOX_BUFFERS = tuple(
    drop(f"{_NEOX}.{name}", "a buffer that models compute", optional=True)
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
)
_NEOX_HEAD = (
    Rule("embed_out.weight", "embed_out.weight"),
    # The name in memory of transformers 5, which reads both.
    Rule("lm_head.weight", "embed_out.weight"),
)
_FALCON = "transformer.h.{i}.self_attention"

RECIPES = (
    _recipe(
        "gpt2-split",
        GPT2,
        GPT2_SPLIT,
        (
            Rule(
                f"{_GPT2}.c_attn.weight",
                {part: f"{_GPT2}.{part}_proj.weight" for part in "qkv"},
                "q, k, v = chunk(transpose(x), 0, 3)",
            ),
            Rule(
                f"{_GPT2}.c_attn.bias",
                {part: f"{_GPT2}.{part}_proj.bias" for part in "qkv"},
                "q, k, v = chunk(x, 0, 3)",
            ),
            *_GPT2_TURNED,
            *_GPT2_BUFFERS,
        ),
        _GPT2_DIFFER,
    ),
    _recipe(
        "gpt2-per-head",
        GPT2,
        GPT2_PER_HEAD,
        (
            Rule(f"{_GPT2}.c_attn.weight", f"{_GPT2}.c_attn.weight", "x = by_head(transpose(x), heads, 3)"),
            Rule(f"{_GPT2}.c_attn.bias", f"{_GPT2}.c_attn.bias", "x = by_head(x, heads, 3)"),
            *_GPT2_TURNED,
            *_GPT2_BUFFERS,
        ),
        (*_GPT2_DIFFER, f"{_GPT2}.c_attn.bias"),
    ),
    _recipe(
        "bloom-split",
        BLOOM,
        BLOOM_SPLIT,
        _split("transformer.h.{i}.self_attention", "query_key_value", _BY_HEAD),
    ),
    _recipe(
        "neox-split",
        NEOX,
        NEOX_SPLIT,
        (*_split(_NEOX, "query_key_value", _BY_HEAD), *_NEOX_HEAD, *_NEOX_BUFFERS),
        ("embed_out.weight",),
    ),
    _recipe(
        "falcon-split",
        FALCON,
        FALCON_SPLIT,
        (
            *_split(
                _FALCON,
                "query_key_value",
                "q, k, v = split_heads(x, kv_heads, [heads // kv_heads, 1, 1], head_dim)",
                when="grouped",
            ),
            *_split(
                _FALCON,
                "query_key_value",
                "q, k, v = split(x, 0, [heads * head_dim, head_dim, head_dim])",
                when="one_key",
            ),
            *_split(_FALCON, "query_key_value", _BY_HEAD, when="not grouped and not one_key"),
        ),
    ),
)
