"""Plans as JSON: every plan reads back equal to what was written, on any machine, without its recipe.

What stands where follows from the types of the records.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, cast

import orjson

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import StreamconvError, UsageError
from streamconv.ops import OPS, Expression, Node, apply
from streamconv.plans.forms import INSIDE, NATURAL, SHAPE, Damaged, Form, Forms
from streamconv.plans.plan import Check, OutputFile, Plan, PlannedTensor, SideFile, SourceFile, TextFile
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import scheme
from streamconv.tensor import Extent, Stored, TensorSpec
from streamconv.writers.layout import FileLayout, Literal, Patch, Placement

VERSION = 1

# Results of one operation: far more than there are experts.
_MOST_RESULTS = 1 << 20


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Paths of source files are relative to the source where they lie in it."""
    write, _ = _forms(plan.source, plan.files)[Plan]
    return {"version": VERSION, **write(plan)}


def from_json(document: Any) -> Plan:
    """The plan that `to_json` wrote. It is outside data: types, ranges, paths and shapes are checked.

    Raises:
        UsageError: another version of streamconv wrote it, or it is damaged.
    """
    try:
        if not isinstance(document, dict):
            raise Damaged("an object", document)
        if document.get("version") != VERSION:
            raise UsageError(
                f"the plan has version {str(document.get('version'))[:20]}, this streamconv reads {VERSION}",
                hint="use the version that made it, or start over with --restart",
            )
        files: list[SourceFile] = []
        source = Forms()[str][1](document["source"])
        files += _forms(source, files)[tuple[SourceFile, ...]][1](document["files"])
        plan: Plan = _forms(source, files)[Plan][1]({"checksums": [], **document})
        _check_places(plan)
    except UsageError as error:
        if error.headline.hint:
            raise
        raise _damaged(error) from error
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise _damaged(error) from error
    except StreamconvError as error:
        raise _damaged(error) from error
    return plan


def _damaged(error: Exception) -> UsageError:
    return UsageError(f"the plan is damaged: {error}", hint="--restart starts over")


def _check_places(plan: Plan) -> None:
    """Hold what a plan says of its output against itself."""
    for tensor in plan.tensors:
        size = plan.outputs[tensor.file].layout.size
        if tensor.offset + tensor.spec.nbytes > size:
            raise Damaged(f"tensor '{tensor.spec.name}' in a file of {size} bytes", tensor.offset)
    for output in plan.outputs:
        layout = output.layout
        for start, length in (
            *((each.offset, len(each.data)) for each in layout.literals),
            *((each.offset, each.length) for each in layout.placements),
            *((each.start, each.length) for each in layout.patches),
            *((each.offset, 4) for each in layout.patches),
        ):
            if start + length > layout.size:
                raise Damaged(f"a place in a file of {layout.size} bytes", start)


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


def _forms(source: str, files: Sequence[SourceFile]) -> Forms:
    """Forms for a plan that reads these files."""
    place = locate(source)
    root = place if place.is_directory() else place.parent
    positions = {file.path: position for position, file in enumerate(files)}
    path = (lambda path: _relative(path, root)), (lambda text: _absolute(text, root))
    forms = Forms()
    forms[bytes] = (lambda data: base64.b64encode(data).decode()), base64.b64decode
    forms[DType] = (lambda dtype: dtype.name), dtypes.by_name
    write_extent, read_extent = forms.record(
        Extent, file=(positions.__getitem__, NATURAL[1]), offset=NATURAL, length=NATURAL
    )

    def extent(row: Any) -> Extent:
        found = read_extent(row)
        file = files[cast(int, found.file)]
        if found.offset + found.length > file.size:
            raise Damaged(f"a place in a file of {file.size} bytes", row)
        return Extent(file.path, found.offset, found.length)

    forms[Extent] = write_extent, extent
    forms[SourceFile] = forms.record(SourceFile, path=path, size=NATURAL)
    forms[SideFile] = forms.record(SideFile, source=path, path=INSIDE, size=NATURAL)
    forms[TextFile] = forms.record(TextFile, path=INSIDE)
    forms[Expression] = _expressions(forms)
    forms[PlannedTensor] = forms.table(PlannedTensor, {"file": NATURAL, "offset": NATURAL}, expression="from")
    forms[Check] = forms.table(Check)
    for kind, naturals in (
        (Placement, ("offset", "length", "start")),
        (Patch, ("offset", "start", "length")),
    ):
        forms[kind] = forms.record(kind, **dict.fromkeys(naturals, NATURAL))
    forms[Literal] = forms.record(Literal, offset=NATURAL)
    write, read = forms.table(FileLayout, {"size": NATURAL})
    forms[OutputFile] = (
        lambda file: {"path": file.path, **write(file.layout)},
        lambda row: OutputFile(INSIDE[1](row["path"]), read(row)),
    )
    forms[Plan] = forms.table(Plan)
    return forms


def _expressions(forms: Forms) -> Form:
    write_spec, read_spec = forms.table(TensorSpec, {"shape": SHAPE})
    write_extents, read_extents = forms[tuple[Extent, ...]]
    ops = {name: forms.table(op) for name, op in OPS.items()}

    def write(expression: Expression) -> dict[str, Any]:
        row: dict[str, Any] = write_spec(expression.spec)
        if isinstance(expression, Stored):
            return row | {"extents": write_extents(expression.extents)}
        op = expression.op
        return row | {"op": op.name, "fields": ops[op.name][0](op), "result": expression.result,
                      "operands": [write(operand) for operand in expression.operands]}  # fmt: skip

    def read(row: Any) -> Expression:
        spec = read_spec(row)
        if "extents" in row:
            return Stored(spec, read_extents(row["extents"]))
        op = ops[row["op"]][1](row["fields"])
        if getattr(op, "count", 0) > _MOST_RESULTS:
            raise Damaged(f"at most {_MOST_RESULTS} results", row["fields"])
        operands = tuple(map(read, row["operands"]))
        # What an operation makes follows from its operands, and blocks are as large as their tensor says.
        made = apply(op, *operands)[NATURAL[1](row["result"])].spec
        if (made.dtype, made.shape) != (spec.dtype, spec.shape):
            raise Damaged(f"{made.dtype} {list(made.shape)} for '{spec.name}'", row["shape"])
        return Node(op, operands, row["result"], spec)

    return write, read


def _relative(path: str, root: Location) -> str:
    place = locate(path)
    return place.relative_to(root) if place.is_relative_to(root) else path


def _absolute(path: str, root: Location) -> str:
    return path if scheme(path) else (root / path).place
