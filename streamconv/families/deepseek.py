"""DeepSeek-V2 and DeepSeek-V3 (and R1), with their experts apart and packed.

Source: huggingface/transformers 5.23.0: models/{deepseek_v2,deepseek_v3}.
"""

from __future__ import annotations

from streamconv.families.experts import DENSE, ENDS, Mixture, packing, shared_expert
from streamconv.families.llama import SIZES
from streamconv.plans.table import table

_LATENT = table("""
    model.layers.{i}.self_attn.q_proj.weight [heads * (nope + rope), hidden] if not q_rank
    model.layers.{i}.self_attn.q_a_proj.weight [q_rank, hidden] if q_rank
    model.layers.{i}.self_attn.q_a_proj.bias [q_rank] if q_rank and attention_bias
    model.layers.{i}.self_attn.q_a_layernorm.weight [q_rank] if q_rank
    model.layers.{i}.self_attn.q_b_proj.weight [heads * (nope + rope), q_rank] if q_rank
    model.layers.{i}.self_attn.kv_a_proj_with_mqa.{weight,bias} [kv_rank + rope, hidden] [kv_rank + rope if attention_bias]
    model.layers.{i}.self_attn.kv_a_layernorm.weight [kv_rank]
    model.layers.{i}.self_attn.kv_b_proj.weight [heads * (nope + value), kv_rank]
    model.layers.{i}.self_attn.o_proj.{weight,bias} [hidden, heads * value] [hidden if attention_bias]
""")
_MLP_BIAS = table("""
    model.layers.{i}.mlp.{gate,up}_proj.bias [ffn] if mlp_bias and not sparse
    model.layers.{i}.mlp.down_proj.bias [hidden] if mlp_bias and not sparse
    model.layers.{i}.mlp.shared_experts.{gate,up}_proj.bias [shared_ffn] if mlp_bias and sparse and shared_ffn
    model.layers.{i}.mlp.shared_experts.down_proj.bias [hidden] if mlp_bias and sparse and shared_ffn
""")
_SIZES = {
    **{name: SIZES[name] for name in ("hidden", "vocab", "ffn", "layers", "heads", "tied")},
    "attention_bias": "bool(attention_bias)",
    "q_rank": "q_lora_rank or 0",
    "kv_rank": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "experts": "n_routed_experts or num_local_experts",
    "expert_ffn": "moe_intermediate_size",
    "shared_ffn": "moe_intermediate_size * (n_shared_experts or 0)",
    "first_sparse": "first_k_dense_replace or 0",
}
_LINES = ENDS + _LATENT + DENSE + shared_expert("shared_experts")
_SPARSE = "i >= first_sparse"

DEEPSEEK_V2 = Mixture(
    name="deepseek-v2",
    title="DeepSeek-V2",
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    sizes={**_SIZES, "mlp_bias": "bool(mlp_bias)"},
    lines=_LINES + _MLP_BIAS,
    sparse=_SPARSE,
)
DEEPSEEK_V3 = Mixture(
    name="deepseek-v3",
    title="DeepSeek-V3",
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    sizes=_SIZES,
    lines=_LINES
    + table("""
        model.layers.{i}.mlp.gate.e_score_correction_bias [experts] if sparse
    """),
    sparse=_SPARSE,
)

RECIPES = (packing(DEEPSEEK_V2), packing(DEEPSEEK_V3))
