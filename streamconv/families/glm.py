"""Glm and Glm4 of transformers: fused gate and up projections, rotation of neighbouring pairs.

Source: huggingface/transformers 5.23.0: models/glm/modeling_glm.py, models/glm4/modeling_glm4.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families import llama
from streamconv.families.llama import SIZES
from streamconv.plans.architecture import Architecture
from streamconv.plans.table import table

GLM = Architecture(
    name="glm",
    title="Glm",
    model_types=("glm",),
    classes=("GlmForCausalLM",),
    sizes={**SIZES, "attention_bias": "bool(attention_bias)"},
    lines=llama.FIRST
    + llama.QKV
    + llama.QKV_BIAS
    + llama.OUTPUT
    + llama.BETWEEN
    + table("""
        model.layers.{i}.mlp.gate_up_proj.weight [2 * ffn, hidden]
        model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
    """)
    + llama.NORM
    + llama.MAYBE_TIED_HEAD,
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
