"""Nets of MindFormers' parallel core: Qwen2, Qwen3, Qwen3-MoE, GLM-4 and DeepSeek-V3 to Hugging Face and back.

Source: see `plans.architectures.mindformers_mcore`.
"""

from __future__ import annotations

from streamconv.plans.architectures.mindformers import LAYER, Family
from streamconv.plans.architectures.mindformers_mcore import (
    BLOCK,
    ENDS,
    LAST,
    LAYOUTS,
    MIXED,
    Layout,
    deepseek_v3,
    glm4,
    qwen2,
    qwen3,
    qwen3_moe,
)
from streamconv.plans.recipe import Recipe, Rule, drop
from streamconv.plans.recipes.mindformers_experts import QUANTISED, V3_REFUSES
from streamconv.plans.recipes.mindformers_rules import LEAVES, prediction, recipe, renames

_HEAD = "lm_head.weight"
_HF_LAST = "model.layers.{k+[layers]}."
_PREDICTION = {
    key: (f"mtp.layers.{{k}}.{ours}.weight", f"{_HF_LAST}{theirs}.weight")
    for key, ours, theirs in (
        ("embedding_norm", "enorm", "enorm"),
        ("norm", "hnorm", "hnorm"),
        ("dense", "eh_proj", "eh_proj"),
        ("last", "final_layernorm", "shared_head.norm"),
    )
}
# A net whose output layer is its embedding does not save it.
_TIED = (
    Rule(None, _HEAD, when="tied", optional=True, reason="tied to the embedding"),
    drop(ENDS[_HEAD], "tied to the embedding", when="tied", optional=True),
    Rule(ENDS[_HEAD], _HEAD, when="not tied"),
)


def _attention(layout: Layout) -> tuple[Rule, ...]:
    parts = f"[heads // {layout.groups}, kv_heads // {layout.groups}, kv_heads // {layout.groups}]"
    return tuple(
        Rule(
            f"{BLOCK}self_attention.linear_qkv.{leaf}",
            {part: f"{LAYER}self_attn.{part}_proj.{leaf}" for part in "qkv"},
            f"q, k, v = split_heads(x, {layout.groups}, {parts}, head_dim)",
        )
        for leaf in LEAVES
    )


def _gate_and_up(ours: str, theirs: str, width: str, layout: Layout) -> Rule:
    pairs = layout.pairs.replace("WIDTH", width)
    return Rule(
        f"{ours}linear_fc1.weight",
        {"gate": f"{theirs}gate_proj.weight", "up": f"{theirs}up_proj.weight"},
        f"gate, up = split_heads(x, {pairs}, [1, 1], {width} // {pairs})",
    )


def _experts(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Experts for grouped products; the order of their rows is the same in every layout."""
    return (
        Rule(
            f"{ours}mlp.experts.weight1",
            {part: f"{theirs}mlp.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up")},
            """
            gate, up = split(transpose(reshape(x, [experts, hidden, -1])), 1, [expert_ffn, expert_ffn])
            gate = unstack(gate)
            up = unstack(up)
            """,
        ),
        Rule(
            f"{ours}mlp.experts.weight2",
            f"{theirs}mlp.experts.{{e}}.down_proj.weight",
            "x = unstack(transpose(reshape(x, [experts, expert_ffn, -1])))",
        ),
    )


def _found(*names: str) -> tuple[str, ...]:
    return (ENDS["model.embed_tokens.weight"], *names)


def _dense(name: str, title: str, family: Family, layout: Layout) -> Recipe:
    return recipe(
        f"{name}-{layout.name}",
        f"{title} of the parallel core, {layout.name}",
        family,
        (
            *_TIED,
            *renames(family, {_HEAD}),
            *_attention(layout),
            _gate_and_up(BLOCK + "mlp.", LAYER + "mlp.", "ffn", layout),
        ),
        _found(BLOCK + "self_attention.linear_qkv.weight", BLOCK + "mlp.linear_fc1.weight"),
    )


def _qwen3_moe(layout: Layout) -> Recipe:
    family = qwen3_moe(layout)
    return recipe(
        f"qwen3-moe-{layout.name}",
        f"Qwen3-MoE of the parallel core, {layout.name}",
        family,
        (
            *_TIED,
            *renames(family, {_HEAD}),
            *_attention(layout),
            _gate_and_up(BLOCK + "mlp.", LAYER + "mlp.", "ffn", layout),
            *_experts(BLOCK, LAYER),
        ),
        _found(BLOCK + "self_attention.linear_qkv.weight", BLOCK + "mlp.experts.weight1"),
        refuses=QUANTISED,
        refuses_back=QUANTISED,
    )


def _in_the_last(family: Family) -> tuple[Rule, ...]:
    """Rules for the layer that predicts, which is like the others and counted by itself."""
    return tuple(
        Rule(rule.sources["x"].text.replace(BLOCK, LAST), rule.targets["x"].text.replace(LAYER, _HF_LAST))
        for rule in renames(family)
        if rule.sources["x"].text.startswith(BLOCK)
    )


def _deepseek_v3(layout: Layout) -> Recipe:
    family = deepseek_v3(layout)
    blocks = ((LAST, _HF_LAST), (BLOCK, LAYER))
    return recipe(
        f"deepseekv3-{layout.name}",
        f"DeepSeek-V3 of the parallel core, {layout.name}",
        family,
        (
            *prediction(_PREDICTION, ENDS),
            *_in_the_last(family),
            *renames(family),
            _gate_and_up(BLOCK + "mlp.", LAYER + "mlp.", "ffn", layout),
            *(
                _gate_and_up(
                    f"{ours}mlp.shared_experts.", f"{theirs}mlp.shared_experts.", "shared_ffn", layout
                )
                for ours, theirs in blocks
            ),
            *(rule for ours, theirs in blocks for rule in _experts(ours, theirs)),
        ),
        _found(BLOCK + "self_attention.linear_kv_up_proj.weight"),
        refuses=V3_REFUSES,
        refuses_back=V3_REFUSES,
    )


def _glm4(layout: Layout) -> Recipe:
    family = glm4(layout)
    return recipe(
        f"glm4-{layout.name}",
        f"GLM-4-0414 of the parallel core, attention {layout.name}",
        family,
        (*_TIED, *renames(family, {_HEAD}), *_attention(layout)),
        _found(BLOCK + "self_attention.linear_qkv.weight", BLOCK + "post_mlp_layernorm.weight"),
    )


RECIPES: tuple[Recipe, ...] = (
    *(_dense("qwen2-core", "Qwen2", qwen2(layout), layout) for layout in (*LAYOUTS, *MIXED)),
    *(_dense("qwen3", "Qwen3", qwen3(layout), layout) for layout in (*LAYOUTS, *MIXED)),
    *(_glm4(layout) for layout in LAYOUTS),
    *(_qwen3_moe(layout) for layout in (*LAYOUTS, *MIXED)),
    *(_deepseek_v3(layout) for layout in LAYOUTS),
)
