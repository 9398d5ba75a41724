"""Qwen2-MoE, Qwen3-MoE and OLMoE, with their experts apart and packed.

Source: huggingface/transformers 5.23.0: models/{qwen2_moe,qwen3_moe,olmoe}.
"""

from __future__ import annotations

from streamconv.families.llama import SIZES
from streamconv.families.mixtral import ATTENTION, DENSE, ENDS, mixture, shared_expert

_QKV_BIAS = """
    model.layers.{i}.self_attn.q_proj.bias [heads * head_dim] if qkv_bias
    model.layers.{i}.self_attn.k_proj.bias [kv_heads * head_dim] if qkv_bias
    model.layers.{i}.self_attn.v_proj.bias [kv_heads * head_dim] if qkv_bias
"""
_OUTPUT_BIAS = """
    model.layers.{i}.self_attn.o_proj.bias [hidden] if qkv_bias
"""
_NORM_OF_HEADS = """
    model.layers.{i}.self_attn.q_norm.weight [head_dim]
    model.layers.{i}.self_attn.k_norm.weight [head_dim]
"""
_NORM_OF_ALL = """
    model.layers.{i}.self_attn.q_norm.weight [heads * head_dim]
    model.layers.{i}.self_attn.k_norm.weight [kv_heads * head_dim]
"""
_SPARSE = "experts > 0 and i not in dense_layers and (i + 1) % step == 0"
_SIZES = {
    **SIZES,
    "experts": "num_experts or num_local_experts",
    "expert_ffn": "moe_intermediate_size",
    "dense_layers": "mlp_only_layers or []",
    "step": "decoder_sparse_step or 1",
}

QWEN2_MOE = mixture(
    "qwen2moe",
    "Qwen2-MoE",
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    {**_SIZES, "shared_ffn": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias != False"},
    ENDS
    + ATTENTION
    + _QKV_BIAS
    + DENSE
    + shared_expert("shared_expert")
    + """
    model.layers.{i}.mlp.shared_expert_gate.weight [1, hidden] if SPARSE
    """,
    _SPARSE,
)
QWEN3_MOE = mixture(
    "qwen3moe",
    "Qwen3-MoE",
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {**_SIZES, "qkv_bias": "bool(attention_bias)"},
    ENDS + ATTENTION + _QKV_BIAS + _OUTPUT_BIAS + _NORM_OF_HEADS + DENSE,
    _SPARSE,
)
OLMOE = mixture(
    "olmoe",
    "OLMoE",
    "olmoe",
    "OlmoeForCausalLM",
    {
        **SIZES,
        "experts": "num_experts or num_local_experts",
        "expert_ffn": "intermediate_size",
        "qkv_bias": "bool(attention_bias)",
    },
    ENDS + ATTENTION + _QKV_BIAS + _OUTPUT_BIAS + _NORM_OF_ALL,
    "True",
)
