"""Baichuan: its attention is one fused projection; the second generation normalises its head.

Source: the modeling code published with baichuan-inc/Baichuan-7B and Baichuan2-7B.
"""

from __future__ import annotations

from streamconv.families import llama
from streamconv.families.llama import LLAMA, SIZES
from streamconv.families.llama_like import (
    COMMON,
    FREQUENCIES,
    LAYER,
    NO_BIAS,
    NO_GROUPS,
    NORMS,
    NOT_TIED,
    QKV,
    llama_config,
    own_config,
    sentencepiece_files,
)
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule, same
from streamconv.plans.table import table

BAICHUAN = Architecture(
    name="baichuan",
    title="Baichuan",
    model_types=("baichuan",),
    classes=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
    sizes={
        **SIZES,
        # Of the config, only the spelling of the class shows that the second generation normalises its head.
        "norm_head": "bool(architectures and architectures[0] == 'BaichuanForCausalLM')",
    },
    lines=llama.FIRST
    + table("""
        model.layers.{i}.self_attn.W_pack.weight [3 * hidden, hidden]
        model.layers.{i}.self_attn.o_proj.weight [hidden, hidden]
        ?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]
    """)
    + llama.BETWEEN
    + llama.FEED_FORWARD
    + llama.NORM
    + llama.HEAD,
)

BAICHUAN_LLAMA = Recipe(
    name="baichuan-llama",
    title="Baichuan-7B, Baichuan2-7B -> Llama, the normalised head folded",
    source=BAICHUAN,
    target=LLAMA,
    rules=(
        *COMMON,
        *same(NORMS, LAYER + "self_attn.o_proj.weight"),
        Rule(LAYER + "self_attn.W_pack.weight", QKV + ".weight", "q, k, v = chunk(x, 0, 3)"),
        FREQUENCIES,
        Rule("lm_head.weight", "lm_head.weight", "x = row_normalize(x, 1, 1e-12)", when="norm_head"),
        Rule("lm_head.weight", "lm_head.weight", when="not norm_head"),
    ),
    config=llama_config,
    # The first generation's form, which normalises nothing: what was folded stays folded.
    config_back=lambda config: own_config(config, "baichuan", "BaiChuanForCausalLM"),
    refuses=(
        Refusal(
            "not max_position_embeddings",
            "it has no rotation but ALiBi, as the 13B models do, which Llama does not have",
        ),
    ),
    refuses_back=(NOT_TIED, NO_BIAS, NO_GROUPS),
    remarks=(
        Remark(
            "architectures and architectures[0] == 'BaichuanForCausalLM'",
            "the rows of the output layer are normalised once and for all, as the model does at run time; their "
            "lengths are lost",
        ),
    ),
    files=sentencepiece_files,
)

RECIPES = (BAICHUAN_LLAMA,)
