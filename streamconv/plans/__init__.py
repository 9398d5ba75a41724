"""From a checkpoint and what is wanted of it to a checked plan, and back from its JSON form."""

from __future__ import annotations

from streamconv.plans.adapters.adapter import Adapter
from streamconv.plans.codec import fingerprint, from_json, to_json
from streamconv.plans.compile import compile_plan
from streamconv.plans.edits import Edits, parse_edits, read_edits
from streamconv.plans.plan import Plan, PlannedTensor
from streamconv.plans.recipe import Recipe
from streamconv.plans.recipe_file import holds_edits
from streamconv.plans.registry import all_recipes, named
from streamconv.plans.vocabulary import Vocabulary
from streamconv.plans.wanted import Wanted, format_of, resolved

__all__ = [
    "Adapter", "Edits", "Plan", "PlannedTensor", "Recipe", "Vocabulary", "Wanted", "all_recipes", "compile_plan", "fingerprint", "format_of", "from_json", "holds_edits", "named",
    "parse_edits", "read_edits", "resolved", "to_json",
]  # fmt: skip
