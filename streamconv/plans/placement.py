"""Which target goes into which file, and where in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from streamconv import shard
from streamconv.errors import PlanError, Problem
from streamconv.ops import Reshape, Split, apply, renamed
from streamconv.plans import mindspore_ranks
from streamconv.plans.plan import OutputFile, PlannedTensor, TextFile
from streamconv.plans.sat_ranks import rank_parts
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
from streamconv.readers.checkpoint import Component
from streamconv.shard import Naming
from streamconv.writers import LARGEST, WRITERS, Placement, Target, mindspore

_FORMATS: dict[str, shard.Format] = {
    "safetensors": "safetensors",
    "torch": "torch",
    "sat": "torch",
    "mindspore-safetensors": "safetensors",
}

# Formats whose loaders take one file, and what comes after its stem.
_ONE_FILE = {"mindspore": ".ckpt"}

# What the index is called, where it is not as Hugging Face calls it.
_INDEXES = {"mindspore-safetensors": "param_name_map.json"}

# Formats that are a torch file with something around the tensors, which a recipe has to say.
_WRAPPED = frozenset({"sat"})

RANK = "mp_rank_00"
"""What a path has in the place of a rank's own number."""


@dataclass(slots=True)
class Placed:
    """A component's weight files: tensors in the order of their files and offsets, and the index of several."""

    tensors: list[PlannedTensor] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    index: list[TextFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def place(component: Component, made: Transformed, wanted: Wanted, first_file: int) -> Placed:
    """Decide file and offset of every target of a component. Problems are returned, not raised.

    With model-parallel ranks, each has a file with its part of every target.

    Args:
        component: says what the files are called.
        made: its targets.
        wanted: format and size of the files.
        first_file: how many files the plan has already.
    """
    if wanted.ranks > 1 and made.wrapping is not None and RANK in made.wrapping.path:
        return _place_ranks(component, made, wanted, first_file)
    if wanted.to in mindspore_ranks.FORMATS and (
        wanted.ranks * wanted.stages > 1 or wanted.strategy is not None
    ):
        return _place_mindspore_ranks(component, made, wanted, first_file)
    placed = Placed()
    writer = WRITERS[wanted.to]
    specs = {name: expression.spec for name, (_, expression) in made.targets.items()}
    placed.problems += (problem for spec in specs.values() if (problem := writer.check(spec)))
    if placed.problems or not specs:
        return placed
    # Names that share their bytes have the first one's name as their storage.
    storages = {first: first for first in made.shared.values()} | dict(made.shared)
    entries = [shard.entry_of(spec, storages.get(name)) for name, spec in specs.items()]
    # What is around the tensors is around all of them: there is one file.
    wrapping = made.wrapping if _FORMATS.get(wanted.to) == "torch" else None
    if wrapping is None and wanted.to in _WRAPPED:
        message = f"--to {wanted.to} is for models in its own naming"
        hint = "name the recipe that leads there, with --reverse; `streamconv recipes` lists them"
        placed.problems.append(Problem(message, hint=hint))
        return placed
    one_file = wrapping.path if wrapping else None
    if wanted.to in _ONE_FILE:
        one_file = component.stem + _ONE_FILE[wanted.to]
    shards = [list(specs)] if one_file else shard.pack(entries, wanted.max_shard)
    naming = Naming(component.stem, component.variant, _FORMATS.get(wanted.to, "safetensors"))
    gone = {name: kept for name, kept in made.shared.items() if name not in specs}
    prefix = f"{component.directory}/" if component.directory else ""
    for number, names in enumerate(shards, 1):
        file_name = one_file or shard.shard_name(naming, number, len(shards))
        metadata = gone if len(shards) == 1 else {}
        if wanted.crc:
            metadata = {**metadata, mindspore.CRC: ""}
        targets = [Target(specs[name], storages.get(name)) for name in names]
        try:
            layout = writer.layout(targets, metadata, file_name.rpartition("/")[2], wrapping)
        except PlanError as error:
            placed.problems += error.problems
            continue
        file = first_file + len(placed.files)
        placed.tensors += (_planned(made, spot, file) for spot in layout.placements)
        placed.files.append(OutputFile(prefix + file_name, layout))
    if wrapping:
        placed.index += (TextFile(prefix + path, text) for path, text in wrapping.texts.items())
    if len(shards) > 1:
        text = shard.index_json(shard.weight_map(naming, shards), shard.total_size(entries), gone)
        index = _INDEXES.get(wanted.to) or shard.index_name(naming)
        placed.index.append(TextFile(prefix + index, text.decode()))
    return placed


def _place_mindspore_ranks(
    component: Component, made: Transformed, wanted: Wanted, first_file: int
) -> Placed:
    """A directory a rank, and the strategy that says what is in them."""
    placed = Placed()
    how = wanted.strategy
    try:
        if how is None:
            how = mindspore_ranks.layouts(made.targets, mindspore_ranks.Split2D(wanted.ranks, wanted.stages))
            placed.index.append(TextFile(mindspore_ranks.STRATEGY, mindspore_ranks.strategy_json(how)))
        parts = mindspore_ranks.rank_parts(made.targets, how)
    except PlanError as error:
        placed.problems += error.problems
        return placed
    whole = replace(wanted, ranks=1, stages=1, strategy=None, max_shard=LARGEST)
    for rank, targets in enumerate(parts):
        own = replace(component, stem=mindspore_ranks.FILE.format(rank=rank))
        one = place(own, replace(made, targets=targets, shared={}), whole, first_file + len(placed.files))
        placed.tensors += one.tensors
        placed.files += one.files
        placed.problems += one.problems
    return placed


def _planned(made: Transformed, spot: Placement, file: int) -> PlannedTensor:
    """A target, or the part of it that goes to one place."""
    sources, whole = made.targets[spot.name]
    if spot.length == whole.spec.nbytes:
        return PlannedTensor(sources, whole, file, spot.offset)
    width = whole.spec.dtype.itemsize
    first, count = spot.start // width, spot.length // width
    rest = whole.spec.numel - first - count
    (flat,) = apply(Reshape((whole.spec.numel,)), whole)
    sizes = [size for size in (first, count, rest) if size]
    parts = apply(Split(0, tuple(sizes)), flat)
    return PlannedTensor(sources, renamed(parts[1 if first else 0], spot.name), file, spot.offset)


def _place_ranks(component: Component, made: Transformed, wanted: Wanted, first_file: int) -> Placed:
    """One file a rank."""
    placed = Placed()
    assert made.wrapping is not None
    try:
        parts = rank_parts(made.targets, made.config or {}, wanted.ranks)
    except PlanError as error:
        placed.problems += error.problems
        return placed
    for rank, targets in enumerate(parts):
        path = made.wrapping.path.replace(RANK, f"mp_rank_{rank:02d}")
        wrapping = replace(made.wrapping, path=path, texts=made.wrapping.texts if rank == 0 else {})
        alone = replace(made, targets=targets, shared={}, wrapping=wrapping)
        own = place(component, alone, replace(wanted, ranks=1), first_file + rank)
        placed.tensors += own.tensors
        placed.files += own.files
        placed.index += own.index
        placed.problems += own.problems
    return placed
