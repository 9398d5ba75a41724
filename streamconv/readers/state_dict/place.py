"""A place in what a checkpoint holds: a container and the keys that lead to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.errors import listed
from streamconv.ops import Expression
from streamconv.readers.pickle import describe
from streamconv.readers.tree import children, text

_MAX_LISTED = 20  # places in one message
MAX_NAME = 4096  # characters; a tree of long keys would otherwise make far more text than the file holds


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A container in the file and the keys that lead to it."""

    keys: tuple[str, ...]
    value: object

    @property
    def name(self) -> str:
        """The keys with dots between them."""
        return ".".join(self.keys)


def at(content: object, keys: tuple[str, ...]) -> Place:
    """The place that keys lead to."""
    value = content
    for wanted in keys:
        value = next(child for key, child in children(value) if text(key) == wanted)
    return Place(keys, value)


def shape_of(leaf: object) -> object:
    """The shape of a leaf; None for what is no tensor that can be read."""
    return leaf.spec.shape if isinstance(leaf, Expression) else None


def listed_places(names: Sequence[str | Place]) -> str:
    """Names for a message, the first of them where there are many."""
    texts = (name if isinstance(name, str) else name.name for name in names)
    return listed((describe(word, quote="") or "(the top)" for word in texts), _MAX_LISTED)
