"""Our recipes, one module a family."""

from __future__ import annotations

from streamconv.plans.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
"""In the order in which `streamconv recipes` lists them."""
