"""SAT (SwissArmyTransformer) checkpoints: `latest`, an iteration's directory, one file per model-parallel rank.

    DIR/latest                                     iteration, or `release`
    DIR/model_config.json                          absent where shapes say all
    DIR/<iteration>/mp_rank_00_model_states.pt     weights under `module`

A rank's file holds its part of each tensor; the tensor's name says which part. The parts are joined as
expressions over the files. A LoRA that lies unmerged in the checkpoint is passed on unmerged: the base weights
under `original`, and each rank's own factors.

Source: THUDM/SwissArmyTransformer: sat/training/model_io.py (files), sat/mpu/layers.py and
sat/model/transformer.py (which modules are split), sat/model/finetune/lora2.py (names of a LoRA).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CheckpointError, Problem, Problems, listed
from streamconv.ops import Expression, renamed
from streamconv.options.records import ReadingOptions, Trait
from streamconv.readers import small
from streamconv.readers.checkpoint import Checkpoint, Component, WeightFile
from streamconv.readers.files import open_file
from streamconv.readers.format import Format
from streamconv.readers.splits import NAMINGS, WHOLE, join
from streamconv.readers.together import numbered, read_all, require_all
from streamconv.shard import STEMS
from streamconv.storage.location import Location, locate

CONFIG = "model_config.json"
_LATEST = "latest"
_PART = "transformer"  # which has the ranks, where a pipeline's parts are distributed together
_RANK = re.compile(r"mp_rank_(?P<rank>\d+)_model_states\.pt")
_AVERAGED = "-ema"
_ITERATION = re.compile(r"(\d+|release)(-ema)?")

# What every model of SAT has at the top of its names; other programs write files of the same names.
_OURS = ("transformer.layers.", "transformer.word_embeddings.", "mixins.")

LORA = re.compile(
    r"(?P<module>.*)\.(?:matrix_(?P<side>[AB])\.(?P<part>\d+)(?:\.rank_(?P<rank>\d+))?|original\.(?P<leaf>\w+))"
)
"""Names of an unmerged LoRA: the base of a module, and the factors for each part of its rows. Where there are several
ranks, each has factors of its own, which we name by the rank."""


@dataclass(frozen=True, slots=True)
class Found:
    """A SAT checkpoint that was found.

    Attributes:
        path: what was given.
        root: the directory with `latest` and the config.
        iteration: the directory with the ranks.
        ranks: the files, open, by rank.
        notes: what was decided, one line each.
    """

    path: Location
    root: Location
    iteration: Location
    ranks: tuple[WeightFile, ...]
    notes: tuple[str, ...] = ()


def find(path: Location, reading: ReadingOptions) -> Found | None:
    """The SAT checkpoint in a directory, in an iteration's directory, or in one of the parts of a distribution.

    Raises:
        CheckpointError: it is one, but which iteration is not clear, or ranks are missing or damaged.
    """
    inside = path / _PART
    place = (_iteration(inside, reading["ema"]) if inside.is_directory() else None) or _iteration(
        path, reading["ema"]
    )
    if place is None:
        return None
    root, iteration, notes = place
    ranks = _rank_files(iteration)
    require_all(
        ranks,
        max(ranks) + 1,
        "model-parallel ranks",
        "ranks that started in different minutes may lie in two run directories: put them together",
    )
    opened = read_all(ranks, open_file, "files of ranks")
    found = Found(path, root, iteration, tuple(opened.values()), notes)
    return found if _is_ours(found.ranks[0].tensors) else None


def read(found: Found, _: ReadingOptions) -> Checkpoint:
    """The ranks, joined.

    Raises:
        CheckpointError: ranks do not fit together, or the config cannot be read; all problems at once.
    """
    config = _config(found)
    stated = (config or {}).get("model_parallel_size")
    if isinstance(stated, int) and stated != len(found.ranks):
        raise CheckpointError(
            f"{CONFIG} says that there are {stated} model-parallel ranks; there are {len(found.ranks)}",
            file=str(found.iteration),
            hint="find the missing files; ranks that started in different minutes may lie in two run directories",
        )
    _check_names(found.ranks)
    notes = list(found.notes)
    joined = _joined([file.tensors for file in found.ranks], config or {}, found)
    reported = {
        Trait.AVERAGED: found.iteration.name.endswith(_AVERAGED),
        Trait.LORA: any(map(LORA.fullmatch, joined)),
    }
    if len(found.ranks) > 1:
        notes.append(f"{len(found.ranks)} model-parallel ranks are joined")
    return Checkpoint(
        found.path,
        FORMAT.name,
        (Component("", STEMS[0], joined, config=config, unreadable=found.ranks[0].unreadable),),
        tuple(file.path for file in found.ranks),
        metadata=found.ranks[0].metadata,
        notes=(*notes, *found.ranks[0].notes),
        reported=frozenset(trait for trait, holds in reported.items() if holds),
    )


def alone(file: WeightFile, reading: ReadingOptions) -> Checkpoint | None:
    """A single file of a SAT checkpoint."""
    if reading["root"] is not None or not _is_ours(file.tensors):
        return None
    path = locate(file.path)
    root = path.parent.parent if (path.parent.parent / CONFIG).is_file() else path.parent
    return read(Found(path, root, path.parent, (file,)), reading)


def _is_ours(tensors: Mapping[str, Expression]) -> bool:
    """Whether names are SAT's."""
    return any(NAMINGS["sat"].bare(name).startswith(_OURS) for name in tensors)


