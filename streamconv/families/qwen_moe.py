"""Qwen2-MoE and Qwen3-MoE, with their experts apart and packed.

Source: huggingface/transformers 5.23.0: models/{qwen2_moe,qwen3_moe}.
"""

from __future__ import annotations

from streamconv.families import experts
from streamconv.families.llama import SIZES
from streamconv.plans.table import table

_NORM_OF_HEADS = table("""
    model.layers.{i}.self_attn.{q,k}_norm.weight [head_dim]
""")
_SPARSE = "experts > 0 and i not in dense_layers and (i + 1) % step == 0"
_SIZES = {
    **SIZES,
    "experts": "num_experts or num_local_experts",
    "expert_ffn": "moe_intermediate_size",
    "dense_layers": "mlp_only_layers or []",
    "step": "decoder_sparse_step or 1",
}

QWEN2_MOE = experts.Mixture(
    name="qwen2moe",
    title="Qwen2-MoE",
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    sizes={**_SIZES, "shared_ffn": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias != False"},
    lines=experts.ENDS
    + experts.ATTENTION
    + experts.QKV_BIAS
    + experts.DENSE
    + experts.shared_expert("shared_expert")
    + table("""
        model.layers.{i}.mlp.shared_expert_gate.weight [1, hidden] if sparse
    """),
    sparse=_SPARSE,
)
QWEN3_MOE = experts.Mixture(
    name="qwen3moe",
    title="Qwen3-MoE",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    sizes={**_SIZES, "qkv_bias": "bool(attention_bias)"},
    lines=experts.ENDS
    + experts.ATTENTION
    + experts.QKV_BIAS
    + experts.OUTPUT_BIAS
    + _NORM_OF_HEADS
    + experts.DENSE,
    sparse=_SPARSE,
)

RECIPES = (experts.packing(QWEN2_MOE), experts.packing(QWEN3_MOE))
