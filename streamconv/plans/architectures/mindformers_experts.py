"""Mixtral, Qwen2-MoE, DeepSeek-V2 and DeepSeek-V3 of MindFormers, whose experts are stacked.

Source: mindspore-lab/mindformers r1.3.0: research/{mixtral,qwen2,deepseek2}; r1.8.0: research/deepseek3.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.plans.architecture import Architecture, Line, table
from streamconv.plans.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from streamconv.plans.architectures.mindformers import (
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
from streamconv.plans.architectures.mixtral import MIXTRAL
from streamconv.plans.architectures.qwen_moe import QWEN2_MOE

SPARSE = "i >= first_sparse"
_MOE, _FEED = LAYER + "mlp.", LAYER + "feed_forward."


def shared_experts(theirs: str) -> Names:
    """The names of the experts that every token goes through."""
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {f"{_MOE}{theirs}.{part}.": f"{_FEED}shared_experts.{ours}." for part, ours in parts.items()}


def stacked(block: str, when: str = "", *, grouped: bool = False) -> str:
    """The lines of stacked experts; `grouped`: each as the factor on the right of a product (`use_gmm`)."""
    wide, tall = "[experts, expert_ffn, hidden]", "[experts, hidden, expert_ffn]"
    if grouped:
        wide, tall = tall, wide
    shapes = {"w1": wide, "w2": tall, "w3": wide}
    end = f" if {when}" if when else ""
    return "\n".join(f"{block}.{part}.weight {shape}{end}" for part, shape in shapes.items()) + "\n"


def grouped(made: Family, lines: str, more: str) -> Family:
    """The same with experts for grouped products; `lines` is what stands in the place of `more`."""
    others = {line.text for line in table(more)}
    rest = tuple(line for line in made.net.lines if line.text not in others)
    net = replace(
        made.net,
        name="mindformers-gmm",
        title=f"{made.net.title}, for grouped products",
        lines=rest + table(lines),
    )
    return replace(made, net=net)


MIXTRAL_EXPERTS = LAYER + "feed_forward.ffn"
ROUTED = LAYER + "feed_forward.routed_experts.ffn"
_ROUTED_GATE = LAYER + "feed_forward.routed_experts.router.dense."
_QWEN_SPARSE = "experts > 0 and i not in dense_layers and (i + 1) % step == 0"

MF_MIXTRAL = family(
    MIXTRAL.apart,
    "Mixtral",
    OUTSIDE | NORMS | QKV | OUTPUT | {LAYER + "block_sparse_moe.gate.": LAYER + "feed_forward.router.dense."},
    stacked(MIXTRAL_EXPERTS),
)
MF_MIXTRAL_GMM = grouped(MF_MIXTRAL, stacked(MIXTRAL_EXPERTS, grouped=True), stacked(MIXTRAL_EXPERTS))

MF_QWEN2_MOE = family(
    QWEN2_MOE.apart,
    "Qwen2-MoE",
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
    },
    stacked(ROUTED, _QWEN_SPARSE),
)
MF_QWEN2_MOE_GMM = grouped(
    MF_QWEN2_MOE, stacked(ROUTED, _QWEN_SPARSE, grouped=True), stacked(ROUTED, _QWEN_SPARSE)
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

MF_DEEPSEEK_V2 = family(
    DEEPSEEK_V2.apart,
    "DeepSeek-V2",
    _DEEPSEEK | {_MOE + "gate.weight": _ROUTED_GATE + "weight"},
    stacked(ROUTED, SPARSE),
)
MF_DEEPSEEK_V2_GMM = grouped(MF_DEEPSEEK_V2, stacked(ROUTED, SPARSE, grouped=True), stacked(ROUTED, SPARSE))


def _with_prediction(architecture: Architecture, lines: str) -> Architecture:
    """An architecture that may have a layer that predicts a further token, after the others and like them."""
    made: list[Line] = []
    for line in architecture.lines:
        if "i" not in line.name.fields:
            made.append(line)
            continue
        text, _, when = line.text.partition(" if ")
        also = f"{when} and " if when else ""
        made += Line(f"{text} if {also}i < layers"), Line(f"?{text} if {also}i >= layers")
    return replace(
        architecture,
        sizes={**architecture.sizes, "predicting": "num_nextn_predict_layers or 0"},
        counts={**architecture.counts, "i": "layers + predicting", "k": "predicting"},
        lines=(*made, *table(lines)),
    )


DEEPSEEK_V3_MTP = _with_prediction(
    DEEPSEEK_V3.apart,
    """
    ?model.layers.{i}.enorm.weight [hidden] if i >= layers
    ?model.layers.{i}.hnorm.weight [hidden] if i >= layers
    ?model.layers.{i}.eh_proj.weight [hidden, 2 * hidden] if i >= layers
    ?model.layers.{i}.shared_head.norm.weight [hidden] if i >= layers
    ?model.layers.{i}.embed_tokens.weight [vocab, hidden] if i >= layers
    ?model.layers.{i}.shared_head.head.weight [vocab, hidden] if i >= layers
    """,
)
"""DeepSeek-V3 as published, with its last layer, which transformers leaves out."""

_V3_SPLIT = """
    model.layers.{i}.attention.l2q_nope_proj.weight [heads * nope, q_rank]
    model.layers.{i}.attention.l2q_pe_proj.weight [heads * rope, q_rank]
    model.layers.{i}.attention.kv2l_latent_kv.weight [kv_rank, hidden]
    model.layers.{i}.attention.kv2l_k_pe.weight [rope, hidden]
    model.layers.{i}.attention.lkv2kv_k_nope.weight [heads * nope, kv_rank]
    model.layers.{i}.attention.lkv2kv_v.weight [heads * value, kv_rank]
