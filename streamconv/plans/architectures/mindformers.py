"""MindFormers' namings of models that Hugging Face's libraries have too, for its nets up to r1.8.

A net of MindFormers is described by the Hugging Face config of the same model, for its own is a YAML file that lies
elsewhere. So its table is that of the Hugging Face architecture under other names, and what the two have of
different shapes is written out.

Source: mindspore-lab/mindformers r1.3.0 to r1.8.0: mindformers/models/*/convert_weight.py, convert_reversed.py and the
same under research/.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamconv.plans.architecture import Architecture, Line, table

Names = dict[str, str]
"""Names of Hugging Face -> names of MindFormers. One that ends in a dot stands for all names that begin with it."""


def relabelled(name: str, names: Names) -> str | None:
    """What MindFormers calls a tensor; None where the names do not say."""
    if name in names:
        return names[name]
    before = max(
        (each for each in names if each.endswith(".") and name.startswith(each)), key=len, default=None
    )
    return None if before is None else names[before] + name.removeprefix(before)


def net(architecture: Architecture, title: str, names: Names, own: str = "", **changes: Any) -> Architecture:
    """An architecture as MindFormers names it.

    Args:
        architecture: as Hugging Face names it; its config and sizes are also the net's.
        title: as people write the family.
        names: of tensors that only change their name. Those that they do not give are left out.
        own: lines of a table for what has another shape there, or exists there alone.
        changes: what else differs, by attribute.
    """
    named = ((line, relabelled(line.name.text, names)) for line in architecture.lines)
    lines = tuple(_renamed(line, theirs) for line, theirs in named if theirs is not None)
    defaults: dict[str, Any] = {"name": "mindformers", "title": f"{title} of MindFormers"}
    return replace(architecture, **(defaults | {"lines": lines + table(own)} | changes))


def _renamed(line: Line, name: str) -> Line:
    return Line(line.text.replace(line.name.text, name, 1))


HF_LAYER = "model.layers.{i}."
LAYER = "model.layers.{i}."

OUTSIDE: Names = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
NORMS: Names = {
    HF_LAYER + "input_layernorm.": LAYER + "attention_norm.",
    HF_LAYER + "post_attention_layernorm.": LAYER + "ffn_norm.",
}
QKV: Names = {HF_LAYER + f"self_attn.{part}_proj.": LAYER + f"attention.w{part}." for part in "qkv"}
OUTPUT: Names = {HF_LAYER + "self_attn.o_proj.": LAYER + "attention.wo."}
GATE_AND_UP: Names = {
    HF_LAYER + "mlp.gate_proj.": LAYER + "feed_forward.w1.",
    HF_LAYER + "mlp.up_proj.": LAYER + "feed_forward.w3.",
}
DOWN: Names = {HF_LAYER + "mlp.down_proj.": LAYER + "feed_forward.w2."}
LLAMA_NAMES: Names = OUTSIDE | NORMS | QKV | OUTPUT | GATE_AND_UP | DOWN
"""What Llama's tensors are called, and those of every family that is like it."""

FOUND_LLAMA = ("model.tok_embeddings.embedding_weight", LAYER + "attention.wq.weight")
"""What tells such a net."""
