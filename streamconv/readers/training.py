"""What readers of training checkpoints give: the model, and the optimizer state per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.errors import listed
from streamconv.ops import Expression
from streamconv.options.records import ReadingOptions, Trait
from streamconv.readers import moments, side_files
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.readers.huggingface import is_model, read_config
from streamconv.shard import STEMS
from streamconv.storage.location import Location
from streamconv.tensor import Checksum


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model out of a training run.

    Attributes:
        tensors: by name.
        moments: the optimizer's state (`exp_avg`, ...) -> parameter -> tensor of the parameter's shape.
        scalars: the optimizer's settings and its step; plain JSON values.
        metadata: what else the files say; plain JSON values.
        files: every file that was read, absolute.
        notes: one line each.
        checksums: what the files say of their own bytes.
        unreadable: tensors that are there and cannot be read, by name, and why.
        reported: what the source has that options apply to.
    """

    tensors: Mapping[str, Expression]
    moments: Mapping[str, Mapping[str, Expression]] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    checksums: tuple[Checksum, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    reported: frozenset[str] = frozenset()


def checkpoint(
    root: Location, model: TrainedModel, form: str, reading: ReadingOptions, *reported: Trait
) -> Checkpoint:
    """A training run's model, with the config and the tokenizer that a trainer has put beside it.

    Args:
        root: the file, or the directory with the config.
        model: what a reader has read.
        form: the name of the format.
        reading: whether the optimizer state is wanted.
        reported: what options apply to.
    """
    notes = list(model.notes)
    if model.moments and not reading["optimizer"]:
        notes.append(f"the optimizer state ({', '.join(model.moments)}) is left out (--optimizer)")
        model = replace(model, moments={})
    directory = root if root.is_directory() else root.parent
    beside = [path.name for path in root.entries() if is_model(path.name)] if root.is_directory() else []
    if beside:
        notes.append(f"{listed(beside, 1)} beside the save: not read; to convert that, give the file itself")
    return Checkpoint(
        root,
        form,
        (
            Component(
                "", STEMS[0], model.tensors, config=read_config(directory), unreadable=model.unreadable
            ),
            *moments.components(model.moments),
        ),
        model.files,
        side_files.beside_training(directory),
        metadata=model.metadata,
        notes=tuple(notes),
        texts=moments.texts(model.moments, model.scalars),
        reported=model.reported.union(reported),
        checksums=model.checksums,
    )
