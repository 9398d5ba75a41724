"""Plans as JSON: every plan reads back equal to what was written, on any machine, without its recipe."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from streamconv import dtypes
from streamconv.errors import UsageError
from streamconv.ops import OPS, Expression, Node
from streamconv.plans.plan import (
    Check,
    Dropped,
    OutputFile,
    Plan,
    PlannedTensor,
    SideFile,
    SourceFile,
    TextFile,
)
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import scheme
from streamconv.tensor import Checksum, Extent, Stored, TensorSpec
from streamconv.writers.layout import FileLayout, Literal, Patch, Placement

VERSION = 1

_AS_IT_IS = ("source", "source_format", "target_format", "arguments")

# Members of a plan that are flat records: a list each.
_ROWS: Mapping[str, type] = {"texts": TextFile, "dropped": Dropped}
_LAYOUT: Mapping[str, type] = {"placements": Placement, "patches": Patch}


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Paths of source files are relative to the source where they lie in it."""
    root = _root(plan.source)
    positions = {file.path: position for position, file in enumerate(plan.files)}
    return {
        "version": VERSION,
        **{name: getattr(plan, name) for name in _AS_IT_IS},
        **_rows(plan, _ROWS),
        "files": [[_relative(file.path, root), file.size, file.identity] for file in plan.files],
        "side_files": [[_relative(side.source, root), *_row(side)[1:]] for side in plan.side_files],
        "notes": list(plan.notes),
        "tensors": [
            {
                "sources": list(tensor.sources),
                "from": _expression_to_json(tensor.expression, positions),
                "file": tensor.file,
                "offset": tensor.offset,
            }
            for tensor in plan.tensors
        ],
        "outputs": [
            {
                "path": path,
                "size": layout.size,
                "literals": [[each.offset, base64.b64encode(each.data).decode()] for each in layout.literals],
                **_rows(layout, _LAYOUT),
            }
            for path, layout in ((output.path, output.layout) for output in plan.outputs)
        ],
        "checks": [
            _fields(check)
            | {side: _expression_to_json(getattr(check, side), positions) for side in ("left", "right")}
            for check in plan.checks
        ],
        "checksums": [
            [_extents_to_json(extents, positions), *rest] for extents, *rest in map(_row, plan.checksums)
        ],
    }


def from_json(document: Mapping[str, Any]) -> Plan:
    """The plan that `to_json` wrote.

    Raises:
        UsageError: another version of streamconv wrote it.
    """
    if document.get("version") != VERSION:
        raise UsageError(
            f"the plan has version {document.get('version')}, this streamconv reads {VERSION}",
            hint="use the version that made it, or start over with --restart",
        )
    root = _root(document["source"])
    files = tuple(SourceFile(_absolute(path, root), *state) for path, *state in document["files"])
    paths = [file.path for file in files]
    return Plan(
        **{name: document[name] for name in _AS_IT_IS},
        **_records(document, _ROWS),
        files=files,
        side_files=tuple(SideFile(_absolute(path, root), *rest) for path, *rest in document["side_files"]),
        notes=tuple(document["notes"]),
        tensors=tuple(
            PlannedTensor(
                tuple(row["sources"]), _expression_from_json(row["from"], paths), row["file"], row["offset"]
            )
            for row in document["tensors"]
        ),
        outputs=tuple(
            OutputFile(
                row["path"],
                FileLayout(
                    row["size"],
                    literals=tuple(Literal(at, base64.b64decode(data)) for at, data in row["literals"]),
                    **_records(row, _LAYOUT),
                ),
            )
            for row in document["outputs"]
        ),
        checks=tuple(
            Check(**row | {side: _expression_from_json(row[side], paths) for side in ("left", "right")})
            for row in document["checks"]
        ),
        checksums=tuple(
            Checksum(_extents_from_json(extents, paths), *rest)
            for extents, *rest in document.get("checksums", ())
        ),
    )


def fingerprint(plan: Plan) -> str:
    """SHA-256 over everything that decides the output's bytes; two equal plans have equal ones.

    Where the source lies, when its files changed and what they say of their own bytes is not part of it.
    """
    moved = dataclasses.replace(
        plan,
        files=tuple(dataclasses.replace(file, identity=0) for file in plan.files),
        side_files=tuple(dataclasses.replace(side, identity=0) for side in plan.side_files),
        notes=(),
        arguments={},
    )
    document = to_json(moved) | {"source": ""}
    del document["checksums"]
    return hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _expression_to_json(expression: Expression, positions: Mapping[str, int]) -> dict[str, Any]:
    spec = expression.spec
    shared = {"name": spec.name, "dtype": spec.dtype.name, "shape": list(spec.shape)}
    if isinstance(expression, Stored):
        return {**shared, "extents": _extents_to_json(expression.extents, positions)}
    return {
        **shared,
        "op": expression.op.name,
        "fields": _fields(expression.op),
        "result": expression.result,
        "operands": [_expression_to_json(operand, positions) for operand in expression.operands],
    }


def _expression_from_json(row: Mapping[str, Any], paths: list[str]) -> Expression:
    spec = TensorSpec(row["name"], dtypes.by_name(row["dtype"]), tuple(row["shape"]))
    if "extents" in row:
        return Stored(spec, _extents_from_json(row["extents"], paths))
    op = OPS[row["op"]](**{key: _frozen(value) for key, value in row["fields"].items()})
    operands = tuple(_expression_from_json(operand, paths) for operand in row["operands"])
    return Node(op, operands, row["result"], spec)


def _extents_to_json(extents: Iterable[Extent], positions: Mapping[str, int]) -> list[list[int]]:
    return [[positions[extent.file], extent.offset, extent.length] for extent in extents]


def _extents_from_json(rows: Iterable[list[int]], paths: list[str]) -> tuple[Extent, ...]:
    return tuple(Extent(paths[file], offset, length) for file, offset, length in rows)


def _fields(record: Any) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}


def _row(record: Any) -> list[Any]:
    return list(_fields(record).values())


def _rows(holder: Any, members: Iterable[str]) -> dict[str, list[list[Any]]]:
    return {name: [_row(record) for record in getattr(holder, name)] for name in members}


def _records(document: Mapping[str, Any], members: Mapping[str, type]) -> dict[str, Any]:
    return {name: tuple(kind(*row) for row in document[name]) for name, kind in members.items()}


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that frozen records hold."""
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


def _root(source: str) -> Location:
    """The directory of a source."""
    place = locate(source)
    return place if place.is_directory() else place.parent


def _relative(path: str, root: Location) -> str:
    place = locate(path)
    return place.relative_to(root) if place.is_relative_to(root) else path


def _absolute(path: str, root: Location) -> str:
    return path if scheme(path) else (root / path).place
