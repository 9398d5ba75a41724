"""Nets of MindFormers' parallel core (r1.6 and later): Qwen2, Qwen3, Qwen3-MoE, GLM-4 and DeepSeek-V3, both ways.

Queries, keys and values are one matrix, and so are gate and up; the order of their rows is a setting of the
training, which a checkpoint does not show.

Source: mindspore-lab/mindformers r1.8.0: mindformers/models/{qwen2,qwen3,qwen3_moe,glm4,deepseek3}/utils.py,
mindformers/parallel_core/utils/model_mixin.py, toolkit/weight_convert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from streamconv.families.deepseek import DEEPSEEK_V3
from streamconv.families.glm import GLM4
from streamconv.families.mindformers import common
from streamconv.families.mindformers.common import (
    CONTIGUOUS,
    INTERLEAVED,
    LAYER,
    Layout,
    attention,
    gate_and_up,
    prediction,
)
from streamconv.families.mindformers.deepseek import DEEPSEEK_V3_MTP, QUANTISED, V3_REFUSES
from streamconv.families.mindformers.net import Names, Net
from streamconv.families.qwen import QWEN2, QWEN3
from streamconv.families.qwen_moe import QWEN3_MOE
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, Rule, drop
from streamconv.plans.table import Table, renamed, table

LAYOUTS = (INTERLEAVED, CONTIGUOUS)
MIXED = (
    Layout("contiguous-attention", CONTIGUOUS.groups, INTERLEAVED.pairs),
    Layout("contiguous-mlp", INTERLEAVED.groups, CONTIGUOUS.pairs),
)
"""Those that only one of the two settings makes."""

BLOCK, LAST = "decoder.layers.{i}.", "mtp.layers.{k}.transformer_layer."
"""What a layer is called, and what the layer that predicts a further token contains."""


ENDS = named("""
    model.embed_tokens.weight -> embedding.word_embeddings.weight
    model.norm. -> decoder.final_layernorm.
    lm_head.weight -> output_layer.weight
""")
_ALL = """
    {input,post_attention}_layernorm. -> {input,pre_mlp}_layernorm.
    self_attn.o_proj. -> self_attention.linear_proj.
    mlp.down_proj. -> mlp.linear_fc2.
"""
_PLAIN = ENDS | named(_ALL + "self_attn.{q,k}_norm. -> self_attention.{q,k}_layernorm.", LAYER, BLOCK)
_ROUTER = named("mlp.gate.weight -> mlp.router.weight", LAYER, BLOCK)
_FUSED = table("""
    decoder.layers.{i}.self_attention.linear_qkv.{weight,bias} [(heads + 2 * kv_heads) * head_dim, hidden] [(heads + 2 * kv_heads) * head_dim if biased]
""")
_FC1 = table("""
    decoder.layers.{i}.mlp.linear_fc1.weight [2 * ffn, hidden]
""")
_EXPERTS = table("""
    decoder.layers.{i}.mlp.experts.weight1 [experts * hidden, 2 * expert_ffn]
    decoder.layers.{i}.mlp.experts.weight2 [experts * expert_ffn, hidden]
""")

_V3_OWN = """
    self_attn.{q_a_proj,q_b_proj}. -> self_attention.linear_{q_down_proj,q_up_proj}.
    self_attn.{kv_a_proj_with_mqa,kv_b_proj}. -> self_attention.linear_{kv_down_proj,kv_up_proj}.
    self_attn.{q,kv}_a_layernorm. -> self_attention.{q,kv}_layernorm.
    mlp.gate.e_score_correction_bias -> mlp.router.expert_bias
    mlp.shared_experts.down_proj. -> mlp.shared_experts.linear_fc2.
"""
_V3_NAMES = ENDS | _ROUTER | named(_ALL + _V3_OWN, LAYER, BLOCK)
_V3_FUSED = (
    _FC1.where("not sparse")
    + table("""
        decoder.layers.{i}.mlp.shared_experts.linear_fc1.weight [2 * shared_ffn, hidden] if sparse
    """)
    + _EXPERTS.where("sparse")
).given(sparse=DEEPSEEK_V3.sparse)
_V3_LAST = table("""
    ?mtp.layers.{k}.{enorm,hnorm}.weight [hidden]
    ?mtp.layers.{k}.eh_proj.weight [hidden, 2 * hidden]
    ?mtp.layers.{k}.final_layernorm.weight [hidden]
""")

# ------------------------------------------------------------------------------------------- rules

_HEAD = "lm_head.weight"
_PREDICTION = tuple(f"mtp.layers.{{k}}.{part}" for part in ("enorm", "hnorm", "eh_proj", "final_layernorm"))
# A net whose output layer is its embedding does not save it.
_TIED = (
    Rule(None, _HEAD, when="tied", optional=True, reason="tied to the embedding"),
    drop(ENDS[_HEAD], "tied to the embedding", when="tied", optional=True),
    Rule(ENDS[_HEAD], _HEAD, when="not tied"),
)


def _experts(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Experts for grouped products; the order of their rows is the same in every layout."""
    return (
        Rule(
            f"{ours}mlp.experts.weight1",
            theirs + "mlp.experts.{e}.{gate,up}_proj.weight",
            """
            gate, up = split(transpose(reshape(x, [experts, hidden, -1])), 1, [expert_ffn, expert_ffn])
            gate = unstack(gate)
            up = unstack(up)
            """,
        ),
        Rule(
            f"{ours}mlp.experts.weight2",
            f"{theirs}mlp.experts.{{e}}.down_proj.weight",
            "x = unstack(transpose(reshape(x, [experts, expert_ffn, -1])))",
        ),
    )


