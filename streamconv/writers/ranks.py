"""What the files of several ranks hold of a model: a format's layout of ranks takes all of it, and says each one's part.

Which part that is, a naming says by a tensor's name (`readers.splits`), or a strategy of MindSpore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression, renamed
from streamconv.readers.mindspore.strategy import Layout
from streamconv.readers.splits import NAMINGS, Naming, Sharding, split
from streamconv.writers.layout import Wrapping
from streamconv.writers.strategy import layouts, strategy_json

Tensors = Mapping[str, Expression]

_MOST_PARTS = 4_000_000


@dataclass(frozen=True, slots=True)
class Whole:
    """A model that is to be split.

    Attributes:
        tensors: by name.
        ranks: tensor-parallel ones, of each stage.
        stages: of the pipeline.
        strategy: how each tensor is split, instead of these numbers.
        config: the model's.
        wrapping: what one file of it would hold around the tensors.
    """

    tensors: Tensors
    ranks: int
    stages: int = 1
    strategy: Mapping[str, Layout] | None = None
    config: Mapping[str, Any] | None = None
    wrapping: Wrapping | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds.

    Attributes:
        tensors: by the names that they have in the whole.
        stem: what the rank's files are called, without the suffix; empty: as those of the whole.
        wrapping: what its file holds around the tensors.
        texts: other files that go with it, by path.
    """

    tensors: Tensors
    stem: str = ""
    wrapping: Wrapping | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


RankLayout = Callable[[Whole], Sequence[Part]]
"""What each rank holds, in their order; none where the whole stays one. Raises PlanError."""


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The layout of ranks of a format whose files differ by the rank in their names.

    Attributes:
        naming: which says what is split how.
        file: what a rank's file is called, without the suffix; of a path that files have anyway, a part.
        strategy: the file that says how tensors are split, where that was not given; empty: none does.
    """

    naming: str
    file: str
    strategy: str = ""

    def __call__(self, whole: Whole) -> list[Part]:
        """One file per rank; where the path of the whole names no rank, it stays one."""
        wrapping, first = whole.wrapping, self.file.format(rank=0)
        if wrapping is not None and first not in wrapping.path:
            return []
        naming, texts = NAMINGS[self.naming], {}
        how = whole.strategy
        if how is None and self.strategy:
            how = layouts(whole.tensors, naming, whole.ranks, whole.stages)
            texts = {self.strategy: strategy_json(how)}
        held = _by_naming(whole, naming) if how is None else _by_layouts(whole.tensors, how)
        parts = []
        for rank, tensors in enumerate(_dealt(whole.tensors, held)):
            stem = self.file.format(rank=rank)
            if wrapping is None:
                part = Part(tensors, stem)
            else:
                path = wrapping.path.replace(first, stem)
                around = replace(wrapping, path=path, texts=wrapping.texts if rank == 0 else {})
                part = Part(tensors, wrapping=around)
            parts.append(replace(part, texts=texts if rank == 0 else {}))
        return parts


@dataclass(frozen=True, slots=True)
class _Held:
    """Who has what of the tensors.

    Attributes:
        ranks: in a stage.
        stages: of a tensor.
        parts: what each rank of such a stage has of one. Raises PlanError.
    """

    ranks: int
    stages: Mapping[str, Sequence[int]]
    parts: Callable[[str, Expression], Sequence[Expression]]


def _by_naming(whole: Whole, naming: Naming) -> _Held:
    sizes = naming.sizes_of(whole.config or {})

    def parts(name: str, tensor: Expression) -> Sequence[Expression]:
        sharding = naming.sharding(name)
        if sharding is None:
            raise PlanError("how it is split among ranks is not known", tensor=name)
        return split(tensor, sharding, whole.ranks, sizes)

    stages = naming.stages(whole.tensors, whole.stages)
    return _Held(whole.ranks, {name: (stage,) for name, stage in stages.items()}, parts)


def _by_layouts(tensors: Tensors, how: Mapping[str, Layout]) -> _Held:
    """By MindSpore's layouts; tensors without one are whole in each rank of all stages.

    Raises:
        PlanError: the layouts are of another model.
    """
    known = {name: layout for name, layout in how.items() if name in tensors}
    if not known:
        raise PlanError(
            "the strategy lists none of these tensors",
            hint="it is of another model, or names are not MindFormers'",
        )
    devices = {layout.ranks for layout in known.values()}
    if len(devices) != 1:
        raise PlanError(f"the strategy has stages of {sorted(devices)} ranks")
    (count,) = devices
    stages = range(max(stage for layout in known.values() for stage in layout.stages) + 1)
    held = {name: known.get(name, Layout(tuple(stages), (count,), ())) for name in tensors}

    def parts(name: str, whole: Expression) -> Sequence[Expression]:
        layout, dimensions = held[name], len(whole.spec.shape)
        pieces = _pieces(whole, layout.counts(dimensions))
        return [pieces[layout.part(rank, dimensions)] for rank in range(count)]

    return _Held(count, {name: layout.stages for name, layout in held.items()}, parts)


def _pieces(whole: Expression, counts: tuple[int, ...]) -> dict[tuple[int, ...], Expression]:
    """Index along each axis -> the part there."""
    pieces: dict[tuple[int, ...], Expression] = {(): whole}
    for axis, count in enumerate(counts):
        pieces = {
            (*index, at): part
            for index, piece in pieces.items()
            for at, part in enumerate(split(piece, Sharding(axis), count, {}))
        }
    return pieces


def _dealt(tensors: Tensors, held: _Held) -> list[Tensors]:
    """What each rank of all stages has of the tensors.

    Raises:
        PlanError: with every tensor that cannot be split.
    """
    ranks = held.ranks * (max(stage for stages in held.stages.values() for stage in stages) + 1)
    if ranks * len(tensors) > _MOST_PARTS:
        raise PlanError(
            f"{ranks} ranks with {len(tensors)} tensors each are more than {_MOST_PARTS} parts",
            hint="no machine has so many; see --tp, --pp and the strategy",
        )
    result: list[dict[str, Expression]] = [{} for _ in range(ranks)]
    problems: list[Problem] = []
    for name, whole in tensors.items():
        try:
            parts = [renamed(part, name) for part in held.parts(name, whole)]
        except PlanError as error:
            problems += error.problems
            continue
        for stage in held.stages[name]:
            for rank, part in enumerate(parts):
                result[stage * held.ranks + rank][name] = part
    if problems:
        raise PlanError(f"it cannot be split among {ranks} ranks", problems=problems)
    return list(result)
