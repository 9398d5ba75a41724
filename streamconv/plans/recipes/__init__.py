"""Our recipes, one module a family."""

from __future__ import annotations

from streamconv.plans.recipe import Recipe
from streamconv.plans.recipes import (
    chatglm,
    cogvideox,
    cogvlm,
    experts,
    fused,
    llamafy,
    meta_llama,
    mindformers_experts,
    mindformers_glm,
    mindformers_gpt,
    mindformers_llama,
    mindformers_lora,
    mindformers_mcore,
    mindformers_telechat,
    mindformers_vision,
    mindformers_whisper,
    quantised,
    qwen_vl,
    torchtitan,
    whisper,
)

RECIPES: tuple[Recipe, ...] = (
    *chatglm.RECIPES,
    *llamafy.RECIPES,
    *experts.RECIPES,
    *fused.RECIPES,
    *meta_llama.RECIPES,
    *torchtitan.RECIPES,
    *qwen_vl.RECIPES,
    *whisper.RECIPES,
    *cogvlm.RECIPES,
    *cogvideox.RECIPES,
    *quantised.RECIPES,
    *mindformers_llama.RECIPES,
    *mindformers_glm.RECIPES,
    *mindformers_gpt.RECIPES,
    *mindformers_experts.RECIPES,
    *mindformers_whisper.RECIPES,
    *mindformers_telechat.RECIPES,
    *mindformers_vision.RECIPES,
    *mindformers_mcore.RECIPES,
    *mindformers_lora.RECIPES,
)
"""In the order in which `streamconv recipes` lists them."""
