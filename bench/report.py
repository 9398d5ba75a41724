"""What benchmarks find, as Markdown: for the terminal and for `bench/results.md`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results.md"

_HEADER = """# Measured

Written by `python -m bench`. `bench/README.md` tells what each contender does and how it is measured.
Ratios are the median of {runs} turns, with the least and the most; memory is the most that was held at once.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark's results.

    Attributes:
        title: a line.
        text: what was done, and what came out of it.
        header, rows: a table.
    """

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [f"## {self.title}", "", self.text, ""]
        if self.rows:
            lines += [_row(self.header), _row(["---"] * len(self.header)), *map(_row, self.rows), ""]
        return "\n".join(lines)


def write(sections: Sequence[Section], runs: int) -> None:
    """Put the sections into `bench/results.md`; those of other parts that stand there stay."""
    found = _sections(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {section.title: str(section) for section in sections}
    head = _HEADER.format(runs=runs) + f"\nThe machine: {machine()}.\n"
    RESULTS.write_text("\n".join([head, *(found[title] for title in sorted(found))]).rstrip() + "\n")


def machine() -> str:
    """What the numbers were measured on, in a few words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{len(os.sched_getaffinity(0))} processors, {memory / 1e9:.0f} GB of memory, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    )


def megabytes(count: float) -> str:
    """Bytes for a table."""
    return f"{count / 1e6:,.0f} MB"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sections(text: str) -> dict[str, str]:
    parts = ("\n" + text).split("\n## ")[1:]
    return {part.splitlines()[0]: f"## {part.rstrip()}\n" for part in parts}
