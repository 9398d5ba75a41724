"""What a user should know about a state dict that was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from streamconv.readers import parts
from streamconv.readers.pickle import Record, describe
from streamconv.readers.state_dict.place import Place, listed_places, shape_of
from streamconv.readers.tree import is_module


def on_choice(place: Place, left_out: Sequence[str], averaged: Sequence[str]) -> Iterator[str]:
    """What a user should know about the choice."""
    if isinstance(place.value, Record) and is_module(place.value):
        yield f"it is a pickled {place.value.cls}; names are those of its state_dict(), without its hooks"
    here = describe(place.name) if place.keys else "the top"
    if left_out:
        yield f"took what is at {here} for the model, and left out the tensors at {listed_places(left_out)}"
    if place.name in averaged:
        yield f"the weights at {here} are averaged ones; --root takes others"
    elif averaged:
        yield f"averaged weights are at {listed_places(averaged)}: --ema takes them"


def on_twins(leaves: Mapping[str, object]) -> Iterator[str]:
    """Prefixes in one state dict under which the same modules are, as a teacher and its student in one module are."""
    groups: dict[str, dict[str, object]] = {}
    prefix = ""
    while leaves and len(groups) < 2:
        groups = {}
        for name, leaf in leaves.items():
            word, _, rest = name[len(prefix) :].partition(".")
            groups.setdefault(word, {})[rest] = shape_of(leaf)
        if len(groups) == 1:
            (word,) = groups
            prefix += f"{word}."
            if not all(name.startswith(prefix) for name in leaves):
                return
    alike: dict[tuple[int, frozenset[tuple[str, object]]], list[str]] = {}
    for word, inner in groups.items():
        of_modules = any("." in rest for rest in inner)
        if of_modules and not word[-1:].isdecimal() and not parts.is_averaged(word):
            alike.setdefault((len(inner), frozenset(inner.items())), []).append(f"{prefix}{word}.")
    for prefixes in alike.values():
        if len(prefixes) > 1:
            yield (
                f"the same names are below {listed_places(prefixes)}: all are taken; "
                f"--only {describe(prefixes[0] + '*')} takes one of them"
            )
