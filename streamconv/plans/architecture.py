"""An architecture: what its config is called, which sizes it gives, and the table of a model's tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import Problem, UsageError, about
from streamconv.plans import formula
from streamconv.plans.patterns import Pattern
from streamconv.plans.table import MOST_TENSORS, Declared, Sizes, Table

Config = Mapping[str, Any]

_KEY = re.compile(r"(\w+)(?: or .*)?$")


@dataclass(frozen=True)
class Architecture:
    """A model family's own naming of its tensors.

    Attributes:
        name: as `--to-arch` takes it (`llama`).
        title: as people write it (`Llama`).
        sizes: name -> formula over the config's keys, and over the sizes before it.
        lines: the table.
        counts: field -> formula of how many there are.
        model_types: what `model_type` of its config can be.
        classes: what `architectures` (or diffusers' `_class_name`) of its config can hold.
        vocabulary: the config's key for the rows of the embedding, or None.
        beyond: patterns of names that such a model has besides the table's; nothing is said of their shapes.
        only_if: a formula over the config; where it is false, the config is of another naming of the family.
    """

    name: str
    title: str
    sizes: Mapping[str, str]
    lines: Table
    counts: Mapping[str, str] = field(default_factory=lambda: {"i": "layers"})
    model_types: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    vocabulary: str | None = "vocab_size"
    beyond: tuple[str, ...] = ()
    only_if: str = ""

    def check(self) -> None:
        """See that the table and the counts use names of sizes and of fields alone, and all formulas known functions.

        Raises:
            UsageError: one uses another.
        """
        for size in self.sizes.values():
            formula.check(size, formula.names_in(size))
        for line in self.lines:
            with about(f"'{line}' of {self.title}"):
                line.check(self.sizes)
        used = frozenset().union(*(line.name.fields for line in self.lines))
        for name in sorted(used & self.counts.keys()):
            with about(f"the count of {{{name}}} of {self.title}"):
                formula.check(self.counts[name], self.sizes)

    def sizes_of(self, config: Config) -> dict[str, Any]:
        """The sizes that a config gives.

        Raises:
            UsageError: every key that is missing, together.
        """
        sizes: dict[str, Any] = {}
        problems: list[Problem] = []
        for name, text in self.sizes.items():
            try:
                sizes[name] = formula.evaluate(text, {**config, **sizes})
            except UsageError as error:
                problems += error.problems
                continue
            if sizes[name] is None:
                problems.append(Problem(f"the config has no {text}, which is the {name} of {self.title}"))
        if problems:
            raise UsageError(f"the config is not that of {self.title}", problems=problems)
        return sizes

    @property
    def shown(self) -> frozenset[str]:
        """The sizes that are those of a side of some tensor, or how many there are of something: tensors tell them."""
        sides = (side for line in self.lines for side in formula.elements(line.dimensions))
        return frozenset(self.sizes.keys() & {*sides, *self.counts.values()})

    @property
    def label(self) -> dict[str, Any]:
        """What a config says of whose it is."""
        return {"architectures": [self.classes[0]], "model_type": self.model_types[0]}

    def stated(self, sizes: Sizes) -> dict[str, Any]:
        """What a config says of those of these sizes whose formula is a key, or one with something in its place."""
        keys = {name: _KEY.match(text) for name, text in self.sizes.items() if name in sizes}
        return {key[1]: sizes[name] for name, key in keys.items() if key is not None}

    def tensors(self, sizes: Sizes) -> dict[str, Declared]:
        """Every tensor of a model of these sizes, by name.

        Raises:
            UsageError: the table asks for a size that there is not.
        """
        entries = (entry for line in self.lines for entry in line.declared(sizes, self.counts))
        found = dict(itertools.islice(entries, MOST_TENSORS + 1))
        if len(found) > MOST_TENSORS:
            raise UsageError(f"by its config, the model has more than {MOST_TENSORS} tensors")
        return found

    def has_beyond(self, name: str) -> bool:
        """Whether a name is one of those besides the table's."""
        return any(Pattern(text).match(name) is not None for text in self.beyond)

    def is_of(self, config: Config) -> bool:
        """Whether a config says that it is of this architecture."""
        model_type, classes = config.get("model_type"), config.get("architectures") or ()
        if isinstance(config.get("_class_name"), str):  # diffusers' spelling
            classes = (config["_class_name"],)
        if self.only_if and not formula.evaluate(self.only_if, config):
            return False
        return model_type in self.model_types or (
            model_type is None and any(name in self.classes for name in classes)
        )
