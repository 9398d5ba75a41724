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

from streamconv.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
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
from streamconv.plans.architecture import Architecture, Line, table
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule

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
