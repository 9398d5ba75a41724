"""A table of tensors: which, of which shapes, a model has; one line a tensor, in the words of recipes:

    model.layers.{i}.self_attn.q_proj.bias [heads * head_dim] if attention_bias

Fields count: `{i}` goes from 0 to the size that an architecture's `counts` names for it. Sizes are formulas. A line
that begins with `?` may be missing. A name with alternatives is several lines, in their order; they have one shape, or
the last alternatives have one each, perhaps with a formula of their own:

    model.layers.{i}.self_attn.{k,v}_proj.{weight,bias} [kv_heads * head_dim, hidden] [kv_heads * head_dim if biased]

Text is read once; from then on a table is changed by its methods, each of which gives another table.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamconv.dtypes import BY_NAME
from streamconv.errors import UsageError
from streamconv.plans import formula
from streamconv.plans.patterns import Pattern, alternatives
from streamconv.tensor import Shape

Sizes = Mapping[str, Any]
Names = Mapping[str, str]
"""Names in a table -> other names. One that ends in a dot, or in `*`, stands for all names that begin so."""

# What a config may ask for. No model has as many layers, experts or tensors; a damaged config may say any number.
_MOST_OF_A_KIND = 1 << 16
MOST_TENSORS = 1 << 21

_HEAD = re.compile(r"(?P<optional>\?)?(?P<name>\S+)")
_OWN_CONDITION = re.compile(r"(\[.*) if ((?:(?! else ).)*)\]")
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


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table.

    Attributes:
        name: the names it declares.
        dimensions: the formula of its shape, a list.
        when: a formula; there is such a tensor where it is true. Empty: always.
        optional, dtype: as in `Declared`.
    """

    name: Pattern
    dimensions: str
    when: str = ""
    optional: bool = False
    dtype: str | None = None

    def __str__(self) -> str:
        parts = (self.name.text, self.dimensions, self.dtype or "", f"if {self.when}" if self.when else "")
        return ("?" if self.optional else "") + " ".join(part for part in parts if part)

    def where(self, condition: str) -> Line:
        """The line under one more condition."""
        return replace(self, when=formula.conjunction(self.when, condition))

    def given(self, formulas: Mapping[str, str]) -> Line:
        """The line with formulas in the place of names."""
        when = formula.substituted(self.when, formulas) if self.when else ""
        dimensions = formula.substituted(self.dimensions, formulas)
        return replace(self, dimensions=dimensions, when=formula.conjunction(when))

    def called(self, name: str) -> Line:
        """The line under another name."""
        return replace(self, name=Pattern(name))

    def check(self, sizes: Collection[str]) -> None:
        """See that it uses these names and its fields alone, and a dtype that there is. Raises UsageError."""
        known = {*sizes, *self.name.fields}
        if self.dtype is not None and self.dtype not in BY_NAME:
            raise UsageError(f"there is no dtype '{self.dtype}'", hint=f"known: {', '.join(BY_NAME)}")
        formula.check(self.dimensions, known)
        if self.when:
            formula.check(self.when, known)

    def declared(self, sizes: Sizes, counts: Mapping[str, str]) -> Iterator[tuple[str, Declared]]:
        """Every tensor that the line stands for, by name.

        Raises:
            UsageError: a size in it is not known.
        """
        fields = sorted(self.name.fields)
        varies = bool(set(fields) & formula.names_in(self.dimensions))
        conditional = bool(self.when and set(fields) & formula.names_in(self.when))
        if self.when and not conditional and not formula.evaluate(self.when, sizes):
            return
        same = None if varies else Declared(self._shape(sizes), self.optional, self.dtype)
        ranges = [range(_count(each, counts, sizes)) for each in fields]
        if math.prod(map(len, ranges)) > MOST_TENSORS:
            raise UsageError(f"'{self}': more than {MOST_TENSORS} tensors, by the config")
        for indices in itertools.product(*ranges):
            scope = {**sizes, **dict(zip(fields, indices, strict=True))} if varies or conditional else sizes
            if conditional and not formula.evaluate(self.when, scope):
                continue
            name = self.name.fill({each: str(index) for each, index in zip(fields, indices, strict=True)})
            yield name, same or Declared(self._shape(scope), self.optional, self.dtype)

    def _shape(self, sizes: Sizes) -> Shape:
        shape = formula.evaluate(self.dimensions, sizes)
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise UsageError(f"'{self}': {shape} is not a shape")
        return tuple(shape)


