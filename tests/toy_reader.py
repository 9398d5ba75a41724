"""A format from outside the package: a directory with `toy.txt`, lines of a name, a count and a file of F32.

`OPTION` is one of its own: another list than that.
"""

from __future__ import annotations

from typing import Annotated

from streamconv.dtypes import by_name
from streamconv.errors import CheckpointError
from streamconv.options.option import Option
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.readers.format import Format
from streamconv.readers.numbers import natural
from streamconv.readers.paths import stays_inside
from streamconv.readers.small import INDEX
from streamconv.tensor import Extent, Stored, TensorSpec

TOYS = "a directory of toys"
OPTION = Annotated[
    str | None,
    Option(None, "which list of toys to take", otherwise="toy.txt", metavar="NAME", source=(TOYS,)),
]


def find(path, reading):
    index = path / (reading.get("toy_list") or "toy.txt")
    return index if index.is_file() else None


def read(found, _):
    tensors = {}
    for line in found.read_text(INDEX).splitlines():
        name, count, file = line.split(" ", 2)
        size = natural(int(count)) if count.isdecimal() else None
        if size is None or not stays_inside(file):
            raise CheckpointError("a line is not understood", file=found.place, tensor=name)
        extent = Extent((found.parent / file).place, 0, 4 * size)
        tensors[name] = Stored(TensorSpec(name, by_name("F32"), (size,)), (extent,))
    files = tuple(extent.file for tensor in tensors.values() for extent in tensor.extents)
    return Checkpoint(
        found.parent, FORMAT.name, (Component("", "model", tensors),), files, reported=frozenset({TOYS})
    )


FORMAT = Format("toy", "a directory with `toy.txt`", find, read, signs={"toy.txt": "a toy"})
