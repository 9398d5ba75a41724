"""What several ranks hold of a model: `DIR/rank_N/*.ckpt` or `.safetensors`, joined as a strategy says.

Source: mindspore-ai/mindspore: mindspore/python/mindspore/parallel/checkpoint_transform.py (directories and files),
mindspore-lab/mindformers: mindformers/core/callback/callback.py (where training puts strategies).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.errors import CheckpointError, Problems, UsageError, listed
from streamconv.ops import Expression
from streamconv.options.records import ReadingOptions, Trait
from streamconv.readers import training
from streamconv.readers.checkpoint import Checkpoint, WeightFile
from streamconv.readers.chunks import Part, assemble
from streamconv.readers.files import open_file
from streamconv.readers.format import Format
from streamconv.readers.mindspore import optimizer, strategy
from streamconv.readers.mindspore.strategy import Layout
from streamconv.readers.together import read_all
from streamconv.readers.training import TrainedModel
from streamconv.shard import CKPT, SAFETENSORS
from streamconv.storage.location import Location, locate
from streamconv.tensor import TensorSpec

_RANK = re.compile(r"rank_(\d+)")
_STEP = re.compile(r"-(\d+)_(\d+)\.(?:ckpt|safetensors)$")

_OFTEN_ABSENT = (*optimizer.SLOTS, "moments.", "moment1.", "moment2.")
"""Prefixes of names that strategies list and a save of the network alone lacks."""


@dataclass(frozen=True, slots=True)
class Found:
    """The ranks' files that were found: rank -> the file that is taken; and what was decided."""

    path: Location
    ranks: Mapping[int, Location]
    notes: tuple[str, ...]


def find(path: Location, _: ReadingOptions) -> Found | None:
    """The ranks in a directory; None where there are none."""
    found: dict[int, Location] = {}
    notes: list[str] = []
    for entry in path.entries():
        match = _RANK.fullmatch(entry.name)
        if match is None or not entry.is_directory():
            continue
        weights = sorted((each for each in entry.entries() if each.suffix in (CKPT, SAFETENSORS)), key=_age)
        if weights:
            found[int(match[1])] = weights[-1]
            if len(weights) > 1 and not notes:
                notes.append(f"of several files in {entry.name}, the last is taken: {weights[-1].name}")
    return Found(path, found, tuple(notes)) if found else None


def read(found: Found, reading: ReadingOptions) -> Checkpoint:
    """Join the ranks' parts.

    Raises:
        UsageError: there are several ranks, and no strategy says what they hold.
        CheckpointError: ranks are missing, or their parts do not fit together; all problems at once.
    """
    given = locate(reading["source_strategy"]) if reading["source_strategy"] else None
    return training.checkpoint(found.path, _model(found, given), FORMAT.name, reading, Trait.RANKS)


def alone(file: WeightFile, reading: ReadingOptions) -> Checkpoint | None:
    """A file that holds optimizer state beside the weights; None where it does not.

    Raises:
        UsageError: it is one rank's, and a strategy beside it splits the model among several.
    """
    rank = locate(file.path).parent
    if _RANK.fullmatch(rank.name) and _strategy_beside(rank.parent):
        others = find(rank.parent, reading)
        if others is not None and len(others.ranks) > 1:
            raise UsageError(
                f"this is one of {len(others.ranks)} ranks, and not a checkpoint by itself",
                file=file.path,
                hint=f"give the directory: {rank.parent}",
            )
    if file.format != FORMAT.name or not any(name.startswith(optimizer.SLOTS) for name in file.tensors):
        return None
    model = TrainedModel(
        *optimizer.apart(file.tensors), {}, file.metadata, (file.path,), file.notes, file.checksums
    )
    return training.checkpoint(locate(file.path), model, FORMAT.name, reading)


