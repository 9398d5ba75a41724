"""TeleChat and TeleChat2: MindFormers to Hugging Face and back.

Source: the modeling code published with Tele-AI/telechat-7B, TeleChat-12B and TeleChat2; mindspore-lab/mindformers
r1.1.0: research/telechat; r1.8.0: research/telechat2.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.mindformers.common import LAYER
from streamconv.families.mindformers.net import Net
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Rule
from streamconv.plans.table import table

HF_LAYER = "transformer.h.{i}."
_DENSE = table("""
    transformer.h.{i}.mlp.{gate,up}_proj.weight [ffn, hidden]
    transformer.h.{i}.mlp.down_proj.weight [hidden, ffn]
    ?transformer.h.{i}.mlp.down_proj.bias [hidden]
""")
_MIXTURE = table("""
    transformer.h.{i}.mlp.router.weight [experts, hidden]
    transformer.h.{i}.mlp.local_experts.{e}.{gate,up}_proj.weight [ffn, hidden]
    transformer.h.{i}.mlp.local_experts.{e}.down_proj.weight [hidden, ffn]
    ?transformer.h.{i}.mlp.local_experts.{e}.{gate,up}_proj.bias [ffn]
    ?transformer.h.{i}.mlp.local_experts.{e}.down_proj.bias [hidden]
""")
_REST = table("""
    transformer.word_embeddings.weight [vocab, hidden]
    transformer.h.{i}.input_layernorm.weight [hidden]
    transformer.h.{i}.self_attention.query.weight [heads * head_dim, hidden]
    transformer.h.{i}.self_attention.key_value.weight [2 * kv_heads * head_dim, hidden]
    transformer.h.{i}.self_attention.dense.weight [hidden, heads * head_dim]
    ?transformer.h.{i}.self_attention.dense.bias [hidden]
    transformer.h.{i}.post_attention_layernorm.weight [hidden]
    transformer.ln_f.weight [hidden]
    ?lm_head.weight [vocab, hidden]
""")

TELECHAT = Architecture(
    name="telechat",
    title="TeleChat",
    model_types=("telechat", "telechat2"),
    classes=("TelechatForCausalLM", "TeleChatForCausalLM", "TeleChat2ForCausalLM"),
    sizes={
        "hidden": "hidden_size or n_embed",
        "vocab": "vocab_size",
        "ffn": "ffn_hidden_size or intermediate_size",
        "layers": "n_layer or num_hidden_layers",
        "heads": "n_head or num_attention_heads",
        "kv_heads": "num_key_value_heads or heads",
        "head_dim": "hidden // heads",
        "experts": "num_experts or num_local_experts or moe_num_experts or expert_num or 0",
    },
    counts={"i": "layers", "e": "experts"},
    only_if="not (num_experts or num_local_experts or moe_num_experts or expert_num)",
    lines=_REST + _DENSE,
)
TELECHAT_MOE = replace(
    TELECHAT,
    title="TeleChat2 with experts",
    only_if="num_experts or num_local_experts or moe_num_experts or expert_num",
    lines=_REST + _MIXTURE,
)

_ENDS = named("""
    transformer.word_embeddings.weight -> model.tok_embeddings.embedding_weight
    transformer.ln_f. -> model.norm_out.
    lm_head.
    transformer.h.{i}.{input,post_attention}_layernorm. -> model.layers.{i}.{attention,ffn}_norm.
    transformer.h.{i}.self_attention.dense. -> model.layers.{i}.attention.wo.
""")
_PROJECTIONS = named("self_attention.{query,key_value}. -> attention.{wq,wk_v}.", HF_LAYER, LAYER)
_DOWN = named("mlp.down_proj. -> feed_forward.w2.", HF_LAYER, LAYER)

_EMBEDDING = "model.tok_embeddings.embedding_weight"
_ATTENTION, _FEED = LAYER + "attention.", LAYER + "feed_forward."
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_UNSTACK = {"weight": "x = unstack(x)", "bias": "x = unstack(reshape(x, [experts, -1]))"}

NETS = (
    Net(
        key="telechat",
        title="TeleChat (7B, 12B), TeleChat2",
        called="TeleChat of MindFormers",
        target=TELECHAT,
        names=_ENDS
        | _PROJECTIONS
        | named("mlp.{gate,up,down}_proj. -> feed_forward.{w1,w3,w2}.", HF_LAYER, LAYER),
        found_by=(_EMBEDDING, _ATTENTION + "wk_v.weight"),
    ),
    Net(
        key="telechat-contiguous",
        title="TeleChat, TeleChat2 with fused projections (qkv_concat)",
        called="TeleChat with fused projections of MindFormers",
        layout="contiguous",
        target=TELECHAT,
        names=_ENDS | _DOWN,
        own=table("""
    model.layers.{i}.attention.w_qkv.weight [(heads + 2 * kv_heads) * head_dim, hidden]
    model.layers.{i}.feed_forward.w_gate_hidden.weight [2 * ffn, hidden]
    """),
        rules=(
            Rule(
                _ATTENTION + "w_qkv.weight",
                HF_LAYER + "self_attention.{query,key_value}.weight",
                """
                query, key, value = split(x, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
                key_value = weave([key, value], kv_heads)
                """,
            ),
            Rule(
                _FEED + "w_gate_hidden.weight",
                HF_LAYER + "mlp.{gate,up}_proj.weight",
                "gate, up = split(x, 0, [ffn, ffn])",
            ),
        ),
        found_by=(_EMBEDDING, _ATTENTION + "w_qkv.weight", _FEED + "w_gate_hidden.weight"),
        # Llama's net with fused projections has the same names.
        more={"named_only": True},
    ),
    Net(
        key="telechat-moe",
        title="TeleChat2 with experts (39B-A12B)",
        called="TeleChat2 with experts of MindFormers",
        target=TELECHAT_MOE,
        names=_ENDS | _PROJECTIONS | {HF_LAYER + "mlp.router.": _FEED + "router.dense."},
        own=table("""
    model.layers.{i}.feed_forward.ffn.{w1,w3}.weight [experts, ffn, hidden]
    model.layers.{i}.feed_forward.ffn.w2.weight [experts, hidden, ffn]
    ?model.layers.{i}.feed_forward.ffn.{w1,w3}.bias [1, experts, 1, ffn]
    ?model.layers.{i}.feed_forward.ffn.w2.bias [1, experts, 1, hidden]
    """),
        rules=tuple(
            Rule(f"{_FEED}ffn.{part}.{leaf}", f"{HF_LAYER}mlp.local_experts.{{e}}.{theirs}.{leaf}", program)
            for leaf, program in _UNSTACK.items()
            for part, theirs in _PARTS.items()
        ),
        found_by=(_EMBEDDING, _ATTENTION + "wk_v.weight", _FEED + "router.dense.weight"),
    ),
)
