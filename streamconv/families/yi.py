"""Yi (first releases): a Llama with other names of its norms.

Source: the modeling code published with 01-ai/Yi-6B.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families import llama, llama_like
from streamconv.plans.recipe import rename, same

_PLAIN = llama.decoder("yi", "Yi (first releases)", "Yi", llama.QKV + llama.OUTPUT, head=llama.HEAD)
YI = replace(
    _PLAIN,
    model_types=("Yi", "yi"),
    lines=_PLAIN.lines.renamed(
        {
            "*": "*",
            llama_like.LAYER + "input_layernorm.": llama_like.LAYER + "ln1.",
            llama_like.LAYER + "post_attention_layernorm.": llama_like.LAYER + "ln2.",
        }
    ),
)

RECIPES = (
    llama_like.llamafied(
        YI,
        "Yi (first releases) -> Llama, renamed",
        (
            *llama_like.COMMON,
            *same("lm_head.weight", llama_like.LAYER + "self_attn.{q,k,v,o}_proj.weight"),
            *rename({llama_like.LAYER + "{ln1,ln2}.weight": llama_like.NORMS}),
        ),
        refuses_back=(llama_like.NO_BIAS,),
    ),
)
