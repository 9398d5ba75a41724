"""Glm and Glm4 of transformers: fused gate and up projections, rotation of neighbouring pairs.

Source: huggingface/transformers 5.23.0: models/glm/modeling_glm.py, models/glm4/modeling_glm4.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families import llama
from streamconv.plans.table import table

GLM = llama.decoder(
    "glm",
    "Glm",
    "Glm",
    llama.QKV + llama.QKV_BIAS + llama.OUTPUT,
    table("""
        model.layers.{i}.mlp.gate_up_proj.weight [2 * ffn, hidden]
        model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
    """),
    attention_bias="bool(attention_bias)",
)

GLM4 = replace(
    GLM,
    name="glm4",
    title="GLM-4-0414",
    model_types=("glm4",),
    classes=("Glm4ForCausalLM",),
    lines=GLM.lines
    + table("""
        model.layers.{i}.post_{self_attn,mlp}_layernorm.weight [hidden]
    """),
)
"""Two more norms in each layer, behind attention and behind the feed-forward part."""
