"""How two checkpoints differ, by header and by value, in bounded memory."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy

from streamconv.dtypes import DType
from streamconv.execution import memory
from streamconv.execution.execute import Settings, Worker
from streamconv.execution.memory import Budget
from streamconv.ops import Expression
from streamconv.ops.arrays import Array
from streamconv.readers.checkpoint import Checkpoint
from streamconv.storage.resolve import scheme
from streamconv.tensor import TensorSpec

# Elements of each side in memory at once; both are widened to up to sixteen bytes to be subtracted.
_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """One name in two checkpoints.

    Attributes:
        name: in either of them.
        left, right: its specs; None where a side lacks it.
        equal: same dtype, shape and bytes.
        differing: elements that are not equal, or None where values were not compared.
        max_abs, max_rel: the largest absolute and relative difference of values, or None.
        note: in words, where the numbers do not say it.
    """

    name: str
    left: TensorSpec | None
    right: TensorSpec | None
    equal: bool
    differing: int | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every name of two checkpoints, in the left one's order, then what only the right one has."""

    rows: tuple[ComparedTensor, ...]

    @property
    def equal(self) -> bool:
        """Whether the two hold the same tensors."""
        return all(row.equal for row in self.rows)


def compare(left: Checkpoint, right: Checkpoint, budget: Budget, *, values: bool = True) -> Comparison:
    """Compare two checkpoints of any formats: names, dtypes, shapes and, with `values`, elements.

    Raises:
        CheckpointError: one of them has tensors that cannot be read.
    """
    for side in (left, right):
        side.require_readable()
    names = dict.fromkeys((*left, *right))
    with closing(Worker(_settings(left, right, budget))) as worker:
        return Comparison(tuple(_row(name, left, right, worker if values else None) for name in names))


def _settings(left: Checkpoint, right: Checkpoint, budget: Budget) -> Settings:
    distant = any(scheme(side.path.place) for side in (left, right))
    return Settings(budget.arena, ahead=memory.ahead(budget.arena) if distant else 0)


def _row(name: str, left: Checkpoint, right: Checkpoint, worker: Worker | None) -> ComparedTensor:
    a, b = left.get(name), right.get(name)
    if a is None or b is None:
        left_spec, right_spec = (side.spec if side is not None else None for side in (a, b))
        note = f"only in the {'left' if b is None else 'right'} one"
        return ComparedTensor(name, left_spec, right_spec, equal=False, note=note)
    row = partial(ComparedTensor, name, a.spec, b.spec)
    same_dtype = a.spec.dtype == b.spec.dtype
    packed = a.spec.dtype.packed or b.spec.dtype.packed
    if a.spec.shape != b.spec.shape:
        return row(equal=False, note="the shapes differ")
    if worker is None or (packed and not same_dtype):
        return row(equal=same_dtype, note="" if same_dtype else "the dtypes differ")
    if packed:
        equal = _equal_bytes(a, b, worker)
        return row(equal=equal, note="" if equal else "the packed bytes differ")
    same_bits, differing, max_abs, max_rel = _differences(a, b, worker)
    note = "" if same_dtype else "the dtypes differ"
    if same_dtype and not same_bits and not differing:
        note = "equal values in other bits: the sign of a zero, or the payload of a NaN"
    return row(same_dtype and same_bits, differing, max_abs, max_rel, note)


def _differences(a: Expression, b: Expression, worker: Worker) -> tuple[bool, int, float, float]:
    """Whether all bits agree, how many elements do not, and the largest absolute and relative difference."""
    same_bits, differing, max_abs, max_rel = True, 0, 0.0, 0.0
    wide = _wide(a.spec.dtype, b.spec.dtype)
    sizes = a.spec.dtype.itemsize, b.spec.dtype.itemsize
    buffers = [numpy.empty(_ELEMENTS * size, numpy.uint8) for size in sizes]
    for first in range(0, a.spec.numel, _ELEMENTS):
        count = min(_ELEMENTS, a.spec.numel - first)
        sides: list[Array] = []
        for expression, size, buffer in zip((a, b), sizes, buffers, strict=True):
            worker.read(expression, first * size, buffer[: count * size])
            sides.append(buffer[: count * size].view(expression.spec.dtype.numpy))
        if a.spec.dtype == b.spec.dtype and sides[0].tobytes() == sides[1].tobytes():
            continue
        same_bits = False
        # Differences may overflow, and NaN may signal: the result is wanted here, not a warning.
        with numpy.errstate(all="ignore"):
            x, y = (side.astype(wide) for side in sides)
            unequal = ~((x == y) | (numpy.isnan(x) & numpy.isnan(y)))
            apart = numpy.abs(x[unequal] - y[unequal])
            relative = apart / numpy.maximum(numpy.abs(x[unequal]), numpy.abs(y[unequal]))
        differing += apart.size
        if apart.size:
            max_abs = max(max_abs, float(numpy.nan_to_num(apart, nan=numpy.inf, posinf=numpy.inf).max()))
            max_rel = max(max_rel, float(numpy.nan_to_num(relative, nan=numpy.inf, posinf=numpy.inf).max()))
    return same_bits, differing, max_abs, max_rel


def _wide(left: DType, right: DType) -> numpy.dtype[Any]:
    """A NumPy dtype that holds every value of both exactly, so that what is unequal stays unequal."""
    if "complex" in (left.kind, right.kind):
        return numpy.dtype(numpy.complex128)
    whole = any(dtype.kind in ("int", "uint") and dtype.bits == 64 for dtype in (left, right))
    return numpy.dtype(numpy.longdouble if whole else numpy.float64)


def _equal_bytes(a: Expression, b: Expression, worker: Worker) -> bool:
    left, right = numpy.empty(_ELEMENTS, numpy.uint8), numpy.empty(_ELEMENTS, numpy.uint8)
    for start in range(0, a.spec.nbytes, _ELEMENTS):
        count = min(_ELEMENTS, a.spec.nbytes - start)
        worker.read(a, start, left[:count])
        worker.read(b, start, right[:count])
        if not numpy.array_equal(left[:count], right[:count]):
            return False
    return True
