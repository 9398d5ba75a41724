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

_FAMILIES = (llama, glm, gpt, experts, deepseek, whisper, telechat, cogvlm, qwenvl, swin, mcore)
NETS: tuple[Net, ...] = tuple(net for family in _FAMILIES for net in family.NETS)
RECIPES: tuple[Recipe, ...] = (*(net.recipe for net in NETS), *lora.RECIPES)
"""In the order in which `streamconv recipes` lists them."""
