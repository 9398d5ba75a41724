"""Qwen-VL in full, in the naming of its own code and in MindFormers'.

Source: Qwen/Qwen-VL: visual.py; mindspore-lab/mindformers r1.3.0: research/qwenvl/convert_weight.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.llama_like import QWEN_VL
from streamconv.families.mindformers.tables import QWEN_NAMES, QWEN_THREE, Names, family, layer_norm
from streamconv.plans.architecture import table

VISUAL, RESBLOCK = "transformer.visual.", "transformer.visual.transformer.resblocks.{j}."
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
        transformer.visual.ln_pre.weight [seen]
        transformer.visual.ln_pre.bias [seen]
        transformer.visual.transformer.resblocks.{j}.ln_1.weight [seen]
        transformer.visual.transformer.resblocks.{j}.ln_1.bias [seen]
        transformer.visual.transformer.resblocks.{j}.ln_2.weight [seen]
        transformer.visual.transformer.resblocks.{j}.ln_2.bias [seen]
        transformer.visual.transformer.resblocks.{j}.attn.in_proj.weight [3 * seen, seen]
        transformer.visual.transformer.resblocks.{j}.attn.in_proj.bias [3 * seen]
        transformer.visual.transformer.resblocks.{j}.attn.out_proj.weight [seen, seen]
        transformer.visual.transformer.resblocks.{j}.attn.out_proj.bias [seen]
        transformer.visual.transformer.resblocks.{j}.mlp.c_fc.weight [seen_ffn, seen]
        transformer.visual.transformer.resblocks.{j}.mlp.c_fc.bias [seen_ffn]
        transformer.visual.transformer.resblocks.{j}.mlp.c_proj.weight [seen, seen_ffn]
        transformer.visual.transformer.resblocks.{j}.mlp.c_proj.bias [seen]
        transformer.visual.attn_pool.pos_embed [queries, out]
        transformer.visual.attn_pool.query [queries, out]
        transformer.visual.attn_pool.kv_proj.weight [out, seen] if seen != out
        transformer.visual.attn_pool.attn.in_proj_weight [3 * out, out]
        transformer.visual.attn_pool.attn.in_proj_bias [3 * out]
        transformer.visual.attn_pool.attn.out_proj.weight [out, out]
        transformer.visual.attn_pool.attn.out_proj.bias [out]
        transformer.visual.attn_pool.ln_q.weight [out]
        transformer.visual.attn_pool.ln_q.bias [out]
        transformer.visual.attn_pool.ln_kv.weight [out]
        transformer.visual.attn_pool.ln_kv.bias [out]
        transformer.visual.ln_post.weight [out]
        transformer.visual.ln_post.bias [out]
    """),
)
"""Qwen-VL in full."""

ENCODER, ENCODER_BLOCK = "vision_encoder.", "vision_encoder.transformer.resblocks.{j}."
_QWENVL_NAMES: Names = {
    **{theirs: "llm_model." + ours for theirs, ours in QWEN_NAMES.items()},
    **{
        VISUAL + part: ENCODER + part
        for part in ("positional_embedding", "proj", "conv1.", "attn_pool.pos_embed", "attn_pool.query",
                     "attn_pool.kv_proj.")
    },
    VISUAL + "attn_pool.attn.out_proj.bias": ENCODER + "attn_pool.attn.projection.bias",
    RESBLOCK + "attn.out_proj.bias": ENCODER_BLOCK + "attn.projection.bias",
    RESBLOCK + "mlp.": ENCODER_BLOCK + "mlp.",
    **{
        theirs: ours
        for norm in ("ln_pre", "ln_post", "attn_pool.ln_q", "attn_pool.ln_kv")
        for theirs, ours in layer_norm(VISUAL + norm, ENCODER + norm).items()
    },
    **layer_norm(RESBLOCK + "ln_1", ENCODER_BLOCK + "ln_1"),
    **layer_norm(RESBLOCK + "ln_2", ENCODER_BLOCK + "ln_2"),
}  # fmt: skip


def _dense(block: str, width: str) -> str:
    lines = [
        (f"{block}dense{part}.weight [{width}, {width}]", f"{block}dense{part}.bias [{width}]")
        for part in (1, 2, 3)
    ]
    return (
        "\n".join(
            [*(line for pair in lines for line in pair), f"{block}projection.weight [{width}, {width}]"]
        )
        + "\n"
    )


_QWENVL_OWN = _dense(ENCODER_BLOCK + "attn.", "seen") + _dense(ENCODER + "attn_pool.attn.", "out")
QWENVL_LAYER = "llm_model.transformer.layers.{i}."

MF_QWENVL = family(
    QWENVL,
    "Qwen-VL",
    _QWENVL_NAMES,
    _QWENVL_OWN + QWEN_THREE.replace("transformer.", "llm_model.transformer."),
)
MF_QWENVL_CONCAT = family(
    QWENVL,
    "Qwen-VL with fused projections",
    _QWENVL_NAMES | {"transformer.h.{i}.attn.c_attn.": QWENVL_LAYER + "attention.w."},
    _QWENVL_OWN,
    name="mindformers-concat",
)
