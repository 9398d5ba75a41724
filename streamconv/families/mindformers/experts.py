"""Mixtral, Qwen2-MoE, DeepSeek-V2 and DeepSeek-V3: MindFormers to Hugging Face and back.

All experts of a layer are stacked, however many there are. Whether they are transposed for grouped products (`use_gmm`)
need not show in their shapes: that is chosen with the recipe.

Source: mindspore-lab/mindformers r1.3.0: research/{mixtral,qwen2,deepseek2}; r1.8.0: research/deepseek3.

Mixtral, Qwen2-MoE, DeepSeek-V2 and DeepSeek-V3 of MindFormers, whose experts are stacked.

Source: mindspore-lab/mindformers r1.3.0: research/{mixtral,qwen2,deepseek2}; r1.8.0: research/deepseek3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from streamconv.families.experts import Mixture
from streamconv.families.mindformers.rules import FOUND_LLAMA, prediction, recipe, renames, tied
from streamconv.families.mindformers.tables import (
    DOWN,
    GATE_AND_UP,
    LAYER,
    NORMS,
    OUTPUT,
    OUTSIDE,
    QKV,
    Family,
    Names,
    family,
)
from streamconv.families.mixtral import MIXTRAL
from streamconv.families.qwen_moe import QWEN2_MOE
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule
from streamconv.plans.table import Line, Table, table

_MOE, _FEED = LAYER + "mlp.", LAYER + "feed_forward."


def shared_experts(theirs: str) -> Names:
    """The names of the experts that every token goes through."""
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {f"{_MOE}{theirs}.{part}.": f"{_FEED}shared_experts.{ours}." for part, ours in parts.items()}


_STACKED = table("""
    w1.weight [experts, expert_ffn, hidden]
    w2.weight [experts, hidden, expert_ffn]
    w3.weight [experts, expert_ffn, hidden]
""")
"""All experts of a layer."""

_GROUPED = table("""
    w1.weight [experts, hidden, expert_ffn]
    w2.weight [experts, expert_ffn, hidden]
    w3.weight [experts, hidden, expert_ffn]
""")
"""The same, each as the factor on the right of a product (`use_gmm`)."""


def _family(mixture: Mixture, names: Names, block: str, *, grouped: bool) -> Family:
    """A family, its experts under `block`."""
    own = (_GROUPED if grouped else _STACKED).under(block + ".").where(mixture.sparse)
    made = family(mixture.apart, mixture.title, names, own)
    if not grouped:
        return made
    title = f"{made.net.title}, for grouped products"
    return replace(made, net=replace(made.net, name="mindformers-gmm", title=title))


MIXTRAL_EXPERTS = LAYER + "feed_forward.ffn"
ROUTED = LAYER + "feed_forward.routed_experts.ffn"
_ROUTED_GATE = LAYER + "feed_forward.routed_experts.router.dense."

_MIXTRAL_NAMES: Names = (
    OUTSIDE | NORMS | QKV | OUTPUT | {LAYER + "block_sparse_moe.gate.": LAYER + "feed_forward.router.dense."}
)
_QWEN2_MOE_NAMES: Names = (
    OUTSIDE
    | NORMS
    | QKV
    | OUTPUT
    | GATE_AND_UP
    | DOWN
    | shared_experts("shared_expert")
    | {
        _MOE + "gate.": _ROUTED_GATE,
        _MOE + "shared_expert_gate.": _FEED + "shared_experts_gate.",
    }
)

# ------------------------------------------------------------------------------------ DeepSeek

_LATENT: Names = {
    LAYER + f"self_attn.{theirs}.": LAYER + f"attention.{ours}."
    for theirs, ours in (
        ("q_proj", "q_proj"),
        ("q_a_proj", "q2l_proj"),
        ("q_a_layernorm", "lq_norm"),
        ("q_b_proj", "l2q_proj"),
        ("kv_a_proj_with_mqa", "kv2l"),
        ("kv_a_layernorm", "lkv_norm"),
        ("kv_b_proj", "lkv2kv"),
        ("o_proj", "wo"),
    )
}
FUSED = tuple(LAYER + f"self_attn.{part}." for part in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
"""Projections that DeepSeek-V3's net has in two parts."""

_DEEPSEEK = OUTSIDE | NORMS | _LATENT | GATE_AND_UP | DOWN | shared_experts("shared_experts")

_DEEPSEEK_V2_NAMES: Names = _DEEPSEEK | {_MOE + "gate.weight": _ROUTED_GATE + "weight"}


def _also_after(lines: Table) -> Table:
    """Lines of layers, and for each the same of those after the last, which may be missing."""
    made: list[Line] = []
    for line in lines:
        of_layers = "i" in line.name.fields
        made += (
            (line.where("i < layers"), replace(line.where("i >= layers"), optional=True))
            if of_layers
            else (line,)
        )
    return Table(tuple(made))


_PREDICTING = table("""
    enorm.weight [hidden]
    hnorm.weight [hidden]
    eh_proj.weight [hidden, 2 * hidden]
    shared_head.norm.weight [hidden]
    embed_tokens.weight [vocab, hidden]
    shared_head.head.weight [vocab, hidden]
""")
DEEPSEEK_V3_MTP = replace(
    DEEPSEEK_V3.apart,
    sizes={**DEEPSEEK_V3.apart.sizes, "predicting": "num_nextn_predict_layers or 0"},
    counts={**DEEPSEEK_V3.apart.counts, "i": "layers + predicting", "k": "predicting"},
    lines=_also_after(DEEPSEEK_V3.apart.lines) + _PREDICTING.under(LAYER).where("i >= layers").optional(),
)
"""DeepSeek-V3 as published, with its last layer, which predicts a further token and transformers leaves out."""

