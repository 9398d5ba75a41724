"""GLM2, GLM3 and GLM-4 (`glm-n`): MindFormers to Hugging Face and back, in each of its layouts.

Whether the channels of queries and keys are rearranged (`use_rearrange_rope`) shows in no name and no shape: that is
chosen with the recipe.

Source: mindspore-lab/mindformers r1.3.0, r1.5.0: mindformers/models/glm2/convert_weight.py.

GLM2, GLM3 and GLM-4 of MindFormers, with projections as Hugging Face fuses them, or split.

Source: mindspore-lab/mindformers r1.5.0: mindformers/models/glm2/convert_weight.py (`qkv_concat`, `mlp_concat`,
`use_rearrange_rope` of its settings).
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.chatglm import CHATGLM
from streamconv.families.mindformers.rules import LEAVES, recipe, renames
from streamconv.families.mindformers.tables import Family, Names, family
from streamconv.plans.recipe import Recipe, Remark, Rule
from streamconv.plans.table import table

LAYER = "transformer.encoder.layers.{i}."
_EMBEDDING: Names = {"transformer.embedding.word_embeddings.weight": "transformer.embedding.embedding_weight"}
_SPLIT: Names = {
    name: name
    for name in (
        "transformer.rotary_pos_emb.inv_freq",
        "transformer.encoder.final_layernorm.",
        "transformer.output_layer.",
        LAYER + "input_layernorm.",
        LAYER + "post_attention_layernorm.",
        LAYER + "self_attention.dense.",
        LAYER + "mlp.dense_4h_to_h.",
    )
}

MF_GLM = family(CHATGLM, "GLM2, GLM3, GLM-4", {"transformer.": "transformer.", **_EMBEDDING})
MF_GLM_SPLIT = family(
    CHATGLM,
    "GLM2, GLM3, GLM-4 with split projections",
    _EMBEDDING | _SPLIT,
    table("""
    transformer.encoder.layers.{i}.self_attention.wq.weight [heads * head_dim, hidden]
    transformer.encoder.layers.{i}.self_attention.wk.weight [kv_heads * head_dim, hidden]
    transformer.encoder.layers.{i}.self_attention.wv.weight [kv_heads * head_dim, hidden]
    transformer.encoder.layers.{i}.self_attention.wq.bias [heads * head_dim] if qkv_bias
    transformer.encoder.layers.{i}.self_attention.wk.bias [kv_heads * head_dim] if qkv_bias
    transformer.encoder.layers.{i}.self_attention.wv.bias [kv_heads * head_dim] if qkv_bias
    transformer.encoder.layers.{i}.mlp.dense_left.weight [ffn, hidden]
    transformer.encoder.layers.{i}.mlp.dense_right.weight [ffn, hidden]
    transformer.encoder.layers.{i}.mlp.dense_left.bias [ffn] if linear_bias
    transformer.encoder.layers.{i}.mlp.dense_right.bias [ffn] if linear_bias
    """),
    name="mindformers-split",
)

# ------------------------------------------------------------------------------------------------- rules

_FUSED = [LAYER + f"self_attention.query_key_value.{leaf}" for leaf in LEAVES]
_PAIRS = """
    q = rotary_pairs(q, heads)
    k = rotary_pairs(k, kv_heads)
"""
_JOIN = "x = concat([q, k, v])"
_CHOICE = Remark(
    "True",
    "queries and keys are taken as they are; where the settings say use_rearrange_rope, use the recipe that ends in "
    "-rearranged",
)


def _rearranged(family: Family) -> Family:
    net = family.net
    return replace(
        family,
        net=replace(net, name=f"{net.name}-rearranged", title=f"{net.title}, their channels rearranged"),
    )


def _split(permute: str) -> tuple[Rule, ...]:
    """Rules for the layout with split projections."""
    return (
        *renames(MF_GLM_SPLIT),
        *(
            Rule(
                {part: LAYER + f"self_attention.w{part}.{leaf}" for part in "qkv"},
                fused,
                permute + _JOIN,
            )
            for leaf, fused in zip(LEAVES, _FUSED, strict=True)
        ),
        *(
            Rule(
                {part: LAYER + f"mlp.dense_{part}.{leaf}" for part in ("left", "right")},
                LAYER + f"mlp.dense_h_to_4h.{leaf}",
                "x = concat([left, right])",
            )
            for leaf in LEAVES
        ),
    )


_TITLE = "GLM2, GLM3, GLM-4"
_APART = "q, k, v = split(x, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])"
_FOUND = ("transformer.embedding.embedding_weight",)
_FOUND_FUSED = (*_FOUND, _FUSED[0])
_FOUND_SPLIT = (*_FOUND, LAYER + "self_attention.wq.weight")

RECIPES: tuple[Recipe, ...] = (
    recipe("glm-n", _TITLE, MF_GLM, renames(MF_GLM), _FOUND_FUSED, remarks=(_CHOICE,)),
    recipe(
        "glm-n-rearranged",
        f"{_TITLE}, rearranged",
        _rearranged(MF_GLM),
        (
            *renames(MF_GLM, _FUSED),
            *(Rule(fused, fused, f"{_APART}{_PAIRS}{_JOIN}") for fused in _FUSED),
        ),
        _FOUND_FUSED,
        named_only=True,
    ),
    recipe(
        "glm-n-split",
        f"{_TITLE} with split projections",
        MF_GLM_SPLIT,
        _split(""),
        _FOUND_SPLIT,
        remarks=(_CHOICE,),
    ),
    recipe(
        "glm-n-split-rearranged",
        f"{_TITLE} with split projections, rearranged",
        _rearranged(MF_GLM_SPLIT),
        _split(_PAIRS),
        _FOUND_SPLIT,
        named_only=True,
    ),
)
