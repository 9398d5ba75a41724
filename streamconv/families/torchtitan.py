"""Llama as torchtitan trains it to transformers and back.

It rotates neighbouring channels, as Meta's code does: rows of queries and keys are reordered. A checkpoint has no
config beside it: that of the Hugging Face model serves both sides (`--like` or `--config`).

Source: pytorch/torchtitan: torchtitan/models/llama3/model (names), state_dict_adapter.py (the mapping).
"""

from __future__ import annotations

from streamconv.families.llama import LLAMA, SIZES
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, Refusal, Rule, drop, rename
from streamconv.plans.table import table

_LAYER = "model.layers.{i}."
_BIASES = Refusal(
    "attention_bias or mlp_bias", "torchtitan's Llama has no biases, and this config wants some"
)


def _recipe(name: str, title: str, attention: str, head: str) -> Recipe:
    """A recipe for one generation of names.

    Args:
        name: of the recipe.
        title: of the names.
        attention: what stands before `wq`, `wk` and `wv`.
        head: the output layer.
    """
    before = f"layers.{{i}}.attention.{attention}"
    source = Architecture(
        name=name.removesuffix("-llama"),
        title=title,
        model_types=("llama",),
        classes=(),
        sizes=SIZES,
        counts={"i": "layers"},
        lines=table(f"""
            tok_embeddings.weight [vocab, hidden]
            {before}wq.weight [heads * head_dim, hidden]
            {before}wk.weight [kv_heads * head_dim, hidden]
            {before}wv.weight [kv_heads * head_dim, hidden]
            layers.{{i}}.attention.wo.weight [hidden, heads * head_dim]
            layers.{{i}}.attention_norm.weight [hidden]
            layers.{{i}}.ffn_norm.weight [hidden]
            layers.{{i}}.feed_forward.w1.weight [ffn, hidden]
            layers.{{i}}.feed_forward.w3.weight [ffn, hidden]
            layers.{{i}}.feed_forward.w2.weight [hidden, ffn]
            norm.weight [hidden]
            {head} [vocab, hidden] if not tied
            ?{head} [vocab, hidden] if tied
        """),
    )
    return Recipe(
        name=name,
        title=f"{title} -> transformers",
        source=source,
        target=LLAMA,
        rules=(
            *rename(
                {
                    "tok_embeddings.weight": "model.embed_tokens.weight",
                    f"{before}wv.weight": _LAYER + "self_attn.v_proj.weight",
                    "layers.{i}.attention.wo.weight": _LAYER + "self_attn.o_proj.weight",
                    "layers.{i}.attention_norm.weight": _LAYER + "input_layernorm.weight",
                    "layers.{i}.ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
                    "layers.{i}.feed_forward.w1.weight": _LAYER + "mlp.gate_proj.weight",
                    "layers.{i}.feed_forward.w3.weight": _LAYER + "mlp.up_proj.weight",
                    "layers.{i}.feed_forward.w2.weight": _LAYER + "mlp.down_proj.weight",
                    "norm.weight": "model.norm.weight",
                }
            ),
            Rule(f"{before}wq.weight", _LAYER + "self_attn.q_proj.weight", "x = rotary_halves(x, heads)"),
            Rule(f"{before}wk.weight", _LAYER + "self_attn.k_proj.weight", "x = rotary_halves(x, kv_heads)"),
            Rule(head, "lm_head.weight", optional=True),
            drop("freqs_cis", "a buffer that models compute", optional=True),
        ),
        refuses=(_BIASES,),
        refuses_back=(_BIASES,),
        found_by=("tok_embeddings.weight", f"{before}wq.weight", head),
    )


TORCHTITAN = _recipe("torchtitan-llama", "Llama of torchtitan", "qkv_linear.", "lm_head.weight")
TORCHTITAN_2025 = _recipe("torchtitan2025-llama", "Llama of torchtitan until 2025", "", "output.weight")

RECIPES = (TORCHTITAN, TORCHTITAN_2025)
