"""GPT-2, BLOOM and WizardCoder of MindFormers.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/{gpt2,bloom}; r1.1.0: research/wizardcoder. GPTBigCode
itself: huggingface/transformers 5.23.0: models/gpt_bigcode/modeling_gpt_bigcode.py.
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture, table
from streamconv.plans.architectures.bloom import BLOOM
from streamconv.plans.architectures.gpt2 import GPT2, HEAD
from streamconv.plans.architectures.mindformers import Names, family, layer_norm

GPTBIGCODE = Architecture(
    name="gptbigcode",
    title="GPTBigCode",
    model_types=("gpt_bigcode",),
    classes=("GPTBigCodeForCausalLM",),
    sizes={**GPT2.sizes, "one_key": "multi_query != False"},
    counts={"i": "layers"},
    lines=table(
        HEAD
        + """
        transformer.wte.weight [vocab, hidden]
        transformer.wpe.weight [positions, hidden]
        transformer.h.{i}.ln_1.weight [hidden]
        transformer.h.{i}.ln_1.bias [hidden]
        transformer.h.{i}.attn.c_attn.weight [hidden + 2 * (head_dim if one_key else hidden), hidden]
        transformer.h.{i}.attn.c_attn.bias [hidden + 2 * (head_dim if one_key else hidden)]
        transformer.h.{i}.attn.c_proj.weight [hidden, hidden]
        transformer.h.{i}.attn.c_proj.bias [hidden]
        transformer.h.{i}.ln_2.weight [hidden]
        transformer.h.{i}.ln_2.bias [hidden]
        transformer.h.{i}.mlp.c_fc.weight [ffn, hidden]
        transformer.h.{i}.mlp.c_fc.bias [ffn]
        transformer.h.{i}.mlp.c_proj.weight [hidden, ffn]
        transformer.h.{i}.mlp.c_proj.bias [hidden]
        transformer.ln_f.weight [hidden]
        transformer.ln_f.bias [hidden]
        """
    ),
)

HF_BLOCK, GPT_BLOCK, BLOOM_BLOCK = "transformer.h.{i}.", "backbone.blocks.{i}.", "blocks.{i}."


def _three(block: str, few: str = "hidden") -> str:
    """The lines of queries, keys and values."""
    rows = ("hidden", few, few)
    lines = [
        (
            f"{block}attention.dense{part}.weight [{size}, hidden]",
            f"{block}attention.dense{part}.bias [{size}]",
        )
        for part, size in enumerate(rows, 1)
    ]
    return "\n".join(line for pair in lines for line in pair) + "\n"


def _turned(block: str, ffn: str) -> str:
    """The lines of matrices that are `[in, out]`."""
    return f"""
        {block}attention.projection.weight [hidden, hidden]
        {block}output.mapping.weight [hidden, {ffn}]
        {block}output.projection.weight [{ffn}, hidden]
    """


_GPT_NAMES: Names = {
    "transformer.wte.weight": "backbone.embedding.word_embedding.embedding_table",
    "transformer.wpe.weight": "backbone.embedding.position_embedding.embedding_table",
    **layer_norm(HF_BLOCK + "ln_1", GPT_BLOCK + "layernorm1"),
    **layer_norm(HF_BLOCK + "ln_2", GPT_BLOCK + "layernorm2"),
    **layer_norm("transformer.ln_f", "backbone.layernorm"),
}
_GPT_LINEAR = {
    "attn.c_proj": "attention.projection",
    "mlp.c_fc": "output.mapping",
    "mlp.c_proj": "output.projection",
}

MF_GPT2 = family(
    GPT2,
    "GPT-2",
    _GPT_NAMES | {f"{HF_BLOCK}{theirs}.": f"{GPT_BLOCK}{ours}." for theirs, ours in _GPT_LINEAR.items()},
    _three(GPT_BLOCK),
)
MF_WIZARDCODER = family(
    GPTBIGCODE,
    "WizardCoder",
    _GPT_NAMES
    | {f"{HF_BLOCK}{theirs}.bias": f"{GPT_BLOCK}{ours}.bias" for theirs, ours in _GPT_LINEAR.items()}
    | {"lm_head.weight": "head.head_weight"},
    _three(GPT_BLOCK, "head_dim") + _turned(GPT_BLOCK, "ffn"),
)
MF_BLOOM = family(
    BLOOM,
    "BLOOM",
    {
        "transformer.word_embeddings.weight": "embedding.word_embedding.embedding_table",
        **layer_norm("transformer.word_embeddings_layernorm", "embedding.norm"),
        **layer_norm(HF_BLOCK + "input_layernorm", BLOOM_BLOCK + "layernorm1"),
        **layer_norm(HF_BLOCK + "post_attention_layernorm", BLOOM_BLOCK + "layernorm2"),
        HF_BLOCK + "self_attention.dense.bias": BLOOM_BLOCK + "attention.projection.bias",
        HF_BLOCK + "mlp.dense_h_to_4h.bias": BLOOM_BLOCK + "output.mapping.bias",
        HF_BLOCK + "mlp.dense_4h_to_h.bias": BLOOM_BLOCK + "output.projection.bias",
        **layer_norm("transformer.ln_f", "ln_f"),
    },
    _three(BLOOM_BLOCK) + _turned(BLOOM_BLOCK, "4 * hidden"),
)
