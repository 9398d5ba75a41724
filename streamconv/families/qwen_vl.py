"""Qwen-VL's language part as Llama or Qwen2, its vision part by itself; Qwen2-VL under the names of transformers 5.

Source: Qwen/Qwen-VL: modeling_qwen.py, visual.py; huggingface/transformers 5.23.0: models/qwen2_vl,
conversion_mapping.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.llama_like import QWEN_VL
from streamconv.families.llamafy import QWEN_LLAMA, QWEN_QWEN2
from streamconv.plans.recipe import Recipe, Rule, drop

_VISION = "transformer.visual.*"


def _language(recipe: Recipe, name: str) -> Recipe:
    return replace(
        recipe,
        name=name,
        source=QWEN_VL,
        title=recipe.title.replace("Qwen (first generation)", "Qwen-VL, its language part,"),
        rules=(*recipe.rules, drop(_VISION, "the vision part; `qwenvl-vision` takes it alone")),
        one_way="the vision part is left out",
        found_by=("transformer.visual.proj",),
    )


QWENVL_VISION = Recipe(
    name="qwenvl-vision",
    title="Qwen-VL, its vision part alone",
    source=None,
    target=None,
    rules=(
        Rule(_VISION, "*"),
        drop("*", "the language part; `qwenvl-llama` and `qwenvl-qwen2` take it"),
    ),
    config=lambda config: {"model_type": "qwen_vl_vision", **(config.get("visual") or {})},
    one_way="the language part is left out",
    found_by=("transformer.visual.proj",),
)

QWEN2VL_V5 = Recipe(
    name="qwen2vl-v5",
    title="Qwen2-VL, Qwen2.5-VL: names of transformers 4 -> names of transformers 5",
    source=None,
    target=None,
    rules=(
        Rule("visual.*", "model.visual.*"),
        Rule("model.*", "model.language_model.*"),
        Rule("lm_head.weight", "lm_head.weight"),
    ),
    found_by=("visual.blocks.{i}.attn.qkv.weight", "model.embed_tokens.weight"),
)

RECIPES = (
    _language(QWEN_LLAMA, "qwenvl-llama"),
    _language(QWEN_QWEN2, "qwenvl-qwen2"),
    QWENVL_VISION,
    QWEN2VL_V5,
)
