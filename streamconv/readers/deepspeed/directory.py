"""Which files of a DeepSpeed checkpoint there are, and what each of them is.

    DIR/latest                                              the tag, mostly `global_stepN`
    DIR/<tag>/mp_rank_MM_model_states.pt                    stages 0 to 2, one per model-parallel rank
    DIR/<tag>/zero_pp_rank_R_mp_rank_MM_model_states.pt     stage 3, one per rank
    DIR/<tag>/[bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt
    DIR/<tag>/layer_L_expert_E_mp_rank_MM_model_states.pt   mixtures of experts
    DIR/<tag>/layer_LL[-model_TT]-model_states.pt           pipelines
    DIR/<tag>_universal/zero/<parameter>/fp32.pt            universal checkpoints

Source: deepspeedai/DeepSpeed: deepspeed/runtime/engine.py (`_get_ckpt_name` and its neighbours),
deepspeed/runtime/pipe/module.py, deepspeed/checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from streamconv.errors import CheckpointError, Problem, listed
from streamconv.options.records import ReadingOptions
from streamconv.readers import small
from streamconv.readers.paths import stays_inside
from streamconv.storage.location import Location

_LATEST = ("latest", "latest_universal")
_UNIVERSAL_STATES = "zero"
_WHOLE = "fp32.pt"

# Very old files lack the underscore before `optim_states`.
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
PARTITIONED_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
MODEL = re.compile(r"mp_rank_(?P<rank>\d+)_model_states\.pt")
EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")

Rank = tuple[int, int]
"""Model-parallel rank, then rank among the data-parallel copies."""


@dataclass(slots=True)
class Files:
    """The files of one save, by what they are."""

    optimizer: dict[Rank, Location] = field(default_factory=dict)
    partitioned: dict[Rank, Location] = field(default_factory=dict)
    """Model states of stage 3."""
    models: dict[int, Location] = field(default_factory=dict)
    """Model states of stages 0 to 2, by model-parallel rank."""
    experts: dict[tuple[int, int, int], Location] = field(default_factory=dict)
    """By layer of experts, expert, and model-parallel rank."""
    layers: dict[tuple[int, int], Location] = field(default_factory=dict)
    """Of a pipeline: by layer and tensor-parallel rank."""
    whole: dict[str, Location] = field(default_factory=dict)
    """Of a universal checkpoint: parameter -> its directory."""

    @property
    def first_models(self) -> dict[int, Location]:
        """The model states of the first data-parallel rank, by model-parallel rank."""
        return self.models or {model: path for (model, rank), path in self.partitioned.items() if rank == 0}


@dataclass(frozen=True, slots=True)
class Found:
    """A DeepSpeed checkpoint that was found.

    Attributes:
        root: the directory with `latest`, and with the config and tokenizer of a trainer's checkpoint.
        tag: the directory with the ranks' files.
        files: what is in it.
        notes: what was decided, one line each.
    """

    root: Location
    tag: Location
    files: Files
    notes: tuple[str, ...] = ()


def find(path: Location, _: ReadingOptions) -> Found | None:
    """The DeepSpeed checkpoint in a directory or a tag's directory; None where there is none.

    Raises:
        CheckpointError: there is one, but which tag is not clear, or two files claim the same rank.
    """
    own = _files(path)
    if own is not None:
        above = path.parent
        is_tag = any((above / name).is_file() for name in (*_LATEST, "config.json"))
        return Found(above if is_tag else path, path, own)
    named = {tag: name for name in reversed(_LATEST) if (tag := _tag(path / name))}
    tags = {entry.name: files for entry in _directories(path) if (files := _files(entry)) is not None}
    for tag in named:
        if tag not in tags and (path / tag).is_directory() and (files := _files(path / tag)) is not None:
            tags[tag] = files
    if not tags:
        return None
    chosen = next((tag for tag in reversed(named) if tag in tags), None)
    if chosen is None and named:
        said = next(iter(named))
        raise CheckpointError(
            f"'{named[said]}' says that the last save is '{said}', which is not there",
            file=str(path),
            hint=f"give one of the directories: {listed(sorted(tags))}",
        )
    if chosen is None and len(tags) > 1:
        raise CheckpointError(
            "there are several saves and no 'latest' says which to take",
            file=str(path),
            hint=f"give one of the directories: {listed(sorted(tags))}",
        )
    chosen = chosen or next(iter(tags))
    others = sorted(tag for tag in tags if tag != chosen)
    notes = (f"the save '{chosen}' is taken" + (f", not {listed(others)}" if others else ""),)
    return Found(path, path / chosen, tags[chosen], notes)


def partitions_of(found: Mapping[Rank, Location], model: int, ranks: Iterable[int]) -> list[str]:
    """What the files of other ranks of a model-parallel rank are called."""
    example = next(path.name for (of, _), path in found.items() if of == model)
    return [re.sub(r"zero_pp_rank_\d+_", f"zero_pp_rank_{rank}_", example) for rank in ranks]


def _tag(latest: Location) -> str | None:
    """The tag that a `latest` file names; None where there is none or it leads out of the directory."""
    text = small.latest(latest)
    return PurePosixPath(text).as_posix() if text and stays_inside(text) else None


def _directories(path: Location) -> Iterable[Location]:
    return (entry for entry in path.entries() if entry.is_directory())


def _files(path: Location) -> Files | None:
    """The files of one save; None where there are none."""
    found = Files()
    problems: list[Problem] = []

    def put(table: dict[Rank, Location], rank: Rank, entry: Location) -> None:
        if rank in table:
            problems.append(
                Problem(f"is rank {rank[1]} of model-parallel rank {rank[0]}, and so is {table[rank].name}",
                        file=str(entry), hint="two saves are mixed: remove the files of one of them")
            )  # fmt: skip
        table[rank] = entry

    for entry in path.entries():
        name = entry.name
        if match := OPTIMIZER.fullmatch(name):
            put(found.optimizer, (int(match[2]), int(match[1])), entry)
        elif match := PARTITIONED_MODEL.fullmatch(name):
            put(found.partitioned, (int(match[2]), int(match[1])), entry)
        elif match := MODEL.fullmatch(name):
            found.models[int(match[1])] = entry
        elif match := EXPERT.fullmatch(name):
            found.experts[int(match[1] or 0), int(match[2]), int(match[3])] = entry
        elif match := LAYER.fullmatch(name):
            found.layers[int(match[1]), int(match[2] or 0)] = entry
        elif name == _UNIVERSAL_STATES and entry.is_directory():
            found.whole = {each.name: each for each in _directories(entry) if (each / _WHOLE).is_file()}
    if problems:
        raise CheckpointError("the directory holds files of two saves", problems=problems)
    if found.models and found.partitioned:
        raise CheckpointError(
            "the directory holds model states of stage 3 and of another stage",
            file=str(path),
            hint="two saves are mixed: remove the files of one of them",
        )
    is_any = found.optimizer or found.partitioned or found.models or found.whole
    return found if is_any else None
