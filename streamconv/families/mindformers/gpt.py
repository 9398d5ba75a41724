"""GPT-2, BLOOM and WizardCoder: MindFormers to Hugging Face and back.

MindFormers has queries, keys and values apart and `[out, in]`; the other matrices of a block are `[in, out]`, as GPT-2
has all of them.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/{gpt2,bloom}; r1.1.0: research/wizardcoder. GPTBigCode
itself: huggingface/transformers 5.23.0: models/gpt_bigcode/modeling_gpt_bigcode.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamconv.families.bloom import BLOOM
from streamconv.families.fused import HEAD
from streamconv.families.gpt2 import GPT2
from streamconv.families.mindformers.common import measured, tied, united
from streamconv.families.mindformers.net import Names, Net
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import named, pairs
from streamconv.plans.recipe import Refusal, Rule, drop
from streamconv.plans.table import table
from streamconv.tensor import Shape

GPTBIGCODE = Architecture(
    name="gptbigcode",
    title="GPTBigCode",
    model_types=("gpt_bigcode",),
    classes=("GPTBigCodeForCausalLM",),
    sizes={**GPT2.sizes, "one_key": "multi_query != False"},
    lines=HEAD
    + table("""
        transformer.wte.weight [vocab, hidden]
        transformer.wpe.weight [positions, hidden]
        transformer.h.{i}.ln_1.{weight,bias} [hidden]
        transformer.h.{i}.attn.c_attn.weight [hidden + 2 * (head_dim if one_key else hidden), hidden]
        transformer.h.{i}.attn.c_attn.bias [hidden + 2 * (head_dim if one_key else hidden)]
        transformer.h.{i}.attn.c_proj.{weight,bias} [hidden, hidden] [hidden]
        transformer.h.{i}.ln_2.{weight,bias} [hidden]
        transformer.h.{i}.mlp.c_fc.{weight,bias} [ffn, hidden] [ffn]
        transformer.h.{i}.mlp.c_proj.{weight,bias} [hidden, ffn] [hidden]
        transformer.ln_f.{weight,bias} [hidden]
    """),
)

HF_BLOCK, GPT_BLOCK, BLOOM_BLOCK = "transformer.h.{i}.", "backbone.blocks.{i}.", "blocks.{i}."


_THREE = table("""
    attention.dense1.{weight,bias} [hidden, hidden] [hidden]
    attention.{dense2,dense3}.{weight,bias} [few, hidden] [few]
""")
"""Queries, keys and values."""
_PARTS = "attention.{dense1,dense2,dense3}"

_TURNED = table("""
    attention.projection.weight [hidden, hidden]
    output.mapping.weight [hidden, ffn]
    output.projection.weight [ffn, hidden]
""")
"""Matrices that are `[in, out]`."""

_GPT_NAMES = named("""
    transformer.{wte,wpe}.weight -> backbone.embedding.{word_embedding,position_embedding}.embedding_table
    transformer.h.{i}.ln_{1,2}.{weight,bias} -> backbone.blocks.{i}.layernorm{1,2}.{gamma,beta}
    transformer.ln_f.{weight,bias} -> backbone.layernorm.{gamma,beta}
""")
_BLOOM_NAMES = named("""
    transformer.word_embeddings.weight -> embedding.word_embedding.embedding_table
    transformer.word_embeddings_layernorm.{weight,bias} -> embedding.norm.{gamma,beta}
    transformer.h.{i}.{input,post_attention}_layernorm.{weight,bias} -> blocks.{i}.layernorm{1,2}.{gamma,beta}
    transformer.ln_f.{weight,bias} -> ln_f.{gamma,beta}
