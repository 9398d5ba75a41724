"""From a checkpoint and what is wanted of it to a checked plan, and back from its JSON form."""

from __future__ import annotations

from streamconv.plans.codec import from_json, to_json
from streamconv.plans.compile import Wanted, compile_plan
from streamconv.plans.edits import Edits, parse_edits, read_edits
from streamconv.plans.plan import Plan, PlannedTensor

__all__ = [
    "Edits", "Plan", "PlannedTensor", "Wanted", "compile_plan", "from_json", "parse_edits", "read_edits", "to_json",
]  # fmt: skip
