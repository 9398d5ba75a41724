"""Plans as JSON: every plan reads back equal to what was written, on any machine, without its recipe.

What stands where follows from the types of the records.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, get_args, get_origin, get_type_hints

import orjson

from streamconv import dtypes
from streamconv.dtypes import DType
from streamconv.errors import StreamconvError, UsageError
from streamconv.ops import OPS, Expression, Node
from streamconv.plans.plan import Check, OutputFile, Plan, PlannedTensor, SideFile, SourceFile
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import scheme
from streamconv.tensor import Extent, Stored, TensorSpec
from streamconv.writers.layout import FileLayout

VERSION = 1

Form = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""How a value stands in JSON: the way there, and the way back."""


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Paths of source files are relative to the source where they lie in it."""
    write, _ = _forms(plan.source, [file.path for file in plan.files])[Plan]
    return {"version": VERSION, **write(plan)}


def from_json(document: Mapping[str, Any]) -> Plan:
    """The plan that `to_json` wrote.

    Raises:
        UsageError: another version of streamconv wrote it, or it is damaged.
    """
    if document.get("version") != VERSION:
        raise UsageError(
            f"the plan has version {document.get('version')}, this streamconv reads {VERSION}",
            hint="use the version that made it, or start over with --restart",
        )
    paths: list[str] = []
    try:
        forms = _forms(str(document["source"]), paths)
        paths += (file.path for file in forms[tuple[SourceFile, ...]][1](document["files"]))
        plan: Plan = forms[Plan][1]({"checksums": [], **document})
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, StreamconvError) as error:
        raise UsageError(f"the plan is damaged: {error}", hint="choose another destination") from error
    return plan


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


class _Forms(dict[Any, Form]):
    """Types and their forms: a tuple or a record is a list, everything else stands for itself."""

    def __missing__(self, kind: Any) -> Form:
        form: Form = _same, _same
        if get_origin(kind) is tuple and get_args(kind)[-1] is ...:
            write, read = self[get_args(kind)[0]]
            form = lambda values: [write(value) for value in values], lambda row: tuple(map(read, row))
        elif get_origin(kind) is tuple:
            form = list, tuple
        elif dataclasses.is_dataclass(kind):
            form = self.record(cast(type, kind))
        self[kind] = form
        return form

    def fields(self, kind: type) -> dict[str, Form]:
        """The forms of a record's fields."""
        hints = get_type_hints(kind)
        return {field.name: self[hints[field.name]] for field in dataclasses.fields(kind)}

    def record(self, kind: type, **own: Form) -> Form:
        """A record as the list of its fields, of which some have forms of their `own`."""
        forms = self.fields(kind) | own
        return (
            lambda record: [write(getattr(record, name)) for name, (write, _) in forms.items()],
            lambda row: kind(*[read(value) for (_, read), value in zip(forms.values(), row, strict=True)]),
        )

    def table(self, kind: type, **keys: str) -> Form:
        """A record as an object, with `keys` for fields that have another name there."""
        forms = [(name, keys.get(name, name), *form) for name, form in self.fields(kind).items()]
        return (
            lambda record: {key: write(getattr(record, name)) for name, key, write, _ in forms},
            lambda row: kind(**{name: read(row[key]) for name, key, _, read in forms}),
        )


def _forms(source: str, paths: Sequence[str]) -> _Forms:
    """Forms for a plan that reads these files."""
    place = locate(source)
    root = place if place.is_directory() else place.parent
    positions = {path: position for position, path in enumerate(paths)}
    path = (lambda path: _relative(path, root)), (lambda text: _absolute(text, root))
    forms = _Forms()
    forms[bytes] = (lambda data: base64.b64encode(data).decode()), base64.b64decode
    forms[DType] = (lambda dtype: dtype.name), dtypes.by_name
    forms[Extent] = forms.record(Extent, file=(positions.__getitem__, lambda at: paths[at]))
    forms[SourceFile] = forms.record(SourceFile, path=path)
    forms[SideFile] = forms.record(SideFile, source=path)
    forms[Expression] = _expressions(forms)
    forms[PlannedTensor] = forms.table(PlannedTensor, expression="from")
    forms[Check] = forms.table(Check)
    write, read = forms.table(FileLayout)
    forms[OutputFile] = (
        lambda file: {"path": file.path, **write(file.layout)},
        lambda row: OutputFile(row["path"], read(row)),
    )
    forms[Plan] = forms.table(Plan)
    return forms


def _expressions(forms: _Forms) -> Form:
    write_spec, read_spec = forms.table(TensorSpec)
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
        return Node(op, tuple(map(read, row["operands"])), row["result"], spec)

    return write, read


def _same(value: Any) -> Any:
    return value


def _relative(path: str, root: Location) -> str:
    place = locate(path)
    return place.relative_to(root) if place.is_relative_to(root) else path


def _absolute(path: str, root: Location) -> str:
    return path if scheme(path) else (root / path).place
