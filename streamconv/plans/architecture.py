"""An architecture as a table: which tensors, of which shapes, a model of a given config has.

One line a tensor, in the words of recipes:

    model.layers.{i}.self_attn.q_proj.bias [heads * head_dim] if attention_bias

Fields count: `{i}` goes from 0 to the size that `counts` names for it. Sizes are formulas over the keys of
the model's `config.json`. A line that begins with `?` may be missing.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streamconv.errors import Problem, UsageError
from streamconv.plans import formula
from streamconv.plans.patterns import Pattern
from streamconv.tensor import Shape

Config = Mapping[str, Any]
Sizes = Mapping[str, Any]

# What a config may ask for. No model has as many layers, experts or tensors; a damaged config may say any number.
_MOST_OF_A_KIND = 1 << 16
_MOST_TENSORS = 1 << 21

_HEAD = re.compile(r"(?P<optional>\?)?(?P<name>\S+) (?=\[)")
_TAIL = re.compile(r"(?: (?P<dtype>[A-Z]\w+))?(?: if (?P<when>.*))?")


@dataclass(frozen=True, slots=True)
class Declared:
    """One tensor that a model has.

    Attributes:
        shape: what it must be.
        optional: whether checkpoints without it are whole.
        dtype: where the architecture fixes it (packed weights, scales), by name; else None.
    """

    shape: Shape
    optional: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Line:
    """A parsed line of the table (see the module's text).

    Raises:
        UsageError: it is not such a line.
    """

    text: str

    def __post_init__(self) -> None:
        _ = self.name

    @cached_property
    def _parts(self) -> Mapping[str, str | None]:
        head = _HEAD.match(self.text)
        end = _closed(self.text, head.end()) if head else None
        tail = _TAIL.fullmatch(self.text, end) if end else None
        if head is None or tail is None:
            raise UsageError(
                f"'{self.text}' declares no tensor",
                hint="write `name [size, size]`, perhaps with `if formula`",
            )
        return {**head.groupdict(), "shape": self.text[head.end() : end], **tail.groupdict()}

    @cached_property
    def name(self) -> Pattern:
        """The names it declares."""
        return Pattern(self._parts["name"] or "")

    @property
    def dimensions(self) -> str:
        """The formula of its shape, a list."""
        return self._parts["shape"] or ""

    def declared(self, sizes: Sizes, counts: Mapping[str, str]) -> Iterator[tuple[str, Declared]]:
        """Every tensor that the line stands for, by name.

        Raises:
            UsageError: a size in it is not known.
        """
        fields = sorted(self.name.fields)
        when, dimensions = self._parts["when"], self.dimensions
        varies = bool(set(fields) & formula.names_in(dimensions))
        conditional = when is not None and bool(set(fields) & formula.names_in(when))
        if when is not None and not conditional and not formula.evaluate(when, sizes):
            return
        optional, dtype = self._parts["optional"] is not None, self._parts["dtype"]
        same = None if varies else Declared(self._shape(sizes), optional, dtype)
        ranges = [range(_count(each, counts, sizes)) for each in fields]
        if math.prod(map(len, ranges)) > _MOST_TENSORS:
            raise UsageError(f"'{self.text}': more than {_MOST_TENSORS} tensors, by the config")
        for indices in itertools.product(*ranges):
            scope = {**sizes, **dict(zip(fields, indices, strict=True))} if varies or conditional else sizes
            if conditional and not formula.evaluate(when or "", scope):
                continue
            name = self.name.fill({each: str(index) for each, index in zip(fields, indices, strict=True)})
            yield name, same or Declared(self._shape(scope), optional, dtype)

    def _shape(self, sizes: Sizes) -> Shape:
        shape = formula.evaluate(self.dimensions, sizes)
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise UsageError(f"'{self.text}': {shape} is no shape")
        return tuple(shape)


@dataclass(frozen=True)
class Architecture:
    """A model family's own naming of its tensors.

    Attributes:
        name: as `--to-arch` takes it (`llama`).
        title: as people write it (`Llama`).
        model_types: what `model_type` of its config can be.
        classes: what `architectures` (or diffusers' `_class_name`) of its config can hold.
        sizes: name -> formula over the config's keys, and over the sizes before it.
        counts: field -> formula of how many there are.
        lines: the table.
        vocabulary: the config's key for the rows of the embedding, or None.
        beyond: patterns of names that such a model has besides the table's; nothing is said of their shapes.
        only_if: a formula over the config; where it is false, the config is of another naming of the family.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    sizes: Mapping[str, str]
    counts: Mapping[str, str]
    lines: tuple[Line, ...]
    vocabulary: str | None = "vocab_size"
    beyond: tuple[str, ...] = ()
    only_if: str = ""

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

    def tensors(self, sizes: Sizes) -> dict[str, Declared]:
        """Every tensor of a model of these sizes, by name.

        Raises:
            UsageError: the table asks for a size that there is not.
        """
        entries = (entry for line in self.lines for entry in line.declared(sizes, self.counts))
        found = dict(itertools.islice(entries, _MOST_TENSORS + 1))
        if len(found) > _MOST_TENSORS:
            raise UsageError(f"by its config, the model has more than {_MOST_TENSORS} tensors")
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


def _closed(text: str, start: int) -> int | None:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return None


def table(text: str) -> tuple[Line, ...]:
    """The lines of a table; blank ones and those that begin with `#` do not count."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(Line(line) for line in lines if line and not line.startswith("#"))


def _count(name: str, counts: Mapping[str, str], sizes: Sizes) -> int:
    if name not in counts:
        raise UsageError(f"nothing says how many {{{name}}} there are")
    count = formula.evaluate(counts[name], sizes)
    if not isinstance(count, int) or not 0 <= count <= _MOST_OF_A_KIND:
        raise UsageError(f"{counts[name]} is {count!r}, which is no count of {{{name}}}")
    return count
