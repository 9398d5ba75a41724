"""Yi (first releases): a Llama with other names of its norms.

Source: the modeling code published with 01-ai/Yi-6B.
"""

from __future__ import annotations

from streamconv.families import llama
from streamconv.families.llama import LLAMA, SIZES
from streamconv.families.llama_like import (
    COMMON,
    LAYER,
    NO_BIAS,
    NORMS,
    NOT_TIED,
    llama_config,
    own_config,
    sentencepiece_files,
)
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, rename, same

YI = Architecture(
    name="yi",
    title="Yi (first releases)",
    model_types=("Yi", "yi"),
    classes=("YiForCausalLM",),
    sizes=SIZES,
    lines=(
        llama.FIRST + llama.QKV + llama.OUTPUT + llama.BETWEEN + llama.FEED_FORWARD + llama.NORM + llama.HEAD
    ).renamed(
        {
            "model.": "model.",
            "lm_head.": "lm_head.",
            LAYER + "input_layernorm.": LAYER + "ln1.",
            LAYER + "post_attention_layernorm.": LAYER + "ln2.",
        }
    ),
)

YI_LLAMA = Recipe(
    name="yi-llama",
    title="Yi (first releases) -> Llama, renamed",
    source=YI,
    target=LLAMA,
    rules=(
        *COMMON,
        *same("lm_head.weight", LAYER + "self_attn.{q,k,v,o}_proj.weight"),
        *rename({LAYER + "{ln1,ln2}.weight": NORMS}),
    ),
    config=llama_config,
    config_back=lambda config: own_config(config, "Yi", "YiForCausalLM"),
    refuses_back=(NOT_TIED, NO_BIAS),
    files=sentencepiece_files,
)

RECIPES = (YI_LLAMA,)
