"""CogVLM and CogVLM2, in SAT's naming and in that of their Hugging Face code.

Sizes of both namings are read from configs that differ: `model_config.json`, to which the SAT reader adds a
`model_type`, and `config.json`.

Source: THUDM/CogVLM (main, cogvlm2_dev: utils/models), THUDM/SwissArmyTransformer
(sat/model/official/llama_model.py); huggingface/transformers PR 28196 (modeling_cogvlm.py).
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.plans.architecture import Architecture, table

_COUNTS = {"i": "layers", "j": "vision_layers"}

SAT_COGVLM = Architecture(
    name="sat",
    title="CogVLM of SAT",
    model_types=("sat-cogvlm",),
    classes=(),
    sizes={
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "ffn": "inner_hidden_size or 4 * hidden_size",
        "layers": "num_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_multi_query_heads or num_attention_heads",
        "head_dim": "hidden_size_per_attention_head or hidden_size // num_attention_heads",
        "second": "bool(num_multi_query_heads)",
        "vision_layers": "eva_args['num_layers']",
        "vision_hidden": "eva_args['hidden_size']",
        "vision_ffn": "eva_args['inner_hidden_size'] or 4 * eva_args['hidden_size']",
        "channels": "eva_args['in_channels']",
        "patch": "eva_args['patch_size']",
        "positions": "eva_args['max_sequence_length']",
        "vision_inner": "(eva_args['hidden_size_per_attention_head'] * eva_args['num_attention_heads'])"
        " if eva_args['hidden_size_per_attention_head'] else eva_args['hidden_size']",
    },
    counts=_COUNTS,
    lines=table("""
        transformer.word_embeddings.weight [vocab, hidden]
        transformer.layers.{i}.input_layernorm.weight [hidden]
        transformer.layers.{i}.post_attention_layernorm.weight [hidden]
        transformer.layers.{i}.attention.query_key_value.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        transformer.layers.{i}.attention.dense.weight [hidden, heads * head_dim]
        transformer.layers.{i}.mlp.dense_h_to_4h.weight [ffn, hidden]
        transformer.layers.{i}.mlp.dense_4h_to_h.weight [hidden, ffn]
        mixins.mlp.gate_proj.{i}.weight [ffn, hidden]
        mixins.mlp.vision_dense_h_to_4h_list.{i}.weight [ffn, hidden]
        mixins.mlp.vision_dense_4h_to_h_list.{i}.weight [hidden, ffn]
        mixins.mlp.vision_gate_proj.{i}.weight [ffn, hidden]
        mixins.rotary.vision_query_key_value_list.{i}.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        mixins.rotary.vision_query_key_value_list.{i}.bias [(heads + 2 * kv_heads) * head_dim] if second
        mixins.rotary.vision_dense_list.{i}.weight [hidden, heads * head_dim]
        ?mixins.rotary.rotary_emb.inv_freq [head_dim // 2]
        transformer.final_layernorm.weight [hidden]
        mixins.lm.lm_head.weight [vocab, hidden]
        mixins.eva.boi [1, 1, hidden]
        mixins.eva.eoi [1, 1, hidden]
        mixins.eva.conv.weight [vision_hidden, vision_hidden, 2, 2] if second
        mixins.eva.conv.bias [vision_hidden] if second
        mixins.eva.linear_proj.linear_proj.weight [hidden, vision_hidden]
        mixins.eva.linear_proj.norm1.weight [hidden]
        mixins.eva.linear_proj.norm1.bias [hidden]
        mixins.eva.linear_proj.dense_h_to_4h.weight [ffn, hidden]
        mixins.eva.linear_proj.gate_proj.weight [ffn, hidden]
        mixins.eva.linear_proj.dense_4h_to_h.weight [hidden, ffn]
        mixins.eva.vit_model.mixins.patch_embedding.proj.weight [vision_hidden, channels, patch, patch]
        mixins.eva.vit_model.mixins.patch_embedding.proj.bias [vision_hidden]
        mixins.eva.vit_model.transformer.word_embeddings.weight [1, vision_hidden]
        mixins.eva.vit_model.transformer.position_embeddings.weight [positions, vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.input_layernorm.weight [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.input_layernorm.bias [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.post_attention_layernorm.weight [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.post_attention_layernorm.bias [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.attention.query_key_value.weight [3 * vision_inner, vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.attention.query_key_value.bias [3 * vision_inner]
        mixins.eva.vit_model.transformer.layers.{j}.attention.dense.weight [vision_hidden, vision_inner]
        mixins.eva.vit_model.transformer.layers.{j}.attention.dense.bias [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.mlp.dense_h_to_4h.weight [vision_ffn, vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.mlp.dense_h_to_4h.bias [vision_ffn]
        mixins.eva.vit_model.transformer.layers.{j}.mlp.dense_4h_to_h.weight [vision_hidden, vision_ffn]
        mixins.eva.vit_model.transformer.layers.{j}.mlp.dense_4h_to_h.bias [vision_hidden]
    """),
)

_SAT_CROSS = """
    mixins.eva.pos_embed [positions - 1, vision_hidden]
    mixins.encoder.pos_embed [cross_positions, cross_hidden]
    transformer.layers.{i}.post_cross_attention_layernorm.weight [hidden]
    transformer.layers.{i}.cross_attention.query.weight [cross_inner, hidden]
    transformer.layers.{i}.cross_attention.key_value.weight [2 * cross_inner, cross_hidden]
    transformer.layers.{i}.cross_attention.dense.weight [hidden, cross_inner]
"""
SAT_COGAGENT = replace(
    SAT_COGVLM,
    title="CogAgent of SAT",
    sizes={
        **SAT_COGVLM.sizes,
        "cross_hidden": "cross_attn_hidden_size",
        "cross_inner": "(cross_hidden_size_per_attention_head or cross_attn_hidden_size // num_attention_heads)"
        " * num_attention_heads",
        "cross_positions": "((cross_image_pix or 1120) // 14) ** 2",
    },
    lines=SAT_COGVLM.lines + table(_SAT_CROSS),
    beyond=("mixins.encoder.vit.*",),
    only_if="cross_attn_hidden_size",
)

COGVLM = Architecture(
    name="cogvlm",
    title="CogVLM",
    model_types=("cogvlm",),
    classes=("CogVLMForCausalLM", "CogVLMVideoForCausalLM"),
    sizes={
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "ffn": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_multi_query_heads or num_attention_heads",
        "head_dim": "hidden_size // num_attention_heads",
        "second": "bool(num_multi_query_heads)",
        "vision_layers": "vision_config['num_hidden_layers']",
        "vision_hidden": "vision_config['hidden_size']",
        "vision_ffn": "vision_config['intermediate_size']",
        "channels": "vision_config['in_channels']",
        "patch": "vision_config['patch_size']",
        "positions": "vision_config['num_positions']",
    },
    counts=_COUNTS,
    lines=table("""
        model.embed_tokens.weight [vocab, hidden]
        model.layers.{i}.input_layernorm.weight [hidden]
        model.layers.{i}.post_attention_layernorm.weight [hidden]
        model.layers.{i}.self_attn.language_expert_query_key_value.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        model.layers.{i}.self_attn.language_expert_dense.weight [hidden, heads * head_dim]
        model.layers.{i}.self_attn.vision_expert_query_key_value.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        model.layers.{i}.self_attn.vision_expert_query_key_value.bias [(heads + 2 * kv_heads) * head_dim] if second
        model.layers.{i}.self_attn.vision_expert_dense.weight [hidden, heads * head_dim]
        ?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]
        model.layers.{i}.mlp.language_mlp.gate_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.language_mlp.up_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.language_mlp.down_proj.weight [hidden, ffn]
        model.layers.{i}.mlp.vision_mlp.gate_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.vision_mlp.up_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.vision_mlp.down_proj.weight [hidden, ffn]
        model.norm.weight [hidden]
        lm_head.weight [vocab, hidden]
        model.vision.boi [1, 1, hidden]
        model.vision.eoi [1, 1, hidden]
        model.vision.conv.weight [vision_hidden, vision_hidden, 2, 2] if second
        model.vision.conv.bias [vision_hidden] if second
        model.vision.linear_proj.linear_proj.weight [hidden, vision_hidden]
        model.vision.linear_proj.norm1.weight [hidden]
        model.vision.linear_proj.norm1.bias [hidden]
        model.vision.linear_proj.dense_h_to_4h.weight [ffn, hidden]
        model.vision.linear_proj.gate_proj.weight [ffn, hidden]
        model.vision.linear_proj.dense_4h_to_h.weight [hidden, ffn]
        model.vision.patch_embedding.proj.weight [vision_hidden, channels, patch, patch]
        model.vision.patch_embedding.proj.bias [vision_hidden]
        model.vision.patch_embedding.cls_embedding [1, vision_hidden]
        model.vision.patch_embedding.position_embedding.weight [positions, vision_hidden]
        model.vision.transformer.layers.{j}.input_layernorm.weight [vision_hidden]
        model.vision.transformer.layers.{j}.input_layernorm.bias [vision_hidden]
        model.vision.transformer.layers.{j}.post_attention_layernorm.weight [vision_hidden]
        model.vision.transformer.layers.{j}.post_attention_layernorm.bias [vision_hidden]
        model.vision.transformer.layers.{j}.attention.query_key_value.weight [3 * vision_hidden, vision_hidden]
        model.vision.transformer.layers.{j}.attention.query_key_value.bias [3 * vision_hidden]
        model.vision.transformer.layers.{j}.attention.dense.weight [vision_hidden, vision_hidden]
        model.vision.transformer.layers.{j}.attention.dense.bias [vision_hidden]
        model.vision.transformer.layers.{j}.mlp.fc1.weight [vision_ffn, vision_hidden]
        model.vision.transformer.layers.{j}.mlp.fc1.bias [vision_ffn]
        model.vision.transformer.layers.{j}.mlp.fc2.weight [vision_hidden, vision_ffn]
        model.vision.transformer.layers.{j}.mlp.fc2.bias [vision_hidden]
    """),
)

COGAGENT = replace(
    COGVLM,
    name="cogagent",
    title="CogAgent",
    model_types=("cogagent",),
    classes=("CogAgentForCausalLM",),
    sizes={
        **COGVLM.sizes,
        "cross_hidden": "cross_hidden_size",
        "cross_inner": "cross_compute_hidden_size",
        "cross_positions": "(cross_image_size // 14) ** 2",
    },
    lines=COGVLM.lines
    + table("""
        model.vision.pos_embed [positions - 1, vision_hidden]
        model.cross_vision.pos_embed [cross_positions, cross_hidden]
        model.layers.{i}.post_cross_attention_layernorm.weight [hidden]
        model.layers.{i}.cross_attn.query.weight [cross_inner, hidden]
        model.layers.{i}.cross_attn.key_value.weight [2 * cross_inner, cross_hidden]
        model.layers.{i}.cross_attn.dense.weight [hidden, cross_inner]
    """),
    beyond=("model.cross_vision.vit.*",),
)
