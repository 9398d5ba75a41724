"""One module a family of models: its tables, its rules to others, its config, its tokenizer.

The only room that knows a model's name. Nothing below imports it: `register` hands its recipes to the plans, and to
the readers what identifies its checkpoints.
"""

from __future__ import annotations

from streamconv.families import (
    baichuan,
    bloom,
    chatglm,
    cogvideox,
    cogvideox_files,
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
from streamconv.plans import registry
from streamconv.plans.recipe import Recipe
from streamconv.readers import opening
from streamconv.readers.opening import Identify

_FAMILIES = (
    chatglm, baichuan, qwen, internlm, yi, mixtral, qwen_moe, olmoe, deepseek, gpt2, bloom, neox, falcon, meta_llama,
    torchtitan, qwen_vl, whisper, cogvlm, cogvideox, quantised, mindformers,
)  # fmt: skip
RECIPES: tuple[Recipe, ...] = tuple(recipe for family in _FAMILIES for recipe in family.RECIPES)
"""In the order in which `streamconv recipes` lists them."""

IDENTITIES: tuple[Identify, ...] = (cogvideox_files.identified, cogvlm.identified, meta_llama.identified)
"""Of families whose checkpoints come without a `config.json`."""


def register() -> None:
    """Make these families known to readers and plans; again does no harm."""
    opening.register(*IDENTITIES)
    registry.register(*RECIPES)
