"""GPT-2: as transformers has it, with split projections, and with its fused one in the order of heads.

Source: huggingface/transformers 5.23.0: models/gpt2/modeling_gpt2.py, whose `Conv1D` matrices are `[in, out]`. The
other two forms are ours, with every matrix `[out, in]`.
"""

from __future__ import annotations

from streamconv.families.fused import HEAD, laid_out, recipe, three
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Rule, drop
from streamconv.plans.table import table

_OUTSIDE = table("""
    transformer.wte.weight [vocab, hidden]
    transformer.wpe.weight [positions, hidden]
    transformer.h.{i}.ln_1.{weight,bias} [hidden]
    transformer.h.{i}.attn.c_proj.{weight,bias} [hidden, hidden] [hidden]
    transformer.h.{i}.ln_2.{weight,bias} [hidden]
    transformer.h.{i}.mlp.c_fc.bias [ffn]
    transformer.h.{i}.mlp.c_proj.bias [hidden]
    transformer.ln_f.{weight,bias} [hidden]
""")
_LINEAR = table("""
    transformer.h.{i}.mlp.c_fc.weight [ffn, hidden]
    transformer.h.{i}.mlp.c_proj.weight [hidden, ffn]
""")
_SIZES = {
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
    sizes=_SIZES,
    only_if="not qkv_layout",
    lines=_OUTSIDE
    + HEAD
    + table("""
        transformer.h.{i}.attn.c_attn.{weight,bias} [hidden, 3 * hidden] [3 * hidden]
        transformer.h.{i}.mlp.c_fc.weight [hidden, ffn]
        transformer.h.{i}.mlp.c_proj.weight [ffn, hidden]
        """),
)
GPT2_SPLIT = laid_out(
    GPT2, "split", "split projections", _OUTSIDE + HEAD + _LINEAR + three("transformer.h.{i}.attn.")
)
GPT2_PER_HEAD = laid_out(
    GPT2,
    "per-head",
    "its projection in the order of heads",
    _OUTSIDE
    + HEAD
    + _LINEAR
    + table("""
        transformer.h.{i}.attn.c_attn.{weight,bias} [3 * hidden, hidden] [3 * hidden]
    """),
)

# ------------------------------------------------------------------------------------------- rules

_ATTENTION = "transformer.h.{i}.attn"
_FUSED, _APART = _ATTENTION + ".c_attn.", _ATTENTION + ".{q,k,v}_proj."
_MATRICES = tuple(f"transformer.h.{{i}}.{name}.weight" for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
_TURNED = tuple(Rule(name, name, "x = transpose(x)") for name in _MATRICES)
_BUFFERS = tuple(
    drop(f"{_ATTENTION}.{name}", "a mask that models compute", optional=True)
    for name in ("bias", "masked_bias")
)

RECIPES = (
    recipe(
        "gpt2-split",
        GPT2,
        GPT2_SPLIT,
        (
            Rule(_FUSED + "weight", _APART + "weight", "q, k, v = chunk(transpose(x), 0, 3)"),
            Rule(_FUSED + "bias", _APART + "bias", "q, k, v = chunk(x, 0, 3)"),
            *_TURNED,
            *_BUFFERS,
        ),
        _MATRICES,
    ),
    recipe(
        "gpt2-per-head",
        GPT2,
        GPT2_PER_HEAD,
        (
            Rule(_FUSED + "weight", _FUSED + "weight", "x = by_head(transpose(x), heads, 3)"),
            Rule(_FUSED + "bias", _FUSED + "bias", "x = by_head(x, heads, 3)"),
            *_TURNED,
            *_BUFFERS,
        ),
        (*_MATRICES, _FUSED + "bias"),
    ),
)
