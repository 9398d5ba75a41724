"""A model directory as transformers, diffusers and peft write it: which files are its weights, and all of them as one model.

File lists come from the index where there is one, never from the directory: repositories keep second copies
of the same weights under other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from streamconv.errors import CheckpointError, Problem, Problems, UsageError, count, listed, located
from streamconv.ops import Expression
from streamconv.options.records import ReadingOptions
from streamconv.readers import moments, run_files, side_files, small, state_dict
from streamconv.readers.checkpoint import Checkpoint, Component, Ignored, WeightFile
from streamconv.readers.files import is_weights, load_torch, open_file, suffixes
from streamconv.readers.format import Format, OneOfMany
from streamconv.readers.paths import stays_inside
from streamconv.readers.together import Missing, read_all
from streamconv.shard import MINDSPORE_INDEX, SAFETENSORS, STEMS, TORCH, Naming, parse_weight_name
from streamconv.storage.location import Location, locate, sought

_OPTIMIZERS = ("optimizer.bin", "optimizer.pt")

_UNNAMED = Naming(STEMS[0])

_SINGLE_FIRST = (STEMS[0], STEMS[2])
"""Stems whose libraries take a single file where an index lies beside it; diffusers takes the index."""


@dataclass(slots=True)
class _Group:
    """The files of one naming in a directory."""

    naming: Naming
    singles: list[str] = field(default_factory=list)
    index: str | None = None
    shards: dict[int, str] = field(default_factory=dict)
    count: int = 0
    sets: dict[int, str] = field(default_factory=dict)
    """How many shards their names say there are -> the first that says so."""

    @property
    def single(self) -> str | None:
        """The file that is all of the model, where there is one."""
        return self.singles[0] if self.singles else None

    def names(self) -> list[str]:
        """Every file of the group."""
        return [name for name in (*self.singles, self.index, *self.shards.values()) if name]


@dataclass(frozen=True, slots=True)
class Found:
    """Which files of a directory are its weights.

    Attributes:
        directory: absolute.
        files: relative to it.
        index: the file that lists them, and which tensor is in which of them; None without one.
        weight_map: what the index says.
        naming: stem and variant of the files' names.
        format: of the weights; None: as the first file is.
        ignored: other weight files, and why.
        notes: what was decided, one line each.
    """

    directory: Location
    files: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None
    naming: Naming = _UNNAMED
    format: str | None = None
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()


def find(path: Location, _: ReadingOptions) -> Found | None:
    """The weights in a directory, or None where it has none.

    Raises:
        CheckpointError: files are missing, or it is not clear which of them are the weights.
    """
    if (path / MINDSPORE_INDEX).is_file():
        weight_map = _weight_map(path / MINDSPORE_INDEX)
        files = tuple(dict.fromkeys(weight_map.values()))
        return Found(path, files, MINDSPORE_INDEX, weight_map, format="MindSpore safetensors")
    groups = _groups(path)
    return _chosen(groups, path) if groups else _loose(path)


def read(found: Found, reading: ReadingOptions) -> Checkpoint:
    """A checkpoint of one model.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
    """
    model = read_model(found, reading)
    whole = united(found.directory, [model], model.format)
    return _with_optimizer(whole) if reading["optimizer"] else whole


def _with_optimizer(checkpoint: Checkpoint) -> Checkpoint:
    """A model with the optimizer state that accelerate or transformers' trainer has put beside it."""
    place = next((path for name in _OPTIMIZERS if (path := checkpoint.directory / name).is_file()), None)
    if place is None:
        return checkpoint
    with located(place.place):
        content = load_torch(place).content
        known = moments.read(content, state_dict.optimizers(content), dict(checkpoint.items()))
    return replace(
        checkpoint,
        components=(*checkpoint.components, *moments.components(known.states)),
        files=(*checkpoint.files, place.place),
        notes=(*checkpoint.notes, *known.notes),
        texts={**checkpoint.texts, **moments.texts(known.states, known.settings)},
    )


def alone(file: WeightFile, _: ReadingOptions) -> Checkpoint:
    """One weight file as a checkpoint, with the config and the tokenizer beside it."""
    _require_whole(file)
    path = locate(file.path)
    parsed = parse_weight_name(path.name)
    naming = parsed.naming if parsed is not None and is_model(path.name) else _UNNAMED
    config = read_config(path.parent)
    component = Component("", naming.stem, file.tensors, naming.variant, config, unreadable=file.unreadable)
    beside = side_files.beside_file(path)
    return Checkpoint(
        path,
        file.format,
        (component, *moments.components(file.moments)),
        (file.path,),
        beside,
        metadata=file.metadata,
        notes=file.notes,
        texts=moments.texts(file.moments, file.settings),
        reported=file.reported,
        checksums=file.checksums,
    )


