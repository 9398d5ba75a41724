"""Yi (first releases): a Llama with other names of its norms.

Source: the modeling code published with 01-ai/Yi-6B.
"""

from __future__ import annotations

from streamconv.families import llama
from streamconv.families.llama import LLAMA, SIZES
from streamconv.families.llama_like import (
    HEAD,
    LAYER,
    MLP,
    NO_BIAS,
    NOT_TIED,
    OUTSIDE,
    llama_config,
    own_config,
    same,
    sentencepiece_files,
)
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, rename

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
        *OUTSIDE,
        *MLP,
        *HEAD,
        *same(*(LAYER + f"self_attn.{part}_proj.weight" for part in "qkvo")),
        *rename(
            {
                LAYER + "ln1.weight": LAYER + "input_layernorm.weight",
                LAYER + "ln2.weight": LAYER + "post_attention_layernorm.weight",
            }
        ),
    ),
    config=llama_config,
    config_back=lambda config: own_config(config, "Yi", "YiForCausalLM"),
    refuses_back=(NOT_TIED, NO_BIAS),
    files=sentencepiece_files,
)

RECIPES = (YI_LLAMA,)
