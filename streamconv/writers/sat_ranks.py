"""A model's tensors as the model-parallel ranks of SAT hold them: one file per rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from streamconv.ops import Expression
from streamconv.readers.sat import sizes_of
from streamconv.readers.splits import SAT, WHOLE, split
from streamconv.writers.ranks import Part, Whole, dealt

_RANK = "mp_rank_00"
"""What a path has in the place of a rank's own number."""


def ranks(whole: Whole) -> list[Part]:
    """One file per rank; a file whose path does not name a rank stays one."""
    wrapping = whole.wrapping
    if wrapping is None or _RANK not in wrapping.path:
        return []
    sizes = sizes_of(whole.config or {})

    def parts(name: str, tensor: Expression) -> Mapping[int, Expression]:
        return dict(enumerate(split(tensor, SAT.find(name) or WHOLE, whole.ranks, sizes)))

    return [
        Part(
            tensors,
            wrapping=replace(
                wrapping,
                path=wrapping.path.replace(_RANK, f"mp_rank_{rank:02d}"),
                texts=wrapping.texts if rank == 0 else {},
            ),
        )
        for rank, tensors in enumerate(dealt(whole.tensors, whole.ranks, parts))
    ]
