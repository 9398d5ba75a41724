"""Architectures whose queries, keys and values are one projection, and the same with three.

Source: huggingface/transformers 5.23.0: models/{gpt2,bloom,gpt_neox,falcon}. The split forms are ours: the same
model with `q_proj`, `k_proj` and `v_proj`, every matrix `[out, in]`.
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture, table

_HEAD = """
    lm_head.weight [vocab, hidden] if not tied
    ?lm_head.weight [vocab, hidden] if tied
"""
_GPT2_OUTSIDE = """
    transformer.wte.weight [vocab, hidden]
    transformer.wpe.weight [positions, hidden]
    transformer.h.{i}.ln_1.weight [hidden]
    transformer.h.{i}.ln_1.bias [hidden]
    transformer.h.{i}.attn.c_proj.weight [hidden, hidden]
    transformer.h.{i}.attn.c_proj.bias [hidden]
    transformer.h.{i}.ln_2.weight [hidden]
    transformer.h.{i}.ln_2.bias [hidden]
    transformer.h.{i}.mlp.c_fc.bias [ffn]
    transformer.h.{i}.mlp.c_proj.bias [hidden]
    transformer.ln_f.weight [hidden]
    transformer.ln_f.bias [hidden]
"""


def _three(name: str, rows: str = "hidden", few: str = "hidden", bias: str = "") -> str:
    """Three projections instead of one; `few` is how many rows keys and values have."""
    lines = []
    for part, size in (("q", rows), ("k", few), ("v", few)):
        lines += [f"{name}.{part}_proj.weight [{size}, hidden]", f"{name}.{part}_proj.bias [{size}]{bias}"]
    return "\n".join(lines)


_GPT2_SIZES = {
    "hidden": "n_embd or hidden_size",
    "vocab": "vocab_size",
    "positions": "n_positions or max_position_embeddings",
    "layers": "n_layer or num_hidden_layers",
    "heads": "n_head or num_attention_heads",
    "head_dim": "hidden // heads",
    "ffn": "n_inner or 4 * hidden",
    "tied": "tie_word_embeddings != False",
}
GPT2 = Architecture(
    name="gpt2",
    title="GPT-2",
    model_types=("gpt2",),
    classes=("GPT2LMHeadModel",),
    sizes=_GPT2_SIZES,
    counts={"i": "layers"},
    only_if="not qkv_layout",
    lines=table(
        _GPT2_OUTSIDE
        + _HEAD
        + """
        transformer.h.{i}.attn.c_attn.weight [hidden, 3 * hidden]
        transformer.h.{i}.attn.c_attn.bias [3 * hidden]
        transformer.h.{i}.mlp.c_fc.weight [hidden, ffn]
        transformer.h.{i}.mlp.c_proj.weight [ffn, hidden]
        """
    ),
)
_GPT2_LINEAR = (
    _GPT2_OUTSIDE
    + _HEAD
    + """
    transformer.h.{i}.mlp.c_fc.weight [ffn, hidden]
    transformer.h.{i}.mlp.c_proj.weight [hidden, ffn]
    """
)
GPT2_SPLIT = Architecture(
    name="split",
    title="GPT-2 with split projections",
    model_types=("gpt2",),
    classes=("GPT2LMHeadModel",),
    sizes=_GPT2_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'split'",
    lines=table(_GPT2_LINEAR + _three("transformer.h.{i}.attn")),
)
GPT2_PER_HEAD = Architecture(
    name="per-head",
    title="GPT-2 with its projection in the order of heads",
    model_types=("gpt2",),
    classes=("GPT2LMHeadModel",),
    sizes=_GPT2_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'per-head'",
    lines=table(
        _GPT2_LINEAR
        + """
        transformer.h.{i}.attn.c_attn.weight [3 * hidden, hidden]
        transformer.h.{i}.attn.c_attn.bias [3 * hidden]
        """
    ),
)

_BLOOM_OUTSIDE = """
    transformer.word_embeddings.weight [vocab, hidden]
    transformer.word_embeddings_layernorm.weight [hidden]
    transformer.word_embeddings_layernorm.bias [hidden]
    transformer.h.{i}.input_layernorm.weight [hidden]
    transformer.h.{i}.input_layernorm.bias [hidden]
    transformer.h.{i}.self_attention.dense.weight [hidden, hidden]
    transformer.h.{i}.self_attention.dense.bias [hidden]
    transformer.h.{i}.post_attention_layernorm.weight [hidden]
    transformer.h.{i}.post_attention_layernorm.bias [hidden]
    transformer.h.{i}.mlp.dense_h_to_4h.weight [4 * hidden, hidden]
    transformer.h.{i}.mlp.dense_h_to_4h.bias [4 * hidden]
    transformer.h.{i}.mlp.dense_4h_to_h.weight [hidden, 4 * hidden]
    transformer.h.{i}.mlp.dense_4h_to_h.bias [hidden]
    transformer.ln_f.weight [hidden]
    transformer.ln_f.bias [hidden]
