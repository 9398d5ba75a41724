"""ChatGLM2, ChatGLM3 and GLM-4, in the naming of their own code (`model_type` chatglm).

Source: zai-org/ChatGLM3: modeling_chatglm.py, configuration_chatglm.py of the published models.
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture, table

CHATGLM = Architecture(
    name="chatglm",
    title="ChatGLM",
    model_types=("chatglm",),
    classes=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    sizes={
        "hidden": "hidden_size",
        "vocab": "padded_vocab_size or vocab_size",
        "ffn": "ffn_hidden_size",
        "layers": "num_layers",
        "heads": "num_attention_heads",
        "head_dim": "kv_channels or hidden_size // num_attention_heads",
        "grouped": "bool(multi_query_attention)",
        "kv_heads": "(multi_query_group_num or 1) if grouped else heads",
        "qkv_bias": "bool(add_qkv_bias or add_bias_linear)",
        "linear_bias": "bool(add_bias_linear)",
        "pairs": "original_rope != False",
    },
    counts={"i": "layers"},
    lines=table("""
        transformer.embedding.word_embeddings.weight [vocab, hidden]
        ?transformer.rotary_pos_emb.inv_freq [head_dim // 4]
        transformer.encoder.layers.{i}.input_layernorm.weight [hidden]
        transformer.encoder.layers.{i}.self_attention.query_key_value.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        transformer.encoder.layers.{i}.self_attention.query_key_value.bias [(heads + 2 * kv_heads) * head_dim] if qkv_bias
        transformer.encoder.layers.{i}.self_attention.dense.weight [hidden, heads * head_dim]
        transformer.encoder.layers.{i}.self_attention.dense.bias [hidden] if linear_bias
        transformer.encoder.layers.{i}.post_attention_layernorm.weight [hidden]
        transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight [2 * ffn, hidden]
        transformer.encoder.layers.{i}.mlp.dense_h_to_4h.bias [2 * ffn] if linear_bias
        transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight [hidden, ffn]
        transformer.encoder.layers.{i}.mlp.dense_4h_to_h.bias [hidden] if linear_bias
        transformer.encoder.final_layernorm.weight [hidden]
        transformer.output_layer.weight [vocab, hidden]
    """),
    vocabulary="padded_vocab_size",
)