def read_model(found: Found, reading: ReadingOptions, name: str = "") -> Checkpoint:
    """A directory's weights, without what lies around them; `name` is that of the directory in its checkpoint."""
    directory = found.directory
    opened = _read_all([directory / file for file in found.files], reading)
    for file in opened:
        _require_whole(file)
    tensors = _tensors(opened, found) if len(opened) > 1 or found.index else opened[0].tensors
    unreadable = {name: why for file in opened for name, why in file.unreadable.items()}
    config = read_config(directory)
    return Checkpoint(
        directory,
        found.format or opened[0].format,
        (Component(name, found.naming.stem, tensors, found.naming.variant, config, unreadable=unreadable),),
        (*(file.path for file in opened), *([str(directory / found.index)] if found.index else [])),
        ignored=found.ignored,
        metadata={key: value for file in opened for key, value in file.metadata.items()},
        notes=(*found.notes, *dict.fromkeys(note for file in opened for note in file.notes)),
        reported=frozenset().union(*(file.reported for file in opened)),
        checksums=tuple(checksum for file in opened for checksum in file.checksums),
    )


def several(
    path: Location, directories: Mapping[str, Location], reading: ReadingOptions, form: str
) -> Checkpoint:
    """A checkpoint of a model for each of some directories, by their names, that has weights.

    Raises:
        CheckpointError: what is wrong with all of them.
    """
    models: list[Checkpoint] = []
    problems = Problems()
    for name, directory in directories.items():
        try:
            found = find(directory, reading)
            if found is not None:
                models.append(read_model(found, reading, name))
        except CheckpointError as error:
            problems += dict.fromkeys((error.headline, *error.problems))
    problems.report(f"components of the {form} cannot be read", file=str(path))
    if not models:
        raise CheckpointError("no weights are in this directory", file=str(path))
    kinds = ", ".join(dict.fromkeys(model.format for model in models))
    return united(path, models, f"{form} ({kinds})")


def united(path: Location, models: Sequence[Checkpoint], form: str) -> Checkpoint:
    """Models of one component each as one checkpoint, with the files around them."""
    files = tuple(file for model in models for file in model.files)
    copied, left = side_files.of_directory(path, files)
    reasons = {ignored.path: ignored for ignored in left}
    metadata: dict[str, Any] = {}
    for model in models:
        prefix = model.components[0].prefix
        metadata.update((prefix + key, value) for key, value in model.metadata.items())
        for ignored in model.ignored:
            reasons[prefix + ignored.path] = Ignored(prefix + ignored.path, ignored.reason)
    return Checkpoint(
        path,
        form,
        tuple(component for model in models for component in model.components),
        files,
        copied,
        tuple(reasons[name] for name in sorted(reasons)),
        metadata,
        tuple(note for model in models for note in model.notes),
        reported=frozenset().union(*(model.reported for model in models)),
        checksums=tuple(checksum for model in models for checksum in model.checksums),
    )


def is_model(name: str) -> bool:
    """Whether a file has a name that libraries give to a model's weights, or to their index."""
    parsed = parse_weight_name(name)
    return parsed is not None and parsed.naming.stem in STEMS


def read_config(directory: Location) -> dict[str, Any] | None:
    """The directory's `config.json`, or None where there is none or it is not an object."""
    path = directory / "config.json"
    return small.read_config(path) if path.is_file() else None


def read_config_file(place: str | Path | Location) -> dict[str, Any]:
    """The config at a path that the user gave.

    Raises:
        UsageError: there is no such file, or it does not hold a JSON object.
    """
    path = sought(place)
    path = path / "config.json" if path.is_directory() else path
    if not path.is_file():
        fault = "the config is not a regular file" if path.exists() else "there is no such config"
        raise UsageError(fault, file=str(path))
    config = small.read_config(path)
    if config is None:
        raise UsageError("it does not hold a JSON object", file=str(path))
    return config


def _groups(directory: Location) -> list[_Group]:
    groups: dict[Naming, _Group] = {}
    for path in directory.entries():
        found = parse_weight_name(path.name)
        # A pipe, or a link to nothing, is refused when it is opened: it must not pass for a model without weights.
        if found is None or path.is_directory():
            continue
        # A `.bin` of another stem may be anything: optimizer.bin, training_args.bin.
        if found.naming.stem not in STEMS and (
            found.naming.suffix == TORCH or run_files.what_it_is(path.name)
        ):
            continue
        group = groups.setdefault(found.naming, _Group(found.naming))
        if found.kind == "single":
            group.singles.append(path.name)
        elif found.kind == "index":
            group.index = path.name
        elif found.number is not None:
            group.sets.setdefault(found.count or 0, path.name)
            group.shards[found.number] = path.name
            group.count = max(group.count, found.count or 0)
    return list(groups.values())


