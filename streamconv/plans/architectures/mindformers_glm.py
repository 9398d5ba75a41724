"""GLM2, GLM3 and GLM-4 of MindFormers, with projections as Hugging Face fuses them, or split.

Source: mindspore-lab/mindformers r1.5.0: mindformers/models/glm2/convert_weight.py (`qkv_concat`, `mlp_concat`,
`use_rearrange_rope` of its settings).
"""

from __future__ import annotations

from streamconv.plans.architectures.chatglm import CHATGLM
from streamconv.plans.architectures.mindformers import Names, family

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
    """
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
    """,
    name="mindformers-split",
)
