"""A format from outside the package: a directory with `toy.txt`, lines of a name, a count and a file of F32."""

from __future__ import annotations

from streamconv.dtypes import by_name
from streamconv.errors import CheckpointError
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.readers.format import Format
from streamconv.readers.numbers import natural
from streamconv.readers.paths import stays_inside
from streamconv.readers.small import INDEX
from streamconv.tensor import Extent, Stored, TensorSpec


def find(path, _):
    index = path / "toy.txt"
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
    return Checkpoint(found.parent, FORMAT.name, (Component("", "model", tensors),), files)


FORMAT = Format("toy", "a directory with `toy.txt`", find, read, signs={"toy.txt": "a toy"})
