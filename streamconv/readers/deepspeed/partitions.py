"""Where a parameter's elements are among the ranks' flat partitions: arithmetic on extents.

Stages 1 and 2 lay a group's parameters end to end, pad the row and cut it in as many equal parts as there are
ranks. Stage 3 cuts each parameter in as many parts, pads the last of them, and lays a rank's parts end to end.
Source: deepspeedai/DeepSpeed: deepspeed/runtime/zero/stage_1_and_2.py, deepspeed/runtime/zero/stage3.py,
deepspeed/runtime/zero/partition_parameters.py; order and padding as measured on files that it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod

from streamconv.errors import CheckpointError
from streamconv.readers.deepspeed.states import Flats
from streamconv.tensor import Extent, Shape, Stored, TensorSpec

# Stages 1 and 2 pad a group to a multiple of twice the number of ranks.
_PADDED_TO = 2


class _Row:
    """Bytes of extents laid end to end, taken from the front."""

    __slots__ = ("_at", "_extents", "_used", "left")

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents = list(extents)
        self._at = 0
        self._used = 0
        self.left = sum(extent.length for extent in self._extents)

    def take(self, length: int, into: list[Extent]) -> None:
        """Append the next `length` bytes, of which there must be that many."""
        self.left -= length
        while length:
            extent = self._extents[self._at]
            rest = extent.length - self._used
            if rest > length:
                into.append(Extent(extent.file, extent.offset + self._used, length))
                self._used += length
                return
            if rest:
                into.append(Extent(extent.file, extent.offset + self._used, rest))
            length -= rest
            self._at += 1
            self._used = 0

    def skip(self, length: int) -> None:
        """Pass over the next `length` bytes."""
        self.take(length, [])


def gather_rows(
    flats: Sequence[Stored], shapes: Mapping[str, Shape], gaps: Sequence[int], file: str
) -> dict[str, Stored]:
    """The parameters of one group of stages 1 and 2.

    Args:
        flats: each rank's part of the group, in the order of the ranks; with or without padding at the end.
        shapes: of its parameters, in the order of the row.
        gaps: how many elements follow each parameter; none where empty.
        file: named in errors.

    Raises:
        CheckpointError: the parts are shorter or longer than the parameters explain.
    """
    dtype = flats[0].spec.dtype
    row = _Row(extent for flat in flats for extent in flat.extents)
    total = row.left // dtype.itemsize
    if gaps and len(gaps) != len(shapes):
        raise CheckpointError(
            f"a group of {len(shapes)} parameters has {len(gaps)} paddings between them", file=file
        )
    spaces = gaps or [0] * len(shapes)
    needed = sum(map(prod, shapes.values())) + sum(spaces[:-1])
    padding = total - needed - (spaces[-1] if spaces else 0)
    if padding < 0 or padding >= _PADDED_TO * len(flats):
        raise CheckpointError(
            f"a group of {len(shapes)} parameters needs {needed} elements, and its {len(flats)} partitions hold "
            f"{total}",
            file=file,
            hint="a partition is cut off, or the files are of several saves: copy the checkpoint again",
        )
    result = {}
    for (name, shape), gap in zip(shapes.items(), spaces, strict=True):
        extents: list[Extent] = []
        row.take(prod(shape) * dtype.itemsize, extents)
        row.skip(min(gap * dtype.itemsize, row.left))
        result[name] = Stored(TensorSpec(name, dtype, shape), tuple(extents))
    return result


def check_slices(
    flats: Sequence[Stored],
    shapes: Mapping[str, Shape],
    gaps: Sequence[int],
    slices: Sequence[Mapping[str, tuple[int, int]]],
    file: str,
) -> None:
    """Compare where a group's parameters lie by `gather_rows` with what the ranks themselves have noted.

    Args:
        flats: as for `gather_rows`.
        shapes: as for `gather_rows`.
        gaps: as for `gather_rows`.
        slices: for each rank, parameter -> (first element in its part, elements).
        file: named in errors.

    Raises:
        CheckpointError: they differ: parameters would come out shifted.
    """
    starts = list(accumulate((flat.spec.numel for flat in flats), initial=0))
    at = 0
    for index, (name, shape) in enumerate(shapes.items()):
        end = at + prod(shape)
        for rank, noted in enumerate(slices):
            start, stop = max(at, starts[rank]), min(end, starts[rank + 1])
            if name in noted and start < stop and noted[name] != (start - starts[rank], stop - start):
                raise CheckpointError(
                    f"rank {rank} notes elements {noted[name][0]} to {sum(noted[name])} of its part for it; by the "
                    f"shapes they are {start - starts[rank]} to {stop - starts[rank]}",
                    file=file,
                    tensor=name,
                    hint="this version of DeepSpeed lays parameters out in a way that is not known; please report it",
                )
        at = end + (gaps[index] if gaps else 0)


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
    dtype = ranks[0][0].spec.dtype
    width = dtype.itemsize
    count = len(ranks)
    shapes = [(name, shape) for group in groups for name, shape in group.items()]
    needed = sum(-(-prod(shape) // count) for _, shape in shapes)
    for rank, flats in enumerate(ranks):
        held = sum(flat.spec.numel for flat in flats)
        if held != needed:
            raise CheckpointError(
                f"rank {rank} of {count} should hold {needed} elements of {len(shapes)} parameters, and holds "
                f"{held}",
                file=flats[0].extents[0].file if flats and flats[0].extents else file,
                hint="it is cut off, or the files are of several saves: copy the checkpoint again",
            )
    rows = [_Row(extent for flat in flats for extent in flat.extents) for flats in ranks]
    result = {}
    for name, shape in shapes:
        numel = prod(shape)
        piece = -(-numel // count)
        extents: list[Extent] = []
        for rank, row in enumerate(rows):
            have = min(max(numel - rank * piece, 0), piece)
            row.take(have * width, extents)
            if have < piece:
                row.skip((piece - have) * width)
        result[name] = Stored(TensorSpec(name, dtype, shape), tuple(extents))
    return result


def gather_frozen(pieces: Sequence[Stored], name: str, shape: Shape) -> Stored:
    """A parameter of stage 3 that is not trained, from each rank's part of it.

    Raises:
        CheckpointError: the parts are too short.
    """
    dtype = pieces[0].spec.dtype
    left = prod(shape) * dtype.itemsize
    extents: list[Extent] = []
    for piece in pieces:
        row = _Row(piece.extents)
        taken = min(row.left, left)
        row.take(taken, extents)
        left -= taken
    if left:
        raise CheckpointError(
            f"its parts in {len(pieces)} ranks are {left // dtype.itemsize} elements short of {list(shape)}",
            tensor=name,
            hint="files of ranks are missing or of another save",
        )
    return Stored(TensorSpec(name, dtype, shape), tuple(extents))
