"""A base whose head is its embedding, where an adapter changes one of the two: they are two tensors then.

The head is written with its own values, and the config says that it is not the embedding. That is what the model computed
in training; merging it in peft changes both, of which peft warns (huggingface/peft 0.21: tuners/tuners_utils.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import PlanError
from streamconv.ops import renamed
from streamconv.plans import registry
from streamconv.plans.findings import Findings
from streamconv.plans.loading import said_of_ties, with_tie
from streamconv.plans.roles import Role, having
from streamconv.readers.checkpoint import Component


def untied(component: Component, changed: Collection[str], findings: Findings) -> Component:
    """A component as two tensors where its head is its embedding, and one of these is among what is changed.

    Raises:
        PlanError: what the head is called is not known.
    """
    config, names = component.config or {}, component.tensors
    heads, embeddings = having(Role.HEAD, changed), having(Role.EMBEDDING, changed)
    said = said_of_ties(config)
    there = having(Role.HEAD, names)
    is_tied = True in said if there or said else not said and registry.has_head(config)
    if not is_tied:
        return component
    if not (heads or embeddings):
        _require_known(changed, component)
        return component
    tensors = dict(names)
    if not there:
        known = sorted(having(Role.EMBEDDING, names), key=len)
        if not known:
            return component
        embedding = embeddings[0] if embeddings else known[0]
        head = heads[0] if heads else registry.head_of(embedding, config)
        if head is None:
            raise _unknown(embedding)
        tensors[head] = renamed(names[embedding], head)
        findings.notes.append(
            f"the head of the base is its embedding, and the adapter changes {' and '.join([*heads, *embeddings])}: "
            f"{head} is written as a tensor of its own, and tie_word_embeddings becomes false"
        )
    return replace(component, tensors=tensors, config=with_tie(config, tied=False))


def _require_known(changed: Collection[str], component: Component) -> None:
    """Refuse what may be an embedding that is the head, by its rows, where its name does not say so."""
    sizes = set(_vocabularies(component.config or {}))
    for name in changed:
        tensor = component.tensors.get(name)
        if tensor is not None and len(tensor.spec.shape) == 2 and tensor.spec.shape[0] in sizes:
            raise _unknown(name)


def _vocabularies(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if key == "vocab_size" and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping):
            yield from _vocabularies(value)


def _unknown(name: str) -> PlanError:
    return PlanError(
        "the adapter changes it, it is the head of the model too, and what that is called is not known",
        tensor=name,
        hint="save the base with a head of its own, tie_word_embeddings false in its config, and merge into that",
    )