# -------------------------------------------------------------------------------------------- nets

_EMBEDDING = ENDS["model.embed_tokens.weight"]
_LINEAR_QKV, _LINEAR_FC1 = BLOCK + "self_attention.linear_qkv", BLOCK + "mlp.linear_fc1"


def _fused_nets(
    key: str,
    title: str,
    target: Architecture,
    *,
    biased: str,
    found: str,
    layouts: tuple[Layout, ...] = (*LAYOUTS, *MIXED),
    names: Names = _PLAIN,
    own: Table = _FC1,
    feed_forward: Callable[[Layout], tuple[Rule, ...]] = lambda layout: gate_and_up(layout, _LINEAR_FC1),
    called: str = "",
    order: str = "",
    refuses: tuple[Refusal, ...] = (),
) -> tuple[Net, ...]:
    """A net whose output layer may be its embedding, in each of its layouts."""
    return tuple(
        Net(
            key=f"{key}-{layout.name}",
            title=f"{title} of the parallel core, {order}{layout.name}",
            called=f"{called or title} of MindFormers, {layout.name}",
            layout=layout.name,
            target=target,
            names=names,
            own=_FUSED.given(biased=biased) + own,
            before=_TIED,
            rules=(*attention(layout, _LINEAR_QKV), *feed_forward(layout)),
            found_by=(_EMBEDDING, _LINEAR_QKV + ".weight", found),
            refuses=refuses,
        )
        for layout in layouts
    )


def _deepseek_v3(layout: Layout) -> Net:
    """With the layer that predicts a further token, where there is one; it is like the others, but has its own count."""
    lines = DEEPSEEK_V3.apart.lines.renamed(_V3_NAMES) + _V3_FUSED
    counted = Table(tuple(line.where("i < layers") if "i" in line.name.fields else line for line in lines))
    last = lines.renamed({BLOCK: LAST}).given(i="layers + k").optional()
    blocks = ((LAST, common.LAST), (BLOCK, LAYER))
    made = Net(
        key=f"deepseekv3-{layout.name}",
        title=f"DeepSeek-V3 of the parallel core, {layout.name}",
        called=f"DeepSeek-V3 of MindFormers' parallel core, {layout.name}",
        layout=f"mcore-{layout.name}",
        target=DEEPSEEK_V3_MTP,
        names=_V3_NAMES,
        lines=counted + last + _V3_LAST,
        rules=(
            *gate_and_up(layout, _LINEAR_FC1),
            *(
                rule
                for ours, theirs in blocks
                for rule in gate_and_up(
                    layout,
                    ours + "mlp.shared_experts.linear_fc1",
                    theirs + "mlp.shared_experts.",
                    "shared_ffn",
                )
            ),
            *(rule for ours, theirs in blocks for rule in _experts(ours, theirs)),
        ),
        found_by=(_EMBEDDING, BLOCK + "self_attention.linear_kv_up_proj.weight"),
        refuses=V3_REFUSES,
    )
    in_the_last = tuple(
        Rule(name, renamed(theirs, {LAYER: common.LAST}))
        for ours, theirs in ((rule.sources["x"].text, rule.targets["x"].text) for rule in made.renames)
        if (name := renamed(ours, {BLOCK: LAST})) is not None
    )
    return replace(made, before=(*prediction(_PREDICTION, ENDS), *in_the_last))


_SPARSE = QWEN3_MOE.sparse
NETS = (
    *_fused_nets("qwen2-core", "Qwen2", QWEN2, biased="True", found=_LINEAR_FC1 + ".weight"),
    *_fused_nets("qwen3", "Qwen3", QWEN3, biased="attention_bias", found=_LINEAR_FC1 + ".weight"),
    # Its gate and up are one matrix on both sides.
    *_fused_nets(
        "glm4",
        "GLM-4-0414",
        GLM4,
        biased="attention_bias",
        found=BLOCK + "post_mlp_layernorm.weight",
        layouts=LAYOUTS,
        names=_PLAIN
        | named("mlp.gate_up_proj. -> mlp.linear_fc1.\npost_{self_attn,mlp}_layernorm.", LAYER, BLOCK),
        own=Table(),
        feed_forward=lambda _: (),
        called="GLM-4",
        order="attention ",
    ),
    *_fused_nets(
        "qwen3-moe",
        "Qwen3-MoE",
        QWEN3_MOE.apart,
        biased="qkv_bias",
        found=BLOCK + "mlp.experts.weight1",
        names=_PLAIN | _ROUTER,
        own=_FC1.where(f"not ({_SPARSE})") + _EXPERTS.where(_SPARSE),
        feed_forward=lambda layout: (*gate_and_up(layout, _LINEAR_FC1), *_experts(BLOCK, LAYER)),
        refuses=QUANTISED,
    ),
    *(_deepseek_v3(layout) for layout in LAYOUTS),
)
