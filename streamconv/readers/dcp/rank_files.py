"""One file per rank, each a plain torch.save of that rank's parts: DTensors with their placements.

verl and SkyRL call them `model_world_size_W_rank_R.pt`, accelerate (without DCP) `pytorch_model_N_rankR.bin`. Beside
verl's lie files `optim_world_size_W_rank_R.pt`: what `Optimizer.state_dict()` gives of DTensors, by number.
How a tensor is cut: pytorch/pytorch: torch/distributed/tensor/_utils.py
(`compute_local_shape_and_global_offset`), placement_types.py; the ranks' grid: device_mesh.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import lt

from streamconv.errors import CheckpointError, PlanError, Problems, located
from streamconv.ops import Expression, Same, apply, renamed
from streamconv.options.records import ReadingOptions
from streamconv.readers import moments, numbers, state_dict, torch_zip, tree
from streamconv.readers.chunks import Part, assemble
from streamconv.readers.moments import Moments
from streamconv.readers.pickle import Record, describe, under
from streamconv.readers.state_dict import Selection, readable
from streamconv.readers.together import APART, numbered, read_all, require_all
from streamconv.readers.torch_rebuild import is_shard
from streamconv.readers.training import TrainedModel
from streamconv.storage.location import Location
from streamconv.tensor import Shape, Stored, TensorSpec

NAMES = (
    re.compile(r"model_world_size_(?P<count>\d+)_rank_(?P<rank>\d+)\.pt"),
    re.compile(r"pytorch_model(?:_\d+)?_rank(?P<rank>\d+)\.bin"),
)
_OPTIMIZER = re.compile(r"optim_world_size_(?P<count>\d+)_rank_(?P<rank>\d+)\.pt")
_MAX_RANKS = 1 << 20


def files(directory: Location) -> dict[int, Location]:
    """Rank -> its file, of the files in a directory."""
    return next(filter(None, (numbered(directory, names) for names in NAMES)), {})


def read(found: Mapping[int, Location], reading: ReadingOptions) -> TrainedModel:
    """The model, its tensors whole.

    Raises:
        CheckpointError: ranks are missing, or their parts do not fit together; all problems at once.
    """
    match = NAMES[0].fullmatch(next(iter(found.values())).name)
    require_all(found, int(match["count"]) if match else max(found) + 1, "ranks", APART)

    def selected(path: Location) -> Selection:
        return state_dict.select(torch_zip.load(path).content, reading["root"], ema=reading["ema"])

    ranks = list(read_all(found, selected, "files of ranks").values())
    first = ranks[0]
    tensors: dict[str, Expression] = {}
    unreadable: dict[str, str] = {}
    problems = Problems()
    for name in first.leaves:
        with problems.collecting(tensor=name):
            values = [rank.leaves[name] for rank in ranks if name in rank.leaves]
            if len(values) != len(ranks):
                raise CheckpointError(f"{len(ranks) - len(values)} ranks do not have it")
            whole = readable.flat_parameter(name) or _whole(name, values)
            if isinstance(whole, str):
                unreadable[name] = whole
            else:
                tensors[name] = whole
    problems.report("the ranks' parts do not fit together")
    directory = next(iter(found.values())).parent
    with located(str(directory)):
        readable.require_some(tensors, unreadable)
    optimizer = numbered(directory, _OPTIMIZER)
    known = _moments(optimizer, tensors) if reading["optimizer"] and optimizer else Moments()
    left_out = (
        ("the optimizer state beside it is left out (--optimizer)",) if optimizer and not known.states else ()
    )
    return TrainedModel(
        tensors,
        moments=known.states,
        scalars=known.settings,
        metadata=tree.all_plain(first.others),
        files=tuple(str(path) for path in (*found.values(), *(optimizer.values() if known.states else ()))),
        notes=(f"the parts of {len(ranks)} ranks are joined", *first.notes, *known.notes, *left_out),
        unreadable=unreadable,
        reported=first.reported,
    )


def _moments(found: Mapping[int, Location], model: Mapping[str, Expression]) -> Moments:
    """The optimizer state of all ranks.

    Raises:
        CheckpointError: ranks are missing, their parts do not fit together, or whose state it is cannot be said.
    """
    first = next(iter(found.values()))
    match = _OPTIMIZER.fullmatch(first.name)
    assert match is not None
    require_all(found, int(match["count"]), "ranks", APART)
    ranks = read_all(found, lambda path: torch_zip.load(path).content, "files of ranks")
    with located(str(first.parent)):
        return moments.read(_joined("", list(ranks.values())), ("",), model)


def _joined(name: str, values: Sequence[object]) -> object:
    """A tree of which each rank has its part: tensors are put together, what else there is, is taken from the first."""
    first = values[0]
    if isinstance(first, dict):
        alike = [value for value in values if isinstance(value, dict) and value.keys() == first.keys()]
        if len(alike) != len(values):
            raise CheckpointError("the ranks have other keys than each other", tensor=name or None)
        return {key: _joined(f"{name}.{key}".lstrip("."), [value[key] for value in alike]) for key in first}
    if not isinstance(first, (Record, Expression)):
        return first
    with located(None, tensor=name):
        whole = _whole(name, values)
    if isinstance(whole, str):
        raise CheckpointError(f"it cannot be read: {whole}", tensor=name, hint="leave --optimizer out")
    return whole


def _whole(name: str, values: Sequence[object]) -> Expression | str:
    """One tensor from what each rank has of it, or why it cannot be read."""
    first = values[0]
    if not isinstance(first, Record) or not is_shard(first.cls) or first.cls.name != "DTensor":
        return _replicated(name, values)
    shards = [_shard(rank, value) for rank, value in enumerate(values)]
    parts = [Part(shard.offsets(rank), shard.local) for rank, shard in enumerate(shards)]
    shape = shards[0].shape
    return assemble(TensorSpec(name, shards[0].local.spec.dtype, shape), parts)


def _replicated(name: str, values: Sequence[object]) -> Expression | str:
    """What is no DTensor, of which every rank holds a copy: all of them are compared with the first one's.

    A run of one rank has nothing else, and FSDP2 never shards buffers.
    """
    copies: list[Expression] = []
    for value in values:
        read = readable.read_leaf(value)
        if isinstance(read, str):
            return read
        copies.append(renamed(read, name))
    try:
        return copies[0] if len(copies) == 1 else apply(Same(), *copies)[0]
    except PlanError as error:
        raise CheckpointError(error.headline.message) from error


@dataclass(frozen=True, slots=True)
class _Shard:
    """A rank's part of a DTensor.

    Attributes:
        local: the part.
        shape: of the whole.
        mesh: extents of the grid of ranks.
        place: of this rank in it.
        cuts: for each axis of the grid: the axis of the tensor that it cuts, or None; and into how many parts later
            axes of the grid have cut that axis before (1: not at all).
    """

    local: Expression
    shape: Shape
    mesh: Shape
    place: Shape
    cuts: tuple[tuple[int | None, int], ...]

    def offsets(self, rank: int) -> Shape:
        """Where the part begins. Raises CheckpointError where it is not as long as it should be."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        # An axis that later ones have cut before comes after them.
        plain = [axis for axis, (_, before) in enumerate(self.cuts) if before == 1]
        strided = [axis for axis, (_, before) in reversed(list(enumerate(self.cuts))) if before > 1]
        for axis in (*plain, *strided):
            cut, _ = self.cuts[axis]
            if cut is None:
                continue
            # As torch.chunk does: parts of ceil(n / count), the last ones shorter or empty.
            piece = -(-sizes[cut] // self.mesh[axis])
            start = min(self.place[axis] * piece, sizes[cut])
            offsets[cut] += start
            sizes[cut] = min(piece, sizes[cut] - start)
        if tuple(sizes) != self.local.spec.shape:
            raise CheckpointError(
                f"rank {rank} should have {sizes} of {list(self.shape)}, and has {list(self.local.spec.shape)}",
                hint="the way it was cut is not known; save it with torch.distributed.checkpoint",
            )
        return tuple(offsets)


def _shard(rank: int, value: object) -> _Shard:
    local, mesh, placements = (
        under(value, *keys) for keys in (("_local_tensor",), ("_spec", "mesh"), ("_spec", "placements"))
    )
    meta = under(value, "_spec", "tensor_meta")
    shape = numbers.shape(meta.args[0]) if isinstance(meta, Record) and meta.args else None
    if not isinstance(local, Expression) or not isinstance(placements, tuple) or shape is None:
        raise CheckpointError("its parts are described in a way that is not known")
    extents, place = _grid(mesh, rank)
    if len(placements) != len(extents):
        raise CheckpointError(f"{len(placements)} placements on a grid of {list(extents)} ranks")
    cuts = tuple(_cut(placement, len(shape)) for placement in placements)
    for axis, (cut, before) in enumerate(cuts):
        later = prod(extents[other] for other in range(axis + 1, len(cuts)) if cuts[other][0] == cut)
        if before != 1 and before != later:
            raise CheckpointError(f"its rows are cut with a stride of {before}, which is not known")
    return _Shard(local, shape, extents, place, cuts)


def _cut(placement: object, dimensions: int) -> tuple[int | None, int]:
    kind = placement.cls.name if isinstance(placement, Record) else describe(placement)
    if kind == "Replicate":
        return None, 1
    axis = under(placement, "dim")
    factor = under(placement, "split_factor") if kind == "_StridedShard" else 1
    if kind in ("Shard", "_StridedShard") and type(axis) is int and type(factor) is int:
        if axis < 0:
            axis += dimensions
        if 0 <= axis < dimensions and factor >= 1:
            return axis, factor
    raise CheckpointError(
        f"it is placed as {kind}, which cannot be put together",
        hint="save it with torch.distributed.checkpoint",
    )  # fmt: skip


def _grid(mesh: object, rank: int) -> tuple[Shape, Shape]:
    """The extents of a grid of ranks, and a rank's place in it.

    Older versions of torch keep the grid itself, newer ones its layout and the place of the rank that saved.
    """
    table = under(mesh, "mesh") or under(mesh, "_mesh")
    if isinstance(table, Stored) and 0 < table.spec.numel <= _MAX_RANKS:
        extents = table.spec.shape
        ranks = numbers.values(table) or ()
        if rank in ranks:
            at = ranks.index(rank)
            return extents, tuple(
                at // prod(extents[axis + 1 :]) % extents[axis] for axis in range(len(extents))
            )
    axes, place = under(mesh, "_layout", "axes"), under(mesh, "_coordinate_on_dim")
    if isinstance(axes, tuple) and isinstance(place, (list, tuple)):
        shapes = [under(axis, "shape") for axis in axes]
        sizes = numbers.naturals(
            [shape[0] for shape in shapes if isinstance(shape, tuple) and len(shape) == 1]
        )
        own = numbers.naturals(place)
        if sizes and own and len(sizes) == len(own) == len(axes) and all(map(lt, own, sizes)):
            return sizes, own
    raise CheckpointError("its grid of ranks is described in a way that is not known")
