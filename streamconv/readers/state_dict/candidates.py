"""The places of a checkpoint that hold tensors, and what each of them is: rules 1 to 3 of the package."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.readers import parts
from streamconv.readers.state_dict.place import MAX_NAME, Place
from streamconv.readers.tree import children, is_module, is_tensor, text

# Ranks of state dicts: 0 is what lies under the key of a model.
CLEAR, _LIKELY, _UNCLEAR, COUNTERS = 1, 2, 3, 4

_WEIGHTS = {"weight", "bias"}

_Inside = tuple[str, object, str | None]
"""A key, what is at it, and what that is where it is the training program's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A place that holds tensors.

    Attributes:
        place: which.
        own: what it is, where it is the training program's own.
        averaged: whether its weights are averaged ones.
        known: the keys down to that of a model, where there is one.
        rank: what goes first, from 0.
    """

    place: Place
    own: str | None
    averaged: bool
    known: tuple[str, ...] | None
    rank: int


def candidates_in(content: object, holding: frozenset[int]) -> list[Candidate]:
    """The places nearest the top that hold tensors, breadth first, and what each of them is."""
    result: list[Candidate] = []
    queue = deque([(Place((), content), parts.own_state("", content), False)])
    seen = {id(content)}
    while queue:
        place, own, averaged = queue.popleft()
        averaged = averaged or parts.average_prefix(place.value) is not None
        here, inside = _split(place, holding, own)
        inner = parts.averages_inside(place.value)
        if here is not None:
            known = next(
                (place.keys[: at + 1] for at, key in enumerate(place.keys) if parts.is_model(key)), None
            )
            result.append(Candidate(place, own, averaged, known, 0 if known else here))
        for name, child, what in inside:
            following = Place((*place.keys, name), child)
            if id(child) not in seen and len(following.name) <= MAX_NAME:
                seen.add(id(child))
                queue.append((following, what, averaged or name in inner or parts.is_averaged(name)))
    return result


def _split(place: Place, holding: frozenset[int], own: str | None) -> tuple[int | None, list[_Inside]]:
    """The rank of a place as a state dict, None where it is none; and what inside it may be one itself."""
    if is_module(place.value) or own == parts.OPTIMIZER or parts.average_prefix(place.value) is not None:
        return CLEAR, []
    members = [(text(key), child) for key, child in children(place.value)]
    nested: list[_Inside] = [
        (name, child, own or parts.own_state(name, child)) for name, child in members if id(child) in holding
    ]
    if own is not None:
        return (_UNCLEAR if any(is_tensor(child) for _, child in members) else None), nested
    names = [name for name, child in members if is_tensor(child) and not parts.is_beside(name, child)]
    apart: list[_Inside] = []
    inner: list[_Inside] = []
    for each in nested:
        (apart if each[2] or parts.is_averaged(each[0]) else inner).append(each)
    ranks = [0 if parts.is_model(name) else likeness(child) for name, child, _ in inner]
    best, here = min(ranks, default=_UNCLEAR), _likeness_of(names)
    averaged = (likeness(child) for name, child, what in apart if what is None)
    # Weights would have the names that their averages have.
    loose = not names or min(averaged, default=here) < here
    if loose and not inner and any(is_tensor(child) for _, child in members):
        return COUNTERS, apart
    if not names or (best <= CLEAR < here) or (best == 0 and not _are_weights(names)):
        return None, nested  # what is beside the key of a model, or beside clear names, is loose
    if best < here or best == 0:
        return best, nested  # neither is clearly a part of the other
    return here, apart


def likeness(value: object) -> int:
    """The rank of the tensors directly in a value."""
    return _likeness_of([key for key, child in children(value) if isinstance(key, str) and is_tensor(child)])


def _likeness_of(names: Sequence[str]) -> int:
    """How much names are those of a module's tensors."""
    if any("." in name for name in names):
        return CLEAR
    return _LIKELY if _WEIGHTS & {*names} else _UNCLEAR


def _are_weights(names: Sequence[str]) -> bool:
    """Whether some of names are those of parameters, whatever module has them."""
    return any(name.rpartition(".")[2] in _WEIGHTS for name in names)
