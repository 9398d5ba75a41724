"""Options in messages, to be pasted into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def either(words: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def quoted(text: str) -> str:
    """A word of a command line, in quotes whatever it is."""
    word = shlex.quote(text)
    return word if word != text else f"'{text}'"


def dropping(name: str) -> str:
    """The option that leaves out a tensor by its name, or by a pattern, to be pasted into a shell.

    What would open a field of a pattern, or a terminal would act on, is a star.
    """
    pattern = quoted("".join("*" if each in "{}" or not each.isprintable() else each for each in name))
    return f"--drop={pattern}" if name.startswith("-") else f"--drop {pattern}"