# ------------------------------------------------------------------------------------- the files


def _rank_files(path: Location) -> dict[int, Location]:
    if not path.is_directory() or any(path.glob("layer_*-model_states.pt")):  # a pipeline of DeepSpeed's
        return {}
    return numbered(path, _RANK)


def _iteration(path: Location, ema: bool) -> tuple[Location, Location, tuple[str, ...]] | None:
    """Which directory has the config, which one the ranks, and what is to be said of the choice."""
    if _rank_files(path):
        return path.parent, path, ()
    iterations = sorted(
        entry.name for entry in path.entries() if _ITERATION.fullmatch(entry.name) and _rank_files(entry)
    )
    if not iterations:
        return None
    latest = _latest(path)
    base = latest.removesuffix(_AVERAGED) if latest else None
    plain = [name for name in iterations if not name.endswith(_AVERAGED)]
    if base is None and len(plain) == 1:
        base = plain[0]
    averaged = f"{base}{_AVERAGED}"
    wanted = averaged if ema and averaged in iterations else base
    # A run that was killed between the two saves says that the averaged weights are the latest.
    if wanted not in iterations and latest in iterations:
        wanted = latest
    if wanted is None or wanted not in iterations:
        raise CheckpointError(
            f"'{_LATEST}' says '{latest}', which is not there"
            if latest
            else f"there are several iterations and no '{_LATEST}' says which to take",
            file=str(path),
            hint=f"give one of the directories: {', '.join(iterations)}",
        )
    others = [name for name in iterations if name != wanted]
    return (
        path,
        path / wanted,
        (f"iteration {wanted} is taken" + (f", not {', '.join(others)}" if others else ""),),
    )


def _latest(path: Location) -> str | None:
    text = small.latest(path / _LATEST)
    return text if text and _ITERATION.fullmatch(text) else None


def _config(found: Found) -> dict[str, Any] | None:
    for directory in (found.root, found.iteration):
        path = directory / CONFIG
        if path.is_file():
            config = small.read_config(path)
            if config is None:
                raise CheckpointError("it does not hold a JSON object", file=str(path))
            return config
    return None


def _check_names(opened: Sequence[WeightFile]) -> None:
    odd = {file.path: sorted(file.tensors.keys() ^ opened[0].tensors.keys()) for file in opened[1:]}
    Problems(
        Problem(f"has other tensors than rank 0: {listed(names)}", file)
        for file, names in odd.items()
        if names
    ).report("the ranks do not hold the same tensors")


# ------------------------------------------------------------------------------------- joining


def _joined(
    ranks: Sequence[Mapping[str, Expression]], config: Mapping[str, Any], found: Found
) -> dict[str, Expression]:
    if len(ranks) == 1:
        return dict(ranks[0])
    naming = NAMINGS["sat"]
    sizes = naming.sizes_of(config)
    joined: dict[str, Expression] = {}
    problems = Problems()
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        lora = LORA.fullmatch(name)
        if lora and lora["side"]:
            own = (f"{name}.rank_{rank}" for rank in range(len(ranks)))
            joined.update((each, renamed(part, each)) for each, part in zip(own, parts, strict=True))
            continue
        with problems.collecting():
            joined[name] = renamed(join(parts, naming.sharding(name) or WHOLE, sizes), name)
    problems.report(f"the ranks in {found.iteration} do not fit together")
    return joined


FORMAT = Format(
    "SAT",
    "a directory with `latest`, an iteration's directory, or one `.pt`; any number of model-parallel ranks",
    find,
    read,
    alone,
)
