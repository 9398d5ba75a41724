"""Glm and Glm4 of transformers: fused gate and up projections, rotation of neighbouring pairs.

Source: huggingface/transformers 5.23.0: models/glm/modeling_glm.py, models/glm4/modeling_glm4.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.llama import SIZES
from streamconv.plans.architecture import Architecture
from streamconv.plans.table import table

GLM = Architecture(
    name="glm",
    title="Glm",
    model_types=("glm",),
    classes=("GlmForCausalLM",),
    sizes={**SIZES, "attention_bias": "bool(attention_bias)"},
    counts={"i": "layers"},
    lines=table("""
        model.embed_tokens.weight [vocab, hidden]
        model.layers.{i}.input_layernorm.weight [hidden]
        model.layers.{i}.self_attn.q_proj.weight [heads * head_dim, hidden]
        model.layers.{i}.self_attn.k_proj.weight [kv_heads * head_dim, hidden]
        model.layers.{i}.self_attn.v_proj.weight [kv_heads * head_dim, hidden]
        model.layers.{i}.self_attn.q_proj.bias [heads * head_dim] if attention_bias
        model.layers.{i}.self_attn.k_proj.bias [kv_heads * head_dim] if attention_bias
        model.layers.{i}.self_attn.v_proj.bias [kv_heads * head_dim] if attention_bias
        model.layers.{i}.self_attn.o_proj.weight [hidden, heads * head_dim]
        model.layers.{i}.post_attention_layernorm.weight [hidden]
        model.layers.{i}.mlp.gate_up_proj.weight [2 * ffn, hidden]
        model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
        model.norm.weight [hidden]
        lm_head.weight [vocab, hidden] if not tied
        ?lm_head.weight [vocab, hidden] if tied
    """),
)

GLM4 = replace(
    GLM,
    name="glm4",
    title="GLM-4-0414",
    model_types=("glm4",),
    classes=("Glm4ForCausalLM",),
    lines=GLM.lines
    + table("""
        model.layers.{i}.post_self_attn_layernorm.weight [hidden]
        model.layers.{i}.post_mlp_layernorm.weight [hidden]
    """),
)
"""Two more norms in each layer, behind attention and behind the feed-forward part."""
