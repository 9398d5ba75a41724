"""GPT-2: as transformers has it, with split projections, and with its fused one in the order of heads.

Source: huggingface/transformers 5.23.0: models/gpt2/modeling_gpt2.py, whose `Conv1D` matrices are `[in, out]`. The
other two forms are ours, with every matrix `[out, in]`.
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture, table

HEAD = """
    lm_head.weight [vocab, hidden] if not tied
    ?lm_head.weight [vocab, hidden] if tied
"""
"""The output layer of GPT-2, BLOOM and Falcon."""


def three(name: str, rows: str = "hidden", few: str = "hidden", bias: str = "") -> str:
    """The lines of three projections under `name` in the place of a fused one.

    Args:
        name: of the attention.
        rows: formula of how many rows the queries' matrix has.
        few: that of keys and of values.
        bias: what stands behind the biases' lines.
    """
    lines = []
    for part, size in (("q", rows), ("k", few), ("v", few)):
        lines += [f"{name}.{part}_proj.weight [{size}, hidden]", f"{name}.{part}_proj.bias [{size}]{bias}"]
    return "\n".join(lines)


_OUTSIDE = """
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
_LINEAR = """
    transformer.h.{i}.mlp.c_fc.weight [ffn, hidden]
    transformer.h.{i}.mlp.c_proj.weight [hidden, ffn]
"""
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
    counts={"i": "layers"},
    only_if="not qkv_layout",
    lines=table(
        _OUTSIDE
        + HEAD
        + """
        transformer.h.{i}.attn.c_attn.weight [hidden, 3 * hidden]
        transformer.h.{i}.attn.c_attn.bias [3 * hidden]
        transformer.h.{i}.mlp.c_fc.weight [hidden, ffn]
        transformer.h.{i}.mlp.c_proj.weight [ffn, hidden]
        """
    ),
)
GPT2_SPLIT = Architecture(
    name="split",
    title="GPT-2 with split projections",
    model_types=GPT2.model_types,
    classes=GPT2.classes,
    sizes=_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'split'",
    lines=table(_OUTSIDE + HEAD + _LINEAR + three("transformer.h.{i}.attn")),
)
GPT2_PER_HEAD = Architecture(
    name="per-head",
    title="GPT-2 with its projection in the order of heads",
    model_types=GPT2.model_types,
    classes=GPT2.classes,
    sizes=_SIZES,
    counts={"i": "layers"},
    only_if="qkv_layout == 'per-head'",
    lines=table(
        _OUTSIDE
        + HEAD
        + _LINEAR
        + """
        transformer.h.{i}.attn.c_attn.weight [3 * hidden, hidden]
        transformer.h.{i}.attn.c_attn.bias [3 * hidden]
        """
    ),
)
