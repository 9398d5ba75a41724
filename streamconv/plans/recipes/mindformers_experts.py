"""Mixtral, Qwen2-MoE, DeepSeek-V2 and DeepSeek-V3: MindFormers to Hugging Face and back.

All experts of a layer are stacked, however many there are. Whether they are transposed for grouped products (`use_gmm`)
need not show in their shapes: that is chosen with the recipe.

Source: mindspore-lab/mindformers r1.3.0: research/{mixtral,qwen2,deepseek2}; r1.8.0: research/deepseek3.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamconv.plans.architectures.mindformers import LAYER
from streamconv.plans.architectures.mindformers_experts import (
    FUSED,
    MF_DEEPSEEK_V2,
    MF_DEEPSEEK_V2_GMM,
    MF_DEEPSEEK_V3,
    MF_DEEPSEEK_V3_UNGROUPED,
    MF_MIXTRAL,
    MF_MIXTRAL_GMM,
    MF_QWEN2_MOE,
    MF_QWEN2_MOE_GMM,
    MIXTRAL_EXPERTS,
    ROUTED,
)
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule
from streamconv.plans.recipes.mindformers_rules import FOUND_LLAMA, prediction, recipe, renames, tied

_HEAD = "lm_head.weight"
_MIXTRAL_PARTS = {"w1": "w1", "w2": "w2", "w3": "w3"}
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

QUANTISED = (
    Refusal(
        "quantization_config",
        "its weights are quantised, and the net has no place for their scales",
        "make them BF16 first, with --recipe fp8-bf16",
    ),
)
_GROUPED = Remark(
    "True",
    "experts are taken as [out, in]; where the settings say use_gmm, use the recipe that ends in -gmm",
)


def _stacked(ours: str, theirs: str, parts: Mapping[str, str], *, grouped: bool = False) -> tuple[Rule, ...]:
    """Rules for the three stacks of a layer's experts."""
    return tuple(
        Rule(
            f"{ours}.{part}.weight",
            f"{theirs}.experts.{{e}}.{their_part}.weight",
            "x = unstack(transpose(x))" if grouped else "x = unstack(x)",
        )
        for part, their_part in parts.items()
    )


def _mixtral(*, grouped: bool) -> tuple[Rule, ...]:
    return (
        *tied(),
        *renames(MF_MIXTRAL, {_HEAD}),
        *_stacked(MIXTRAL_EXPERTS, LAYER + "block_sparse_moe", _MIXTRAL_PARTS, grouped=grouped),
    )


def _qwen2_moe(*, grouped: bool) -> tuple[Rule, ...]:
    return (
        *tied(),
        *renames(MF_QWEN2_MOE, {_HEAD}),
        *_stacked(ROUTED, LAYER + "mlp", _PARTS, grouped=grouped),
    )


def _deepseek_v2(*, grouped: bool) -> tuple[Rule, ...]:
    return (
        *tied(),
        *renames(MF_DEEPSEEK_V2, {_HEAD}),
        *_stacked(ROUTED, LAYER + "mlp", _PARTS, grouped=grouped),
    )


_FOUND_MIXTRAL = (*FOUND_LLAMA, LAYER + "feed_forward.router.dense.weight")
_FOUND_QWEN2_MOE = (
    *FOUND_LLAMA,
    LAYER + "attention.wq.bias",
    LAYER + "feed_forward.routed_experts.router.dense.weight",
)
_FOUND_LATENT = (FOUND_LLAMA[0], LAYER + "attention.lkv_norm.weight")
_FOUND_V2 = (*_FOUND_LATENT, LAYER + "attention.kv2l.weight")

# ------------------------------------------------------------------------------------ DeepSeek-V3

