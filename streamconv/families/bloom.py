"""BLOOM: as transformers has it, and with split projections.

Source: huggingface/transformers 5.23.0: models/bloom/modeling_bloom.py. The split form is ours.
"""

from __future__ import annotations

from streamconv.families.fused import BY_HEAD, HEAD, laid_out, recipe, three
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import linear
from streamconv.plans.table import table

_OUTSIDE = table("""
    transformer.word_embeddings.weight [vocab, hidden]
    transformer.word_embeddings_layernorm.{weight,bias} [hidden]
    transformer.h.{i}.input_layernorm.{weight,bias} [hidden]
    transformer.h.{i}.self_attention.dense.{weight,bias} [hidden, hidden] [hidden]
    transformer.h.{i}.post_attention_layernorm.{weight,bias} [hidden]
    transformer.h.{i}.mlp.dense_h_to_4h.{weight,bias} [4 * hidden, hidden] [4 * hidden]
    transformer.h.{i}.mlp.dense_4h_to_h.{weight,bias} [hidden, 4 * hidden] [hidden]
    transformer.ln_f.{weight,bias} [hidden]
""")
_SIZES = {
    "hidden": "hidden_size or n_embed",
    "vocab": "vocab_size",
    "layers": "n_layer or num_hidden_layers",
    "heads": "n_head or num_attention_heads",
    "head_dim": "hidden // heads",
    "tied": "tie_word_embeddings != False",
}

BLOOM = Architecture(
    name="bloom",
    title="BLOOM",
    model_types=("bloom",),
    classes=("BloomForCausalLM",),
    sizes=_SIZES,
    only_if="not qkv_layout",
    lines=_OUTSIDE
    + HEAD
    + table("""
        transformer.h.{i}.self_attention.query_key_value.{weight,bias} [3 * hidden, hidden] [3 * hidden]
        """),
)
BLOOM_SPLIT = laid_out(
    BLOOM, "split", "split projections", _OUTSIDE + HEAD + three("transformer.h.{i}.self_attention.")
)

# ------------------------------------------------------------------------------------------- rules

RECIPES = (
    recipe(
        "bloom-split",
        BLOOM,
        BLOOM_SPLIT,
        linear(
            "transformer.h.{i}.self_attention.query_key_value",
            "transformer.h.{i}.self_attention.{q,k,v}_proj",
            BY_HEAD,
        ),
    ),
)