@dataclass(frozen=True)
class Table:
    """Lines in the order in which a model's tensors are listed."""

    lines: tuple[Line, ...] = ()

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __add__(self, other: Table) -> Table:
        return Table(self.lines + other.lines)

    @property
    def names(self) -> tuple[str, ...]:
        """The name patterns, each once."""
        return tuple(dict.fromkeys(line.name.text for line in self.lines))

    def where(self, condition: str) -> Table:
        """All lines under one more condition."""
        return Table(tuple(line.where(condition) for line in self.lines))

    def given(self, **formulas: str) -> Table:
        """All lines with formulas in the place of the names of sizes and fields."""
        return Table(tuple(line.given(formulas) for line in self.lines))

    def optional(self) -> Table:
        """The same, but that all may be missing."""
        return Table(tuple(replace(line, optional=True) for line in self.lines))

    def under(self, prefix: str) -> Table:
        """All names with a prefix."""
        return Table(tuple(line.called(prefix + line.name.text) for line in self.lines))

    def renamed(self, names: Names) -> Table:
        """Under other names; without the lines for which there are none."""
        pairs = ((line, renamed(line.name.text, names)) for line in self.lines)
        return Table(tuple(line.called(name) for line, name in pairs if name is not None))

    def without(self, *parts: str) -> Table:
        """Without the lines whose names have one of these in them."""
        kept = (line for line in self.lines if not any(part in line.name.text for part in parts))
        return Table(tuple(kept))


def table(text: str) -> Table:
    """A table from its text; blank lines and those that begin with `#` do not count.

    Raises:
        UsageError: a line is not of this form.
    """
    lines = map(str.strip, text.splitlines())
    return Table(tuple(each for line in lines if line and not line.startswith("#") for each in _lines(line)))


def renamed(name: str, names: Names) -> str | None:
    """What a tensor is called by other names; None where they do not say."""
    if name in names:
        return names[name]
    starts = (each for each in names if each.endswith((".", "*")) and name.startswith(each.removesuffix("*")))
    before = max(starts, key=len, default=None)
    if before is None:
        return None
    return names[before].removesuffix("*") + name.removeprefix(before.removesuffix("*"))


def _lines(text: str) -> Iterator[Line]:
    """The lines that one line of text stands for."""
    head = _HEAD.match(text)
    names = alternatives(head["name"]) if head else {}
    shapes: list[str] = []
    end = head.end() if head else 0
    while text.startswith(" [", end) and (after := _closed(text, end + 1)):
        shapes.append(text[end + 1 : after])
        end = after
    tail = _TAIL.fullmatch(text, end)
    last = len({chosen[-1:] for chosen in names})
    if head is None or tail is None or len(shapes) not in {1, last}:
        raise UsageError(
            f"'{text}' declares no tensor", hint="write `name [size, size]`, perhaps with `if formula`"
        )
    for name, shape in zip(names.values(), itertools.cycle(shapes), strict=False):
        own = _OWN_CONDITION.fullmatch(shape)
        dimensions, when = (own[1] + "]", own[2]) if own else (shape, "")
        line = Line(Pattern(name), dimensions, when, head["optional"] is not None, tail["dtype"])
        yield line.where(tail["when"]) if tail["when"] else line


def _closed(text: str, start: int) -> int | None:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return None


def _count(name: str, counts: Mapping[str, str], sizes: Sizes) -> int:
    if name not in counts:
        raise UsageError(f"nothing says how many {{{name}}} there are")
    count = formula.evaluate(counts[name], sizes)
    if not isinstance(count, int) or not 0 <= count <= _MOST_OF_A_KIND:
        raise UsageError(f"{counts[name]} is {count!r}, which is not a count of {{{name}}}")
    return count