def _model(found: Found, given: Location | None) -> TrainedModel:
    """The model of all ranks; `given` is the strategy, or None to look where MindSpore writes it."""
    if len({path.suffix for path in found.ranks.values()}) > 1:
        raise CheckpointError("the ranks have .ckpt and .safetensors files", file=str(found.path),
                              hint="remove those of one save")  # fmt: skip
    opened = read_all(dict(sorted(found.ranks.items())), open_file, "files of ranks")
    first, *others = opened.values()
    if not others and given is None:
        tensors, note = first.tensors, "one rank's file is all there is"
    else:
        place = given or _strategy_beside(found.path)
        if place is None:
            raise UsageError(
                f"there are {len(opened)} ranks, and no strategy says what each of them holds",
                file=str(found.path),
                hint="name the strategy file with --source-strategy",
            )
        tensors = _joined(found, opened, strategy.read(place))
        note = f"{len(opened)} ranks are joined as {place.name} says"
    return TrainedModel(
        *optimizer.apart(tensors),
        metadata=first.metadata,
        files=tuple(file.path for file in opened.values()),
        notes=(*found.notes, note, *first.notes),
        checksums=tuple(checksum for file in opened.values() for checksum in file.checksums),
    )


def _strategy_beside(path: Location) -> Location | None:
    """Where training or a converter puts the strategy of the ranks in a directory."""
    above = path.parent
    places = (path / "strategy.json", path / "strategy", above / "strategy", above.parent / "strategy")
    return next((place for place in places if place.exists()), None)


def _age(path: Location) -> tuple[bool, int, int, str]:
    """For the order in which training wrote files."""
    match = _STEP.search(path.name)
    return (match is not None, int(match[1]) if match else 0, int(match[2]) if match else 0, path.name)


def _joined(
    found: Found, opened: Mapping[int, WeightFile], layouts: Mapping[str, Layout]
) -> dict[str, Expression]:
    devices = {layout.ranks for layout in layouts.values()}
    if len(devices) != 1:
        raise CheckpointError(f"the strategy has stages of {sorted(devices)} ranks", file=str(found.path))
    (count,) = devices
    stages = max(stage for layout in layouts.values() for stage in layout.stages) + 1
    problems = Problems()
    missing = [f"rank_{rank}" for rank in range(count * stages) if rank not in opened]
    # Copies of what another rank has are not needed; which they are shows parameter by parameter.
    result: dict[str, Expression] = {}
    names = dict.fromkeys(name for file in opened.values() for name in file.tensors)
    for name in names:
        layout = layouts.get(name)
        holders = {rank: file.tensors[name] for rank, file in opened.items() if name in file.tensors}
        if layout is None:
            # Counters and the like: every rank has the same.
            result[name] = next(iter(holders.values()))
            continue
        stage = layout.stages[0]
        own = {rank % count: part for rank, part in holders.items() if rank // count == stage}
        with problems.collecting(tensor=name):
            result[name] = _whole(name, own, layout)
    lost = f"{listed(missing)} of {count * stages} ranks are missing; " if missing else ""
    problems.report(f"{lost}the ranks in {found.path} do not join")
    absent = sorted(set(layouts) - set(names) - {name for name in layouts if name.startswith(_OFTEN_ABSENT)})
    if absent:
        raise CheckpointError(
            f"no rank has {listed(absent)}, which the strategy lists", file=str(found.path),
            hint=f"missing ranks: {listed(missing)}" if missing else "the strategy is of another model",
        )  # fmt: skip
    return result


def _whole(name: str, own: Mapping[int, Expression], layout: Layout) -> Expression:
    if not own:
        raise CheckpointError("no rank of its stage is there")
    spec = next(iter(own.values())).spec
    if any(part.spec.shape != spec.shape for part in own.values()):
        raise CheckpointError("its parts have several shapes")
    if len(layout.axes) > len(spec.shape) and any(layout.axes[len(spec.shape) :]):
        raise CheckpointError(
            f"its shape is {list(spec.shape)}, and the strategy splits {len(layout.axes)} axes"
        )
    dimensions = len(spec.shape)
    shape = tuple(size * count for size, count in zip(spec.shape, layout.counts(dimensions), strict=True))
    parts = []
    for rank, tensor in own.items():
        index = layout.part(rank, dimensions)
        parts.append(Part(tuple(at * size for at, size in zip(index, spec.shape, strict=True)), tensor))
    return assemble(TensorSpec(name, spec.dtype, shape), parts)


FORMAT = Format(
    "MindSpore",
    "one directory `rank_N` of `.ckpt` or safetensors per rank, joined as the strategy files say",
    find,
    read,
    alone,
)
