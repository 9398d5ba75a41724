"""Shards that every rank writes as safetensors: `shard-RRRRR-model-CCCCC-of-NNNNN.safetensors`, without an index.

Each header says where its tensors begin in the whole ones: `DCP_SHARDING_INFO`, JSON of
{name: {"saved_offsets": [...]}}. Source: pytorch/pytorch: torch/distributed/checkpoint/hf_storage.py, _hf_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import add

from streamconv.errors import CheckpointError, Problem, Problems, listed
from streamconv.ops import Expression
from streamconv.readers import numbers, safetensors, small
from streamconv.readers.chunks import Part, assemble
from streamconv.readers.pickle import under
from streamconv.readers.together import Missing, read_together
from streamconv.storage.location import Location
from streamconv.tensor import TensorSpec

NAME = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")
_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"


def files(directory: Location) -> list[Location]:
    """The shards in a directory."""
    return [entry for entry in directory.entries() if NAME.fullmatch(entry.name)]


def read(shards: Iterable[Location]) -> dict[str, Expression]:
    """The whole tensors.

    Raises:
        CheckpointError: shards are missing or damaged; all problems at once.
    """
    paths = list(shards)
    problems = Problems(_missing(paths))
    parts: dict[str, list[Part]] = {}
    for found in read_together(dict(enumerate(paths)), _parts, problems).values():
        for name, part in found.items():
            parts.setdefault(name, []).append(part)
    problems.report("the shards do not fit together")
    result: dict[str, Expression] = {}
    for name, own in parts.items():
        dtype = own[0].tensor.spec.dtype
        with problems.collecting(tensor=name):
            ends = (map(add, part.offsets, part.tensor.spec.shape) for part in own)
            shape = tuple(max(along) for along in zip(*ends, strict=False))
            result[name] = assemble(TensorSpec(name, dtype, shape), own)
    problems.report("the shards do not fit together")
    return result


def _missing(paths: list[Location]) -> list[Problem]:
    """A problem for each shard that is missing, by the ranks in the names of the others."""
    found = [match for path in paths if (match := NAME.fullmatch(path.name))]
    counts = {int(match[3]) for match in found}
    if len(counts) > 1:
        return [Problem("the shards are of several saves", file=str(paths[0].parent))]
    ranks = {int(match[1]) for match in found}
    first = min(ranks, default=1)
    absent = Missing(ranks, max(ranks, default=0) + 1, first)
    told = f"no shard of rank {listed(absent)} is there"
    return [Problem(told, file=str(paths[0].parent), hint="copy it here too")] if absent else []


def _parts(path: Location) -> dict[str, Part]:
    found = safetensors.read(path)
    try:
        info = small.parsed(found.metadata.get(_INFO, "null").encode())
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise CheckpointError(
            f"its header does not say where its tensors begin ({_INFO})",
            hint="it is a part of a sharded save; another program has rewritten it",
        )
    result = {}
    for name, tensor in found.tensors.items():
        offsets = numbers.naturals(under(info, name, _OFFSETS))
        if offsets is None or len(offsets) != len(tensor.spec.shape):
            raise CheckpointError(f"where it begins is not said in {_INFO}", tensor=name)
        result[name] = Part(offsets, tensor)
    return result
