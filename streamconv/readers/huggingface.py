"""A model directory as transformers, diffusers and peft write it: which files are its weights, and their sum.

File lists come from the index where there is one, never from the directory: repositories keep second copies
of the same weights under other names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from streamconv.errors import CheckpointError, Problem, UsageError, listed
from streamconv.ops import Expression
from streamconv.readers import files
from streamconv.readers.checkpoint import Component, Ignored
from streamconv.readers.files import WeightFile
from streamconv.readers.paths import stays_inside
from streamconv.readers.together import read_all
from streamconv.shard import STEMS, Naming, parse_weight_name

# Names that torch files have outside of libraries' own naming.
_LOOSE = (".pt", ".pth", ".ckpt", ".bin")

# Indexes and configs are small; what is larger is something else.
_MAX_JSON = 256 << 20

_MINDSPORE_INDEX = "param_name_map.json"
"""MindSpore's index: as Hugging Face's, or the map alone. Shards have names of any kind."""


@dataclass(slots=True)
class _Group:
    """The files of one naming in a directory."""

    naming: Naming
    single: str | None = None
    index: str | None = None
    shards: dict[int, str] = field(default_factory=dict)
    count: int = 0

    def names(self) -> list[str]:
        """Every file of the group."""
        return [name for name in (self.single, self.index, *self.shards.values()) if name]


@dataclass(frozen=True, slots=True)
class Model:
    """A directory's weights.

    Attributes:
        component: ready for a checkpoint.
        files: what was read, weights and index, absolute.
        format: of the weights.
        ignored: other weight files in the directory, relative to it, and why.
    """

    component: Component
    files: tuple[str, ...]
    format: str
    ignored: tuple[Ignored, ...]
    metadata: dict[str, Any]
    notes: tuple[str, ...]


def read_model(directory: Path, name: str = "", root: str | None = None) -> Model | None:
    """The model in a directory, or None where it has no weights.

    Args:
        directory: absolute.
        name: what the component is called: the directory relative to its checkpoint.
        root: see `files.open_file`.

    Raises:
        CheckpointError: the weights are damaged, incomplete, or not to be told apart.
    """
    if (directory / _MINDSPORE_INDEX).is_file():
        return _mindspore(directory, name, root)
    groups = _groups(directory)
    if not groups:
        return _loose(directory, name, root)
    chosen, ignored = _choose(groups, directory)
    shards, notes = _shards(chosen, directory)
    read = _read_all([str(directory / file) for file in shards.files], root)
    tensors = _united(read, shards, directory)
    index = (str(directory / shards.index),) if shards.index else ()
    metadata: dict[str, Any] = {}
    for file in read:
        metadata.update(file.metadata)
    return Model(
        Component(name, chosen.naming.stem, tensors, chosen.naming.variant, read_config(directory)),
        (*(file.path for file in read), *index),
        read[0].format,
        tuple(ignored),
        metadata,
        (*notes, *dict.fromkeys(note for file in read for note in file.notes)),
    )


def _mindspore(directory: Path, name: str, root: str | None) -> Model:
    """The files that MindSpore's index lists."""
    path = directory / _MINDSPORE_INDEX
    weight_map = _weight_map(path)
    files_listed = tuple(dict.fromkeys(weight_map.values()))
    shards = _Shards(files_listed, _MINDSPORE_INDEX, weight_map)
    read = _read_all([str(directory / file) for file in shards.files], root)
    tensors = _united(read, shards, directory)
    component = Component(name, STEMS[0], tensors, config=read_config(directory))
    return Model(component, (*(file.path for file in read), str(path)), "MindSpore safetensors", (), {}, ())


def read_config(directory: Path) -> dict[str, Any] | None:
    """The directory's `config.json`, or None where there is none that is an object."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    config = _json(path)
    return config if isinstance(config, dict) else None


def read_config_file(path: Path) -> dict[str, Any]:
    """A config that was named.

    Raises:
        UsageError: there is no such file, or it holds no JSON object.
    """
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError("there is no such config", file=str(path))
    config = _json(path)
    if not isinstance(config, dict):
        raise UsageError("it holds no JSON object", file=str(path))
    return config


@dataclass(frozen=True, slots=True)
class _Shards:
    """Which files to read; where an index says so, which tensor is in which of them."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None


def _groups(directory: Path) -> list[_Group]:
    groups: dict[Naming, _Group] = {}
    for path in sorted(directory.iterdir()):
        found = parse_weight_name(path.name)
        if found is None or not path.is_file():
            continue
        # A `.bin` of another stem may be anything: optimizer.bin, training_args.bin.
        if found.naming.format == "torch" and found.naming.stem not in STEMS:
            continue
        group = groups.setdefault(found.naming, _Group(found.naming))
        if found.kind == "single":
            group.single = path.name
        elif found.kind == "index":
            group.index = path.name
        elif found.number is not None:
            group.shards[found.number] = path.name
            group.count = max(group.count, found.count or 0)
    return list(groups.values())


