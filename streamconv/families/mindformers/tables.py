"""MindFormers' namings of models that Hugging Face's libraries have too, for its nets up to r1.8.

A net of MindFormers is described by the Hugging Face config of the same model, for its own is a YAML file that lies
elsewhere. So its table is that of the Hugging Face architecture under other names, and what the two have of
different shapes is written out.

Source: mindspore-lab/mindformers r1.3.0 to r1.8.0: mindformers/models/*/convert_weight.py, convert_reversed.py and the
same under research/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streamconv.families.baichuan import BAICHUAN
from streamconv.families.internlm import INTERNLM, INTERNLM2
from streamconv.families.llama import LLAMA
from streamconv.families.qwen import QWEN, QWEN2
from streamconv.plans.architecture import Architecture
from streamconv.plans.table import Table, table

Names = dict[str, str]
"""Names of Hugging Face -> names of MindFormers, as `Table.renamed` takes them."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family in both namings.

    Attributes:
        target: as Hugging Face has it.
        net: as MindFormers has it.
        names: of tensors that only change their name.
    """

    target: Architecture
    net: Architecture
    names: Names


_NOTHING = Table()


def family(target: Architecture, title: str, names: Names, own: Table = _NOTHING, **changes: Any) -> Family:
    """A family whose net is described by the Hugging Face config, and so has its sizes.

    Args:
        target: as Hugging Face has it.
        title: as people write it.
        names: of tensors that only change their name; the net does not have those that they do not give.
        own: the table of what has another shape there, or exists there alone.
        changes: what else of the net's differs, by attribute.
    """
    defaults: dict[str, Any] = {"name": "mindformers", "title": f"{title} of MindFormers"}
    net = replace(target, **(defaults | {"lines": target.lines.renamed(names) + own} | changes))
    return Family(target, net, names)


def layer_norm(theirs: str, ours: str) -> Names:
    """The names of a norm."""
    return {f"{theirs}.weight": f"{ours}.gamma", f"{theirs}.bias": f"{ours}.beta"}


LAYER = "model.layers.{i}."
"""What layers are called on both sides."""

OUTSIDE: Names = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
NORMS: Names = {
    LAYER + "input_layernorm.": LAYER + "attention_norm.",
    LAYER + "post_attention_layernorm.": LAYER + "ffn_norm.",
}
QKV: Names = {LAYER + f"self_attn.{part}_proj.": LAYER + f"attention.w{part}." for part in "qkv"}
OUTPUT: Names = {LAYER + "self_attn.o_proj.": LAYER + "attention.wo."}
GATE_AND_UP: Names = {
    LAYER + "mlp.gate_proj.": LAYER + "feed_forward.w1.",
    LAYER + "mlp.up_proj.": LAYER + "feed_forward.w3.",
}
DOWN: Names = {LAYER + "mlp.down_proj.": LAYER + "feed_forward.w2."}
LLAMA_NAMES: Names = OUTSIDE | NORMS | QKV | OUTPUT | GATE_AND_UP | DOWN
"""What Llama's tensors are called, and those of every family that is like it."""

_THREE = table("""
    model.layers.{i}.attention.wq.weight [heads * head_dim, hidden]
    model.layers.{i}.attention.wk.weight [kv_heads * head_dim, hidden]
    model.layers.{i}.attention.wv.weight [kv_heads * head_dim, hidden]
""")
_THREE_BIASES = table("""
    model.layers.{i}.attention.wq.bias [heads * head_dim] if bias
    model.layers.{i}.attention.wk.bias [kv_heads * head_dim] if bias
    model.layers.{i}.attention.wv.bias [kv_heads * head_dim] if bias
""")

MF_LLAMA = family(LLAMA, "Llama", LLAMA_NAMES)
MF_QWEN2 = family(QWEN2, "Qwen2", LLAMA_NAMES)
_CONCAT = table("""
    model.layers.{i}.attention.w_qkv.weight [(heads + 2 * kv_heads) * head_dim, hidden]
    model.layers.{i}.attention.w_qkv.bias [(heads + 2 * kv_heads) * head_dim] if biased
    model.layers.{i}.feed_forward.w_gate_hidden.weight [2 * ffn, hidden]
""")
_CONCAT_NAMES: Names = OUTSIDE | NORMS | OUTPUT | DOWN


def llama_concat(order: str) -> Family:
    """Llama with fused projections, their rows in this order."""
    lines = _CONCAT.given(biased="attention_bias") + table("""
        model.layers.{i}.feed_forward.w_gate_hidden.bias [2 * ffn] if mlp_bias
    """)
    return family(LLAMA, f"Llama, {order}", _CONCAT_NAMES, lines, name=f"mindformers-{order}")


def qwen2_concat(order: str) -> Family:
    """Qwen2 with fused projections, their rows in this order."""
    return family(
        QWEN2, f"Qwen2, {order}", _CONCAT_NAMES, _CONCAT.given(biased="True"), name=f"mindformers-{order}"
    )


MF_BAICHUAN2 = family(
    BAICHUAN,
    "Baichuan2",
    LLAMA_NAMES,
    _THREE.given(kv_heads="heads"),
    # Only the first generation's 7B has them in its files; 13B does not rotate, and has no such key.
    sizes={**BAICHUAN.sizes, "keeps_frequencies": "not norm_head and bool(max_position_embeddings)"},
)
MF_INTERNLM = family(INTERNLM, "InternLM", LLAMA_NAMES)

INTERNLM2_NAMES: Names = {
    "model.tok_embeddings.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "output.weight": "lm_head.weight",
    **{
        LAYER + part: LAYER + part
        for part in ("attention.wo.", "feed_forward.", "attention_norm.", "ffn_norm.")
    },
}
MF_INTERNLM2 = family(
    INTERNLM2, "InternLM2", {**INTERNLM2_NAMES, LAYER + "attention.wqkv.": LAYER + "attention.w."}
)
MF_INTERNLM2_SPLIT = family(
    INTERNLM2,
    "InternLM2 with split projections",
    INTERNLM2_NAMES,
    _THREE + _THREE_BIASES,
    name="mindformers-split",
)

_QWEN, _QWEN_MF = "transformer.h.{i}.", "transformer.layers.{i}."
QWEN_NAMES: Names = {
    "transformer.wte.weight": "transformer.wte.embedding_weight",
    "transformer.ln_f.": "transformer.ln_f.",
    "lm_head.weight": "lm_head.weight",
    _QWEN + "attn.c_proj.": _QWEN_MF + "attention.wo.",
    _QWEN + "ln_1.": _QWEN_MF + "attention_norm.",
    _QWEN + "ln_2.": _QWEN_MF + "ffn_norm.",
    _QWEN + "mlp.w1.": _QWEN_MF + "feed_forward.w1.",
    # The one under the activation.
    _QWEN + "mlp.w2.": _QWEN_MF + "feed_forward.w3.",
    _QWEN + "mlp.c_proj.": _QWEN_MF + "feed_forward.w2.",
}
QWEN_THREE = (_THREE + _THREE_BIASES).given(kv_heads="heads", bias="True").renamed({LAYER: _QWEN_MF})
MF_QWEN = family(QWEN, "Qwen (first generation)", QWEN_NAMES, QWEN_THREE)
