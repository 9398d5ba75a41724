"""Our recipes, one module a family."""

from __future__ import annotations

from streamconv.plans.recipe import Recipe
from streamconv.plans.recipes import chatglm, cogvideox, cogvlm, llamafy, quantised

RECIPES: tuple[Recipe, ...] = (
    *chatglm.RECIPES,
    *llamafy.RECIPES,
    *cogvlm.RECIPES,
    *cogvideox.RECIPES,
    *quantised.RECIPES,
)
"""In the order in which `streamconv recipes` lists them."""
