"""Our recipes, one module a family."""

from __future__ import annotations

from streamconv.plans.recipe import Recipe
from streamconv.plans.recipes import chatglm, cogvideox, cogvlm, experts, fused, llamafy, quantised

RECIPES: tuple[Recipe, ...] = (
    *chatglm.RECIPES,
    *llamafy.RECIPES,
    *experts.RECIPES,
    *fused.RECIPES,
    *cogvlm.RECIPES,
    *cogvideox.RECIPES,
    *quantised.RECIPES,
)
"""In the order in which `streamconv recipes` lists them."""
