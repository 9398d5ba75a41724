"""Tables of tensors: names that differ only in their indices are one line.

    model.layers.0.mlp.experts.0.up_proj.weight  ...  model.layers.79.mlp.experts.7.up_proj.weight
    model.layers.{0..79}.mlp.experts.{0..7}.up_proj.weight

An index is a whole part of a dotted name. Rows fold where all else that is printed of them is the same, and
only so far that the folded line stands for exactly the names that are there.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streamconv.cli.text import columns, first_lines, printable

# Longer runs of digits are not an index, and those with a leading zero would not come back from a number.
_INDEX = re.compile(r"(?<![^./ ])(0|[1-9][0-9]{0,8})(?![^./ ])")

# No model nests deeper; a name that does is shown as it is.
_MOST_INDICES = 8

# Between columns, and before those that stand under the first.
_GAP, _INDENT = "  ", 2

# Cells are not folded to less, as long as the first column can have lines of its own.
_NARROWEST = 24

Indices = tuple[int, ...]
Box = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line before folding.

    Attributes:
        names: the name that leads, then others that go with it, such as a target's source.
        values: all else that is printed; rows fold only where it is equal.
    """

    names: tuple[str, ...]
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Folded:
    """One line after folding.

    Attributes:
        names: as in the rows, with `{0..79}` for indices that differ.
        values: the rows'.
        members: positions of the rows.
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Member:
    position: int
    lead: Indices
    rest: tuple[Indices, ...]


@dataclass(frozen=True, slots=True)
class _Link:
    """An index of a name that is the leading name's index `axis` plus `step`; without axis, just `step`."""

    axis: int | None
    step: int

    def values(self, box: Box) -> tuple[int, ...]:
        if self.axis is None:
            return (self.step,)
        return tuple(index + self.step for index in box[self.axis])


def fold(rows: Iterable[Row], full: bool = False) -> list[Folded]:
    """Fold rows, or with `full` leave each a line; the lines are in the order of their first rows."""
    if full:
        return [Folded(row.names, row.values, (position,)) for position, row in enumerate(rows)]
    groups: dict[tuple[tuple[tuple[str, ...], ...], tuple[str, ...]], list[_Member]] = {}
    for position, row in enumerate(rows):
        texts, indices = zip(*map(_parted, row.names), strict=True)
        groups.setdefault((texts, row.values), []).append(_Member(position, indices[0], indices[1:]))
    lines = [
        Folded(names, values, members)
        for (texts, values), group in groups.items()
        for names, members in _lines(texts, group)
    ]
    return sorted(lines, key=lambda line: line.members[0])


