"""GLM2, GLM3 and GLM-4 (`glm-n`): MindFormers to Hugging Face and back, with projections fused or split.

Whether the channels of queries and keys are rearranged (`use_rearrange_rope`) shows in no name and no shape: that is
chosen with the recipe.

Source: mindspore-lab/mindformers r1.3.0, r1.5.0: mindformers/models/glm2/convert_weight.py (`qkv_concat`, `mlp_concat`,
`use_rearrange_rope` of its settings).
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.chatglm import CHATGLM
from streamconv.families.mindformers.net import Names, Net
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Remark, Rule, linear
from streamconv.plans.table import table

LAYER = "transformer.encoder.layers.{i}."
_EMBEDDING: Names = {"transformer.embedding.word_embeddings.weight": "transformer.embedding.embedding_weight"}
_SPLIT = named("""
    transformer.rotary_pos_emb.inv_freq
    transformer.encoder.final_layernorm.
    transformer.output_layer.
    transformer.encoder.layers.{i}.{input,post_attention}_layernorm.
    transformer.encoder.layers.{i}.{self_attention.dense,mlp.dense_4h_to_h}.
""")

_OWN = table("""
    transformer.encoder.layers.{i}.self_attention.wq.weight [heads * head_dim, hidden]
    transformer.encoder.layers.{i}.self_attention.{wk,wv}.weight [kv_heads * head_dim, hidden]
    transformer.encoder.layers.{i}.self_attention.wq.bias [heads * head_dim] if qkv_bias
    transformer.encoder.layers.{i}.self_attention.{wk,wv}.bias [kv_heads * head_dim] if qkv_bias
    transformer.encoder.layers.{i}.mlp.dense_{left,right}.weight [ffn, hidden]
    transformer.encoder.layers.{i}.mlp.dense_{left,right}.bias [ffn] if linear_bias
    """)

_FUSED = LAYER + "self_attention.query_key_value"
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


_APART = "q, k, v = split(x, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])"


def _joined(permute: str) -> tuple[Rule, ...]:
    """Rules for the layout with split projections."""
    return (
        *linear(LAYER + "self_attention.w{q,k,v}", _FUSED, permute + _JOIN),
        *linear(LAYER + "mlp.dense_{left,right}", LAYER + "mlp.dense_h_to_4h", "x = concat([left, right])"),
    )


def _rearranged(net: Net, layout: str, rules: tuple[Rule, ...]) -> Net:
    return replace(
        net,
        key=f"{net.key}-rearranged",
        title=f"{net.title}, rearranged",
        layout=layout,
        called=f"{net.architecture.title}, their channels rearranged",
        rules=rules,
        more={"named_only": True},
    )


MF_GLM = Net(
    key="glm-n",
    title="GLM2, GLM3, GLM-4",
    target=CHATGLM,
    names={"transformer.": "transformer.", **_EMBEDDING},
    found_by=("transformer.embedding.embedding_weight", _FUSED + ".weight"),
    more={"remarks": (_CHOICE,)},
)
_MF_GLM_SPLIT = Net(
    key="glm-n-split",
    title="GLM2, GLM3, GLM-4 with split projections",
    layout="split",
    target=CHATGLM,
    names=_EMBEDDING | _SPLIT,
    own=_OWN,
    rules=_joined(""),
    found_by=("transformer.embedding.embedding_weight", LAYER + "self_attention.wq.weight"),
    more={"remarks": (_CHOICE,)},
)
NETS = (
    MF_GLM,
    _rearranged(MF_GLM, "rearranged", linear(_FUSED, _FUSED, f"{_APART}{_PAIRS}{_JOIN}")),
    _MF_GLM_SPLIT,
    _rearranged(_MF_GLM_SPLIT, "split-rearranged", _joined(_PAIRS)),
)
