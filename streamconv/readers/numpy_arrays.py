"""NumPy's arrays, whose elements lie in the pickle itself: as text in protocol 2, which torch writes.

Source: numpy/numpy: numpy/_core/src/multiarray/methods.c (`array_reduce`, `array_reduce_ex_picklebuffer`), descriptor.c
(`arraydescr_reduce`).
"""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.dtypes import BY_NAME, DType
from streamconv.ops import Expression
from streamconv.ops.arrays import numpy
from streamconv.ops.constant import MOST_BYTES, constant
from streamconv.readers import numbers
from streamconv.readers.pickle import Record
from streamconv.tensor import Shape, TensorSpec

_DTYPES = {
    "b1": "BOOL", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64", "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128",
}  # fmt: skip

_PLAIN, _BUFFER, _MASKED = "_reconstruct", "_frombuffer", "_mareconstruct"
_MAKERS = {_PLAIN, _BUFFER, _MASKED}
"""Functions that make arrays: of numbers, out of a buffer, and with a mask (numpy/numpy: numpy/ma/core.py)."""


@dataclass(frozen=True, slots=True)
class _Array:
    """What a pickle says of an array.

    Attributes:
        dtype: of its elements.
        swapped: whether the bytes of an element are in the other order.
        shape: of it.
        columns: whether the first axis is the one that varies fastest.
        data: the elements.
    """

    dtype: DType
    swapped: bool
    shape: Shape
    columns: bool
    data: bytes


def is_array(value: object) -> bool:
    """Whether a value is an array, of numbers that can be read or of anything else."""
    return (
        isinstance(value, Record)
        and value.cls.module.partition(".")[0] == "numpy"
        and value.cls.name in _MAKERS
    )


def shape_of(value: object) -> Shape | None:
    """The shape of an array of numbers; None for other values."""
    array = _array(value) if isinstance(value, Record) else None
    return None if array is None else array.shape


def read(value: object) -> Expression | str:
    """An array of numbers as a tensor, or why it cannot be read."""
    array = _array(value) if isinstance(value, Record) else None
    if array is None:
        return "it is a NumPy array of another kind than plain numbers; save it as a tensor"
    spec = TensorSpec("", array.dtype, array.shape)
    if spec.nbytes != len(array.data):
        return f"it is a NumPy array with {len(array.data)} bytes of the {spec.nbytes} that its shape needs"
    if spec.nbytes > MOST_BYTES:
        return (
            f"it is a NumPy array of {spec.nbytes} bytes, which lie in the pickle; above {MOST_BYTES} it has to be "
            "saved as a tensor"
        )
    return constant(spec, _row_major(array))


def _row_major(array: _Array) -> bytes:
    """The elements, little-endian, the last axis varying fastest."""
    own = numpy.dtype(array.dtype.numpy)
    values = numpy.frombuffer(array.data, own.newbyteorder(">") if array.swapped else own)
    return values.reshape(array.shape, order="F" if array.columns else "C").astype(own).tobytes()


def _array(record: Record) -> _Array | None:
    if record.cls.module.partition(".")[0] != "numpy":
        return None
    state = record.state
    if record.cls.name == _PLAIN and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, columns, data = state
    elif record.cls.name == _BUFFER and len(record.args) == 4:
        data, dtype, shape, order = record.args
        columns = order == "F"
    else:
        return None
    sizes = numbers.shape(shape)
    if (
        not isinstance(dtype, Record)
        or not dtype.args
        or sizes is None
        or not isinstance(data, (bytes, bytearray))
    ):
        return None
    row = BY_NAME.get(_DTYPES.get(str(dtype.args[0]), ""))
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    return None if row is None else _Array(row, order == ">", sizes, columns is True, bytes(data))
