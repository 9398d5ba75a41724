"""Baichuan: its attention is one fused projection; the second generation normalises its head.

Source: the modeling code published with baichuan-inc/Baichuan-7B and Baichuan2-7B.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families import llama, llama_like
from streamconv.plans.recipe import Refusal, Remark, Rule, same
from streamconv.plans.table import table

_SECOND = "architectures and architectures[0] == 'BaichuanForCausalLM'"
"""Of the config, only the spelling of the class shows that the second generation normalises its head."""
_PROJECTIONS = table("""
    model.layers.{i}.self_attn.W_pack.weight [3 * hidden, hidden]
    model.layers.{i}.self_attn.o_proj.weight [hidden, hidden]
""")
BAICHUAN = replace(
    llama.decoder("baichuan", "Baichuan", "Baichuan", _PROJECTIONS + llama_like.FREQUENCY_LINE,
                  head=llama.HEAD, norm_head=f"bool({_SECOND})"),
    # The way back makes the first, which normalises nothing: what was folded stays folded.
    classes=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
)  # fmt: skip

BAICHUAN_LLAMA = llama_like.llamafied(
    BAICHUAN,
    "Baichuan-7B, Baichuan2-7B -> Llama, the normalised head folded",
    (
        *llama_like.COMMON,
        *same(llama_like.NORMS, llama_like.LAYER + "self_attn.o_proj.weight"),
        Rule(
            llama_like.LAYER + "self_attn.W_pack.weight",
            llama_like.QKV + ".weight",
            "q, k, v = chunk(x, 0, 3)",
        ),
        llama_like.FREQUENCIES,
        Rule("lm_head.weight", "lm_head.weight", "x = row_normalize(x, 1, 1e-12)", when="norm_head"),
        Rule("lm_head.weight", "lm_head.weight", when="not norm_head"),
    ),
    refuses=(
        Refusal(
            "not max_position_embeddings",
            "it has no rotation but ALiBi, as the 13B models do, which Llama does not have",
        ),
    ),
    refuses_back=(llama_like.NO_BIAS, llama_like.NO_GROUPS),
    remarks=(
        Remark(
            _SECOND,
            "the rows of the output layer are normalised once and for all, as the model does at run time; their "
            "lengths are lost",
        ),
    ),
)

RECIPES = (BAICHUAN_LLAMA,)
