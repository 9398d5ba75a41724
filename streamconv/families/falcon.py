"""Falcon, in its three layouts of the fused projection, and with split projections.

    new_decoder_architecture (40B, 180B, 11B)  by group: its queries, its key, its value
    multi_query (7B)                           all queries, one key, one value
    neither (RW)                               by head: query, key, value

The first code of the 40B (`model_type` RefinedWeb) knows only groups, and has `n_head_kv` of them.

Source: huggingface/transformers 5.23.0: models/falcon/modeling_falcon.py; tiiuae/falcon-40b: modelling_RW.py. The
split form is ours.
"""

from __future__ import annotations

from streamconv.families.fused import BY_HEAD, HEAD, laid_out, recipe, three
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import linear
from streamconv.plans.table import table

_OUTSIDE = table("""
    transformer.word_embeddings.weight [vocab, hidden]
    transformer.h.{i}.input_layernorm.{weight,bias} [hidden] if norms == 1
    transformer.h.{i}.ln_{attn,mlp}.{weight,bias} [hidden] if norms == 2
    transformer.h.{i}.post_attention_layernorm.{weight,bias} [hidden] if not parallel
    transformer.h.{i}.self_attention.dense.{weight,bias} [hidden, hidden] [hidden if biased]
    transformer.h.{i}.mlp.dense_h_to_4h.{weight,bias} [ffn, hidden] [ffn if biased]
    transformer.h.{i}.mlp.dense_4h_to_h.{weight,bias} [hidden, ffn] [hidden if biased]
    transformer.ln_f.{weight,bias} [hidden]
""")
_SIZES = {
    "hidden": "hidden_size or n_embed",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers or n_layer",
    "heads": "num_attention_heads or n_head",
    "head_dim": "hidden // heads",
    "grouped": "bool(new_decoder_architecture or (model_type == 'RefinedWeb' and n_head_kv))",
    "one_key": "not grouped and multi_query != False",
    "kv_heads": "(num_kv_heads or n_head_kv or heads) if grouped else (1 if one_key else heads)",
    "ffn": "ffn_hidden_size or 4 * hidden",
    "biased": "bool(bias)",
    "parallel": "grouped or parallel_attn != False",
    "norms": "(num_ln_in_parallel_attn or 2) if grouped else 1",
    "tied": "tie_word_embeddings != False",
}

FALCON = Architecture(
    name="falcon",
    title="Falcon",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    classes=("FalconForCausalLM", "RWForCausalLM"),
    sizes=_SIZES,
    only_if="not qkv_layout",
    lines=_OUTSIDE
    + HEAD
    + table("""
        transformer.h.{i}.self_attention.query_key_value.{weight,bias} [(heads + 2 * kv_heads) * head_dim, hidden] [(heads + 2 * kv_heads) * head_dim if biased]
        """),
)
FALCON_SPLIT = laid_out(
    FALCON,
    "split",
    "split projections",
    _OUTSIDE + HEAD + three("transformer.h.{i}.self_attention.", few="kv_heads * head_dim", biased="biased"),
)

# ------------------------------------------------------------------------------------------- rules

_FUSED, _APART = (
    f"transformer.h.{{i}}.self_attention.{name}" for name in ("query_key_value", "{q,k,v}_proj")
)

RECIPES = (
    recipe(
        "falcon-split",
        FALCON,
        FALCON_SPLIT,
        (
            *linear(
                _FUSED,
                _APART,
                "q, k, v = split_heads(x, kv_heads, [heads // kv_heads, 1, 1], head_dim)",
                when="grouped",
            ),
            *linear(
                _FUSED,
                _APART,
                "q, k, v = split(x, 0, [heads * head_dim, head_dim, head_dim])",
                when="one_key",
            ),
            *linear(_FUSED, _APART, BY_HEAD, when="not grouped and not one_key"),
        ),
    ),
)