_ATTENTION = LAYER + "attention."
_Q_B, _KV_A, _KV_B = (f"{name}weight" for name in FUSED)
_V3_SPLIT = (
    # Channels that rotate are moved from neighbouring pairs to halves.
    Rule(
        {"still": _ATTENTION + "l2q_nope_proj.weight", "turning": _ATTENTION + "l2q_pe_proj.weight"},
        _Q_B,
        "x = weave([still, rotary_pairs(turning, heads)], heads)",
    ),
    Rule(
        {"latent": _ATTENTION + "kv2l_latent_kv.weight", "turning": _ATTENTION + "kv2l_k_pe.weight"},
        _KV_A,
        "x = concat([latent, rotary_pairs(turning, 1)])",
    ),
    Rule(
        {"key": _ATTENTION + "lkv2kv_k_nope.weight", "value_part": _ATTENTION + "lkv2kv_v.weight"},
        _KV_B,
        "x = weave([key, value_part], heads)",
    ),
)
_HF_LAST = "model.layers.{k+[layers]}."
_PREDICTION = {
    "embedding_norm": ("model.mtp_hidden_fusers.{k}.norm_emb.weight", _HF_LAST + "enorm.weight"),
    "norm": ("model.mtp_hidden_fusers.{k}.norm.weight", _HF_LAST + "hnorm.weight"),
    "dense": ("model.mtp_hidden_fusers.{k}.dense.weight", _HF_LAST + "eh_proj.weight"),
    "last": ("model.mtp_norms.{k}.weight", _HF_LAST + "shared_head.norm.weight"),
}
V3_REFUSES = (
    *QUANTISED,
    Refusal("not q_lora_rank", "its queries are not of low rank, and those of the net are"),
    Refusal("attention_bias", "its attention has biases, and that of the net has none"),
    Refusal("(num_nextn_predict_layers or 0) > 1", "it has several layers that predict further tokens"),
    Refusal("tie_word_embeddings", "its output layer is tied to its embedding, and that of the net is not"),
)


def _deepseek_v3(key: str, title: str, *, grouped: bool) -> Recipe:
    family = MF_DEEPSEEK_V3 if grouped else MF_DEEPSEEK_V3_UNGROUPED
    experts = {part: f"{LAYER}mlp.experts.{{e}}.{theirs}.weight" for part, theirs in _PARTS.items()}
    joined = (
        Rule(
            ROUTED + ".w1",
            {"gate": experts["w1"], "up": experts["w3"]},
            """
            gate, up = split(transpose(x), 1, [expert_ffn, expert_ffn])
            gate = unstack(gate)
            up = unstack(up)
            """,
        ),
        Rule(ROUTED + ".w2", experts["w2"], "x = unstack(transpose(x))"),
    )
    return recipe(
        key,
        title,
        family,
        (
            *prediction(_PREDICTION, MF_DEEPSEEK_V3.names),
            *renames(family),
            *_V3_SPLIT,
            *(joined if grouped else _stacked(ROUTED, LAYER + "mlp", _PARTS)),
        ),
        (
            *_FOUND_LATENT,
            LAYER + "attention.kv2l_k_pe.weight",
            LAYER + f"feed_forward.routed_experts.{'router_dense' if grouped else 'router.dense'}.weight",
        ),
        refuses=V3_REFUSES,
        refuses_back=V3_REFUSES,
    )


RECIPES: tuple[Recipe, ...] = (
    recipe("mixtral", "Mixtral", MF_MIXTRAL, _mixtral(grouped=False), _FOUND_MIXTRAL, remarks=(_GROUPED,)),
    recipe(
        "mixtral-gmm",
        "Mixtral for grouped products (use_gmm)",
        MF_MIXTRAL_GMM,
        _mixtral(grouped=True),
        _FOUND_MIXTRAL,
        named_only=True,
    ),
    recipe(
        "qwen2-moe",
        "Qwen2-MoE",
        MF_QWEN2_MOE,
        _qwen2_moe(grouped=False),
        _FOUND_QWEN2_MOE,
        remarks=(_GROUPED,),
    ),
    recipe(
        "qwen2-moe-gmm",
        "Qwen2-MoE for grouped products (use_gmm)",
        MF_QWEN2_MOE_GMM,
        _qwen2_moe(grouped=True),
        _FOUND_QWEN2_MOE,
        named_only=True,
    ),
    recipe(
        "deepseek-v2",
        "DeepSeek-V2",
        MF_DEEPSEEK_V2,
        _deepseek_v2(grouped=False),
        _FOUND_V2,
        refuses=QUANTISED,
        refuses_back=QUANTISED,
        remarks=(_GROUPED,),
    ),
    recipe(
        "deepseek-v2-gmm",
        "DeepSeek-V2 for grouped products (use_gmm)",
        MF_DEEPSEEK_V2_GMM,
        _deepseek_v2(grouped=True),
        _FOUND_V2,
        refuses=QUANTISED,
        refuses_back=QUANTISED,
        named_only=True,
    ),
    _deepseek_v3("deepseek-v3", "DeepSeek-V3 and R1", grouped=True),
    _deepseek_v3("deepseek-v3-ungrouped", "DeepSeek-V3 and R1 without grouped products", grouped=False),
)
