"""GPT-NeoX (and Pythia): as transformers has it, and with split projections.

The output layer is `embed_out` in files, which transformers 5 calls `lm_head` in memory, and in files only with
`save_original_format=False`.

Source: huggingface/transformers 5.23.0: models/gpt_neox/modeling_gpt_neox.py, conversion_mapping.py. The split form
is ours.
"""

from __future__ import annotations

from streamconv.families.fused import BY_HEAD, laid_out, recipe, three
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Rule, drop, linear
from streamconv.plans.table import table

_OUTSIDE = table("""
    gpt_neox.embed_in.weight [vocab, hidden]
    gpt_neox.layers.{i}.{input,post_attention}_layernorm.{weight,bias} [hidden]
    gpt_neox.layers.{i}.attention.dense.{weight,bias} [hidden, hidden] [hidden if biased]
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.{weight,bias} [ffn, hidden] [ffn]
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.{weight,bias} [hidden, ffn] [hidden]
    gpt_neox.final_layer_norm.{weight,bias} [hidden]
""")
_SIZES = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "head_dim": "hidden_size // num_attention_heads",
    "ffn": "intermediate_size",
    "biased": "attention_bias != False",
    "tied": "bool(tie_word_embeddings)",
}

NEOX = Architecture(
    name="neox",
    title="GPT-NeoX",
    model_types=("gpt_neox",),
    classes=("GPTNeoXForCausalLM",),
    sizes=_SIZES,
    only_if="not qkv_layout",
    lines=_OUTSIDE
    + table("""
        # One of them, unless it is tied; that it is there, the split form's table says.
        ?{embed_out,lm_head}.weight [vocab, hidden]
        gpt_neox.layers.{i}.attention.query_key_value.{weight,bias} [3 * hidden, hidden] [3 * hidden if biased]
        """),
)
NEOX_SPLIT = laid_out(
    NEOX,
    "split",
    "split projections",
    _OUTSIDE
    + table("""
        embed_out.weight [vocab, hidden] if not tied
        ?embed_out.weight [vocab, hidden] if tied
    """)
    + three("gpt_neox.layers.{i}.attention.", biased="biased"),
)

# ------------------------------------------------------------------------------------------- rules

_ATTENTION = "gpt_neox.layers.{i}.attention"
_BUFFERS = tuple(
    drop(f"{_ATTENTION}.{name}", "a buffer that models compute", optional=True)
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
)
_HEAD = (
    Rule("embed_out.weight", "embed_out.weight"),
    # The name in memory of transformers 5, which reads both.
    Rule("lm_head.weight", "embed_out.weight"),
)

RECIPES = (
    recipe(
        "neox-split",
        NEOX,
        NEOX_SPLIT,
        (*linear(_ATTENTION + ".query_key_value", _ATTENTION + ".{q,k,v}_proj", BY_HEAD), *_HEAD, *_BUFFERS),
        ("embed_out.weight",),
    ),
)
