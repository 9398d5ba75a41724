"""Which elements of stored tensors an output has: what is not among them is nowhere, once they are deleted.

Structural operations say exactly where each element goes, so a tensor is looked at by the runs of it that are written,
whatever joins, splits or repeats them. Operations that compute an element from an element are looked through. Of others,
every element of the operands counts as used.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
from numpy.lib.stride_tricks import as_strided

from streamconv.ops import Expression, Node, Structural, leaves
from streamconv.ops import layout as table
from streamconv.ops.layout import FILL, Layout, Piece
from streamconv.tensor import Stored

# Parts of a tensor that are told apart; a byte each.
_MOST_PARTS = 1 << 26

Run = tuple[int, tuple[tuple[int, int], ...]]
"""The first element, and loops (count, stride) over elements, the smallest stride first."""


@dataclass(slots=True)
class _Used:
    """What is used of one stored tensor."""

    stored: Stored
    runs: set[Run] = field(default_factory=set)

    def is_whole(self) -> bool:
        return _is_whole(self.runs, self.stored.spec.numel)


def left_out(written: Iterable[Expression], equal: Iterable[tuple[Expression, Expression]]) -> list[Stored]:
    """The stored tensors in what is written of which not every element is written, or equal to what is."""
    used: dict[Hashable, _Used] = {}
    for expression in written:
        for leaf in leaves(expression):
            used.setdefault(_key(leaf), _Used(leaf))
        _use(expression, used)
    lacking = {key for key, each in used.items() if not each.is_whole()}
    if not lacking:
        return []
    kept = used.keys() - lacking
    for left, right in equal:
        for one, other in ((left, right), (right, left)):
            if {_key(leaf) for leaf in leaves(other)} <= kept:
                _use(one, used)
    return [used[key].stored for key in used if key in lacking and not used[key].is_whole()]


def _key(stored: Stored) -> Hashable:
    return stored.extents, stored.spec.numel


def _use(expression: Expression, used: Mapping[Hashable, _Used]) -> None:
    layout, sources = _fused(expression)
    found: dict[int, set[Run]] = {}
    for piece in layout.pieces:
        if piece.source != FILL:
            found.setdefault(piece.source, set()).add(_run(piece))
    for at, runs in found.items():
        source = sources[at]
        if isinstance(source, Node):
            for operand in source.operands:
                _use(operand, used)
        elif _key(source) in used:
            used[_key(source)].runs.update(runs)


def _fused(expression: Expression) -> tuple[Layout, Sequence[Stored | Node]]:
    """Where the elements of an expression are from."""
    sources: list[Stored | Node] = []

    def walk(current: Expression) -> Layout:
        if isinstance(current, Node):
            if isinstance(current.op, Structural):
                return current.op.layout([walk(operand) for operand in current.operands])[current.result]
            if len(current.operands) == 1 and current.operands[0].spec.shape == current.spec.shape:
                return walk(current.operands[0])
        sources.append(current)
        return table.identity(current.spec.shape, len(sources) - 1)

    return walk(expression), sources


def _run(piece: Piece) -> Run:
    loops: list[tuple[int, int]] = []
    for count, stride in sorted(
        ((loop.count, loop.stride) for loop in piece.loops), key=lambda each: each[1]
    ):
        if stride and loops and stride == loops[-1][0] * loops[-1][1]:
            loops[-1] = (count * loops[-1][0], loops[-1][1])
        elif stride:  # without, it is the same element again
            loops.append((count, stride))
    return piece.start, tuple(loops)


def _is_whole(runs: set[Run], numel: int) -> bool:
    """Whether runs reach every element; of a tensor that is cut too finely to know, not."""
    if not numel or (0, ((numel, 1),)) in runs or (numel == 1 and runs):
        return True
    if sum(math.prod(count for count, _ in loops) for _, loops in runs) < numel:
        return False
    # All runs are made of parts of this many elements.
    part = numel
    for start, loops in runs:
        inner = loops[0][0] if loops and loops[0][1] == 1 else 1
        part = math.gcd(part, start, inner, *(stride for _, stride in loops if stride > 1))
    if numel // part > _MOST_PARTS:
        return False
    reached = numpy.zeros(numel // part, bool)
    for start, loops in runs:
        first = [(loops[0][0] // part, 1)] if loops and loops[0][1] == 1 else []
        walks = [*first, *((count, stride // part) for count, stride in loops if stride > 1)]
        as_strided(reached[start // part :], [count for count, _ in walks], [stride for _, stride in walks])[
            ...
        ] = True
    return bool(reached.all())
