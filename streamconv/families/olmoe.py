"""OLMoE, with its experts apart and packed.

Source: huggingface/transformers 5.23.0: models/olmoe.
"""

from __future__ import annotations

from streamconv.families import experts
from streamconv.families.llama import SIZES
from streamconv.plans.table import table

_NORM_OF_ALL = table("""
    model.layers.{i}.self_attn.q_norm.weight [heads * head_dim]
    model.layers.{i}.self_attn.k_norm.weight [kv_heads * head_dim]
""")
OLMOE = experts.Mixture(
    name="olmoe",
    title="OLMoE",
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    sizes={
        **SIZES,
        "experts": "num_experts or num_local_experts",
        "expert_ffn": "intermediate_size",
        "qkv_bias": "bool(attention_bias)",
    },
    lines=experts.ENDS + experts.ATTENTION + experts.QKV_BIAS + experts.OUTPUT_BIAS + _NORM_OF_ALL,
)

RECIPES = (experts.packing(OLMOE),)