"""
_V3_PREDICTION = """
    ?model.mtp_hidden_fusers.{k}.norm_emb.weight [hidden]
    ?model.mtp_hidden_fusers.{k}.norm.weight [hidden]
    ?model.mtp_hidden_fusers.{k}.dense.weight [hidden, 2 * hidden]
    ?model.mtp_norms.{k}.weight [hidden]
"""
_V3_NAMES = {name: ours for name, ours in _DEEPSEEK.items() if name not in FUSED}
_V3_ROUTED = LAYER + "feed_forward.routed_experts."


def _v3(title: str, names: Names, experts: str, name: str) -> Family:
    lines = "\n".join(
        text
        for line in table(_V3_SPLIT + experts)
        for text in (f"{_and(line, 'i < layers')}", f"?{_and(line, 'i >= layers')}")
    )
    return family(DEEPSEEK_V3_MTP, title, _V3_NAMES | names, lines + _V3_PREDICTION, name=name)


def _and(line: Line, when: str) -> str:
    return f"{line.text} and {when}" if " if " in line.text else f"{line.text} if {when}"


MF_DEEPSEEK_V3 = _v3(
    "DeepSeek-V3",
    {
        _MOE + "gate.weight": _V3_ROUTED + "router_dense.weight",
        _MOE + "gate.e_score_correction_bias": _V3_ROUTED + "topk_bias",
    },
    f"""
    {ROUTED}.w1 [experts, hidden, 2 * expert_ffn] if {SPARSE}
    {ROUTED}.w2 [experts, expert_ffn, hidden] if {SPARSE}
    """,
    "mindformers",
)
MF_DEEPSEEK_V3_UNGROUPED = _v3(
    "DeepSeek-V3 without grouped products",
    {
        _MOE + "gate.weight": _ROUTED_GATE + "weight",
        _MOE + "gate.e_score_correction_bias": _V3_ROUTED + "router.router.topk_bias",
    },
    stacked(ROUTED, SPARSE),
    "mindformers-ungrouped",
)
