"""Where a parameter's elements are among the ranks' flat partitions: arithmetic on extents.

Stages 1 and 2 lay a group's parameters end to end, pad the row and cut it in as many equal parts as there are
ranks. Stage 3 cuts each parameter in as many parts, pads the last of them, and lays a rank's parts end to end.
Source: deepspeedai/DeepSpeed: deepspeed/runtime/zero/stage_1_and_2.py, deepspeed/runtime/zero/stage3.py,
deepspeed/runtime/zero/partition_parameters.py; order and padding as measured on files that it wrote.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from math import prod

from streamconv.errors import CheckpointError
from streamconv.readers.deepspeed.states import Flats
from streamconv.tensor import Extent, Shape, Stored, TensorSpec

# Stages 1 and 2 pad a group to a multiple of twice the number of ranks.
_PADDED_TO = 2


class _Row:
    """Extents laid end to end, which are elements of `width` bytes."""

    def __init__(self, extents: Iterable[Extent], width: int) -> None:
        self._extents = [extent for extent in extents if extent.length]
        self._starts = list(accumulate((extent.length for extent in self._extents), initial=0))
        self._width = width
        self.length = self._starts[-1] // width

    def cut(self, start: int, count: int) -> Iterator[Extent]:
        """Where `count` elements are from `start` on."""
        at, stop = start * self._width, (start + count) * self._width
        index = bisect_right(self._starts, at) - 1
        while at < stop:
            extent, skipped = self._extents[index], at - self._starts[index]
            length = min(extent.length - skipped, stop - at)
            yield Extent(extent.file, extent.offset + skipped, length)
            at, index = at + length, index + 1


def gather_rows(
    flats: Sequence[Stored],
    shapes: Mapping[str, Shape],
    gaps: Sequence[int],
    slices: Sequence[Mapping[str, tuple[int, int]]],
    file: str,
) -> dict[str, Stored]:
    """The parameters of one group of stages 1 and 2.

    Args:
        flats: each rank's part of the group, in the order of the ranks; with or without padding at the end.
        shapes: of its parameters, in the order of the row.
        gaps: how many elements follow each parameter; none where empty.
        slices: what each rank itself has noted: parameter -> (first element in its part, elements).
        file: named in errors.

    Raises:
        CheckpointError: the parts are shorter or longer than the parameters explain, or a rank notes that a
            parameter is elsewhere.
    """
    dtype = flats[0].spec.dtype
    row = _Row((extent for flat in flats for extent in flat.extents), dtype.itemsize)
    if gaps and len(gaps) != len(shapes):
        raise CheckpointError(
            f"a group of {len(shapes)} parameters has {len(gaps)} paddings between them", file=file
        )
    spaces = gaps or [0] * len(shapes)
    needed = sum(map(prod, shapes.values())) + sum(spaces[:-1])
    padding = row.length - needed - (spaces[-1] if spaces else 0)
    if padding < 0 or padding >= _PADDED_TO * len(flats):
        raise CheckpointError(
            f"a group of {len(shapes)} parameters needs {needed} elements, and its {len(flats)} partitions hold "
            f"{row.length}",
            file=file,
            hint="a partition is cut off, or the files are of several saves: copy the checkpoint again",
        )
    firsts = list(accumulate((flat.spec.numel for flat in flats), initial=0))
    result = {}
    at = 0
    for (name, shape), gap in zip(shapes.items(), spaces, strict=True):
        numel = prod(shape)
        result[name] = Stored(TensorSpec(name, dtype, shape), tuple(row.cut(at, numel)))
        for rank, noted in enumerate(slices):
            start, stop = (
                max(at, firsts[rank]) - firsts[rank],
                min(at + numel, firsts[rank + 1]) - firsts[rank],
            )
            if name in noted and start < stop and noted[name] != (start, stop - start):
                raise CheckpointError(
                    f"rank {rank} notes elements {noted[name][0]} to {sum(noted[name])} of its part for it; by the "
                    f"shapes they are {start} to {stop}",
                    file=file,
                    tensor=name,
                    hint="this version of DeepSpeed lays parameters out in a way that is not known; please report it",
                )
        at += numel + gap
    return result


def gather_pieces(
    ranks: Sequence[Flats], groups: Sequence[Mapping[str, Shape]], file: str
) -> dict[str, Stored]:
    """The parameters of stage 3.

    Args:
        ranks: each rank's flats of all sub-groups, in the order of the ranks.
        groups: shapes of the sub-groups' parameters, in the order of the flats.
        file: named in errors.

    Raises:
        CheckpointError: a rank's flats are shorter or longer than the parameters explain.
    """
    dtype, count = ranks[0][0].spec.dtype, len(ranks)
    shapes = [(name, shape) for group in groups for name, shape in group.items()]
    needed = sum(-(-prod(shape) // count) for _, shape in shapes)
    rows = [_Row((extent for flat in flats for extent in flat.extents), dtype.itemsize) for flats in ranks]
    for rank, (row, flats) in enumerate(zip(rows, ranks, strict=True)):
        if row.length != needed:
            raise CheckpointError(
                f"rank {rank} of {count} should hold {needed} elements of {len(shapes)} parameters, and holds "
                f"{row.length}",
                file=flats[0].extents[0].file if flats and flats[0].extents else file,
                hint="it is cut off, or the files are of several saves: copy the checkpoint again",
            )
    result = {}
    at = 0
    for name, shape in shapes:
        numel = prod(shape)
        piece = -(-numel // count)
        cuts = (row.cut(at, min(numel - rank * piece, piece)) for rank, row in enumerate(rows))
        result[name] = Stored(TensorSpec(name, dtype, shape), tuple(chain.from_iterable(cuts)))
        at += piece
    return result


def gather_frozen(pieces: Sequence[Stored], name: str, shape: Shape) -> Stored:
    """A parameter of stage 3 that is not trained, from each rank's part of it; only the last is padded.

    Raises:
        CheckpointError: the parts are too short.
    """
    spec = TensorSpec(name, pieces[0].spec.dtype, shape)
    row = _Row((extent for piece in pieces for extent in piece.extents), spec.dtype.itemsize)
    if row.length < spec.numel:
        raise CheckpointError(
            f"its parts in {len(pieces)} ranks are {spec.numel - row.length} elements short of {list(shape)}",
            tensor=name,
            hint="files of ranks are missing or of another save",
        )
    return Stored(spec, tuple(row.cut(0, spec.numel)))
