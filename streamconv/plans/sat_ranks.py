"""A model's tensors as the model-parallel ranks of SAT hold them: one file per rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from streamconv.ops import Expression
from streamconv.plans.output import Output, dealt
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
from streamconv.readers.sat import sizes_of
from streamconv.readers.splits import SAT, WHOLE, split

_RANK = "mp_rank_00"
"""What a path has in the place of a rank's own number."""


def ranks(made: Transformed, wanted: Wanted, output: Output) -> Iterator[Transformed]:
    """One file per rank; a file whose path does not name a rank stays one."""
    del output
    if made.wrapping is None or _RANK not in made.wrapping.path:
        yield made
        return
    sizes = sizes_of(made.config or {})

    def parts(name: str, whole: Expression) -> Mapping[int, Expression]:
        return dict(enumerate(split(whole, SAT.find(name) or WHOLE, wanted.options["tp"], sizes)))

    for rank, targets in enumerate(dealt(made.targets, wanted.options["tp"], parts)):
        path = made.wrapping.path.replace(_RANK, f"mp_rank_{rank:02d}")
        wrapping = replace(made.wrapping, path=path, texts=made.wrapping.texts if rank == 0 else {})
        yield replace(made, targets=targets, shared={}, wrapping=wrapping)
