"""Strategy files: how MindSpore splits each parameter among the ranks of a pipeline stage.

    ParallelStrategyMap {1 current_stage; 3 parallel_layout_item* {1 param_name; 2 parallel_layouts}}
    ParallelLayouts {1 dev_matrix*; 2 tensor_map*; 3 param_split_shape*; 5 field; 6 opt_weight_shard_step; 7 ..._size}

or the same as JSON. The ranks of a stage form a grid, its slowest axis first. For each axis of a parameter the map
names the axes of the grid that split it, counted from the last, -1 for none. With an optimizer shard, the first axis of each
slice is cut once more. Source: mindspore-ai/mindspore: mindspore/python/mindspore/train/node_strategy.proto,
mindspore/python/mindspore/parallel/_parallel_serialization.py and _tensor.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

from streamconv.errors import CheckpointError, located
from streamconv.readers import small
from streamconv.readers.pickle import under
from streamconv.readers.together import read_all
from streamconv.storage import protobuf
from streamconv.storage.location import Location
from streamconv.storage.protobuf import BYTES, VARINT, Field, fields, integers, signed
from streamconv.tensor import Shape

_MAX_RANKS = 1 << 16
_MAX_STAGES = 1 << 10
_MAX_AXES = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """How one parameter is split.

    Attributes:
        stages: the pipeline stages that have it.
        grid: extents of the grid of a stage's ranks, slowest first.
        axes: for each axis of the parameter, the axes of the grid that split it, counted from the last.
        shard: parts into which the first axis of each slice is cut once more, for the optimizer; 1: it is not.
    """

    stages: tuple[int, ...]
    grid: Shape
    axes: tuple[tuple[int, ...], ...]
    shard: int = 1

    @property
    def ranks(self) -> int:
        """Ranks in a stage."""
        return prod(self.grid)

    def counts(self, dimensions: int) -> Shape:
        """Into how many parts each axis of a parameter is cut."""
        counts = [self._extent(self.axes[axis]) if axis < len(self.axes) else 1 for axis in range(dimensions)]
        if counts:
            counts[0] *= self.shard
        return tuple(counts)

    def part(self, rank: int, dimensions: int) -> Shape:
        """Which of these parts a rank of the stage has, along each axis."""
        place = [rank // prod(self.grid[axis + 1 :]) % self.grid[axis] for axis in range(len(self.grid))]
        result = []
        for axis in range(dimensions):
            index = 0
            for named in self.axes[axis] if axis < len(self.axes) else ():
                index = index * self.grid[-1 - named] + place[-1 - named]
            result.append(index)
        if result:
            for axis, extent in shard_axes(self.grid, self.axes, self.shard):
                result[0] = result[0] * extent + place[axis] % extent
        return tuple(result)

    def _extent(self, named: Sequence[int]) -> int:
        return prod(self.grid[-1 - axis] for axis in named)


def shard_axes(grid: Shape, axes: Sequence[Sequence[int]], shard: int) -> list[tuple[int, int]]:
    """The axes of a grid that an optimizer shard is split along, and the parts along each.

    They are the axes along which ranks would otherwise hold copies, taken from the last one.

    Raises:
        CheckpointError: there are not enough of them.
    """
    used = {len(grid) - 1 - axis for named in axes for axis in named}
    found: list[tuple[int, int]] = []
    left = shard
    for axis in reversed([axis for axis in range(len(grid)) if axis not in used and grid[axis] > 1]):
        if left == 1:
            break
        extent = min(grid[axis], left)
        if left % extent or grid[axis] % extent:
            break
        found.insert(0, (axis, extent))
        left //= extent
    if left != 1:
        raise CheckpointError(
            f"an optimizer shard of {shard} parts does not fit a grid {list(grid)} of ranks"
        )
    return found


def read(path: Location) -> dict[str, Layout]:
    """The layouts in a strategy file, or in all strategy files of a directory.

    Raises:
        CheckpointError: there are none, or they cannot be used; all problems at once.
    """
    files = (
        [entry for entry in path.entries() if entry.suffix in (".ckpt", ".json")]
        if path.is_directory()
        else [path]
    )
    result: dict[str, Layout] = {}
    for found in read_all(dict(enumerate(files)), _of_file, "the strategy").values():
        for name, layout in found.items():
            known = result.get(name)
            stages = tuple(sorted({*layout.stages, *(known.stages if known else ())}))
            result[name] = replace(layout, stages=stages)
    if not result:
        raise CheckpointError(
            "it says of no parameter how it is split", file=str(path),
            hint="a strategy file is written with set_auto_parallel_context(strategy_ckpt_save_file=...)",
        )  # fmt: skip
    return result


def _of_file(path: Location) -> dict[str, Layout]:
    if not path.is_file():
        raise CheckpointError("there is no such strategy file")
    is_json = path.suffix == ".json"
    document = small.read_json(path, small.INDEX) if is_json else _of_protobuf(path.read(small.INDEX))
    items, stage = under(document, "parallel_layout_item"), under(document, "current_stage")
    stage = stage if type(stage) is int else 0
    return dict(
        _layout(name, stage, item) for name, item in (items if isinstance(items, dict) else {}).items()
    )


# Fields of ParallelLayouts, by what the form in JSON calls them.
_LISTS = {1: "dev_matrix", 2: "tensor_map", 3: "param_split_shape"}
_NUMBERS = {5: "field", 6: "opt_weight_shard_step", 7: "opt_weight_shard_size"}


def _of_protobuf(data: bytes) -> dict[str, Any]:
    """The same document as in JSON."""
    view = memoryview(data)
    stage = 0
    items: dict[str, Any] = {}
    for part in fields(view):
        if part.number == 1 and part.wire_type == VARINT:
            stage = part.value
        elif part.number == 1:
            raise CheckpointError("this is a checkpoint, not a strategy file")
        if part.number != 3 or part.wire_type != BYTES:
            continue
        name, item = "", None
        for field in fields(view, part.start, part.stop):
            if field.number == 1 and field.wire_type == BYTES:
                name = protobuf.text(view, field)
            elif field.number == 2 and field.wire_type == BYTES:
                item = _item(view, field)
        if item is not None:
            items[name] = item
    return {"current_stage": stage, "parallel_layout_item": items}


def _item(view: memoryview, layouts: Field) -> dict[str, Any]:
    lists: dict[int, list[list[int]]] = {number: [] for number in _LISTS}
    item: dict[str, Any] = {}
    for field in fields(view, layouts.start, layouts.stop):
        if field.number in _LISTS and field.wire_type == BYTES:
            inside = fields(view, field.start, field.stop)
            values = (integers(view, each) for each in inside if each.number == 1)
            lists[field.number].append(list(chain.from_iterable(values)))
        elif field.number in _NUMBERS and field.wire_type == VARINT:
            item[_NUMBERS[field.number]] = signed(field.value)
    for number, name in _LISTS.items():
        item[name] = lists[number][0] if lists[number] else []
    if len(lists[2]) != 1:  # a list for each axis, where several axes of the grid split one
        item["tensor_map"] = [each for each in lists[2] if each]
    return item


def _layout(name: str, stage: int, item: object) -> tuple[str, Layout]:
    """A parameter's own name, and how it is split; all of it checked."""
    grid, maps, split = (under(item, key) for key in _LISTS.values())
    field, step, size = (under(item, key) or 0 for key in _NUMBERS.values())
    if not isinstance(maps, list):
        raise CheckpointError("its tensor_map is not a list", tensor=name)
    axes = [each if isinstance(each, list) else [each] for each in maps]
    before, dash, rest = name.partition("-")
    if dash and before.isdecimal():  # of several stages, merged into one file
        stage, name = int(before[:9]), rest
    if not 0 <= stage < _MAX_STAGES:
        raise CheckpointError(f"its stage of the pipeline, {stage}, is impossible", tensor=name)
    numbers = [grid, *axes, [step, size, field]]
    if not all(isinstance(each, list) and all(type(value) is int for value in each) for each in numbers):
        raise CheckpointError("its layout is not made of numbers", tensor=name)
    if not grid or len(grid) > _MAX_AXES or min(grid) < 1 or prod(grid) > _MAX_RANKS:
        raise CheckpointError(f"its grid of ranks {grid} is impossible", tensor=name)
    named = [tuple(axis for axis in each if axis != -1) for each in axes]
    if any(not 0 <= axis < len(grid) for each in named for axis in each) or len(named) > _MAX_AXES:
        raise CheckpointError(
            f"its tensor map {axes} names axes that the grid {grid} does not have", tensor=name
        )
    if split and (not isinstance(split, list) or any(split)):
        raise CheckpointError(
            f"it is split unevenly, into {split}, which is not put together", tensor=name,
            hint="merge it with mindspore.transform_checkpoints",
        )  # fmt: skip
    if field:
        raise CheckpointError(
            "it is an embedding in field layout, which is not put together", tensor=name,
            hint="merge it with mindspore.transform_checkpoints",
        )  # fmt: skip
    shard = size if step else 1
    if shard == -1:  # among all ranks that would hold copies
        used = {len(grid) - 1 - axis for each in named for axis in each}
        shard = prod(extent for axis, extent in enumerate(grid) if axis not in used)
    if shard < 0 or shard > _MAX_RANKS:
        raise CheckpointError(f"its optimizer shard of {shard} parts is impossible", tensor=name)
    with located(tensor=name):
        shard_axes(tuple(grid), named, max(shard, 1))
    return name, Layout((stage,), tuple(grid), tuple(named), max(shard, 1))
