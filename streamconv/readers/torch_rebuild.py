"""How torch's pickles describe tensors: storages, views of them, and the functions that rebuild both.

A pickle names a storage by a persistent id and makes each tensor by calling one of torch's rebuild
functions on it (pytorch/pytorch: torch/_utils.py, torch/_tensor.py, torch/serialization.py). Here are our
functions under those names. They check sizes, strides and offsets against the storage and give an
expression over it, or an `Unsupported` leaf for what is a tensor that this program cannot read: whether
that is an error is known once the tensor's name is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import mul

from streamconv.dtypes import BY_NAME, BY_TORCH_NAME, BY_TORCH_STORAGE, DType
from streamconv.errors import CheckpointError, PlanError
from streamconv.ops import Expression, FlipSigns, apply, strided
from streamconv.readers.numbers import MAX_DIMENSIONS, MOST, natural, naturals
from streamconv.readers.pickle import Calls, Global, Record, describe
from streamconv.tensor import Extent, Stored, TensorSpec, row_major_strides

_UNTYPED = "UntypedStorage"

# Bytes of an element of the storage classes that are not those of a dtype.
_OTHER_STORAGES: dict[str, int] = {
    _UNTYPED: 1,
    "_UntypedStorage": 1,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}

_PLAIN_CLASSES = frozenset(
    {
        Global("torch", "Tensor"),
        Global("torch._tensor", "Tensor"),
        Global("torch.nn.parameter", "Parameter"),
        Global("torch.nn.parameter", "Buffer"),
    }
)
"""Tensor classes whose elements are what their storage holds."""

_UNINITIALISED = frozenset(
    {
        Global("torch.nn.parameter", "UninitializedParameter"),
        Global("torch.nn.parameter", "UninitializedBuffer"),
    }
)


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A torch file, decoded.

    Attributes:
        content: the saved object: plain containers and values, `Record`s, and tensors as expressions
            without a name (or `Unsupported`).
        notes: what a user should know, one line each.
    """

    content: object
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor that the file describes and that cannot be read, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class StorageClass:
    """What the class of a storage says: its name, the bytes of one element, and their dtype.

    `dtype` is None for quantised elements. An untyped storage counts as bytes, as in torch.
    """

    name: str
    width: int
    dtype: DType | None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of bytes in the file that tensors are views of.

    `name` is the record or key in the file, `cls` the class under which the pickle refers to it.
    """

    name: str
    extent: Extent
    cls: StorageClass
    _flat: dict[str, Stored] = field(default_factory=dict)

    def flat(self, dtype: DType) -> Stored:
        """All of the storage as one row of `dtype`; always the same object for one dtype."""
        known = self._flat.get(dtype.name)
        if known is None:
            numel = self.extent.length * 8 // dtype.bits
            length = numel * dtype.bits // 8
            extents = (Extent(self.extent.file, self.extent.offset, length),) if length else ()
            known = self._flat[dtype.name] = Stored(TensorSpec(self.name, dtype, (numel,)), extents)
        return known


def storage_class(cls: object) -> StorageClass:
    """The storage class that a persistent id names.

    Raises:
        CheckpointError: it is none of torch's.
    """
    if isinstance(cls, Global) and cls.module.partition(".")[0] == "torch":
        dtype = BY_TORCH_STORAGE.get(cls.name)
        if dtype is not None:
            return StorageClass(cls.name, dtype.itemsize, dtype)
        width = _OTHER_STORAGES.get(cls.name)
        if width is not None:
            untyped = cls.name.endswith(_UNTYPED)
            return StorageClass(cls.name, width, BY_NAME["U8"] if untyped else None)
    raise CheckpointError(f"a storage of the class {describe(cls)}, which is none of torch's")


def storage_length(cls: StorageClass, numel: object, name: str) -> int:
    """Bytes of a storage of `numel` elements.

    Raises:
        CheckpointError: `numel` is not a possible count.
    """
    count = natural(numel)
    if count is None:
        raise CheckpointError(f"storage {describe(name)} has {describe(numel)} elements")
    return count * cls.width


def is_shard(cls: Global) -> bool:
    """Whether objects of this class are one rank's part of a tensor."""
    return cls.module.startswith("torch.distributed") and cls.name in ("DTensor", "ShardedTensor")


