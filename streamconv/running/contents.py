"""What `conversion.json` says of the files of a conversion: enough to check every byte of them without the source.

files     path -> {size, xxh3_128, crc32}
    xxh3_128    the digest of the bytes that are no tensor's: of a weight file its headers, of any other all
    crc32       [[start, length, CRC-32], ...]: what the file itself says of bytes that have no digest here
tensors   path -> name -> {dtype, shape, from, at, xxh3_128}
    from        the source tensors that it was made of
    at          [[offset, length], ...]: its row-major bytes in the file, in their order; of a tensor that its format
                cuts, the shape is how many elements it has
    xxh3_128    a digest of each `checksum_part_bytes` of each of these; absent where only storage saw the bytes
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from streamconv import dtypes
from streamconv.errors import DestinationError
from streamconv.execution import patches
from streamconv.execution.execute import Receipt, WorkItem
from streamconv.plans import Plan
from streamconv.plans.forms import INSIDE
from streamconv.readers.numbers import natural, shape
from streamconv.running.destination import Destination
from streamconv.storage.files import Files
from streamconv.storage.location import Location
from streamconv.tensor import TensorSpec
from streamconv.writers.layout import FileLayout

_READ = 1 << 20

Crcs = tuple[tuple[int, int, str], ...]
"""Byte at which a range begins, its length, and its CRC-32 in hexadecimal."""


@dataclass(frozen=True, slots=True)
class RecordedTensor:
    """A tensor in one file.

    Attributes:
        spec: its name, dtype and shape; of one that is cut, the shape is how many elements it has.
        at: offset and length of its bytes in the file.
        parts: offset, length and digest of each part of them; empty where there are no digests.
    """

    spec: TensorSpec
    at: tuple[tuple[int, int], ...]
    parts: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """A file of a conversion: its path relative to the destination, its size, and what is in it.

    `digest` is of the bytes that `rest` lists; `crcs` are what the file says of itself.
    """

    path: str
    size: int
    digest: str
    crcs: Crcs
    tensors: tuple[RecordedTensor, ...]

    @property
    def bare(self) -> tuple[list[RecordedTensor], Crcs]:
        """The tensors of which nothing is known, and the file's own checksums of others that have no digests."""
        runs = sorted(
            (at, at + length) for tensor in self.tensors if not tensor.parts for at, length in tensor.at
        )
        starts = [start for start, _ in runs]
        used, covered = [], set()
        for start, length, crc in self.crcs:
            inside = runs[bisect_left(starts, start) : bisect_left(starts, start + length)]
            whole = {run for run in inside if run[1] <= start + length and run[1] > run[0]}
            used += [(start, length, crc)] if whole else []
            covered |= whole
        left = [
            tensor
            for tensor in self.tensors
            if not tensor.parts
            and any((at, at + length) not in covered for at, length in tensor.at if length)
        ]
        return left, tuple(used)

    @property
    def rest(self) -> list[tuple[int, int]]:
        """Offset and length of the runs of bytes that are no tensor's, in their order."""
        taken = sorted({(at, at + length) for tensor in self.tensors for at, length in tensor.at})
        runs, end = [], 0
        for start, stop in (*taken, (self.size, self.size)):
            if start > end:
                runs.append((end, start - end))
            end = max(end, stop)
        return runs


# -------------------------------------------------------------------------------------------- writing


def described(
    plan: Plan,
    destination: Destination,
    items: Sequence[WorkItem],
    paths: Sequence[str],
    done: Mapping[int, Receipt],
) -> dict[str, Any]:
    """The two members for a run whose files have their final names; `paths` are where its items wrote."""
    digests: dict[tuple[str, int], list[str | None]] = {}
    for item in items:
        digests.setdefault((item.path, item.offset), []).append(done[item.index].digest)
    tensors: dict[str, dict[str, Any]] = {output.path: {} for output in plan.outputs}
    for tensor in plan.tensors:
        spec, row = tensor.spec, tensors[plan.outputs[tensor.file].path]
        # One without bytes may lie where the next one begins.
        found = digests[paths[tensor.file], tensor.offset] if spec.nbytes else []
        known = {"dtype": spec.dtype.name, "shape": list(spec.shape), "from": list(tensor.sources),
                 "at": [[tensor.offset, spec.nbytes]], "xxh3_128": found}  # fmt: skip
        cut = row.get(spec.name)
        if cut is not None:
            known |= {key: cut[key] + known[key] for key in ("at", "xxh3_128")}
            known["shape"] = [cut["shape"][0] + spec.numel]
        row[spec.name] = known
    files: dict[str, dict[str, Any]] = {}
    for output in plan.outputs:
        rows = tensors[output.path].values()
        for row in rows:
            if None in row["xxh3_128"]:
                del row["xxh3_128"]
        bare = not all("xxh3_128" in row for row in rows)
        with Files() as opened:
            digest, crcs = _rest(output.layout, destination / output.path, opened)
        files[output.path] = {
            "size": output.layout.size,
            "xxh3_128": digest,
            **({"crc32": crcs} if bare and crcs else {}),
        }
    for side in plan.side_files:
        files[side.path] = {"size": side.size, "xxh3_128": _digest(destination / side.path)}
    for text in plan.texts:
        content = text.content.encode()
        files[text.path] = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    return {"files": files, "tensors": tensors}