_V3_SPLIT = table("""
    model.layers.{i}.attention.l2q_nope_proj.weight [heads * nope, q_rank]
    model.layers.{i}.attention.l2q_pe_proj.weight [heads * rope, q_rank]
    model.layers.{i}.attention.kv2l_latent_kv.weight [kv_rank, hidden]
    model.layers.{i}.attention.kv2l_k_pe.weight [rope, hidden]
    model.layers.{i}.attention.lkv2kv_k_nope.weight [heads * nope, kv_rank]
    model.layers.{i}.attention.lkv2kv_v.weight [heads * value, kv_rank]
""")
_V3_PREDICTION = table("""
    ?model.mtp_hidden_fusers.{k}.norm_emb.weight [hidden]
    ?model.mtp_hidden_fusers.{k}.norm.weight [hidden]
    ?model.mtp_hidden_fusers.{k}.dense.weight [hidden, 2 * hidden]
    ?model.mtp_norms.{k}.weight [hidden]
""")
_V3_NAMES = {name: ours for name, ours in _DEEPSEEK.items() if name not in FUSED}
_V3_ROUTED = LAYER + "feed_forward.routed_experts."


def _v3(title: str, names: Names, experts: Table, name: str) -> Family:
    own = _also_after(_V3_SPLIT + experts.where(DEEPSEEK_V3.sparse)) + _V3_PREDICTION
    return family(DEEPSEEK_V3_MTP, title, _V3_NAMES | names, own, name=name)


MF_DEEPSEEK_V3 = _v3(
    "DeepSeek-V3",
    {
        _MOE + "gate.weight": _V3_ROUTED + "router_dense.weight",
        _MOE + "gate.e_score_correction_bias": _V3_ROUTED + "topk_bias",
    },
    table("""
        w1 [experts, hidden, 2 * expert_ffn]
        w2 [experts, expert_ffn, hidden]
    """).under(ROUTED + "."),
    "mindformers",
)
MF_DEEPSEEK_V3_UNGROUPED = _v3(
    "DeepSeek-V3 without grouped products",
    {
        _MOE + "gate.weight": _ROUTED_GATE + "weight",
        _MOE + "gate.e_score_correction_bias": _V3_ROUTED + "router.router.topk_bias",
    },
    _STACKED.under(ROUTED + "."),
    "mindformers-ungrouped",
)

# ------------------------------------------------------------------------------------------------- rules

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
_TAKEN_AS_THEY_ARE = Remark(
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
_V3_SPLIT_RULES = (
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
            *_V3_SPLIT_RULES,
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


def _mixture(
    key: str,
    mixture: Mixture,
    names: Names,
    blocks: tuple[str, str],
    parts: Mapping[str, str],
    found_by: tuple[str, ...],
    refuses: tuple[Refusal, ...] = (),
) -> tuple[Recipe, Recipe]:
    """A family with its experts as they are, and for grouped products.

    Args:
        key: what MindFormers calls it.
        mixture: as Hugging Face has it.
        names: of tensors that only change their name.
        blocks: what MindFormers and Hugging Face call the mixture of a layer.
        parts: of an expert, MindFormers' names -> Hugging Face's.
        found_by: as in `Recipe`.
        refuses: what neither direction can do.
    """
    made = []
    for grouped in (False, True):
        both = _family(mixture, names, blocks[0], grouped=grouped)
        end: dict[str, Any] = {"named_only": True} if grouped else {"remarks": (_TAKEN_AS_THEY_ARE,)}
        made.append(
            recipe(
                f"{key}-gmm" if grouped else key,
                f"{mixture.title} for grouped products (use_gmm)" if grouped else mixture.title,
                both,
                (*tied(), *renames(both, {_HEAD}), *_stacked(*blocks, parts, grouped=grouped)),
                found_by,
                refuses=refuses,
                refuses_back=refuses,
                **end,
            )
        )
    return made[0], made[1]


RECIPES: tuple[Recipe, ...] = (
    *_mixture(
        "mixtral",
        MIXTRAL,
        _MIXTRAL_NAMES,
        (MIXTRAL_EXPERTS, LAYER + "block_sparse_moe"),
        _MIXTRAL_PARTS,
        _FOUND_MIXTRAL,
    ),
    *_mixture("qwen2-moe", QWEN2_MOE, _QWEN2_MOE_NAMES, (ROUTED, LAYER + "mlp"), _PARTS, _FOUND_QWEN2_MOE),
    *_mixture(
        "deepseek-v2", DEEPSEEK_V2, _DEEPSEEK_V2_NAMES, (ROUTED, LAYER + "mlp"), _PARTS, _FOUND_V2, QUANTISED
    ),
    _deepseek_v3("deepseek-v3", "DeepSeek-V3 and R1", grouped=True),
    _deepseek_v3("deepseek-v3-ungrouped", "DeepSeek-V3 and R1 without grouped products", grouped=False),
)
