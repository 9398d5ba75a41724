"""What every writer produces: where in a file each byte goes, known from specs alone.

    1. A writer turns targets into a `FileLayout`; no tensor byte has been read yet.
    2. The literals are written. From now on tensor bytes may arrive in any order, by anyone.
    3. When all are in place, each patch is computed from the file's own bytes and written.
    4. The file is then complete: literals, placements and patches cover all of `size`.

A layout is plain data of names, numbers and bytes, so that a plan can be kept as JSON.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from streamconv.errors import Problem
from streamconv.tensor import TensorSpec

# File offsets are signed 64-bit numbers on every system, and so are torch's sizes and strides.
LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to be written.

    Attributes:
        storage: targets with an equal storage hold equal bytes if dtype and shape agree too. A format
            that can keeps them once. None for a tensor that is tied to no other.
    """

    spec: TensorSpec
    storage: Hashable | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """The row-major bytes of tensor `name`, or `length` of them from byte `start`, belong at byte `offset` of the file.

    Tied tensors may have one place: whoever writes either writes the same bytes. A format that cuts large tensors
    has several places for one, each of whole elements.
    """

    name: str
    offset: int
    length: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are known before any tensor is: headers, padding, directories."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Patch:
    """Four bytes at `offset`: the CRC-32 (zip's and zlib's) of bytes [start, start + length).

    The literals hold zeros where patches go.

    Attributes:
        name: what is in the range, for messages.
        kind: what is computed; little-endian where nothing is said.
    """

    name: str
    offset: int
    kind: typing.Literal["crc32", "crc32, big-endian"]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A whole file of `size` bytes. Placements are ordered by offset, and so are literals.

    Patches over one range are neighbours.
    """

    size: int
    placements: tuple[Placement, ...]
    literals: tuple[Literal, ...]
    patches: tuple[Patch, ...] = ()


Plain = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None
"""Values that a file may hold besides tensors."""


@dataclass(frozen=True, slots=True)
class Wrapping:
    """A file in which the tensors are not alone: they lie under a key, with others beside it.

    Attributes:
        path: of the one file, relative to the component.
        under: the key; empty: the file is the dictionary of tensors itself.
        prefix: put before the tensors' names.
        before: what stands before it, by key.
        texts: other files that go with it, by path.
    """

    path: str
    under: str
    prefix: str = ""
    before: Mapping[str, Plain] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class About:
    """What a writer knows of a file besides its tensors; it ignores what its format cannot hold.

    Attributes:
        name: the file's final name, without directories.
        metadata: text to store along.
        wrapping: what is around the tensors.
        crc: whether the file ends with a checksum of all of it.
    """

    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    wrapping: Wrapping | None = None
    crc: bool = False


BARE = About()
"""Of a file that holds tensors and nothing else."""


class Writer(Protocol):
    """The two functions of a format's module."""

    def check(self, spec: TensorSpec) -> Problem | None:
        """Why the format cannot hold such a tensor, or None where it can. What no format can hold is refused anyway."""

    def layout(self, tensors: Sequence[Target], about: About = BARE) -> FileLayout:
        """Plan a file of tensors that `problems` has nothing against.

        Args:
            tensors: in the order that the format may keep.
            about: what else is known of the file.

        Raises:
            PlanError: the format cannot hold them together.
        """


def problems(writer: Writer, specs: Sequence[TensorSpec]) -> list[Problem]:
    """All that keeps a format from holding tensors, each for itself."""
    found = [problem for spec in specs if (problem := writer.check(spec) or _of_any_format(spec))]
    if not found and sum(spec.nbytes for spec in specs) > LARGEST:
        return [Problem("the tensors together are beyond 64-bit sizes")]
    return found


def _of_any_format(spec: TensorSpec) -> Problem | None:
    """What no format can hold: names that are not Unicode text, sizes beyond 64 bits, split bytes."""
    try:
        spec.name.encode()
    except UnicodeEncodeError:
        return Problem(
            "the name is not valid Unicode (it has a lone surrogate)",
            tensor=ascii(spec.name)[1:-1],
            hint="--rename it",
        )
    if min(spec.shape, default=0) < 0:
        return Problem(f"negative dimension in shape {list(spec.shape)}", tensor=spec.name)
    # Empty dimensions count as one here, because strides do not know them.
    if math.prod(filter(None, spec.shape)) * spec.dtype.bits // 8 > LARGEST:
        return Problem(f"shape {list(spec.shape)} of {spec.dtype} is beyond 64-bit sizes", tensor=spec.name)
    if math.prod(spec.shape) * spec.dtype.bits % 8:
        return Problem(
            f"shape {list(spec.shape)} of {spec.dtype} does not fill whole bytes",
            tensor=spec.name,
            hint=f"{8 // math.gcd(8, spec.dtype.bits)} elements share bytes and must come together",
        )
    return None
