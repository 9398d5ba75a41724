"""Qwen-VL in full: MindFormers to Hugging Face and back.

Source: Qwen/Qwen-VL: visual.py; mindspore-lab/mindformers r1.3.0: research/qwenvl/convert_weight.py.
"""

from __future__ import annotations

from streamconv.families.mindformers.common import QWEN_NAMES, QWEN_THREE, united
from streamconv.families.mindformers.net import Names, Net
from streamconv.families.qwen_vl import QWENVL, RESBLOCK, VISUAL
from streamconv.plans.patterns import named
from streamconv.plans.recipe import LEAVES, Rule
from streamconv.plans.table import table

ENCODER, ENCODER_BLOCK = "vision_encoder.", "vision_encoder.transformer.resblocks.{j}."
_QWENVL_NAMES: Names = {
    **{theirs: "llm_model." + ours for theirs, ours in QWEN_NAMES.items()},
    **named(
        """
        {positional_embedding,proj,conv1.,attn_pool.pos_embed,attn_pool.query,attn_pool.kv_proj.}
        attn_pool.attn.out_proj.bias -> attn_pool.attn.projection.bias
        transformer.resblocks.{j}.attn.out_proj.bias -> transformer.resblocks.{j}.attn.projection.bias
        transformer.resblocks.{j}.mlp.
        {ln_pre,ln_post,attn_pool.ln_q,attn_pool.ln_kv}.{weight,bias} -> {ln_pre,ln_post,attn_pool.ln_q,attn_pool.ln_kv}.{gamma,beta}
        transformer.resblocks.{j}.ln_{1,2}.{weight,bias} -> transformer.resblocks.{j}.ln_{1,2}.{gamma,beta}
        """,
        VISUAL,
        ENCODER,
    ),
}

_THREE = table("""
    {dense1,dense2,dense3}.{weight,bias} [width, width] [width]
    projection.weight [width, width]
""")
_QWENVL_OWN = _THREE.under(ENCODER_BLOCK + "attn.").given(width="seen") + _THREE.under(
    ENCODER + "attn_pool.attn."
).given(width="out")

_PARTS = "{dense1,dense2,dense3}"
_SEEING = (
    *united(ENCODER_BLOCK + f"attn.{_PARTS}", RESBLOCK + "attn.in_proj", "seen_heads"),
    *(
        Rule(
            f"{ENCODER}attn_pool.attn.{_PARTS}.{leaf}",
            f"{VISUAL}attn_pool.attn.in_proj_{leaf}",
            "x = concat([dense1, dense2, dense3])",
        )
        for leaf in LEAVES
    ),
    Rule(ENCODER_BLOCK + "attn.projection.weight", RESBLOCK + "attn.out_proj.weight", "x = transpose(x)"),
    Rule(
        ENCODER + "attn_pool.attn.projection.weight",
        VISUAL + "attn_pool.attn.out_proj.weight",
        "x = transpose(x)",
    ),
)
_LAYER = "llm_model.transformer.layers.{i}."

NETS = (
    Net(
        key="qwenvl",
        title="Qwen-VL",
        target=QWENVL,
        names=_QWENVL_NAMES,
        own=_QWENVL_OWN + QWEN_THREE.under("llm_model."),
        rules=(*_SEEING, *united(_LAYER + "attention.{wq,wk,wv}", "transformer.h.{i}.attn.c_attn")),
        found_by=(ENCODER + "proj", _LAYER + "attention.wq.weight"),
    ),
    Net(
        key="qwenvl-concat",
        title="Qwen-VL with fused projections (use_qkv_concat)",
        called="Qwen-VL with fused projections of MindFormers",
        layout="concat",
        target=QWENVL,
        names=_QWENVL_NAMES | {"transformer.h.{i}.attn.c_attn.": _LAYER + "attention.w."},
        own=_QWENVL_OWN,
        rules=_SEEING,
        found_by=(ENCODER + "proj", _LAYER + "attention.w.weight"),
    ),
)
