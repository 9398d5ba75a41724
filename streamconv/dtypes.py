"""The dtypes of tensors: one table, one row a dtype.

Names are those of safetensors 0.8 (huggingface/safetensors: safetensors/src/tensor.rs, `Dtype`), and
`rank` is that library's sort rank, by which it lays tensors out (highest first). A row without a rank
cannot be held by safetensors; a row without a torch name cannot be held by torch.

NumPy types are imported on first use, because the command line must start without NumPy.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from streamconv.errors import UsageError

if TYPE_CHECKING:
    import numpy

Kind = Literal["bool", "int", "uint", "float", "complex"]


@dataclass(frozen=True)
class DType:
    """One row of the table.

    Attributes:
        name: safetensors' spelling.
        bits: bits that one element takes in a file. Below 8, elements share bytes and a tensor's
            row-major bits must fill whole bytes.
        kind: what the elements are. `--dtype` only ever touches `float`.
        numpy_name: `module.attribute` of the NumPy type that holds the elements in memory.
        rank: safetensors' sort rank, or None where that format has no such dtype.
        torch_name: attribute of the torch module, or None.
        torch_storage: storage class that torch's pickles name for it, or None where torch writes an
            untyped storage (pytorch/pytorch: torch/storage.py, `_dtype_to_storage_type_map`).
    """

    name: str
    bits: int
    kind: Kind
    numpy_name: str
    rank: int | None
    torch_name: str | None = None
    torch_storage: str | None = None

    @cached_property
    def numpy(self) -> numpy.dtype[Any]:
        """The NumPy dtype of one element in memory (sub-byte elements take a byte each there)."""
        import numpy

        module, _, attribute = self.numpy_name.partition(".")
        found: numpy.dtype[Any] = numpy.dtype(getattr(importlib.import_module(module), attribute))
        return found

    @property
    def packed(self) -> bool:
        """Whether several elements share a byte, so that not every element has an address."""
        return self.bits % 8 != 0

    @property
    def itemsize(self) -> int:
        """Bytes of one element; only for dtypes that are not `packed`."""
        if self.packed:
            raise ValueError(f"{self.name} has no whole number of bytes an element")
        return self.bits // 8

    def __reduce__(self) -> tuple[Any, ...]:
        # Work items travel between processes; a row is a singleton and travels as its name.
        return (by_name, (self.name,))

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


# fmt: off
_TABLE: tuple[DType, ...] = (
    DType("BOOL",        8, "bool",  "numpy.bool_",                 1, "bool",            "BoolStorage"),
    DType("F4",          4, "float", "ml_dtypes.float4_e2m1fn",     2, "float4_e2m1fn_x2"),
    DType("F6_E2M3",     6, "float", "ml_dtypes.float6_e2m3fn",     3),
    DType("F6_E3M2",     6, "float", "ml_dtypes.float6_e3m2fn",     4),
    DType("U8",          8, "uint",  "numpy.uint8",                 5, "uint8",           "ByteStorage"),
    DType("I8",          8, "int",   "numpy.int8",                  6, "int8",            "CharStorage"),
    DType("F8_E5M2",     8, "float", "ml_dtypes.float8_e5m2",       7, "float8_e5m2"),
    DType("F8_E4M3",     8, "float", "ml_dtypes.float8_e4m3fn",     8, "float8_e4m3fn"),
    DType("F8_E8M0",     8, "float", "ml_dtypes.float8_e8m0fnu",    9, "float8_e8m0fnu"),
    DType("F8_E4M3FNUZ", 8, "float", "ml_dtypes.float8_e4m3fnuz",  10, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 8, "float", "ml_dtypes.float8_e5m2fnuz",  11, "float8_e5m2fnuz"),
    DType("I16",        16, "int",   "numpy.int16",                12, "int16",           "ShortStorage"),
    DType("U16",        16, "uint",  "numpy.uint16",               13, "uint16"),
    DType("F16",        16, "float", "numpy.float16",              14, "float16",         "HalfStorage"),
    DType("BF16",       16, "float", "ml_dtypes.bfloat16",         15, "bfloat16",        "BFloat16Storage"),
    DType("I32",        32, "int",   "numpy.int32",                16, "int32",           "IntStorage"),
    DType("U32",        32, "uint",  "numpy.uint32",               17, "uint32"),
    DType("F32",        32, "float", "numpy.float32",              18, "float32",         "FloatStorage"),
    DType("C64",        64, "complex", "numpy.complex64",          19, "complex64",       "ComplexFloatStorage"),
    DType("F64",        64, "float", "numpy.float64",              20, "float64",         "DoubleStorage"),
    DType("I64",        64, "int",   "numpy.int64",                21, "int64",           "LongStorage"),
    DType("U64",        64, "uint",  "numpy.uint64",               22, "uint64"),
    DType("C128",      128, "complex", "numpy.complex128",         None, "complex128",    "ComplexDoubleStorage"),
)
# fmt: on

BY_NAME: dict[str, DType] = {row.name: row for row in _TABLE}
BY_TORCH_NAME: dict[str, DType] = {row.torch_name: row for row in _TABLE if row.torch_name}
BY_TORCH_STORAGE: dict[str, DType] = {row.torch_storage: row for row in _TABLE if row.torch_storage}

# Other spellings that users type and configs hold, in lower case.
_ALIASES: dict[str, str] = {
    **{name.lower(): name for name in BY_NAME},
    **{torch_name: row.name for torch_name, row in BY_TORCH_NAME.items()},
    "half": "F16", "fp16": "F16", "bf16": "BF16", "fp32": "F32", "float": "F32",
    "fp64": "F64", "double": "F64", "long": "I64", "fp8": "F8_E4M3", "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2", "float8_e4m3": "F8_E4M3",
}  # fmt: skip


def by_name(name: str) -> DType:
    """The row of a safetensors dtype name. Raises KeyError for an unknown one."""
    return BY_NAME[name]


def parse(text: str) -> DType:
    """The row that a user's spelling means: `BF16`, `bf16`, `bfloat16`, `torch.bfloat16`, `fp32`.

    Raises:
        UsageError: no row has that name.
    """
    key = text.strip().lower().removeprefix("torch.")
    if key not in _ALIASES:
        raise UsageError(f"unknown dtype '{text}'", hint="known: " + ", ".join(BY_NAME))
    return BY_NAME[_ALIASES[key]]
