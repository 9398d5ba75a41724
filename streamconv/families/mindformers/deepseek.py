"""DeepSeek-V2, V3 and R1: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: research/deepseek2; r1.8.0: research/deepseek3.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from streamconv.families.mindformers import common, experts
from streamconv.families.mindformers.net import Names, Net
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, Rule
from streamconv.plans.table import Line, Table, table

_LATENT = named(
    """
    {q_proj,q_a_proj,q_a_layernorm,q_b_proj}. -> {q_proj,q2l_proj,lq_norm,l2q_proj}.
    {kv_a_proj_with_mqa,kv_a_layernorm,kv_b_proj,o_proj}. -> {kv2l,lkv_norm,lkv2kv,wo}.
    """,
    common.LAYER + "self_attn.",
    common.LAYER + "attention.",
)
FUSED = tuple(common.LAYER + f"self_attn.{part}." for part in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
"""Projections that DeepSeek-V3's net has in two parts."""

_DEEPSEEK = (
    common.OUTSIDE
    | common.NORMS
    | _LATENT
    | common.GATE_AND_UP
    | common.DOWN
    | experts.shared_experts("shared_experts")
)


def _also_after(lines: Table) -> Table:
    """Lines of layers, and for each the same of those after the last, which may be missing."""
    made: list[Line] = []
    for line in lines:
        if "i" in line.name.fields:
            made += line.where("i < layers"), replace(line.where("i >= layers"), optional=True)
        else:
            made.append(line)
    return Table(tuple(made))


_PREDICTING = table("""
    {enorm,hnorm}.weight [hidden]
    eh_proj.weight [hidden, 2 * hidden]
    shared_head.norm.weight [hidden]
    embed_tokens.weight [vocab, hidden]
    shared_head.head.weight [vocab, hidden]
""")
DEEPSEEK_V3_MTP = replace(
    DEEPSEEK_V3.apart,
    sizes={**DEEPSEEK_V3.apart.sizes, "predicting": "num_nextn_predict_layers or 0"},
    counts={**DEEPSEEK_V3.apart.counts, "i": "layers + predicting", "k": "predicting"},
    lines=_also_after(DEEPSEEK_V3.apart.lines)
    + _PREDICTING.under(common.LAYER).where("i >= layers").optional(),
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
    ?model.mtp_hidden_fusers.{k}.{norm_emb,norm}.weight [hidden]
    ?model.mtp_hidden_fusers.{k}.dense.weight [hidden, 2 * hidden]
    ?model.mtp_norms.{k}.weight [hidden]
""")
_V3_NAMES = {name: ours for name, ours in _DEEPSEEK.items() if name not in FUSED}
_V3_ROUTED = experts.FEED + "routed_experts."

# ------------------------------------------------------------------------------------------- rules

QUANTISED = (
    Refusal(
        "quantization_config",
        "its weights are quantised, and the net has no place for their scales",
        "make them plain first, with --recipe dequantise",
    ),
)


_ATTENTION = common.LAYER + "attention."
_Q_B, _KV_A, _KV_B = (f"{name}weight" for name in FUSED)
_V3_JOINED = (
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
_PREDICTION = (
    "model.mtp_hidden_fusers.{k}.norm_emb",
    "model.mtp_hidden_fusers.{k}.norm",
    "model.mtp_hidden_fusers.{k}.dense",
    "model.mtp_norms.{k}",
)
V3_REFUSES = (
    *QUANTISED,
    Refusal("not q_lora_rank", "its queries are not of low rank, and those of the net are"),
    Refusal("attention_bias", "its attention has biases, and that of the net has none"),
    Refusal("(num_nextn_predict_layers or 0) > 1", "it has several layers that predict further tokens"),
    Refusal("tie_word_embeddings", "its output layer is tied to its embedding, and that of the net is not"),
)

_EXPERTS = {part: f"{experts.MOE}experts.{{e}}.{theirs}.weight" for part, theirs in experts.PARTS.items()}
_FOUND_LATENT = (common.FOUND_LLAMA[0], common.LAYER + "attention.lkv_norm.weight")


def _v3(
    key: str, title: str, layout: str, names: Names, own: Table, rules: tuple[Rule, ...], router: str
) -> Net:
    """V3 in one of its layouts, with what this one has for experts and router."""
    return Net(
        key=key,
        title=f"DeepSeek-V3 and R1{title}",
        called=f"DeepSeek-V3{title} of MindFormers",
        layout=layout,
        target=DEEPSEEK_V3_MTP,
        names=_V3_NAMES | names,
        own=_also_after(_V3_SPLIT + own.where(DEEPSEEK_V3.sparse)) + _V3_PREDICTION,
        before=common.prediction(_PREDICTION, _V3_NAMES),
        rules=(*_V3_JOINED, *rules),
        found_by=(
            *_FOUND_LATENT,
            common.LAYER + "attention.kv2l_k_pe.weight",
            f"{_V3_ROUTED}{router}.weight",
        ),
        refuses=V3_REFUSES,
    )


NETS = (
    *experts.both(
        "deepseek-v2",
        DEEPSEEK_V2,
        _DEEPSEEK | {experts.MOE + "gate.weight": experts.ROUTED_GATE + "weight"},
        (experts.ROUTED, common.LAYER + "mlp"),
        (*_FOUND_LATENT, common.LAYER + "attention.kv2l.weight"),
        refuses=QUANTISED,
    ),
    _v3(
        "deepseek-v3",
        "",
        "",
        {
            experts.MOE + "gate.weight": _V3_ROUTED + "router_dense.weight",
            experts.MOE + "gate.e_score_correction_bias": _V3_ROUTED + "topk_bias",
        },
        table("""
            w1 [experts, hidden, 2 * expert_ffn]
            w2 [experts, expert_ffn, hidden]
        """).under(experts.ROUTED + "."),
        (
            Rule(
                experts.ROUTED + ".w1",
                {"gate": _EXPERTS["w1"], "up": _EXPERTS["w3"]},
                """
                gate, up = split(transpose(x), 1, [expert_ffn, expert_ffn])
                gate = unstack(gate)
                up = unstack(up)
                """,
            ),
            Rule(experts.ROUTED + ".w2", _EXPERTS["w2"], "x = unstack(transpose(x))"),
        ),
        "router_dense",
    ),
    _v3(
        "deepseek-v3-ungrouped",
        " without grouped products",
        "ungrouped",
        {
            experts.MOE + "gate.weight": experts.ROUTED_GATE + "weight",
            experts.MOE + "gate.e_score_correction_bias": _V3_ROUTED + "router.router.topk_bias",
        },
        experts.STACKED.under(experts.ROUTED + "."),
        experts.unstacked(experts.ROUTED, common.LAYER + "mlp", experts.PARTS),
        "router.dense",
    ),
)
