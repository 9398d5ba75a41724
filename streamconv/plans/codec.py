"""Plans as JSON: every plan reads back equal to what was written, on any machine, without its recipe."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
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
from streamconv.tensor import Extent, Stored, TensorSpec
from streamconv.writers.layout import FileLayout, Literal, Patch, Placement

VERSION = 1


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Paths of source files are relative to the source where they lie in it."""
    root = _root(plan.source)
    positions = {file.path: position for position, file in enumerate(plan.files)}
    return {
        "version": VERSION,
        "source": plan.source,
        "source_format": plan.source_format,
        "target_format": plan.target_format,
        "files": [[_relative(file.path, root), file.size, file.identity] for file in plan.files],
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
                "path": output.path,
                "size": output.layout.size,
                "literals": [
                    [literal.offset, base64.b64encode(literal.data).decode()]
                    for literal in output.layout.literals
                ],
                "placements": [list(_fields(place).values()) for place in output.layout.placements],
                "patches": [list(_fields(patch).values()) for patch in output.layout.patches],
            }
            for output in plan.outputs
        ],
        "texts": [[text.path, text.content] for text in plan.texts],
        "side_files": [
            [_relative(side.source, root), side.path, side.size, side.identity] for side in plan.side_files
        ],
        "checks": [
            {
                "meaning": check.meaning,
                "left": _expression_to_json(check.left, positions),
                "right": _expression_to_json(check.right, positions),
                "tolerance": check.tolerance,
            }
            for check in plan.checks
        ],
        "dropped": [[dropped.name, dropped.reason] for dropped in plan.dropped],
        "notes": list(plan.notes),
        "arguments": dict(plan.arguments),
    }


def from_json(document: Mapping[str, Any]) -> Plan:
    """The plan that `to_json` wrote.

    Raises:
        UsageError: another version of streamconv wrote it.
    """
    if document.get("version") != VERSION:
        raise UsageError(
            f"the plan has version {document.get('version')}, this streamconv reads {VERSION}",
            hint="use the version that made it, or begin anew with --restart",
        )
    root = _root(document["source"])
    files = tuple(
        SourceFile(_absolute(path, root), size, identity) for path, size, identity in document["files"]
    )
    paths = [file.path for file in files]
    return Plan(
        source=document["source"],
        source_format=document["source_format"],
        target_format=document["target_format"],
        files=files,
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
                    placements=tuple(Placement(*place) for place in row["placements"]),
                    literals=tuple(
                        Literal(offset, base64.b64decode(data)) for offset, data in row["literals"]
                    ),
                    patches=tuple(Patch(*patch) for patch in row["patches"]),
                ),
            )
            for row in document["outputs"]
        ),
        texts=tuple(TextFile(path, content) for path, content in document["texts"]),
        side_files=tuple(
            SideFile(_absolute(source, root), path, size, identity)
            for source, path, size, identity in document["side_files"]
        ),
        checks=tuple(
            Check(
                row["meaning"],
                _expression_from_json(row["left"], paths),
                _expression_from_json(row["right"], paths),
                row["tolerance"],
            )
            for row in document["checks"]
        ),
        dropped=tuple(Dropped(name, reason) for name, reason in document["dropped"]),
        notes=tuple(document["notes"]),
        arguments=document["arguments"],
    )


def fingerprint(plan: Plan) -> str:
    """SHA-256 over everything that decides the output's bytes; two equal plans have equal ones.

    Where the source lies and when its files changed is not part of it.
    """
    moved = dataclasses.replace(
        plan,
        files=tuple(dataclasses.replace(file, identity=0) for file in plan.files),
        side_files=tuple(dataclasses.replace(side, identity=0) for side in plan.side_files),
        notes=(),
        arguments={},
    )
    document = to_json(moved) | {"source": ""}
    return hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _expression_to_json(expression: Expression, positions: Mapping[str, int]) -> dict[str, Any]:
    spec = expression.spec
    shared = {"name": spec.name, "dtype": spec.dtype.name, "shape": list(spec.shape)}
    if isinstance(expression, Stored):
        extents = [[positions[extent.file], extent.offset, extent.length] for extent in expression.extents]
        return {**shared, "extents": extents}
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
        extents = (Extent(paths[file], offset, length) for file, offset, length in row["extents"])
        return Stored(spec, tuple(extents))
    op = OPS[row["op"]](**{key: _frozen(value) for key, value in row["fields"].items()})
    operands = tuple(_expression_from_json(operand, paths) for operand in row["operands"])
    return Node(op, operands, row["result"], spec)


def _fields(record: Any) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}


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