def _chosen(groups: Sequence[_Group], directory: Location) -> Found:
    """The group to convert, and the others' files with the reason: known stems before unknown ones, files
    without a variant before variants, safetensors before torch.
    """

    def rank(group: _Group) -> tuple[int, bool, bool]:
        naming = group.naming
        stem = STEMS.index(naming.stem) if naming.stem in STEMS else len(STEMS)
        return stem, naming.variant is not None, naming.suffix != SAFETENSORS

    first, *rest = sorted(groups, key=rank)
    rivals = [group.names()[0] for group in rest if rank(group) == rank(first)]
    if not first.index:
        other = [name for name in first.sets.values() if name != first.names()[0]]
        more = [] if first.single else other
        rivals += [*first.singles[1:], *more, *_numbered(first, directory)]
    if rivals:
        raise _several([first.names()[0], *rivals], directory)
    reason = f"other weights; {first.index or first.single or first.names()[0]} is what is converted"
    ignored = tuple(Ignored(name, reason) for group in rest for name in group.names())
    if first.index and not (first.single and first.naming.stem in _SINGLE_FIRST):
        weight_map = _weight_map(directory / first.index, (first, *rest))
        files = tuple(dict.fromkeys(weight_map.values()))
        return Found(directory, files, first.index, weight_map, first.naming, None, ignored)
    files, note = _without_index(first, directory)
    return Found(directory, files, naming=first.naming, ignored=ignored, notes=(note,) if note else ())


def _numbered(group: _Group, directory: Location) -> list[str]:
    """The second and later models of a run of several, as accelerate numbers their files."""
    numbered = {
        re.compile(rf"{re.escape(PurePosixPath(name).stem)}_\d+{group.naming.suffix}")
        for name in group.singles
    }
    return [
        path.name for path in directory.entries() if any(pattern.fullmatch(path.name) for pattern in numbered)
    ]


def _several(names: Sequence[str], directory: Location) -> CheckpointError:
    return CheckpointError(
        f"several weight files that may each be the model: {listed(names)}",
        file=str(directory),
        hint="give the file itself",
    )


def _without_index(group: _Group, directory: Location) -> tuple[tuple[str, ...], str]:
    """A group's files, and what is to be said about them."""
    if group.single:
        beside = group.index or ("shards" if group.shards else "")
        return (
            group.single,
        ), f"{beside} beside {group.single}: left alone, as libraries do" if beside else ""
    absent = _absent(group)
    if absent or len(group.shards) != group.count:
        some = next(iter(group.shards.values()))
        which = f"shard {listed(absent)}" if len(absent) == 1 else f"shards {listed(absent)}"
        raise CheckpointError(
            f"{which} of {group.count} {'is' if len(absent) == 1 else 'are'} missing, and so is the index",
            file=str(directory / some),
            hint="download them again",
        )
    files = tuple(group.shards[number] for number in sorted(group.shards))
    return files, f"no index: all {group.count} shards are there and are taken together"


def _absent(group: _Group) -> Missing:
    """The numbers of shards that a group lacks. They count from 1 in all libraries, from 0 in some old files."""
    first = min(1, *group.shards)
    return Missing(group.shards, first + group.count, first)


def _weight_map(path: Location, groups: Iterable[_Group] = ()) -> dict[str, str]:
    """The index's map, its file names checked: plain relative paths that stay in the directory.

    What of the directory's `groups` is whole without the index is offered where that is of no use.
    """
    document = small.read_json(path, small.INDEX)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if weight_map is None and path.name == MINDSPORE_INDEX:
        weight_map = document
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index has no weight_map", file=str(path), hint="remove it, or download it again"
        )
    files = {file for file in weight_map.values() if isinstance(file, str)}
    inside = {file for file in files if stays_inside(file)}
    strange = [name for name, file in weight_map.items() if not isinstance(file, str) or file not in inside]
    if strange:
        raise CheckpointError(
            f"the index sends this tensor to {str(weight_map[strange[0]])[:200]!r}, which is not a file of the "
            "directory",
            file=str(path),
            tensor=strange[0],
            hint="do not trust this checkpoint",
        )
    missing = sorted(file for file in inside if not (path.parent / file).is_file())
    if missing:
        raise CheckpointError(
            f"the index names {count(len(missing), 'file')} that {'is' if len(missing) == 1 else 'are'} not there: "
            + listed(missing),
            file=str(path),
            hint=_instead(groups) or "download them again",
        )
    return weight_map


