"""Qwen-VL in full: MindFormers to Hugging Face and back.

Source: Qwen/Qwen-VL: visual.py; mindspore-lab/mindformers r1.3.0: research/qwenvl/convert_weight.py.
"""

from __future__ import annotations

from streamconv.families.mindformers.rules import LEAVES, recipe, renames, united
from streamconv.families.mindformers.tables import QWEN_NAMES, QWEN_THREE, Family, Names, family, layer_norm
from streamconv.families.qwen_vl import QWENVL, RESBLOCK, VISUAL
from streamconv.plans.recipe import Recipe, Rule
from streamconv.plans.table import table

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


_THREE = table("""
    dense1.weight [width, width]
    dense1.bias [width]
    dense2.weight [width, width]
    dense2.bias [width]
    dense3.weight [width, width]
    dense3.bias [width]
    projection.weight [width, width]
""")
_QWENVL_OWN = _THREE.under(ENCODER_BLOCK + "attn.").given(width="seen") + _THREE.under(
    ENCODER + "attn_pool.attn."
).given(width="out")
QWENVL_LAYER = "llm_model.transformer.layers.{i}."

MF_QWENVL = family(
    QWENVL,
    "Qwen-VL",
    _QWENVL_NAMES,
    _QWENVL_OWN + QWEN_THREE.under("llm_model."),
)
MF_QWENVL_CONCAT = family(
    QWENVL,
    "Qwen-VL with fused projections",
    _QWENVL_NAMES | {"transformer.h.{i}.attn.c_attn.": QWENVL_LAYER + "attention.w."},
    _QWENVL_OWN,
    name="mindformers-concat",
)

# ------------------------------------------------------------------------------------------- rules


def _qwenvl_seeing() -> tuple[Rule, ...]:
    parts = ("dense1", "dense2", "dense3")
    return (
        *(
            united(
                ENCODER_BLOCK + f"attn.dense{{}}.{leaf}",
                "123",
                RESBLOCK + f"attn.in_proj.{leaf}",
                "seen_heads",
            )
            for leaf in LEAVES
        ),
        *(
            Rule(
                {part: f"{ENCODER}attn_pool.attn.{part}.{leaf}" for part in parts},
                f"{VISUAL}attn_pool.attn.in_proj_{leaf}",
                f"x = concat([{', '.join(parts)}])",
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


def _qwenvl(key: str, title: str, family: Family, *, split: bool) -> Recipe:
    language = tuple(
        united(QWENVL_LAYER + f"attention.w{{}}.{leaf}", "qkv", f"transformer.h.{{i}}.attn.c_attn.{leaf}")
        for leaf in LEAVES
    )
    return recipe(
        key,
        title,
        family,
        (*renames(family), *_qwenvl_seeing(), *(language if split else ())),
        (ENCODER + "proj", QWENVL_LAYER + f"attention.w{'q' if split else ''}.weight"),
    )


RECIPES: tuple[Recipe, ...] = (
    _qwenvl("qwenvl", "Qwen-VL", MF_QWENVL, split=True),
    _qwenvl(
        "qwenvl-concat", "Qwen-VL with fused projections (use_qkv_concat)", MF_QWENVL_CONCAT, split=False
    ),
)
