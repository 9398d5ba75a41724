"""MindFormers: its nets beside the models of Hugging Face that they are, one module a family."""

from __future__ import annotations

from streamconv.families.mindformers import (
    cogvlm,
    experts,
    glm,
    gpt,
    llama,
    lora,
    mcore,
    qwenvl,
    swin,
    telechat,
    whisper,
)
from streamconv.plans.recipe import Recipe

RECIPES: tuple[Recipe, ...] = (
    *llama.RECIPES,
    *glm.RECIPES,
    *gpt.RECIPES,
    *experts.RECIPES,
    *whisper.RECIPES,
    *telechat.RECIPES,
    *cogvlm.RECIPES,
    *qwenvl.RECIPES,
    *swin.RECIPES,
    *mcore.RECIPES,
    *lora.RECIPES,
)
"""In the order in which `streamconv recipes` lists them."""