def _instead(groups: Iterable[_Group]) -> str:
    """What to do where an index names files that are not there, if a group is whole without it; else empty."""
    whole = (group for group in groups if group.single or (group.shards and not _absent(group)))
    group = next(whole, None)
    if group is None:
        return ""
    what = group.single or f"all {group.count} shards of {group.naming.base}{group.naming.suffix}"
    return f"the index is of another save: remove it, and {what} will be taken; or download what it names"


def _read_all(paths: Sequence[Location], reading: ReadingOptions) -> list[WeightFile]:
    """Open files side by side: on a network disk, reading a header is mostly waiting."""
    if len(paths) == 1:
        return [open_file(paths[0], reading)]
    opened = read_all(
        dict(enumerate(paths)), lambda path: open_file(path, reading), "shards of the checkpoint"
    )
    return list(opened.values())


def _tensors(opened: Sequence[WeightFile], found: Found) -> dict[str, Expression]:
    """All files' tensors. Raises CheckpointError where names clash or the index disagrees."""
    problems = Problems()
    if {"safetensors"} < {file.format for file in opened}:
        problems.append(Problem("the shards are of several formats", file=str(found.directory)))
    promised: dict[str, list[str]] = {}
    for name, where in (found.weight_map or {}).items():
        promised.setdefault(where, []).append(name)
    tensors: dict[str, Expression] = {}
    for own, file in zip(found.files, opened, strict=True):
        there = file.tensors.keys() | file.unreadable.keys()
        listing = set(there) if found.weight_map is None else set(promised[own])
        for message, names in (
            ("another shard has tensors of these names too: {}", file.tensors.keys() & tensors.keys()),
            ("lacks {count} tensors that the index has in it: {}", listing - there),
            ("has {count} tensors that the index does not have in it: {}", there - listing),
        ):
            if names:
                text = message.format(listed(sorted(names)), count=len(names))
                problems.append(Problem(text, file=file.path))
        tensors.update(file.tensors)
    problems.report(
        "the index disagrees with its shards" if found.index else "the shards do not fit together",
        file=str(found.directory / found.index if found.index else found.directory),
        hint="download the checkpoint again, or remove the index where the shards are right",
    )
    return tensors


def _loose(directory: Location) -> Found | None:
    """The one torch file of a directory without any name that a library gives."""
    found = [
        path
        for path in directory.entries()
        if path.suffix in suffixes()
        and path.is_file()
        and not run_files.what_it_is(path.name)
        and is_weights(path)
    ]
    if len(found) > 1:
        found = [path for path in found if not _is_own(path)] or found
    if len(found) > 1:
        raise _several([path.name for path in found], directory)
    return Found(directory, tuple(path.name for path in found)) if found else None


def _is_own(path: Location) -> bool:
    """Whether all that a file holds is a training program's own, such as the state of an optimizer."""
    try:
        content = load_torch(path).content
        return not state_dict.holds_weights(content)
    except CheckpointError:
        return False


_MEGATRON_RANK = "one rank of a model that Megatron has split"
_ONE_RANK = (
    "these ranks are not joined: let Megatron's tools/checkpoint/convert.py make one rank of them "
    "(--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1)"
)
_MEGATRON_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "model_parallel_size")


def _require_whole(file: WeightFile) -> None:
    """Refuse a file that says of itself that it holds one rank of several.

    Source: NVIDIA/Megatron-LM: megatron/training/checkpointing.py (`args` of every rank's file).
    """
    args = file.metadata.get("args")
    sizes = [args.get(name) for name in _MEGATRON_SIZES] if isinstance(args, dict) else []
    if any(type(size) is int and size > 1 for size in sizes):
        raise UsageError(f"this is {_MEGATRON_RANK}, by its own args", file=file.path, hint=_ONE_RANK)


FORMAT = Format(
    "model directory",
    "as transformers, diffusers and peft write it, with or without an index; files of any format that is read",
    find,
    read,
    alone,
    parts=(
        OneOfMany(re.compile(r".+[-_]\d{1,9}[-_]of[-_](?P<count>\d{1,9})(?!\d).*"), "one shard of several"),
        OneOfMany(
            re.compile(r".+\.index\.json"),
            "an index of shards",
            "give the directory that they are in: {directory}",
        ),
        OneOfMany(
            re.compile(r"consolidated\.(?P<rank>\d+)\.\w+"),
            "one of several model-parallel ranks in their original form",
            "these ranks are not joined: take the release in the form of transformers",
        ),
        OneOfMany(
            re.compile(r"mp_rank_(?P<rank>\d+(?:_\d+)*)"),
            _MEGATRON_RANK,
            _ONE_RANK,
            directories=True,
        ),
    ),
)
