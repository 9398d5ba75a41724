"""Mixtures of experts: each expert's matrices by themselves, as checkpoints have them, or packed into one
tensor a layer, as transformers 5 has them in memory (and on disk with `save_original_format=False`).

Source: huggingface/transformers 5.23.0: models/{mixtral,qwen2_moe,qwen3_moe,deepseek_v2,deepseek_v3},
conversion_mapping.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.plans.architecture import Architecture, Line, table
from streamconv.plans.architectures.llama import SIZES

_LAYER = "model.layers.{i}."
_ATTENTION = """
    model.embed_tokens.weight [vocab, hidden]
    model.layers.{i}.input_layernorm.weight [hidden]
    model.layers.{i}.self_attn.q_proj.weight [heads * head_dim, hidden]
    model.layers.{i}.self_attn.k_proj.weight [kv_heads * head_dim, hidden]
    model.layers.{i}.self_attn.v_proj.weight [kv_heads * head_dim, hidden]
    model.layers.{i}.self_attn.o_proj.weight [hidden, heads * head_dim]
    model.layers.{i}.post_attention_layernorm.weight [hidden]
    model.norm.weight [hidden]
    lm_head.weight [vocab, hidden] if not tied
    ?lm_head.weight [vocab, hidden] if tied
"""
_QKV_BIAS = """
    model.layers.{i}.self_attn.q_proj.bias [heads * head_dim]
    model.layers.{i}.self_attn.k_proj.bias [kv_heads * head_dim]
    model.layers.{i}.self_attn.v_proj.bias [kv_heads * head_dim]
"""
_QK_NORM = """
    model.layers.{i}.self_attn.q_norm.weight [head_dim]
    model.layers.{i}.self_attn.k_norm.weight [head_dim]
"""
_DENSE = """
    model.layers.{i}.mlp.gate_proj.weight [ffn, hidden] if DENSE
    model.layers.{i}.mlp.up_proj.weight [ffn, hidden] if DENSE
    model.layers.{i}.mlp.down_proj.weight [hidden, ffn] if DENSE
"""
_SHARED = """
    model.layers.{i}.mlp.SHARED.gate_proj.weight [shared_ffn, hidden] if SPARSE
    model.layers.{i}.mlp.SHARED.up_proj.weight [shared_ffn, hidden] if SPARSE
    model.layers.{i}.mlp.SHARED.down_proj.weight [hidden, shared_ffn] if SPARSE
"""
_LATENT = """
    model.embed_tokens.weight [vocab, hidden]
    model.layers.{i}.input_layernorm.weight [hidden]
    model.layers.{i}.self_attn.q_proj.weight [heads * (nope + rope), hidden] if not q_rank
    model.layers.{i}.self_attn.q_a_proj.weight [q_rank, hidden] if q_rank
    model.layers.{i}.self_attn.q_a_proj.bias [q_rank] if q_rank and attention_bias
    model.layers.{i}.self_attn.q_a_layernorm.weight [q_rank] if q_rank
    model.layers.{i}.self_attn.q_b_proj.weight [heads * (nope + rope), q_rank] if q_rank
    model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight [kv_rank + rope, hidden]
    model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias [kv_rank + rope] if attention_bias
    model.layers.{i}.self_attn.kv_a_layernorm.weight [kv_rank]
    model.layers.{i}.self_attn.kv_b_proj.weight [heads * (nope + value), kv_rank]
    model.layers.{i}.self_attn.o_proj.weight [hidden, heads * value]
    model.layers.{i}.self_attn.o_proj.bias [hidden] if attention_bias
    model.layers.{i}.post_attention_layernorm.weight [hidden]
    model.norm.weight [hidden]
    lm_head.weight [vocab, hidden] if not tied
    ?lm_head.weight [vocab, hidden] if tied
