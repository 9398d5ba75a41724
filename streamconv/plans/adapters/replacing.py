"""Tensors that an adapter has as a whole, put in the place of the base's.

They have the shapes of those. Only a vocabulary may have another length, all that has a row for each token alike: the config
then says so. What the base lacks is taken where it is a part of its own, such as the head of a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, renamed
from streamconv.plans.findings import grouped
from streamconv.plans.loading import is_vocabulary
from streamconv.readers.checkpoint import Component

_BASE = "is it the base that the adapter was trained on?"


def replaced(component: Component, taken: Mapping[str, Expression], path: str) -> tuple[Component, list[str]]:
    """A component with tensors of an adapter, by their names in the base; and the names that the base lacks.

    Raises:
        PlanError: they do not fit; all of them at once.
    """
    base = component.tensors
    modules = {name.rpartition(".")[0] for name in base}
    parts = {name.partition(".")[0] for name in base}
    added = [name for name in taken if name not in base]
    problems = [
        Problem("the adapter has it, and the base has not", file=path, tensor=name, hint=_BASE)
        for name in added
        if name.rpartition(".")[0] in modules or name.partition(".")[0] in parts
    ]
    made = {**base, **{name: renamed(tensor, name) for name, tensor in taken.items()}}
    longer: dict[int, int] = {}
    for name, tensor in taken.items():
        after, before = tensor.spec.shape, base[name].spec.shape if name in base else tensor.spec.shape
        if after == before:
            continue
        if is_vocabulary(name) and len(before) == len(after) == 2 and before[1] == after[1]:
            longer[before[0]] = after[0]
            continue
        problems.append(
            Problem(f"the adapter has it as {list(after)}, and the base as {list(before)}", file=path, tensor=name, hint=_BASE)
        )  # fmt: skip
    config = component.config
    for before_rows, after_rows in longer.items():
        problems += (
            Problem(
                f"it has {each.spec.shape[0]} rows, and the adapter's vocabulary {after_rows}", file=path, tensor=name,
                hint=f"give a base whose embeddings were resized to {after_rows} rows",
            )
            for name, each in made.items()
            if is_vocabulary(f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else name) and each.spec.shape[0] != after_rows
        )  # fmt: skip
        resized = _with_vocabulary(config or {}, before_rows, after_rows)
        if config is not None and resized == config:
            problems.append(
                Problem(f"its config has no vocab_size of {before_rows}, which should become {after_rows}", file=path)
            )  # fmt: skip
        config = None if config is None else resized
    if problems:
        raise PlanError("what the adapter replaces does not fit the base", problems=grouped(problems))
    return replace(component, tensors=made, config=config), added


def _with_vocabulary(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """A config with another length of the vocabulary, also where it says it of its parts."""
    return {
        key: _with_vocabulary(value, before, after)
        if isinstance(value, Mapping)
        else after
        if key.endswith("vocab_size") and value == before
        else value
        for key, value in config.items()
    }
