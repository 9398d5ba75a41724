"""One tensor from rectangles of it, as extents where its rows lie end to end, otherwise as concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from streamconv.errors import CheckpointError
from streamconv.ops import Concat, Expression, apply, renamed
from streamconv.tensor import Shape, Stored, TensorSpec


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a tensor, from `offsets` on, of the shape that `tensor` has."""

    offsets: Shape
    tensor: Expression


def assemble(spec: TensorSpec, parts: Sequence[Part]) -> Expression:
    """The tensor that its parts make up.

    Args:
        spec: of the whole.
        parts: in any order; the same rectangle may occur again, as replicas of it do.

    Raises:
        CheckpointError: the parts are of another dtype, overlap, leave gaps, or do not form a grid.
    """
    name, shape = spec.name, spec.shape
    if any(part.tensor.spec.dtype is not spec.dtype for part in parts):
        raise CheckpointError("its parts have several dtypes", tensor=name)
    if any(len(part.offsets) != len(shape) for part in parts):
        raise CheckpointError(f"its parts have not as many axes as {list(shape)}", tensor=name)
    distinct = {part.offsets: part for part in parts if part.tensor.spec.numel}
    held = sum(part.tensor.spec.numel for part in distinct.values())
    if held != prod(shape):
        raise CheckpointError(
            f"its {len(distinct)} parts hold {held} elements, {list(shape)} has {prod(shape)}",
            tensor=name,
            hint="files of ranks are missing, or of another save",
        )
    if not distinct:
        return Stored(spec, ())
    whole = _joined(list(distinct.values()), (0,) * len(shape), shape)
    if whole is None:
        raise CheckpointError(
            f"its {len(distinct)} parts overlap, leave gaps, or form no grid in {list(shape)}",
            tensor=name,
            hint="the checkpoint is damaged, or of several saves",
        )
    return renamed(whole, name)


def _joined(parts: list[Part], start: Shape, sizes: Shape) -> Expression | None:
    """The rectangle of `sizes` from `start` out of parts, or None where they do not fill it."""
    if len(parts) == 1:
        (part,) = parts
        return part.tensor if part.offsets == start and part.tensor.spec.shape == sizes else None
    for axis in range(len(sizes)):
        slabs = _slabs(parts, axis)
        if len(slabs) == 1:
            continue
        joined = []
        at = start[axis]
        for first, end, inside in slabs:
            if first != at:
                return None
            corner = (*start[:axis], first, *start[axis + 1 :])
            slab = _joined(inside, corner, (*sizes[:axis], end - first, *sizes[axis + 1 :]))
            if slab is None:
                return None
            joined.append(slab)
            at = end
        if at != start[axis] + sizes[axis]:
            return None
        return _concatenated(joined, axis)
    return None


def _slabs(parts: Sequence[Part], axis: int) -> list[tuple[int, int, list[Part]]]:
    """Parts between the cuts along an axis that go through none of them: (first, end, parts)."""
    slabs: list[tuple[int, int, list[Part]]] = []
    for part in sorted(parts, key=lambda part: part.offsets[axis]):
        first = part.offsets[axis]
        end = first + part.tensor.spec.shape[axis]
        if slabs and first < slabs[-1][1]:
            begun, until, inside = slabs[-1]
            inside.append(part)
            slabs[-1] = (begun, max(until, end), inside)
        else:
            slabs.append((first, end, [part]))
    return slabs


def _concatenated(parts: Sequence[Expression], axis: int) -> Expression:
    stored = [part for part in parts if isinstance(part, Stored)]
    first = parts[0].spec
    if len(stored) == len(parts) and prod(first.shape[:axis]) == 1:
        # Rows end to end: no operation is needed.
        rows = sum(part.spec.shape[axis] for part in stored)
        spec = TensorSpec(first.name, first.dtype, (*first.shape[:axis], rows, *first.shape[axis + 1 :]))
        return Stored(spec, tuple(extent for part in stored for extent in part.extents))
    return apply(Concat(axis), *parts)[0]