def _choose(groups: Sequence[_Group], directory: Path) -> tuple[_Group, list[Ignored]]:
    """The group to convert, and the others' files with the reason: known stems before unknown ones, files
    without a variant before variants, safetensors before torch.
    """

    def rank(group: _Group) -> tuple[int, bool, bool]:
        naming = group.naming
        stem = STEMS.index(naming.stem) if naming.stem in STEMS else len(STEMS)
        return stem, naming.variant is not None, naming.format != "safetensors"

    ordered = sorted(groups, key=rank)
    first, rest = ordered[0], ordered[1:]
    rivals = [group for group in rest if rank(group) == rank(first)]
    if rivals:
        names = [group.names()[0] for group in (first, *rivals)]
        raise CheckpointError(
            f"several weight files that may each be the model: {listed(names)}",
            file=str(directory),
            hint="give the file itself",
        )
    chosen = first.index or first.single or first.names()[0]
    return first, [
        Ignored(name, f"other weights; {chosen} is what is converted")
        for group in rest
        for name in group.names()
    ]


def _shards(group: _Group, directory: Path) -> tuple[_Shards, list[str]]:
    if group.index:
        weight_map = _weight_map(directory / group.index)
        return _Shards(tuple(dict.fromkeys(weight_map.values())), group.index, weight_map), []
    if group.single:
        notes = [f"shards beside {group.single} are left alone"] if group.shards else []
        return _Shards((group.single,)), notes
    # Numbered from 1 in all libraries, from 0 in some old files.
    first = min(group.shards)
    absent = [number for number in range(first, first + group.count) if number not in group.shards]
    if absent or first > 1 or len(group.shards) != group.count:
        some = next(iter(group.shards.values()))
        raise CheckpointError(
            f"shards {listed(absent)} of {group.count} are missing, and so is the index",
            file=str(directory / some),
            hint="download them again",
        )
    files = tuple(group.shards[number] for number in sorted(group.shards))
    return _Shards(files), [f"no index: all {group.count} shards are there and are taken together"]


def _weight_map(path: Path) -> dict[str, str]:
    """The index's map, its file names checked: plain relative paths that stay in the directory."""
    document = _json(path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if weight_map is None and path.name == _MINDSPORE_INDEX:
        weight_map = document
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index has no weight_map", file=str(path), hint="remove it, or download it again"
        )
    inside: dict[str, bool] = {}
    for name, file in weight_map.items():
        if isinstance(file, str) and file not in inside:
            inside[file] = stays_inside(file)
        if not isinstance(file, str) or not inside[file]:
            raise CheckpointError(
                f"the index sends this tensor to {str(file)[:200]!r}, which is no file of the directory",
                file=str(path),
                tensor=name,
                hint="do not trust this checkpoint",
            )
    missing = sorted(file for file in inside if not (path.parent / file).is_file())
    if missing:
        raise CheckpointError(
            f"the index names {len(missing)} files that are not there: {listed(missing)}",
            file=str(path),
            hint="download them again",
        )
    return weight_map


def _read_all(paths: Sequence[str], root: str | None) -> list[WeightFile]:
    """Open files side by side: on a network disk, headers are waiting."""
    if len(paths) == 1:
        return [files.open_file(paths[0], root)]
    places = {path: path for path in paths}
    opened = read_all(places, lambda path: files.open_file(path, root), "shards of the checkpoint")
    return list(opened.values())


def _united(read: Sequence[WeightFile], shards: _Shards, directory: Path) -> dict[str, Expression]:
    """All files' tensors. Raises CheckpointError where names clash or the index tells something else."""
    problems: list[Problem] = []
    formats = Counter(file.format for file in read)
    if {"safetensors"} < set(formats):
        problems.append(Problem("the shards are of several formats", file=str(directory)))
    promised: dict[str, list[str]] = {}
    for name, where in (shards.weight_map or {}).items():
        promised.setdefault(where, []).append(name)
    tensors: dict[str, Expression] = {}
    for file in read:
        twice = [name for name in file.tensors if name in tensors]
        if twice:
            problems.append(
                Problem(f"another shard has tensors of these names too: {listed(twice)}", file=file.path)
            )
        tensors.update(file.tensors)
        if shards.weight_map is not None:
            own = Path(file.path).relative_to(directory).as_posix()
            problems += _disagreements(file, promised[own])
    if problems:
        subject = "the index disagrees with its shards" if shards.index else "the shards do not fit together"
        raise CheckpointError(
            subject,
            file=str(directory / shards.index) if shards.index else str(directory),
            hint="download the checkpoint again, or remove the index where the shards are right",
            problems=problems,
        )
    return tensors


def _disagreements(file: WeightFile, promised: Sequence[str]) -> Iterable[Problem]:
    absent = [name for name in promised if name not in file.tensors]
    unlisted = sorted(file.tensors.keys() - promised)
    if absent:
        yield Problem(
            f"lacks {len(absent)} tensors that the index has in it: {listed(sorted(absent))}", file=file.path
        )
    if unlisted:
        yield Problem(
            f"has {len(unlisted)} tensors that the index does not have in it: {listed(unlisted)}",
            file=file.path,
        )


def _loose(directory: Path, name: str, root: str | None) -> Model | None:
    """The one torch file of a directory without any name that a library gives."""
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.suffix in _LOOSE and path.is_file() and files.is_weights(str(path))
    ]
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"several weight files that may each be the model: {listed(path.name for path in found)}",
            file=str(directory),
            hint="give the file itself",
        )
    (path,) = found
    file = files.open_file(str(path), root)
    component = Component(name, STEMS[0], file.tensors, config=read_config(directory))
    return Model(component, (file.path,), file.format, (), dict(file.metadata), file.notes)


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"larger than {_MAX_JSON} bytes, which no such file is", file=str(path))
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}", file=str(path), hint="download it again"
        ) from error