""")
_OURS = "{attention.projection,output.mapping,output.projection}"
_GPT_LINEAR = pairs({"{attn.c_proj,mlp.c_fc,mlp.c_proj}": _OURS})
_BLOOM_LINEAR = pairs({"{self_attention.dense,mlp.dense_h_to_4h,mlp.dense_4h_to_h}": _OURS})


def _linear(block: str, names: Names, leaf: str) -> Names:
    return {f"{HF_BLOCK}{theirs}{leaf}": f"{block}{ours}{leaf}" for theirs, ours in names.items()}


_HEAD = "lm_head.weight"
_TIED_HEAD = Rule(None, _HEAD, optional=True, reason="tied to the embedding")
_ONLY_TIED = (
    Refusal(
        "tie_word_embeddings == False",
        "the net has no output layer besides its embedding, and this model has",
    ),
)
_MASKS = (
    Rule(None, HF_BLOCK + "attn.bias", optional=True, reason="a mask that models compute"),
    Rule(None, HF_BLOCK + "attn.masked_bias", optional=True, reason="a mask that models compute"),
    drop(GPT_BLOCK + "attention.beta", "a mask that models compute", optional=True),
    drop(GPT_BLOCK + "attention.masked_beta", "a mask that models compute", optional=True),
)


def _transposed(block: str, names: Names) -> tuple[Rule, ...]:
    """Rules for matrices that the net has the other way round."""
    return tuple(
        Rule(ours, theirs, "x = transpose(x)") for theirs, ours in _linear(block, names, ".weight").items()
    )


_measured_gpt2 = measured(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocab_size": ("backbone.embedding.word_embedding.embedding_table", 0),
        "n_embd": ("backbone.embedding.word_embedding.embedding_table", 1),
        "n_positions": ("backbone.embedding.position_embedding.embedding_table", 0),
        "n_inner": ("backbone.blocks.0.output.mapping.weight", 1),
    },
    {"n_layer": GPT_BLOCK + "layernorm1.gamma"},
)
_measured_bloom = measured(
    "bloom",
    "BloomForCausalLM",
    {
        "vocab_size": ("embedding.word_embedding.embedding_table", 0),
        "hidden_size": ("embedding.word_embedding.embedding_table", 1),
    },
    {"n_layer": BLOOM_BLOCK + "layernorm1.gamma"},
)


def _gpt2_of(shapes: Mapping[str, Shape]) -> Config:
    """Every published GPT-2 has heads of 64 channels."""
    made = _measured_gpt2(shapes)
    heads, rest = divmod(made.get("n_embd", 0), 64)
    return made | ({"n_head": heads} if heads and not rest else {})


_WIZARDCODER_NAMES: Names = (
    _GPT_NAMES | _linear(GPT_BLOCK, _GPT_LINEAR, ".bias") | {_HEAD: "head.head_weight"}
)
NETS = (
    Net(
        key="gpt",
        title="GPT-2",
        target=GPT2,
        names=_GPT_NAMES | _linear(GPT_BLOCK, _GPT_LINEAR, "."),
        own=_THREE.under(GPT_BLOCK).given(few="hidden"),
        rules=(
            Rule(
                f"{GPT_BLOCK}{_PARTS}.weight",
                HF_BLOCK + "attn.c_attn.weight",
                "x = transpose(concat([dense1, dense2, dense3]))",
            ),
            *united(GPT_BLOCK + _PARTS, HF_BLOCK + "attn.c_attn", leaves=("bias",)),
            _TIED_HEAD,
            *_MASKS,
        ),
        found_by=(
            "backbone.embedding.word_embedding.embedding_table",
            GPT_BLOCK + "attention.dense1.weight",
        ),
        refuses=_ONLY_TIED,
        more={"config_of": _gpt2_of},
    ),
    Net(
        key="bloom",
        title="BLOOM",
        target=BLOOM,
        names=_BLOOM_NAMES | _linear(BLOOM_BLOCK, _BLOOM_LINEAR, ".bias"),
        own=(_THREE + _TURNED).under(BLOOM_BLOCK).given(few="hidden", ffn="4 * hidden"),
        rules=(
            *united(BLOOM_BLOCK + _PARTS, HF_BLOCK + "self_attention.query_key_value", "heads"),
            *_transposed(BLOOM_BLOCK, _BLOOM_LINEAR),
            _TIED_HEAD,
            drop("head.weight", "the net computes its output with the embedding", optional=True),
        ),
        found_by=(
            "embedding.word_embedding.embedding_table",
            "embedding.norm.gamma",
            BLOOM_BLOCK + "attention.dense1.weight",
        ),
        refuses=_ONLY_TIED,
        more={"config_of": _measured_bloom},
    ),
    Net(
        key="wizardcoder",
        title="WizardCoder (GPTBigCode)",
        called="WizardCoder of MindFormers",
        target=GPTBIGCODE,
        names=_WIZARDCODER_NAMES,
        own=(_THREE + _TURNED).under(GPT_BLOCK).given(few="head_dim"),
        before=tied("transformer.wte.weight", _HEAD, _WIZARDCODER_NAMES),
        rules=(
            *united(GPT_BLOCK + _PARTS, HF_BLOCK + "attn.c_attn"),
            *_transposed(GPT_BLOCK, _GPT_LINEAR),
            *_MASKS,
        ),
        found_by=(
            "head.head_weight",
            GPT_BLOCK + "attention.dense1.weight",
            GPT_BLOCK + "output.mapping.weight",
        ),
        refuses=(
            Refusal(
                "multi_query == False",
                "the net has one head of keys and values, and this model one for each query",
            ),
        ),
    ),
)
