"""The plan: a conversion as data. What is in it decides every byte of the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import Problem
from streamconv.ops import Exactness, Expression, exactness
from streamconv.options.fields import fields
from streamconv.options.records import PlanOptions
from streamconv.storage.location import locate
from streamconv.storage.resolve import scheme
from streamconv.storage.roles import State
from streamconv.tensor import Checksum, TensorSpec
from streamconv.writers.layout import FileLayout


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that the plan reads, as it was when the plan was made.

    Attributes:
        path: absolute.
        size: bytes.
        identity: changes whenever the content does; see `storage.roles.State`.
    """

    path: str
    size: int
    identity: int | str


Targets = Mapping[str, tuple[tuple[str, ...], Expression]]
"""Tensors on their way to the output: name -> (the names in the source of what it reads, what it is)."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        sources: the names in the source of the tensors that its expression reads.
        expression: what its bytes are; `expression.spec` is the target's name, dtype and shape.
        file: position in `Plan.outputs`.
        offset: byte of that file at which the tensor's data begins.
    """

    sources: tuple[str, ...]
    expression: Expression
    file: int
    offset: int

    @property
    def spec(self) -> TensorSpec:
        """The target's name, dtype and shape."""
        return self.expression.spec

    @property
    def exactness(self) -> Exactness:
        """How much of the source survives in it."""
        return exactness(self.expression)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One weight file of the output: its path relative to the destination, and its layout."""

    path: str
    layout: FileLayout


@dataclass(frozen=True, slots=True)
class TextFile:
    """A small file that the plan makes: an index, a changed config. Written after all weights."""

    path: str
    content: str


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is copied as it is, from an absolute path to one relative to the destination.

    `size` and `identity` are what they were when the plan was made.
    """

    source: str
    path: str
    size: int
    identity: int | str

    @property
    def is_marker(self) -> bool:
        """Whether its presence tells loaders that all the rest is there."""
        return self.path.rpartition("/")[2] == "model_index.json"


@dataclass(frozen=True, slots=True)
class Check:
    """Two expressions that must be equal for the plan to be right, and what it would mean if not.

    `tolerance` is by how much floating-point elements may differ, relative to themselves; 0: not in a bit.
    """

    meaning: str
    left: Expression
    right: Expression
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source tensor that leads to no target, and why."""

    name: str
    reason: str


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


@dataclass(frozen=True, repr=False)
class Plan:
    """A checked conversion (see DESIGN: a table that says where every byte of the output comes from).

    Attributes:
        source: absolute path of what is converted.
        source_format, target_format: in words (`torch zip`, `safetensors`).
        files: everything the plan reads tensor bytes from.
        tensors: in the order of their files and offsets.
        outputs: weight files.
        texts, side_files: the other files of the output.
        checks: what is proven while the conversion runs.
        checksums: what source files say of their own bytes, which a run may be asked to hold against them.
        dropped: source tensors without a target.
        notes: what was decided and a user should know, one line each.
        arguments: the options that the plan was made with, as text, to reproduce it.
    """

    source: str
    source_format: str
    target_format: str
    files: tuple[SourceFile, ...]
    tensors: tuple[PlannedTensor, ...]
    outputs: tuple[OutputFile, ...]
    texts: tuple[TextFile, ...] = ()
    side_files: tuple[SideFile, ...] = ()
    checks: tuple[Check, ...] = ()
    checksums: tuple[Checksum, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        held = f"{len(self.tensors):,} tensors, {self.bytes_to_write:,} bytes"
        return f"<Plan from {self.source} to {self.target_format}: {held}, files: {len(self.outputs):,}>"

    @property
    def bytes_to_write(self) -> int:
        """Size of all output files together."""
        return (
            sum(output.layout.size for output in self.outputs)
            + sum(side.size for side in self.side_files)
            + sum(len(text.content.encode()) for text in self.texts)
        )

    @property
    def trial(self) -> str | None:
        """The option that takes a few layers only; None where it takes all."""
        return trial_of(self.arguments)

    def written(self) -> Iterator[PlannedTensor]:
        """The tensors that take bytes: of several names on one place in a file, the first."""
        seen: set[tuple[int, int]] = set()
        for tensor in self.tensors:
            place = (tensor.file, tensor.offset)
            if tensor.spec.nbytes and place not in seen:
                seen.add(place)
                yield tensor


def trial_of(arguments: Mapping[str, Any]) -> str | None:
    """The option that takes a few layers only, as it is given on the command line; None where there is none."""
    given = ((name, arguments.get(name)) for name in ("try_layers", "layers"))
    flags = fields(PlanOptions)
    return next((f"{flags[name].flag} {value}" for name, value in given if value is not None), None)


def rewritten(files: Iterable[SourceFile]) -> set[str]:
    """The paths of those files that are there, and not as they were when the plan was made."""
    found = set()
    for file in files:
        with suppress(OSError):  # what cannot be reached is no other file
            state = locate(file.path).state()
            if (state.size, state.identity) != (file.size, file.identity):
                found.add(file.path)
    return found


def known_states(plan: Plan) -> dict[str, State]:
    """What a plan says of its files that are not on the local disk; see `Source.reopen`."""
    return {file.path: State("file", file.size, file.identity) for file in plan.files if scheme(file.path)}


def changed(files: Iterable[SourceFile | SideFile]) -> list[Problem]:
    """What happened to files since the plan was made; empty where they are as they were."""
    problems = []
    for file in files:
        path = file.source if isinstance(file, SideFile) else file.path
        try:
            state = locate(path).state()
        except OSError as error:
            problems.append(Problem(f"cannot be found any more: {error.strerror}", file=path))
            continue
        if (state.size, state.identity) != (file.size, file.identity):
            problems.append(Problem("it was written to since the plan was made", file=path))
    return problems
