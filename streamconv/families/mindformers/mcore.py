"""Nets of MindFormers' parallel core (r1.6 and later): Qwen2, Qwen3, Qwen3-MoE, GLM-4 and DeepSeek-V3, both ways.

Queries, keys and values are one matrix, and so are gate and up; the order of their rows is a setting of the
training, which a checkpoint does not show.

Source: mindspore-lab/mindformers r1.8.0: mindformers/models/{qwen2,qwen3,qwen3_moe,glm4,deepseek3}/utils.py,
mindformers/parallel_core/utils/model_mixin.py, toolkit/weight_convert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamconv.families.deepseek import DEEPSEEK_V3
from streamconv.families.glm import GLM4
from streamconv.families.mindformers import common
from streamconv.families.mindformers.deepseek import DEEPSEEK_V3_MTP, QUANTISED, V3_REFUSES
from streamconv.families.mindformers.net import Names, Net
from streamconv.families.qwen import QWEN2, QWEN3
from streamconv.families.qwen_moe import QWEN3_MOE
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, Rule, drop, linear
from streamconv.plans.table import Table, renamed, table

BLOCK, LAST = "decoder.layers.{i}.", "mtp.layers.{k}.transformer_layer."
"""What a layer is called, and what the layer that predicts a further token contains."""


@dataclass(frozen=True, slots=True)
class Layout:
    """In which order rows of fused matrices lie.

    Attributes:
        name: as recipes end in.
        groups: formula of how many groups queries, keys and values lie in.
        pairs: formula of how many groups gate and up lie in, over the `width` of each.
    """

    name: str
    groups: str
    pairs: str


INTERLEAVED = Layout("interleaved", "kv_heads", "width")
CONTIGUOUS = Layout("contiguous", "1", "1")
LAYOUTS = (INTERLEAVED, CONTIGUOUS)
MIXED = (
    Layout("contiguous-attention", CONTIGUOUS.groups, INTERLEAVED.pairs),
    Layout("contiguous-mlp", INTERLEAVED.groups, CONTIGUOUS.pairs),
)
"""Those that only one of the two settings makes."""

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
_PLAIN = ENDS | named(_ALL + "self_attn.{q,k}_norm. -> self_attention.{q,k}_layernorm.", common.LAYER, BLOCK)
_ROUTER = named("mlp.gate.weight -> mlp.router.weight", common.LAYER, BLOCK)
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
_V3_NAMES = ENDS | _ROUTER | named(_ALL + _V3_OWN, common.LAYER, BLOCK)
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
_HF_LAST = "model.layers.{k+[layers]}."
_PREDICTION = {
    "embedding_norm": ("mtp.layers.{k}.enorm.weight", _HF_LAST + "enorm.weight"),
    "norm": ("mtp.layers.{k}.hnorm.weight", _HF_LAST + "hnorm.weight"),
    "dense": ("mtp.layers.{k}.eh_proj.weight", _HF_LAST + "eh_proj.weight"),
    "last": ("mtp.layers.{k}.final_layernorm.weight", _HF_LAST + "shared_head.norm.weight"),
}
# A net whose output layer is its embedding does not save it.
_TIED = (
    Rule(None, _HEAD, when="tied", optional=True, reason="tied to the embedding"),
    drop(ENDS[_HEAD], "tied to the embedding", when="tied", optional=True),
    Rule(ENDS[_HEAD], _HEAD, when="not tied"),
)


def _attention(layout: Layout) -> tuple[Rule, ...]:
    parts = f"[heads // {layout.groups}, kv_heads // {layout.groups}, kv_heads // {layout.groups}]"
    return linear(
        BLOCK + "self_attention.linear_qkv",
        common.LAYER + "self_attn.{q,k,v}_proj",
        f"q, k, v = split_heads(x, {layout.groups}, {parts}, head_dim)",
    )


def _gate_and_up(ours: str, theirs: str, width: str, layout: Layout) -> Rule:
    pairs = formula.substituted(layout.pairs, {"width": width})
    return Rule(
        f"{ours}linear_fc1.weight",
        theirs + "{gate,up}_proj.weight",
        f"gate, up = split_heads(x, {pairs}, [1, 1], {width} // {pairs})",
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


def _found(*names: str) -> tuple[str, ...]:
    return (ENDS["model.embed_tokens.weight"], *names)


# -------------------------------------------------------------------------------------------- nets

_LINEAR_QKV, _LINEAR_FC1 = BLOCK + "self_attention.linear_qkv.weight", BLOCK + "mlp.linear_fc1.weight"


def _net(
    key: str,
    target: Architecture,
    layout: Layout,
    names: Names,
    own: Table,
    rules: tuple[Rule, ...],
    *found_by: str,
    title: str,
    called: str = "",
    order: str = "",
    refuses: tuple[Refusal, ...] = (),
) -> Net:
    """A net whose output layer may be its embedding, in one of its layouts."""
    return Net(
        key=f"{key}-{layout.name}",
        title=f"{title} of the parallel core, {order}{layout.name}",
        called=f"{called or title} of MindFormers, {layout.name}",
        layout=layout.name,
        target=target,
        names=names,
        own=own,
        before=_TIED,
        rules=(*_attention(layout), *rules),
        found_by=_found(*found_by),
        refuses=refuses,
    )


def _dense(key: str, title: str, target: Architecture, biased: str, layout: Layout) -> Net:
    own = _FUSED.given(biased=biased) + _FC1
    rules = (_gate_and_up(BLOCK + "mlp.", common.LAYER + "mlp.", "ffn", layout),)
    return _net(key, target, layout, _PLAIN, own, rules, _LINEAR_QKV, _LINEAR_FC1, title=title)


def _glm4(layout: Layout) -> Net:
    """GLM-4-0414, whose gate and up are one matrix on both sides."""
    own_names = "mlp.gate_up_proj. -> mlp.linear_fc1.\npost_{self_attn,mlp}_layernorm."
    names = _PLAIN | named(own_names, common.LAYER, BLOCK)
    own = _FUSED.given(biased="attention_bias")
    found_by = (_LINEAR_QKV, BLOCK + "post_mlp_layernorm.weight")
    return _net(
        "glm4",
        GLM4,
        layout,
        names,
        own,
        (),
        *found_by,
        title="GLM-4-0414",
        called="GLM-4",
        order="attention ",
    )


def _qwen3_moe(layout: Layout) -> Net:
    sparse = QWEN3_MOE.sparse
    own = _FUSED.given(biased="qkv_bias") + _FC1.where(f"not ({sparse})") + _EXPERTS.where(sparse)
    rules = (
        _gate_and_up(BLOCK + "mlp.", common.LAYER + "mlp.", "ffn", layout),
        *_experts(BLOCK, common.LAYER),
    )
    return _net(
        "qwen3-moe",
        QWEN3_MOE.apart,
        layout,
        _PLAIN | _ROUTER,
        own,
        rules,
        _LINEAR_QKV,
        BLOCK + "mlp.experts.weight1",
        title="Qwen3-MoE",
        refuses=QUANTISED,
    )


def _deepseek_v3(layout: Layout) -> Net:
    """With the layer that predicts a further token, where there is one; it is like the others, but has its own count."""
    lines = DEEPSEEK_V3.apart.lines.renamed(_V3_NAMES) + _V3_FUSED
    counted = Table(tuple(line.where("i < layers") if "i" in line.name.fields else line for line in lines))
    last = lines.renamed({BLOCK: LAST}).given(i="layers + k").optional()
    blocks = ((LAST, _HF_LAST), (BLOCK, common.LAYER))
    made = Net(
        key=f"deepseekv3-{layout.name}",
        title=f"DeepSeek-V3 of the parallel core, {layout.name}",
        called=f"DeepSeek-V3 of MindFormers' parallel core, {layout.name}",
        layout=f"mcore-{layout.name}",
        target=DEEPSEEK_V3_MTP,
        names=_V3_NAMES,
        lines=counted + last + _V3_LAST,
        rules=(
            _gate_and_up(BLOCK + "mlp.", common.LAYER + "mlp.", "ffn", layout),
            *(
                _gate_and_up(
                    f"{ours}mlp.shared_experts.", f"{theirs}mlp.shared_experts.", "shared_ffn", layout
                )
                for ours, theirs in blocks
            ),
            *(rule for ours, theirs in blocks for rule in _experts(ours, theirs)),
        ),
        found_by=_found(BLOCK + "self_attention.linear_kv_up_proj.weight"),
        refuses=V3_REFUSES,
    )
    in_the_last = tuple(
        Rule(name, renamed(theirs, {common.LAYER: _HF_LAST}))
        for ours, theirs in ((rule.sources["x"].text, rule.targets["x"].text) for rule in made.renames)
        if (name := renamed(ours, {BLOCK: LAST})) is not None
    )
    return replace(made, before=(*common.prediction(_PREDICTION, ENDS), *in_the_last))


NETS = (
    *(_dense("qwen2-core", "Qwen2", QWEN2, "True", layout) for layout in (*LAYOUTS, *MIXED)),
    *(_dense("qwen3", "Qwen3", QWEN3, "attention_bias", layout) for layout in (*LAYOUTS, *MIXED)),
    *(_glm4(layout) for layout in LAYOUTS),
    *(_qwen3_moe(layout) for layout in (*LAYOUTS, *MIXED)),
    *(_deepseek_v3(layout) for layout in LAYOUTS),
)
