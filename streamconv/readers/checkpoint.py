"""A checkpoint as its reader found it: names, tensors, configs and side files; no tensor data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamconv.errors import CheckpointError, Problem
from streamconv.ops import Expression
from streamconv.options.records import Trait
from streamconv.shard import ADAPTER_STEMS
from streamconv.storage.location import Location
from streamconv.tensor import Checksum


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What one file holds.

    Attributes:
        path: of the file.
        format: its name in `files.FORMATS`.
        tensors: by name, in the file's order.
        metadata: what it holds besides tensors.
        notes: what was decided and a user should know, one line each.
        checksums: what the file says of its own bytes.
        unreadable: tensors that are there and cannot be read, by name, and why.
        reported: what it has that options apply to.
        moments: the optimizer's state (`exp_avg`, ...) -> parameter -> tensor, where that is wanted.
        settings: the optimizer's; plain JSON values.
    """

    path: str
    format: str
    tensors: Mapping[str, Expression]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checksums: tuple[Checksum, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    reported: frozenset[str] = frozenset()
    moments: Mapping[str, Mapping[str, Expression]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Component:
    """One model of a checkpoint: the only one, or one directory of a diffusers pipeline.

    Attributes:
        directory: relative to the checkpoint's directory, with `/`; empty for the only one.
        stem: what target files of this component are called, as its library names them:
            `model` (transformers), `diffusion_pytorch_model` (diffusers), `adapter_model` (peft).
        variant: the file name variant (`fp16` in `model.fp16.safetensors`), or None.
        tensors: name -> tensor, in the source's own order.
        config: the component's parsed `config.json`, or None where there is none.
        kind: a model, or optimizer state per parameter. Optimizer state goes through no recipe, and keeps its
            dtype unless another is asked for by name.
        unreadable: tensors that are there and cannot be read, by name, and why. They are in the way of what would
            take them, and of nothing else.
        lacking: tensors that are not there and without which it is not whole, by name, and why. They are in the way
            of it unless it is left out.
        one_file: whether what loads it takes one file of it, with no config, and no shards.
        copies: averaged copy -> the weight that it is one of, both among the tensors.
        numbered: what is to be called otherwise than it is, because only some layers are taken, and what.
    """

    directory: str
    stem: str
    tensors: Mapping[str, Expression]
    variant: str | None = None
    config: Mapping[str, Any] | None = None
    kind: Literal["model", "optimizer"] = "model"
    unreadable: Mapping[str, str] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    one_file: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    numbered: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """What stands before names and paths of the component among those of the whole checkpoint."""
        return f"{self.directory}/" if self.directory else ""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A file of the source that no output comes from, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Checkpoint(Mapping[str, Expression]):
    """An ordered mapping from name to tensor over all components, with what came along.

    In a checkpoint of several components a name is `DIRECTORY/NAME`.

    Attributes:
        path: the file or directory that was opened, absolute.
        format: what the reader recognised, in words for people (`safetensors`, `torch zip`).
        components: in the order of their directories.
        files: absolute paths of all files that tensor bytes or names come from.
        side_files: paths relative to `directory` of files to copy along (config, tokenizer, ...).
        ignored: files that are neither, with the reason.
        metadata: what the files hold besides tensors, by dotted name.
        notes: what the reader decided and a user should know, one line each.
        texts: path -> content of files that the reader makes, to be written beside the output.
        reported: what options apply to, as far as components do not show it.
        checksums: what files say of their own bytes.
    """

    path: Location
    format: str
    components: tuple[Component, ...]
    files: tuple[str, ...]
    side_files: tuple[str, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    reported: frozenset[str] = frozenset()
    checksums: tuple[Checksum, ...] = ()

    @property
    def traits(self) -> frozenset[str]:
        """What there is that options apply to."""
        found = {
            Trait.OPTIMIZER: len(self.models) < len(self.components),
            Trait.ONE_MODEL: len(self.models) == 1,
            Trait.LORA: any(map(holds_factors, self.models)),
        }
        return self.reported.union(trait for trait, holds in found.items() if holds)

    @property
    def models(self) -> tuple[Component, ...]:
        """The components that are models."""
        return tuple(component for component in self.components if component.kind == "model")

    @property
    def directory(self) -> Location:
        """The directory that `side_files` and components are relative to."""
        return self.path if self.path.is_directory() else self.path.parent

    @property
    def unreadable(self) -> dict[str, str]:
        """Tensors of all components that cannot be read, by name, and why."""
        return {
            component.prefix + name: why
            for component in self.components
            for name, why in component.unreadable.items()
        }

    def require_readable(self) -> None:
        """Refuse a checkpoint that has tensors which cannot be read, where all of them matter.

        Raises:
            CheckpointError: a problem for each.
        """
        problems = [Problem(why, tensor=name) for name, why in self.unreadable.items()]
        if problems:
            raise CheckpointError("tensors that cannot be read", file=str(self.path), problems=problems)

    def __getitem__(self, name: str) -> Expression:
        for component in self.components:
            own = name.removeprefix(component.prefix)
            if name == component.prefix + own and own in component.tensors:
                return component.tensors[own]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        for component in self.components:
            yield from (component.prefix + name for name in component.tensors)

    def __len__(self) -> int:
        return sum(len(component.tensors) for component in self.components)


def holds_factors(component: Component) -> bool:
    """Whether a model has factors of a LoRA of peft among its tensors, and is no file of an adapter."""
    if component.stem in ADAPTER_STEMS:
        return False
    around = ("base_model.model.", ".base_layer.")
    factors = any(".lora_A." in name or ".lora_embedding_A" in name for name in component.tensors)
    return factors and any(word in name for name in component.tensors for word in around)