"""


@dataclass(frozen=True, slots=True)
class Mixture:
    """One family.

    Attributes:
        name: of its recipe's family.
        apart, packed: its two namings.
        block: what the layer's mixture is called in the first naming.
        parts: what its gate, up and down matrices are called there.
    """

    name: str
    apart: Architecture
    packed: Architecture
    block: str
    parts: tuple[str, str, str]


def _mixture(
    name: str,
    title: str,
    model_type: str,
    class_name: str,
    sizes: dict[str, str],
    lines: str,
    sparse: str,
    block: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Mixture:
    """Both namings of a family; SPARSE and DENSE in `lines` stand for `sparse` and its opposite."""
    lines = lines.replace("SPARSE", sparse).replace("DENSE", f"not ({sparse})")
    gate, up, down = parts
    experts = {
        block: f"""
            {_LAYER}{block}.experts.{{e}}.{gate}.weight [expert_ffn, hidden] if {sparse}
            {_LAYER}{block}.experts.{{e}}.{up}.weight [expert_ffn, hidden] if {sparse}
            {_LAYER}{block}.experts.{{e}}.{down}.weight [hidden, expert_ffn] if {sparse}
            {_LAYER}{block}.gate.weight [experts, hidden] if {sparse}
        """,
        "": f"""
            {_LAYER}mlp.experts.gate_up_proj [experts, 2 * expert_ffn, hidden] if {sparse}
            {_LAYER}mlp.experts.down_proj [experts, hidden, expert_ffn] if {sparse}
            {_LAYER}mlp.gate.weight [experts, hidden] if {sparse}
        """,
    }

    def architecture(naming: str, own: str) -> Architecture:
        return Architecture(
            name=naming,
            title=f"{title}, {'packed experts' if naming == 'packed' else 'experts apart'}",
            model_types=(model_type,),
            classes=(class_name,),
            sizes=sizes,
            counts={"i": "layers", "e": "experts"},
            lines=table(lines + own),
        )

    return Mixture(
        name, architecture("experts-apart", experts[block]), architecture("packed", experts[""]), block, parts
    )


MIXTRAL = _mixture(
    "mixtral",
    "Mixtral",
    "mixtral",
    "MixtralForCausalLM",
    {**SIZES, "experts": "num_local_experts", "expert_ffn": "intermediate_size"},
    _ATTENTION,
    "True",
    block="block_sparse_moe",
    parts=("w1", "w3", "w2"),
)
_QWEN_SPARSE = "experts > 0 and i not in dense_layers and (i + 1) % step == 0"
_QWEN_SIZES = {
    **SIZES,
    "experts": "num_experts or num_local_experts",
    "expert_ffn": "moe_intermediate_size",
    "dense_layers": "mlp_only_layers or []",
    "step": "decoder_sparse_step or 1",
}
QWEN2_MOE = _mixture(
    "qwen2moe",
    "Qwen2-MoE",
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    {**_QWEN_SIZES, "shared_ffn": "shared_expert_intermediate_size"},
    _ATTENTION
    + _QKV_BIAS
    + _DENSE
    + _SHARED.replace("SHARED", "shared_expert")
    + "\n model.layers.{i}.mlp.shared_expert_gate.weight [1, hidden] if SPARSE\n",
    _QWEN_SPARSE,
)
QWEN3_MOE = _mixture(
    "qwen3moe",
    "Qwen3-MoE",
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _QWEN_SIZES,
    _ATTENTION + _QK_NORM + _DENSE,
    _QWEN_SPARSE,
)
_DEEPSEEK_SIZES = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "tied": "bool(tie_word_embeddings)",
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
_DEEPSEEK = _LATENT + _DENSE + _SHARED.replace("SHARED", "shared_experts")
DEEPSEEK_V2 = _mixture(
    "deepseek-v2",
    "DeepSeek-V2",
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _DEEPSEEK_SIZES,
    _DEEPSEEK,
    "i >= first_sparse",
)
DEEPSEEK_V3 = _mixture(
    "deepseek-v3",
    "DeepSeek-V3",
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _DEEPSEEK_SIZES,
    _DEEPSEEK + "\n model.layers.{i}.mlp.gate.e_score_correction_bias [experts] if SPARSE\n",
    "i >= first_sparse",
)

MIXTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3)


def shared_lines(mixture: Mixture) -> list[Line]:
    """What both namings have alike."""
    packed = {line.name.text for line in mixture.packed.lines}
    return [line for line in mixture.apart.lines if line.name.text in packed]
