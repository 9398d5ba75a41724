"""MindFormers: its nets beside the models of Hugging Face that they are, one module a family, one record a net."""

from __future__ import annotations

from streamconv.families.mindformers import (
    cogvlm,
    deepseek,
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
from streamconv.families.mindformers.net import Net
from streamconv.plans.recipe import Recipe

NETS: tuple[Net, ...] = (
    *llama.NETS,
    *glm.NETS,
    *gpt.NETS,
    *experts.NETS,
    *deepseek.NETS,
    *whisper.NETS,
    *telechat.NETS,
    *cogvlm.NETS,
    *qwenvl.NETS,
    *swin.NETS,
    *mcore.NETS,
)
RECIPES: tuple[Recipe, ...] = (*(net.recipe for net in NETS), *lora.RECIPES)
"""In the order in which `streamconv recipes` lists them."""
