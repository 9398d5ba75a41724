"""Patterns of tensor names, readable in both directions.

A pattern is text with fields: `{i}` stands for an index (one or more digits; the same field twice is the
same index), `{i+1}` or `{3-i}` for one worked out from it, `*` for any text, also across dots. All else is
literal, and a pattern matches whole names. In a recipe, `{i+[layers]}` counts from a size of the model on, and
`{q,k,v}` stands for several patterns, one for each alternative.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from streamconv.errors import UsageError
from streamconv.plans import formula

_TOKEN = re.compile(r"(\{[^{}]+\}|\*)")
_FIELD = re.compile(r"\{[^{}]+\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDEX = re.compile(r"\d+")
_SIZE = re.compile(r"\[([A-Za-z_][A-Za-z0-9_]*)\]")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a pattern: the text of its name times `factor` plus `offset`; a star is taken as it is."""

    name: str
    factor: int = 1
    offset: int = 0
    star: bool = False

    @property
    def plain(self) -> bool:
        return (self.factor, self.offset) == (1, 0)

    def fill(self, values: Mapping[str, str]) -> str:
        if self.plain:
            return values[self.name]
        return str(int(values[self.name]) * self.factor + self.offset)

    def solve(self, text: str) -> str | None:
        """What the name stands for where the field reads `text`."""
        if self.plain:
            return text
        index, rest = divmod(int(text) - self.offset, self.factor)
        return str(index) if rest == 0 and index >= 0 else None


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; `text` is what the user wrote.

    Raises:
        UsageError: a brace that opens no field.
    """

    text: str

    def __post_init__(self) -> None:
        _parsed(self.text)

    @property
    def fields(self) -> frozenset[str]:
        """The fields' names; stars are numbered `*0`, `*1`, ... from the left."""
        return frozenset(field.name for field in self._fields)

    @property
    def stars(self) -> int:
        """How many stars it has."""
        return sum(field.star for field in self._fields)

    @cached_property
    def shape(self) -> str:
        """`shape_of` every name that the pattern matches, where it has no star."""
        return _INDEX.sub("{}", _TOKEN.sub("0", self.text))

    def match(self, name: str) -> dict[str, str] | None:
        """What each field stands for in `name`, or None where the pattern does not match."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        values: dict[str, str] = {}
        for field, text in zip(self._fields, found.groups(), strict=True):
            value = field.solve(text)
            if value is None or values.setdefault(field.name, value) != value:
                return None
        return values

    def fill(self, values: Mapping[str, str]) -> str:
        """The name that the fields' values give."""
        parts = [self._literals[0]]
        for field, literal in zip(self._fields, self._literals[1:], strict=True):
            parts += field.fill(values), literal
        return "".join(parts)

    @property
    def sizes(self) -> list[str]:
        """The sizes that its fields count from."""
        return _SIZE.findall(self.text)

    def bound(self, sizes: Mapping[str, object]) -> Pattern:
        """The pattern with numbers in the place of sizes; one that is not known counts as 0."""
        if "[" not in self.text:
            return self
        bound = (
            _SIZE.sub(lambda size: str(sizes.get(size[1]) or 0), part) for part in _TOKEN.findall(self.text)
        )
        return Pattern("".join(itertools.chain(*itertools.zip_longest(self._literals, bound, fillvalue=""))))

    @property
    def _literals(self) -> Sequence[str]:
        """The text before, between and after the fields."""
        return _parsed(self.text)[0]

    @property
    def _fields(self) -> Sequence[_Field]:
        """Every field in order, repeats included."""
        return _parsed(self.text)[1]

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = [re.escape(self._literals[0])]
        first: dict[_Field, int] = {}
        for number, (field, literal) in enumerate(zip(self._fields, self._literals[1:], strict=True), 1):
            group = "(.*)" if field.star else r"(\d+)"
            # The same field again is a reference to the first, so that neighbours part in the right place.
            parts += f"(\\{first[field]})" if field in first else group, re.escape(literal)
            first.setdefault(field, number)
        return re.compile("".join(parts), re.DOTALL)


