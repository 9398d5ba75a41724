"""The recipes of all families, which `families` loads when the first of them is wanted."""

from __future__ import annotations

from streamconv.families import (
    baichuan,
    bloom,
    chatglm,
    cogvideox,
    cogvlm,
    deepseek,
    falcon,
    gpt2,
    internlm,
    meta_llama,
    mindformers,
    mixtral,
    neox,
    olmoe,
    quantised,
    qwen,
    qwen_moe,
    qwen_vl,
    torchtitan,
    whisper,
    yi,
)
from streamconv.plans.recipe import Recipe

_FAMILIES = (
    chatglm, baichuan, qwen, internlm, yi, mixtral, qwen_moe, olmoe, deepseek, gpt2, bloom, neox, falcon, meta_llama,
    torchtitan, qwen_vl, whisper, cogvlm, cogvideox, quantised, mindformers,
)  # fmt: skip
RECIPES: tuple[Recipe, ...] = tuple(recipe for family in _FAMILIES for recipe in family.RECIPES)
"""In the order in which `streamconv recipes` lists them."""
