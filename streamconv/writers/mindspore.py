"""MindSpore's `.ckpt`: byte for byte what `mindspore.save_checkpoint` writes of the same tensors in the same order.

A record a parameter, each of Protocol Buffers; one of more than 512 MiB is cut into several that follow each other.
All lengths follow from shapes. Source: mindspore-ai/mindspore: mindspore/python/mindspore/train/serialization.py
(`_write_parameter_bytes_data`), train/checkpoint.proto.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.errors import Problem
from streamconv.options.spelling import dropping
from streamconv.storage.protobuf import encoded_varint
from streamconv.tensor import TensorSpec
from streamconv.writers.layout import BARE, About, FileLayout, Literal, Patch, Placement, Target

TYPES: dict[str, str] = {
    "I8": "Int8", "I16": "Int16", "I32": "Int32", "I64": "Int64", "U8": "UInt8", "U16": "UInt16", "U32": "UInt32",
    "U64": "UInt64", "F16": "Float16", "F32": "Float32", "F64": "Float64", "BF16": "BFloat16", "BOOL": "Bool",
}  # fmt: skip
"""Dtypes that `mindspore.load_checkpoint` takes, as a record spells them."""

SLICE = 512 << 20
_FOOTER = b"crc_num"
_FOOTER_NUMBER = 10


def check(spec: TensorSpec) -> Problem | None:
    """Why a `.ckpt` cannot hold such a tensor, or None where it can."""
    if spec.dtype.name not in TYPES:
        return Problem(
            f"MindSpore's .ckpt has no dtype {spec.dtype}",
            tensor=spec.name,
            hint="cast it with --dtype, or leave it out with --drop",
        )
    if spec.shape == (0,):
        return Problem(
            "MindSpore's .ckpt cannot hold an empty row: it would be read as a scalar", tensor=spec.name,
            hint=f"leave it out: {dropping(spec.name)}",
        )  # fmt: skip
    if not spec.name:
        return Problem("a parameter needs a name", hint="--rename it")
    return None


def layout(tensors: Sequence[Target], about: About = BARE) -> FileLayout:
    """Plan a file of the tensors in their order; tied ones are written one by one, as MindSpore does.

    There is no place for anything besides, but a checksum at the end.
    """
    literals: list[Literal] = []
    placements: list[Placement] = []
    at = 0
    for target in tensors:
        spec = target.spec
        for start in range(0, max(spec.nbytes, 1), SLICE):
            length = min(SLICE, spec.nbytes - start)
            head = _head(spec, length)
            literals.append(Literal(at, head))
            at += len(head)
            placements.append(Placement(spec.name, at, length, start))
            at += length
    patches: tuple[Patch, ...] = ()
    if about.crc:
        end = at
        literals.append(Literal(at, _FOOTER + bytes(_FOOTER_NUMBER)))
        at += len(literals[-1].data)
        patches = (Patch("the whole file", at - 4, "crc32, big-endian", 0, end),)
    return FileLayout(at, tuple(placements), tuple(literals), patches)


def _head(spec: TensorSpec, length: int) -> bytes:
    """What stands before `length` bytes of a parameter's content."""
    name, kind = spec.name.encode(), TYPES[spec.dtype.name].encode()
    dims = b"".join(b"\x08" + encoded_varint(size) for size in spec.shape)
    tensor = dims + b"\x12" + encoded_varint(len(kind)) + kind + b"\x1a" + encoded_varint(length)
    value = (
        b"\x0a" + encoded_varint(len(name)) + name + b"\x12" + encoded_varint(len(tensor) + length) + tensor
    )
    return b"\x0a" + encoded_varint(len(value) + length) + value