"""
_BLOOM_SIZES = {
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
    sizes=_BLOOM_SIZES,
    counts={"i": "layers"},
    only_if="not qkv_layout",
    lines=table(
        _BLOOM_OUTSIDE
        + _HEAD
        + """
        transformer.h.{i}.self_attention.query_key_value.weight [3 * hidden, hidden]
        transformer.h.{i}.self_attention.query_key_value.bias [3 * hidden]
        """
    ),
)
BLOOM_SPLIT = Architecture(
    name="split",
    title="BLOOM with split projections",
    model_types=("bloom",),
    classes=("BloomForCausalLM",),
    sizes=_BLOOM_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'split'",
    lines=table(_BLOOM_OUTSIDE + _HEAD + _three("transformer.h.{i}.self_attention")),
)

_NEOX_OUTSIDE = """
    gpt_neox.embed_in.weight [vocab, hidden]
    gpt_neox.layers.{i}.input_layernorm.weight [hidden]
    gpt_neox.layers.{i}.input_layernorm.bias [hidden]
    gpt_neox.layers.{i}.post_attention_layernorm.weight [hidden]
    gpt_neox.layers.{i}.post_attention_layernorm.bias [hidden]
    gpt_neox.layers.{i}.attention.dense.weight [hidden, hidden]
    gpt_neox.layers.{i}.attention.dense.bias [hidden] if biased
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight [ffn, hidden]
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias [ffn]
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight [hidden, ffn]
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias [hidden]
    gpt_neox.final_layer_norm.weight [hidden]
    gpt_neox.final_layer_norm.bias [hidden]
"""
_NEOX_HEAD = """
    ?embed_out.weight [vocab, hidden]
    ?lm_head.weight [vocab, hidden]
"""
_NEOX_SIZES = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "head_dim": "hidden_size // num_attention_heads",
    "ffn": "intermediate_size",
    "biased": "attention_bias != False",
}
NEOX = Architecture(
    name="neox",
    title="GPT-NeoX",
    model_types=("gpt_neox",),
    classes=("GPTNeoXForCausalLM",),
    sizes=_NEOX_SIZES,
    counts={"i": "layers"},
    only_if="not qkv_layout",
    lines=table(
        _NEOX_OUTSIDE
        + _NEOX_HEAD
        + """
        gpt_neox.layers.{i}.attention.query_key_value.weight [3 * hidden, hidden]
        gpt_neox.layers.{i}.attention.query_key_value.bias [3 * hidden] if biased
        """
    ),
)
NEOX_SPLIT = Architecture(
    name="split",
    title="GPT-NeoX with split projections",
    model_types=("gpt_neox",),
    classes=("GPTNeoXForCausalLM",),
    sizes=_NEOX_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'split'",
    lines=table(_NEOX_OUTSIDE + _NEOX_HEAD + _three("gpt_neox.layers.{i}.attention", bias=" if biased")),
)

_FALCON_OUTSIDE = """
    transformer.word_embeddings.weight [vocab, hidden]
    transformer.h.{i}.input_layernorm.weight [hidden] if norms == 1
    transformer.h.{i}.input_layernorm.bias [hidden] if norms == 1
    transformer.h.{i}.ln_attn.weight [hidden] if norms == 2
    transformer.h.{i}.ln_attn.bias [hidden] if norms == 2
    transformer.h.{i}.ln_mlp.weight [hidden] if norms == 2
    transformer.h.{i}.ln_mlp.bias [hidden] if norms == 2
    transformer.h.{i}.post_attention_layernorm.weight [hidden] if not parallel
    transformer.h.{i}.post_attention_layernorm.bias [hidden] if not parallel
    transformer.h.{i}.self_attention.dense.weight [hidden, hidden]
    transformer.h.{i}.self_attention.dense.bias [hidden] if biased
    transformer.h.{i}.mlp.dense_h_to_4h.weight [ffn, hidden]
    transformer.h.{i}.mlp.dense_h_to_4h.bias [ffn] if biased
    transformer.h.{i}.mlp.dense_4h_to_h.weight [hidden, ffn]
    transformer.h.{i}.mlp.dense_4h_to_h.bias [hidden] if biased
    transformer.ln_f.weight [hidden]
    transformer.ln_f.bias [hidden]
"""
_FALCON_SIZES = {
    "hidden": "hidden_size or n_embed",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers or n_layer",
    "heads": "num_attention_heads or n_head",
    "head_dim": "hidden // heads",
    "grouped": "bool(new_decoder_architecture)",
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
    sizes=_FALCON_SIZES,
    counts={"i": "layers"},
    only_if="not qkv_layout",
    lines=table(
        _FALCON_OUTSIDE
        + _HEAD
        + """
        transformer.h.{i}.self_attention.query_key_value.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        transformer.h.{i}.self_attention.query_key_value.bias [(heads + 2 * kv_heads) * head_dim] if biased
        """
    ),
)
FALCON_SPLIT = Architecture(
    name="split",
    title="Falcon with split projections",
    model_types=FALCON.model_types,
    classes=FALCON.classes,
    sizes=_FALCON_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'split'",
    lines=table(
        _FALCON_OUTSIDE
        + _HEAD
        + _three("transformer.h.{i}.self_attention", few="kv_heads * head_dim", bias=" if biased")
    ),
)
