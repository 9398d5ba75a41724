"""Arrays as stored tensors, and expressions over them as a worker writes them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from streamconv import dtypes
from streamconv.execution.execute import Settings, Worker, WorkItem
from streamconv.ops import Expression
from streamconv.tensor import Extent, Stored, TensorSpec

Array = numpy.ndarray[Any, Any]


def as_codes(array: Array) -> Array:
    """Bit patterns, which NumPy copies by any strides; of what is wider than its integers, the bytes."""
    return array.view(f"u{array.itemsize}") if array.itemsize <= 8 else array


def same_bytes(left: Array, right: Array) -> bool:
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and left.tobytes() == numpy.ascontiguousarray(as_codes(right)).tobytes()
    )


def same_values(left: Array, right: Array) -> bool:
    """Equal bits, but for which not-a-number it is."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    undefined = numpy.isnan(left.astype(numpy.float64)) & numpy.isnan(right.astype(numpy.float64))
    return bool(((as_codes(left) == as_codes(right)) | undefined).all())


@dataclass
class Sources:
    """Tensors in one file, with gaps between them. Where they have seams, in extents that are out of order."""

    path: Path

    def store(self, array: Array, dtype: str, name: str = "x", seams: Sequence[int] = ()) -> Stored:
        """One more; `seams` are the bytes at which an extent ends."""
        raw = numpy.ascontiguousarray(as_codes(array)).tobytes()
        edges = [0, *sorted(min(seam, len(raw)) for seam in seams), len(raw)]
        extents = []
        with self.path.open("ab") as file:
            for start, stop in reversed(list(itertools.pairwise(edges))):
                file.write(b"gap")
                if stop > start:
                    extents.append(Extent(str(self.path), file.tell(), stop - start))
                    file.write(raw[start:stop])
        return Stored(TensorSpec(name, dtypes.by_name(dtype), array.shape), tuple(reversed(extents)))

    def written(
        self, expression: Expression, arena: int = 1 << 20, cuts: Sequence[int] = (), order: int = 0
    ) -> Array:
        """What a worker makes of an expression.

        Args:
            expression: over tensors of these sources.
            arena: the worker's, in bytes.
            cuts: elements at which a work item ends; taken modulo how many there are.
            order: seed of the order in which the items are done.
        """
        spec = expression.spec
        target = self.path.with_name("target")
        target.write_bytes(b"\xa5" * spec.nbytes)  # no value of any test: what is left out shows
        edges = sorted({0, spec.numel, *(cut % (spec.numel + 1) for cut in cuts)})
        size = spec.dtype.itemsize
        items = [
            WorkItem(index, spec.name, expression, start * size, stop * size, str(target), 0)
            for index, (start, stop) in enumerate(itertools.pairwise(edges))
        ]
        worker = Worker(Settings(arena))
        try:
            worker.run([items[index] for index in numpy.random.default_rng(order).permutation(len(items))])
        finally:
            worker.close()
        raw = numpy.fromfile(target, numpy.uint8)
        return raw.view(spec.dtype.numpy).reshape(spec.shape)


@contextmanager
def sources() -> Iterator[Sources]:
    """None yet."""
    with tempfile.TemporaryDirectory() as directory:
        yield Sources(Path(directory, "source"))
