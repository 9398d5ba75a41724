"""The safetensors format: an 8-byte header length, a JSON header, and the tensors without gaps.

Byte for byte what the reference library writes (huggingface/safetensors: safetensors/src/tensor.rs,
`prepare` and `serialize`), with one difference: metadata of several keys is sorted here, and in the
order of a hash table there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import orjson

from streamconv.errors import PlanError, Problem
from streamconv.options.spelling import dropping
from streamconv.tensor import TensorSpec
from streamconv.writers.layout import BARE, About, FileLayout, Literal, Placement, Target

# The library refuses longer headers, reading and writing (tensor.rs, `MAX_HEADER_SIZE`).
_LONGEST_HEADER = 100_000_000

# Loaders of transformers, accelerate, diffusers and mlx have refused files without this.
_ALWAYS = {"format": "pt"}

_METADATA = "__metadata__"


def check(spec: TensorSpec) -> Problem | None:
    """Why safetensors cannot hold such a tensor, or None where it can."""
    if spec.name == _METADATA:
        return Problem(
            f"safetensors keeps metadata under the name {_METADATA}", tensor=spec.name, hint="--rename it"
        )
    if spec.dtype.rank is None:
        return Problem(
            f"safetensors has no dtype {spec.dtype}",
            tensor=spec.name,
            hint=f"write --to torch, or leave it out: {dropping(spec.name)}",
        )
    return None


def layout(tensors: Sequence[Target], about: About = BARE) -> FileLayout:
    """Plan a safetensors file: widest dtypes first, then by name, so that every tensor is aligned.

    Tied tensors are stored one by one: the format refuses two names for the same bytes. `format: pt` is added to the
    metadata; nothing else has a place.

    Raises:
        PlanError: the header is longer than readers take, or the metadata is not text.
    """
    return laid_out(tensors, {**about.metadata, **_ALWAYS})


def opinion(path: Path, names: list[str]) -> Iterator[Problem]:
    """What the safetensors library says of a file's header, which is to have these names, sorted."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as handle:
            found = sorted(handle.keys())
    except (safetensors.SafetensorError, OSError) as error:
        yield Problem(f"the safetensors library refuses it: {error}", file=str(path))
        return
    if found != names:
        yield Problem("the safetensors library reads other tensor names from it than planned", file=str(path))


def laid_out(tensors: Sequence[Target], metadata: Mapping[str, str]) -> FileLayout:
    """Plan a file with exactly this metadata; see `layout`."""
    specs = sorted((target.spec for target in tensors), key=_order)
    sizes = [spec.nbytes for spec in specs]
    stops = list(itertools.accumulate(sizes))
    try:
        text = bytearray(orjson.dumps({_METADATA: dict(sorted(metadata.items()))})[:-1])
    except TypeError as error:  # the names were checked
        raise PlanError(f"the metadata is not valid Unicode text: {error}") from error
    # One by one: as objects, all of them would take many times what the text does.
    for spec, size, stop in zip(specs, sizes, stops, strict=True):
        entry = {"dtype": spec.dtype.name, "shape": spec.shape, "data_offsets": (stop - size, stop)}
        text += b",%b:%b" % (orjson.dumps(spec.name), orjson.dumps(entry))
    text += b"}"
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise PlanError(
            f"a header of {len(text)} bytes for {len(specs)} tensors; safetensors takes {_LONGEST_HEADER}",
            hint="use a smaller --max-shard, so that a file holds fewer tensors",
        )
    head = len(text).to_bytes(8, "little") + text
    placements = tuple(
        Placement(spec.name, len(head) + stop - size, size)
        for spec, size, stop in zip(specs, sizes, stops, strict=True)
    )
    return FileLayout(len(head) + sum(sizes), placements, (Literal(0, head),))


def _order(spec: TensorSpec) -> tuple[int, str]:
    # Rust compares names by their UTF-8 bytes, Python by code points: the same order for Unicode text.
    return (-(spec.dtype.rank or 0), spec.name)