def unsupported(leaf: object) -> Unsupported | None:
    """What is a tensor to torch although no expression stands for it; None for all other values."""
    if isinstance(leaf, Unsupported):
        return leaf
    if isinstance(leaf, Storage):
        return Unsupported("it is a bare storage, without dtype and shape")
    if isinstance(leaf, Record):
        cls = leaf.cls
        if is_shard(cls) and cls.name != "DTensor":
            return Unsupported(
                f"it is a {cls.name}, of FSDP1; load the run with FSDP1 and save it with torch.distributed.checkpoint"
            )
        if is_shard(cls):
            return Unsupported(
                f"it is one rank's part of a {cls.name}; the files of all ranks make the tensor"
            )
        if cls in _UNINITIALISED:
            return Unsupported("it is a parameter of a lazy module that has not run yet: it has no elements")
        inner = cls.module.partition(".")[0] == "torch"
        if inner and (cls.name.startswith("_rebuild_") or cls.name.endswith("Tensor")):
            return Unsupported(f"it is made by {cls}, which is not known")
    return None


# ---------------------------------------------------------------------- functions of torch._utils


def _rebuild_tensor(storage: object, offset: object, size: object, strides: object) -> object:
    """Torch before 0.4."""
    storage = _storage(storage)
    if storage.cls.dtype is None:
        return Unsupported(f"its storage is a {storage.cls.name}: it is quantised")
    return _view(storage, storage.cls.dtype, offset, size, strides)


def _rebuild_tensor_v2(
    storage: object,
    offset: object,
    size: object,
    strides: object,
    _requires_grad: object = None,
    _backward_hooks: object = None,
    metadata: object = None,
) -> object:
    """The dtype is that of the storage's class."""
    return _resolved(_rebuild_tensor(storage, offset, size, strides), metadata)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    size: object,
    strides: object,
    _requires_grad: object,
    _backward_hooks: object,
    dtype: object,
    metadata: object = None,
) -> object:
    """The dtype comes along: torch's newer dtypes have no storage class."""
    row = _dtype(dtype)
    if row is None:
        return Unsupported(f"its dtype is {describe(dtype)}")
    return _resolved(_view(_storage(storage), row, offset, size, strides), metadata)


def _tensor_of(tensor: object, *_: object) -> object:
    """What only wraps a tensor: `_rebuild_parameter`, and the classes that torch before 0.4 calls."""
    if isinstance(tensor, (Expression, Unsupported)) or unsupported(tensor):
        return tensor
    raise CheckpointError(f"a parameter is made of {describe(tensor)}, not of a tensor")


def _rebuild_device_tensor_from_cpu_tensor(
    tensor: object, dtype: object, _device: object = None, _requires_grad: object = None
) -> object:
    """Tensors of devices without storages (XLA): a copy in main memory, in the same dtype."""
    tensor = _tensor_of(tensor)
    if isinstance(tensor, Expression) and tensor.spec.dtype is not _dtype(dtype):
        return Unsupported(f"its data is {tensor.spec.dtype} and its dtype {describe(dtype)}")
    return tensor


def _from_type(function: object, cls: object, args: object, state: object = None) -> object:
    """A tensor of another class than torch.Tensor, or one with Python attributes."""
    if not isinstance(cls, Global) or not isinstance(function, Global) or type(args) is not tuple:
        raise CheckpointError("a tensor is rebuilt from something that is not a class")
    if is_shard(cls):
        return Record(cls, args, state)
    rebuild = CALLS.get((function.module, function.name))
    if rebuild is None:
        return Unsupported(f"it is rebuilt by {function}, which is not known")
    if cls not in _PLAIN_CLASSES:
        return Unsupported(f"it is of the class {cls}, whose elements may mean anything")
    return rebuild(*args)


def _refused(reason: str, *_: object) -> object:
    return Unsupported(reason)


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor_v2,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": _tensor_of,
    "_rebuild_parameter_with_state": _tensor_of,
    "_rebuild_device_tensor_from_cpu_tensor": _rebuild_device_tensor_from_cpu_tensor,
}