def ranges(indices: Iterable[int]) -> str:
    """`7` for one index, `{0..3,5,7..9}` for several."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    spelled = (
        str(first) if first == last else f"{first}{',' if last == first + 1 else '..'}{last}"
        for first, last in runs
    )
    return "{" + ",".join(spelled) + "}"


def render(
    titles: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[str] = (), most: int | None = None
) -> list[str]:
    """Lines of a table with its columns side by side, made printable; cells under `right` end at the right.

    Of more rows than `most` only the first are shown, and how many more there are.

    Where they are wider than the terminal that stdout is, the widest cells are folded; and where that would leave them
    too narrow, the first of each row has lines of its own.
    """
    shown = rows if most is None else rows[:most]
    further = first_lines([""] * len(rows), len(shown))[len(shown) :]
    cells = [list(titles), *([printable(cell) for cell in row] for row in shown)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [">" if title in right else "<" for title in titles]
    room = columns(sys.stdout)
    narrow = _narrowed(widths, room)
    if room is None or all(
        width >= min(wide, _NARROWEST) for width, wide in zip(narrow, widths, strict=True)
    ):
        return [*(line for row in cells for line in _side_by_side(row, narrow, sides)), *further]
    rest = _narrowed(widths[1:], room - _INDENT)
    lines: list[str] = []
    for first, *others in cells:
        lines += _in_lines(first, room)
        lines += (" " * _INDENT + line for line in _side_by_side(others, rest, sides[1:]))
    return [*lines, *further]


def _narrowed(widths: Sequence[int], room: int | None) -> list[int]:
    """The widths of columns that have `room` together, with what is between them: the widest are cut to one width."""
    room = sum(widths) if room is None else room - len(_GAP) * (len(widths) - 1)
    most = next(
        (
            most
            for most in range(max(widths, default=1), 1, -1)
            if sum(min(most, each) for each in widths) <= room
        ),
        1,
    )
    return [min(most, each) for each in widths]


def _side_by_side(row: Sequence[str], widths: Sequence[int], sides: Sequence[str]) -> list[str]:
    """The lines of one row."""
    parts = [_in_lines(cell, width) for cell, width in zip(row, widths, strict=True)]
    shapes = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    return [
        _GAP.join(map(format, line, shapes)).rstrip() for line in itertools.zip_longest(*parts, fillvalue="")
    ]


def _in_lines(cell: str, width: int) -> list[str]:
    """A cell in lines of at most `width`, broken after what parts names and words where that wastes little."""
    lines = []
    while len(cell) > width:
        at = max(cell.rfind(mark, width // 2, width) for mark in " ./_,>|") + 1 or width
        lines.append(cell[:at].rstrip())
        cell = cell[at:].lstrip()
    return [*lines, cell]


@lru_cache(maxsize=1)  # most targets are called as their sources, which come next
def _parted(name: str) -> tuple[tuple[str, ...], Indices]:
    """What is around the indices of a name, and the indices."""
    parts = _INDEX.split(name)
    if len(parts) // 2 > _MOST_INDICES:
        return (name,), ()
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def _lines(
    texts: tuple[tuple[str, ...], ...], group: list[_Member]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Names and members of each line that a group of rows with equal texts folds into."""
    for links, members in _linked(group):
        by_lead: dict[Indices, list[int]] = {}
        for member in members:
            by_lead.setdefault(member.lead, []).append(member.position)
        for box in _boxes(by_lead):
            names = (
                _joined(texts[0], box),
                *(
                    _joined(text, [link.values(box) for link in name_links])
                    for text, name_links in zip(texts[1:], links, strict=True)
                ),
            )
            inside = (position for lead in itertools.product(*box) for position in by_lead[lead])
            yield names, tuple(sorted(inside))


def _linked(group: list[_Member]) -> Iterator[tuple[tuple[tuple[_Link, ...], ...], list[_Member]]]:
    """Parts of a group in which every further index follows from the leading name's, and how."""
    first = group[0]
    places = [(name, at) for name, indices in enumerate(first.rest) for at in range(len(indices))]
    links = {place: _link(group, *place) for place in places}
    loose = next((place for place in places if links[place] is None), None)
    if loose is None:
        found = {place: link for place, link in links.items() if link is not None}
        yield (
            tuple(
                tuple(found[name, at] for at in range(len(indices)))
                for name, indices in enumerate(first.rest)
            ),
            group,
        )
        return
    parts: dict[int, list[_Member]] = {}
    for member in group:
        parts.setdefault(member.rest[loose[0]][loose[1]], []).append(member)
    for part in parts.values():
        yield from _linked(part)


def _link(group: list[_Member], name: int, at: int) -> _Link | None:
    """How an index follows from the leading name's in all rows of a group, or None where it does not."""
    values = [member.rest[name][at] for member in group]
    width = len(group[0].lead)
    # The axis of the same place is the likeliest; and of equal fits, the one without a step.
    axes = sorted(range(width), key=lambda axis: (axis != at, axis))
    steps = [(axis, values[0] - group[0].lead[axis]) for axis in axes]
    for axis, step in sorted(steps, key=lambda each: each[1] != 0):
        if (
            all(value == member.lead[axis] + step for value, member in zip(values, group, strict=True))
            and len({member.lead[axis] for member in group}) > 1
        ):
            return _Link(axis, step)
    return _Link(None, values[0]) if len(set(values)) == 1 else None


def _boxes(leads: Iterable[Indices]) -> list[Box]:
    """Boxes that together hold exactly these indices, each once."""
    unique = list(dict.fromkeys(leads))
    if not unique[0]:
        return [()]
    tails: dict[int, list[Indices]] = {}
    for lead in unique:
        tails.setdefault(lead[0], []).append(lead[1:])
    heads: dict[tuple[Box, ...], list[int]] = {}
    for head, tail in tails.items():
        heads.setdefault(tuple(_boxes(sorted(tail))), []).append(head)
    return [(tuple(sorted(head)), *box) for boxes, head in heads.items() for box in boxes]


def _joined(text: Sequence[str], indices: Sequence[Iterable[int]]) -> str:
    spelled = [*map(ranges, indices), ""]
    return "".join(part + index for part, index in zip(text, spelled, strict=True))
