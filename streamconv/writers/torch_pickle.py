"""The pickle of a dictionary of tensors, byte for byte as `torch.save` writes it.

Protocol 2, with the opcodes, the memo and the batches of CPython's pickler (Modules/_pickle.c), and the
calls of torch (pytorch/pytorch: torch/_tensor.py, `_reduce_ex_internal`; torch/serialization.py, `_save`).
Nothing here imports or runs a pickle. One thing differs: strings are remembered by value, not by identity,
so that a tensor with the name `10` and a storage with the key `10` share one.
"""

from __future__ import annotations

import itertools
import pickle
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from streamconv.dtypes import DType
from streamconv.tensor import Shape, row_major_strides
from streamconv.writers.layout import Wrapping

# Items between a MARK and its SETITEMS (Modules/_pickle.c, `BATCHSIZE`).
_BATCH = 1000

# An opcode and its argument.
_BYTE = struct.Struct("<cB").pack
_SHORT = struct.Struct("<cH").pack
_LONG = struct.Struct("<cI").pack
_SIGNED = struct.Struct("<ci").pack

_SHORT_TUPLES = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A contiguous tensor that fills a storage.

    Attributes:
        shape: as torch counts it: packed elements, not values, where a byte holds two.
        key: the storage's, which names its record.
        nbytes: of the storage.
    """

    name: str
    dtype: DType
    shape: Shape
    key: str
    nbytes: int


def pickled(tensors: Sequence[TorchTensor], wrapping: Wrapping | None = None) -> bytes:
    """The pickle of `{name: tensor, ...}` in this order; names must be distinct Unicode text.

    With a wrapping, of `{..., under: {name: tensor, ...}}`.
    """
    emitter = _Emitter()
    emitter.out += pickle.PROTO + b"\x02"
    prefix = wrapping.prefix if wrapping else ""
    content: dict[str, object] = {prefix + tensor.name: tensor for tensor in tensors}
    emitter.value({**wrapping.before, wrapping.under: content} if wrapping and wrapping.under else content)
    emitter.out += pickle.STOP
    return bytes(emitter.out)


@dataclass(slots=True)
class _Emitter:
    """Opcodes written so far, and what the reader's memo will hold."""

    out: bytearray = field(default_factory=bytearray)
    memo: dict[str | tuple[str, str], int] = field(default_factory=dict)
    memo_size: int = 0

    def remember(self, key: str | tuple[str, str] | None = None) -> None:
        """Put the top of the reader's stack into the next place of its memo."""
        place = self.memo_size
        self.memo_size = place + 1
        if key is not None:
            self.memo[key] = place
        self.out += _BYTE(pickle.BINPUT, place) if place < 256 else _LONG(pickle.LONG_BINPUT, place)

    def recall(self, key: str | tuple[str, str]) -> bool:
        """Fetch what was remembered under `key`; False where nothing was."""
        place = self.memo.get(key)
        if place is None:
            return False
        self.out += _BYTE(pickle.BINGET, place) if place < 256 else _LONG(pickle.LONG_BINGET, place)
        return True

    def text(self, value: str) -> None:
        if not self.recall(value):
            data = value.encode()
            self.out += _LONG(pickle.BINUNICODE, len(data)) + data
            self.remember(value)

    def class_or_function(self, module: str, name: str) -> None:
        if not self.recall((module, name)):
            self.out += pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")
            self.remember((module, name))

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += _BYTE(pickle.BININT1, value)
        elif 0 <= value < 1 << 16:
            self.out += _SHORT(pickle.BININT2, value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += _SIGNED(pickle.BININT, value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += _BYTE(pickle.LONG1, len(data)) + data

    def value(self, value: object) -> None:
        """Anything that a file may hold: tensors, and what `Plain` lists."""
        if isinstance(value, TorchTensor):
            _tensor(self, value)
        elif isinstance(value, dict):
            self.out += pickle.EMPTY_DICT
            self.remember()
            self._filled(value.items(), pickle.SETITEM, pickle.SETITEMS)
        elif isinstance(value, list):
            self.out += pickle.EMPTY_LIST
            self.remember()
            self._filled([(each,) for each in value], pickle.APPEND, pickle.APPENDS)
        elif value is None or isinstance(value, bool):
            self.out += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += pickle.BINFLOAT + struct.pack(">d", value)
        else:
            self.text(str(value))

    def _filled(self, items: Collection[tuple[object, ...]], one: bytes, several: bytes) -> None:
        """The items of a container, each of one value or two, in batches as the pickler makes them."""
        rest = iter(items)
        # A last batch may be empty: the pickler notices the end only when a batch falls short.
        for _ in range(0, len(items) + 1 if items else 0, _BATCH):
            batch = itertools.islice(rest, _BATCH)
            self.out += pickle.MARK if len(items) > 1 else b""
            for value in itertools.chain.from_iterable(batch):
                self.value(value)
            self.out += several if len(items) > 1 else one

    def integers(self, values: Sequence[int]) -> None:
        """A tuple of numbers from 0 up."""
        short = len(values) < len(_SHORT_TUPLES)
        if not short:
            self.out += pickle.MARK
        for value in values:
            self.integer(value)
        self.out += _SHORT_TUPLES[len(values)] if short else pickle.TUPLE
        if values:
            self.remember()


def _tensor(emitter: _Emitter, tensor: TorchTensor) -> None:
    """A tensor: a call of one of torch's two rebuild functions.

    Dtypes with a storage class of their own take `_rebuild_tensor_v2(storage, first, size, stride,
    requires_grad, hooks)`; the later ones lie in untyped storages, and `_rebuild_tensor_v3` has the dtype
    as its last argument.
    """
    storage_class = tensor.dtype.torch_storage
    emitter.class_or_function("torch._utils", "_rebuild_tensor_v2" if storage_class else "_rebuild_tensor_v3")
    emitter.out += pickle.MARK
    _storage(emitter, tensor)
    emitter.integer(0)
    emitter.integers(tensor.shape)
    emitter.integers(row_major_strides(tensor.shape))
    emitter.out += pickle.NEWFALSE
    emitter.class_or_function("collections", "OrderedDict")
    emitter.out += pickle.EMPTY_TUPLE + pickle.REDUCE
    emitter.remember()
    if not storage_class:
        emitter.class_or_function("torch", str(tensor.dtype.torch_name))
    emitter.out += pickle.TUPLE
    emitter.remember()
    emitter.out += pickle.REDUCE
    emitter.remember()


def _storage(emitter: _Emitter, tensor: TorchTensor) -> None:
    """The persistent id ('storage', class, key, location, elements); untyped elements are bytes."""
    storage_class = tensor.dtype.torch_storage
    emitter.out += pickle.MARK
    emitter.text("storage")
    if storage_class:
        emitter.class_or_function("torch", storage_class)
    else:
        emitter.class_or_function("torch.storage", "UntypedStorage")
    emitter.text(tensor.key)
    emitter.text("cpu")
    emitter.integer(tensor.nbytes // tensor.dtype.itemsize if storage_class else tensor.nbytes)
    emitter.out += pickle.TUPLE
    emitter.remember()
    emitter.out += pickle.BINPERSID