_INLINE = (
    "its elements are inside the pickle (an XLA or HPU tensor of torch before 2.6); save it from the CPU"
)
_REFUSED: dict[str, str] = {
    "_rebuild_device_tensor_from_numpy": _INLINE,
    "_rebuild_xla_tensor": _INLINE,
    "_rebuild_meta_tensor_no_storage": "it is on the meta device: the file holds no elements of it",
    "_rebuild_nested_tensor": "it is a nested tensor",
    "_rebuild_qtensor": "it is quantised",
    "_rebuild_sparse_tensor": "it is sparse; save its to_dense()",
    "_rebuild_sparse_csr_tensor": "it is sparse; save its to_dense()",
    "_rebuild_wrapper_subclass": "it wraps other tensors in a way that is not known",
}

CALLS: Calls = {
    **{("torch._utils", name): function for name, function in _FUNCTIONS.items()},
    **{("torch._utils", name): partial(_refused, reason) for name, reason in _REFUSED.items()},
    **{
        (module, name): _from_type
        for module in ("torch._tensor", "torch.tensor", "torch._utils")
        for name in ("_rebuild_from_type", "_rebuild_from_type_v2")
    },
    ("torch.nn.parameter", "Parameter"): _tensor_of,
    ("torch.autograd.variable", "Variable"): _tensor_of,
}
"""The functions that make tensors, for `pickle.decode`, which says the file of their errors."""


# -------------------------------------------------------------------------------------- their parts


def _storage(storage: object) -> Storage:
    if not isinstance(storage, Storage):
        raise CheckpointError(f"a tensor is made of {describe(storage)}, not of a storage")
    return storage


def _dtype(dtype: object) -> DType | None:
    if isinstance(dtype, Global) and dtype.module == "torch":
        return BY_TORCH_NAME.get(dtype.name)
    return None


def _resolved(tensor: object, metadata: object) -> object:
    """A tensor after what torch has noted on it and not done to its elements."""
    if not isinstance(metadata, dict) or not isinstance(tensor, Expression):
        return tensor
    for key, word in (("conj", "conjugated"), ("neg", "negated")):
        if metadata.get(key):
            try:
                (tensor,) = apply(FlipSigns(imaginary=key == "conj"), tensor)
            except PlanError:
                return Unsupported(f"its elements are yet to be {word}; save its resolve_{key}()")
    return tensor


def _numbers(storage: Storage, what: str, values: object) -> tuple[int, ...]:
    """A size or stride from the file, each number within what memory can address."""
    numbers = naturals(values)
    if numbers is None or len(numbers) > MAX_DIMENSIONS:
        raise CheckpointError(f"a view of storage {describe(storage.name)} has an impossible {what}")
    return numbers


def _view(
    storage: Storage, dtype: DType, offset: object, size: object, strides: object
) -> Expression | Unsupported:
    """A tensor: `size`, `strides` and `offset` count torch's elements of `storage`."""
    shape = _numbers(storage, "size", size)
    steps = _numbers(storage, "stride", strides)
    (start,) = _numbers(storage, "offset", (offset,))
    if len(shape) != len(steps):
        raise CheckpointError(
            f"a view of storage {describe(storage.name)} has {len(shape)} sizes and {len(steps)} strides",
        )
    if dtype.packed:
        # An element of torch's `float4_e2m1fn_x2` is the pair of ours that shares a byte.
        pair = 8 // dtype.bits
        if not shape or (steps[-1] != 1 and shape[-1] > 1):
            return Unsupported(f"its {dtype} elements are not in pairs along the last axis")
        shape = (*shape[:-1], shape[-1] * pair)
        steps = (*(step * pair for step in steps[:-1]), 1)
        start *= pair
    spec = TensorSpec("", dtype, shape)
    numel = spec.numel
    if numel * dtype.bits > MOST * 8:
        raise CheckpointError(f"a view of storage {describe(storage.name)} has an impossible size")
    held = storage.extent.length * 8 // dtype.bits
    row_major = steps == row_major_strides(shape)
    last = start + (numel - 1 if row_major else sum(map(mul, (count - 1 for count in shape), steps)))
    if last >= held and numel:
        raise CheckpointError(
            f"a view {list(shape)} with strides {list(steps)} from element {start} reaches element {last} of "
            f"storage {describe(storage.name)}, which holds {held} of {dtype}",
            hint="the file is damaged",
        )
    if row_major and numel:
        # Nearly every tensor. The general way gives the same; this one saves a third of the time to load.
        run = Extent(storage.extent.file, storage.extent.offset + start * dtype.bits // 8, spec.nbytes)
        return Stored(spec, (run,))
    return strided(storage.flat(dtype), spec, steps, start)
