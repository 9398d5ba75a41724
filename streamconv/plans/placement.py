"""Which target goes into which file, and where in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from streamconv import shard
from streamconv.errors import Problem
from streamconv.ops import Reshape, Split, apply, renamed
from streamconv.plans import mindspore_ranks
from streamconv.plans.findings import Findings
from streamconv.plans.plan import OutputFile, PlannedTensor, TextFile
from streamconv.plans.sat_ranks import rank_parts
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
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
class Output:
    """What the destination is to hold, as far as it is decided.

    Attributes:
        tensors: in the order of their files and offsets.
        files: weight files.
        texts: small files that are made.
        left_out: paths of side files that are not to be copied.
    """

    tensors: list[PlannedTensor] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def place(made: Transformed, wanted: Wanted, output: Output, findings: Findings) -> None:
    """Decide file and offset of every target of a component.

    With model-parallel ranks, each has a file with its part of every target.

    Args:
        made: the targets, and what their files are called.
        wanted: format and size of the files.
        output: they are added to it.
        findings: what the format cannot hold.
    """
    if wanted.ranks > 1 and made.wrapping is not None and RANK in made.wrapping.path:
        ranks = _sat_ranks
    elif wanted.to in mindspore_ranks.FORMATS and (
        wanted.ranks * wanted.stages > 1 or wanted.strategy is not None
    ):
        ranks = _mindspore_ranks
    else:
        _place(made, wanted, output, findings)
        return
    with findings.collecting():
        for rank in ranks(made, wanted, output):
            _place(rank, replace(wanted, max_shard=LARGEST), output, findings)


def _place(made: Transformed, wanted: Wanted, output: Output, findings: Findings) -> None:
    """One rank's files, or the only one's."""
    writer = WRITERS[wanted.to]
    specs = {name: expression.spec for name, (_, expression) in made.targets.items()}
    problems = [problem for spec in specs.values() if (problem := writer.check(spec))]
    if problems or not specs:
        findings.problems += problems
        return
    # Names that share their bytes have the first one's name as their storage.
    storages = {first: first for first in made.shared.values()} | dict(made.shared)
    entries = [shard.entry_of(spec, storages.get(name)) for name, spec in specs.items()]
    # What is around the tensors is around all of them: there is one file.
    wrapping = made.wrapping if _FORMATS.get(wanted.to) == "torch" else None
    if wrapping is None and wanted.to in _WRAPPED:
        message = f"--to {wanted.to} is for models in its own naming"
        hint = "name the recipe that leads there, with --reverse; `streamconv recipes` lists them"
        findings.problems.append(Problem(message, hint=hint))
        return
    one_file = wrapping.path if wrapping else None
    if wanted.to in _ONE_FILE:
        one_file = made.component.stem + _ONE_FILE[wanted.to]
    shards = [list(specs)] if one_file else shard.pack(entries, wanted.max_shard)
    naming = Naming(made.component.stem, made.component.variant, _FORMATS.get(wanted.to, "safetensors"))
    gone = {name: kept for name, kept in made.shared.items() if name not in specs}
    prefix = f"{made.component.directory}/" if made.component.directory else ""
    for number, names in enumerate(shards, 1):
        file_name = one_file or shard.shard_name(naming, number, len(shards))
        metadata = gone if len(shards) == 1 else {}
        if wanted.crc:
            metadata = {**metadata, mindspore.CRC: ""}
        targets = [Target(specs[name], storages.get(name)) for name in names]
        with findings.collecting():
            layout = writer.layout(targets, metadata, file_name.rpartition("/")[2], wrapping)
            output.tensors += [_planned(made, spot, len(output.files)) for spot in layout.placements]
            output.files.append(OutputFile(prefix + file_name, layout))
    if wrapping:
        output.texts += (TextFile(prefix + path, text) for path, text in wrapping.texts.items())
    if len(shards) > 1:
        text = shard.index_json(shard.weight_map(naming, shards), shard.total_size(entries), gone)
        index = _INDEXES.get(wanted.to) or shard.index_name(naming)
        output.texts.append(TextFile(prefix + index, text.decode()))


def _mindspore_ranks(made: Transformed, wanted: Wanted, output: Output) -> Iterator[Transformed]:
    """A directory a rank, and the strategy that says what is in them."""
    how = wanted.strategy
    if how is None:
        how = mindspore_ranks.layouts(made.targets, mindspore_ranks.Split2D(wanted.ranks, wanted.stages))
        output.texts.append(TextFile(mindspore_ranks.STRATEGY, mindspore_ranks.strategy_json(how)))
    for rank, targets in enumerate(mindspore_ranks.rank_parts(made.targets, how)):
        component = replace(made.component, stem=mindspore_ranks.FILE.format(rank=rank))
        yield replace(made, component=component, targets=targets, shared={})


def _sat_ranks(made: Transformed, wanted: Wanted, output: Output) -> Iterator[Transformed]:
    """One file a rank."""
    del output
    assert made.wrapping is not None
    for rank, targets in enumerate(rank_parts(made.targets, made.config or {}, wanted.ranks)):
        path = made.wrapping.path.replace(RANK, f"mp_rank_{rank:02d}")
        wrapping = replace(made.wrapping, path=path, texts=made.wrapping.texts if rank == 0 else {})
        yield replace(made, targets=targets, shared={}, wrapping=wrapping)


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