# Recipes make thousands of patterns as they are imported, many of them of the same text.
@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Sequence[str], Sequence[_Field]]:
    """The literals of a pattern and the fields between them."""
    parts = _TOKEN.split(text)
    if not text or any("{" in literal or "}" in literal for literal in parts[::2]):
        raise _fault(text)
    stars = itertools.count()
    try:
        fields = [
            _Field(f"*{next(stars)}", star=True) if part == "*" else _field(part[1:-1])
            for part in parts[1::2]
        ]
    except (UsageError, ValueError):
        raise _fault(text) from None
    return parts[::2], fields


@lru_cache(maxsize=4096)
def _field(text: str) -> _Field:
    """A field by what stands between its braces. Raises UsageError or ValueError where it is not one."""
    if _NAME.fullmatch(text):
        return _Field(text)
    text = _SIZE.sub("0", text)
    (name,) = formula.names_in(text)
    at = [formula.evaluate(text, {name: index}) for index in range(3)]
    if not all(isinstance(value, int) for value in at) or at[2] - at[1] != at[1] - at[0] or at[0] == at[1]:
        raise ValueError(text)
    return _Field(name, at[1] - at[0], at[0])


def _fault(text: str) -> UsageError:
    return UsageError(
        f"'{text}' is not a name pattern",
        hint="fields are {i} for an index, {i+1} for one worked out from it, and * for any text; "
        "all else is literal",
    )


def shape_of(name: str) -> str:
    """A name with its indices as `{}`: what names of equal layers have in common."""
    return _INDEX.sub("{}", name)


Kinds = Mapping[str, Sequence[str]]
"""Names by what they are with 0 for each index."""


def kinds(names: Iterable[str]) -> Kinds:
    """The names of a checkpoint by their kind, of which there are few however many layers it has."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_INDEX.sub("0", name), []).append(name)
    return found


def occurs(text: str, names: Kinds) -> bool:
    """Whether a pattern matches some name, as it is, inside a wrapper, or of a model without its head."""
    return any(
        kind.match(own) is not None and any(form.match(name) is not None for name in alike)
        for form, kind in _forms(text)
        for own, alike in names.items()
    )


@lru_cache(maxsize=1024)
def _forms(text: str) -> list[tuple[Pattern, Pattern]]:
    """A pattern in each of these forms, and the same for kinds of names."""
    forms = [text, f"*.{text}", text.split(".", 1)[-1]]
    return [(Pattern(form), Pattern(_INDEX.sub("0", _FIELD.sub("0", form)))) for form in forms]


def alternatives(text: str) -> dict[tuple[str, ...], str]:
    """What `{q,k,v}_proj.{weight,bias}` stands for, by the alternatives chosen; the last varies fastest."""
    if "," not in text:  # as nearly all of the thousands that recipes ask for while they are imported
        return {(): text}
    literals = _ALTERNATIVES.split(text)
    choices = itertools.product(*(choice.split(",") for choice in literals[1::2]))
    return {
        chosen: "".join(itertools.chain(*zip(literals[::2], (*chosen, ""), strict=True)))
        for chosen in choices
    }


def named(text: str, left: str = "", right: str = "") -> dict[str, str]:
    """Names -> other names, from a text with a line for each:

        self_attn.{q,k}_norm. -> self_attention.{q,k}_layernorm.

    Alternatives of both sides are spelled out side by side; a name without an arrow stays as it is.

    Args:
        text: the lines.
        left: what all names on the left begin with.
        right: the same on the right.

    Raises:
        ValueError: a name has more alternatives than the other.
    """
    lines = (line.strip().partition(" -> ") for line in text.splitlines() if line.strip())
    return pairs({left + name: right + (other or name) for name, _, other in lines})


def pairs(names: Mapping[str, str]) -> dict[str, str]:
    """Names -> other names, with the alternatives of both spelled out side by side.

    Raises:
        ValueError: a name has more alternatives than the other.
    """
    return {
        name: other
        for left, right in names.items()
        for name, other in zip(alternatives(left).values(), alternatives(right).values(), strict=True)
    }
