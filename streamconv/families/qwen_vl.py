"""Qwen-VL's language part as Llama or Qwen2, its vision part by itself; Qwen2-VL under the names of transformers 5.

Source: Qwen/Qwen-VL: modeling_qwen.py, visual.py; huggingface/transformers 5.23.0: models/qwen2_vl,
conversion_mapping.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.qwen import QWEN, QWEN_LLAMA, QWEN_QWEN2
from streamconv.plans.recipe import Recipe, Rule, drop
from streamconv.plans.table import table

VISUAL, RESBLOCK = "transformer.visual.", "transformer.visual.transformer.resblocks.{j}."
_VISION = VISUAL + "*"

QWEN_VL = replace(QWEN, title="Qwen-VL", only_if="visual")
"""Its language part."""

QWENVL = replace(
    QWEN_VL,
    sizes={
        **QWEN_VL.sizes,
        "seen": "visual['width']",
        "seen_layers": "visual['layers']",
        "seen_heads": "visual['heads']",
        "seen_ffn": "int(visual['width'] * visual['mlp_ratio'])",
        "out": "visual['output_dim']",
        "patch": "visual['patch_size']",
        "queries": "visual['n_queries'] or 256",
    },
    counts={"i": "layers", "j": "seen_layers"},
    lines=QWEN_VL.lines
    + table("""
        transformer.visual.positional_embedding [256, seen]
        transformer.visual.proj [out, out]
        transformer.visual.conv1.weight [seen, 3, patch, patch]
        transformer.visual.ln_pre.{weight,bias} [seen]
        transformer.visual.transformer.resblocks.{j}.ln_{1,2}.{weight,bias} [seen]
        transformer.visual.transformer.resblocks.{j}.attn.in_proj.{weight,bias} [3 * seen, seen] [3 * seen]
        transformer.visual.transformer.resblocks.{j}.attn.out_proj.{weight,bias} [seen, seen] [seen]
        transformer.visual.transformer.resblocks.{j}.mlp.c_fc.{weight,bias} [seen_ffn, seen] [seen_ffn]
        transformer.visual.transformer.resblocks.{j}.mlp.c_proj.{weight,bias} [seen, seen_ffn] [seen]
        transformer.visual.attn_pool.{pos_embed,query} [queries, out]
        transformer.visual.attn_pool.kv_proj.weight [out, seen] if seen != out
        transformer.visual.attn_pool.attn.in_proj_weight [3 * out, out]
        transformer.visual.attn_pool.attn.in_proj_bias [3 * out]
        transformer.visual.attn_pool.attn.out_proj.{weight,bias} [out, out] [out]
        transformer.visual.attn_pool.ln_{q,kv}.{weight,bias} [out]
        transformer.visual.ln_post.{weight,bias} [out]
    """),
)
"""Qwen-VL in full."""


def _language(recipe: Recipe, name: str, target: str) -> Recipe:
    return replace(
        recipe,
        name=name,
        source=QWEN_VL,
        title=f"Qwen-VL, its language part, -> {target}, exact within seq_length",
        rules=(*recipe.rules, drop(_VISION, "the vision part; `qwenvl-vision` takes it alone")),
        one_way="the vision part is left out",
        found_by=("transformer.visual.proj",),
    )


QWENVL_VISION = Recipe(
    name="qwenvl-vision",
    title="Qwen-VL, its vision part alone",
    rules=(
        Rule(_VISION, "*"),
        drop("*", "the language part; `qwenvl-llama` and `qwenvl-qwen2` take it"),
    ),
    config=lambda config: {"model_type": "qwen_vl_vision", **(config.get("visual") or {})},
    one_way="the language part is left out",
    found_by=("transformer.visual.proj",),
)

QWEN2VL_V5 = Recipe(
    name="qwen2vl-v5",
    title="Qwen2-VL, Qwen2.5-VL: names of transformers 4 -> names of transformers 5",
    rules=(
        Rule("visual.*", "model.visual.*"),
        Rule("model.*", "model.language_model.*"),
        Rule("lm_head.weight", "lm_head.weight"),
    ),
    found_by=("visual.blocks.{i}.attn.qkv.weight", "model.embed_tokens.weight"),
)

RECIPES = (
    _language(QWEN_LLAMA, "qwenvl-llama", "Llama"),
    _language(QWEN_QWEN2, "qwenvl-qwen2", "Qwen2"),
    QWENVL_VISION,
    QWEN2VL_V5,
)
