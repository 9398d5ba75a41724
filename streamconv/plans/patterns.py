"""Patterns of tensor names, readable in both directions.

A pattern is text with fields: `{i}` stands for an index (one or more digits; the same field twice is the
same index), `*` for any text, also across dots. All else is literal, and a pattern matches whole names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from streamconv.errors import UsageError

_TOKEN = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}|(\*)")
_INDEX = re.compile(r"\d+")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; `text` is what the user wrote.

    Raises:
        UsageError: a brace that opens no field.
    """

    text: str

    def __post_init__(self) -> None:
        if set("{}") & set(_TOKEN.sub("", self.text)) or not self.text:
            raise UsageError(
                f"'{self.text}' is not a name pattern",
                hint="fields are {i} for an index and * for any text; all else is literal",
            )

    @property
    def fields(self) -> frozenset[str]:
        """The fields' names; stars are numbered `*0`, `*1`, ... from the left."""
        return frozenset(self._names)

    def match(self, name: str) -> dict[str, str] | None:
        """What each field stands for in `name`, or None where the pattern does not match."""
        found = self._regex.fullmatch(name)
        return None if found is None else dict(zip(self._groups, found.groups(), strict=True))

    def fill(self, values: dict[str, str]) -> str:
        """The name that the fields' values give."""
        names = iter(self._names)
        return _TOKEN.sub(lambda _: values[next(names)], self.text)

    @cached_property
    def _names(self) -> list[str]:
        """Every field in order, repeats included."""
        names: list[str] = []
        stars = 0
        for token in _TOKEN.finditer(self.text):
            names.append(token[1] or f"*{stars}")
            stars += token[2] is not None
        return names

    @cached_property
    def _groups(self) -> list[str]:
        return list(dict.fromkeys(self._names))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts: list[str] = []
        seen: list[str] = []
        at = 0
        for token, name in zip(_TOKEN.finditer(self.text), self._names, strict=True):
            parts.append(re.escape(self.text[at : token.start()]))
            if name in seen:
                parts.append(f"(?:\\{seen.index(name) + 1})")
            else:
                seen.append(name)
                parts.append("(.*)" if token[2] else r"(\d+)")
            at = token.end()
        parts.append(re.escape(self.text[at:]))
        return re.compile("".join(parts), re.DOTALL)


def shape_of(name: str) -> str:
    """A name with its indices as `{}`: what names of equal layers have in common."""
    return _INDEX.sub("{}", name)