def _rest(layout: FileLayout, place: Location, files: Files) -> tuple[str, Crcs]:
    """The digest of what is written besides tensors, and the checksums that are patched in."""
    values: dict[int, bytes] = {}
    ranges: dict[tuple[int, int], str] = {}
    for patch in layout.patches:
        value = bytearray(4)
        files.read_into(place.place, memoryview(value), patch.offset)
        values[patch.offset] = bytes(value)
        ranges[patch.start, patch.length] = patches.text(patch, value)
    hasher = xxhash.xxh3_128()
    pending = sorted(values, reverse=True)
    for literal in layout.literals:
        data = bytearray(literal.data)
        while pending and pending[-1] < literal.offset + len(data):
            at = pending.pop()
            data[at - literal.offset : at - literal.offset + 4] = values[at]
        hasher.update(data)
    return hasher.hexdigest(), tuple((*where, crc) for where, crc in ranges.items())


def _digest(place: Location) -> str:
    hasher = xxhash.xxh3_128()
    with place.open() as file:
        for at in range(0, file.size, _READ):
            hasher.update(file.read(at, min(_READ, file.size - at)))
    return hasher.hexdigest()


# -------------------------------------------------------------------------------------------- reading


def read(document: Mapping[str, Any], place: Location) -> tuple[RecordedFile, ...]:
    """The files of the record at a place, which anybody may have written.

    Raises:
        DestinationError: something in it cannot be.
    """
    try:
        tensors = document["tensors"]
        _require(tensors.keys() <= document["files"].keys(), "tensors are in files that it does not list")
        part = _count(document["checksum_part_bytes"])
        _require(part > 0, "its digests are of no bytes")
        return tuple(_file(path, row, tensors.get(path, {}), part) for path, row in document["files"].items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DestinationError(
            f"the record of the conversion cannot be used: {what}",
            file=str(place),
            hint="it is damaged, or of another version; verify with the source, or convert again with --overwrite",
        ) from error


def _file(path: str, row: Mapping[str, Any], tensors: Mapping[str, Any], part: int) -> RecordedFile:
    size = _count(row["size"])
    INSIDE[1](path)
    crcs = tuple((*_run([start, length], size), _text(crc, 8)) for start, length, crc in row.get("crc32", ()))
    held = tuple(_tensor(name, tensor, size, part) for name, tensor in tensors.items())
    return RecordedFile(path, size, _text(row["xxh3_128"], 32), crcs, held)


def _tensor(name: str, row: Mapping[str, Any], size: int, part: int) -> RecordedTensor:
    sizes = shape(row["shape"])
    if sizes is None or row["dtype"] not in dtypes.BY_NAME:
        raise ValueError(f"'{name}' has an impossible dtype or shape")
    spec = TensorSpec(name, dtypes.by_name(row["dtype"]), sizes)
    at = tuple(_run(run, size) for run in row["at"])
    _require(sum(length for _, length in at) == spec.nbytes, f"'{name}' has other bytes than its shape takes")
    if "xxh3_128" not in row:
        return RecordedTensor(spec, at, ())
    digests = [_text(digest, 32) for digest in row["xxh3_128"]]
    parts = sum(-(-length // part) for _, length in at)
    _require(len(digests) == parts, f"'{name}' has {len(digests)} digests, not {parts}")
    cut = [
        (start, min(part, offset + length - start))
        for offset, length in at
        for start in range(offset, offset + length, part)
    ]
    return RecordedTensor(spec, at, tuple((*run, digest) for run, digest in zip(cut, digests, strict=True)))


def _run(run: Sequence[Any], size: int) -> tuple[int, int]:
    """An offset and a length of bytes in a file of `size`."""
    start, length = map(_count, run)
    _require(start + length <= size, f"{run} are beyond the end of a file of {size} bytes")
    return start, length


def _count(value: Any) -> int:
    count = natural(value)
    if count is None:
        raise ValueError(f"{value!r} is no number of bytes")
    return count


def _text(value: Any, digits: int) -> str:
    """A checksum in hexadecimal."""
    _require(isinstance(value, str) and len(value) == digits and value.isalnum(), f"{value!r} is no checksum")
    return str(value)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
