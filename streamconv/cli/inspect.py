"""`streamconv inspect`: the contents of a checkpoint, from its headers; runs no code in it.

With `--json`, one document on stdout:

    path, format
    components      [{directory, stem, variant, tensors, model_type}]
    tensors         number of tensors
    parameters      number of elements; names that share their bytes count once
    bytes           of tensors, likewise
    dtypes          {"BF16": {tensors, parameters, bytes}, ...}; each name counts
    metadata        {dotted name: value}, what the files hold besides tensors
    side_files      [path]
    ignored         [{path, reason}]
    notes           [text]
    unreadable      {name: why}, of tensors that are there and cannot be read
    can_become      [architecture], what --to-arch can make of it
    rows            [{name, dtype, shape, bytes}], every tensor in the source's order
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamconv.cli import options
from streamconv.cli.tables import Row, fold, render
from streamconv.cli.text import as_json, labelled, picked, present, size
from streamconv.errors import count
from streamconv.options.records import ReadingOptions

if TYPE_CHECKING:
    from streamconv.readers.checkpoint import Checkpoint, Component
    from streamconv.tensor import TensorSpec

_MOST_LINES = 20
_WIDTH = 12
_LONGEST_VALUE = 100


def run(arguments: Namespace) -> int:
    """Print what is there."""
    from streamconv import api

    contents = api.open(arguments.source, **options.given(ReadingOptions, arguments)).contents
    present(arguments, lambda: _document(contents), lambda: _lines(contents, arguments.full))
    return 0


def _lines(contents: Checkpoint, full: bool) -> list[str]:
    """The contents as text."""
    from streamconv.plans.ends import ends

    specs = _specs(contents)
    unshared = _sums(_unshared(contents))
    shared = _sums(specs)["parameters"] - unshared["parameters"]
    further = f", and {shared:,} under further names that share their bytes" if shared else ""
    facts = {
        "path": [str(contents.path)],
        "format": [contents.format],
        "tensors": [f"{len(specs):,}"],
        "parameters": [f"{unshared['parameters']:,}{further}"],
        "bytes": [size(unshared["bytes"])],
        "dtype": (
            f"{name}: {count(sums['tensors'], 'tensor')}, {count(sums['parameters'], 'parameter')}, {size(sums['bytes'])}"
            for name, sums in _by_dtype(specs).items()
        ),
        "component": map(_component, contents.components),
    }
    lists = {
        "metadata": (f"{name}: {_short(value)}" for name, value in contents.metadata.items()),
        "side file": contents.side_files,
        "ignored": (f"{file.path}: {file.reason}" for file in contents.ignored),
        "unreadable": (f"{name}: {why}" for name, why in contents.unreadable.items()),
        "note": contents.notes,
    }
    about = [*labelled(facts, None, _WIDTH), *labelled(lists, None if full else _MOST_LINES, _WIDTH)]
    return [*about, "", *_table(specs, full), *ends(contents).lines]


def _table(specs: list[TensorSpec], full: bool) -> list[str]:
    rows = [Row((spec.name,), (spec.dtype.name, str(list(spec.shape)))) for spec in specs]
    cells = []
    for line in fold(rows, full):
        number = len(line.members)
        cells.append((*line.names, *line.values, f"{number:,}", size(specs[line.members[0]].nbytes * number)))
    return render(("tensor", "dtype", "shape", "count", "bytes"), cells, right=["count", "bytes"])


def _document(contents: Checkpoint) -> dict[str, Any]:
    """What the module's docstring says."""
    from streamconv.plans.ends import ends

    specs = _specs(contents)
    return {
        "path": str(contents.path),
        "format": contents.format,
        "components": [
            {
                **picked(component, "directory stem variant"),
                "tensors": len(component.tensors),
                "model_type": as_json((component.config or {}).get("model_type")),
            }
            for component in contents.components
        ],
        **_sums(_unshared(contents)),
        "tensors": len(specs),
        "dtypes": _by_dtype(specs),
        "metadata": as_json(contents.metadata),
        "side_files": contents.side_files,
        "ignored": [picked(file, "path reason") for file in contents.ignored],
        "unreadable": contents.unreadable,
        "notes": contents.notes,
        "can_become": ends(contents).names,
        "rows": [
            {"name": spec.name, "dtype": spec.dtype.name, "shape": spec.shape, "bytes": spec.nbytes}
            for spec in specs
        ],
    }


def _specs(contents: Checkpoint) -> list[TensorSpec]:
    """Every tensor, under its name in the whole checkpoint."""
    return [
        replace(tensor.spec, name=f"{component.directory}/{name}" if component.directory else name)
        for component in contents.components
        for name, tensor in component.tensors.items()
    ]


def _unshared(contents: Checkpoint) -> list[TensorSpec]:
    """Every tensor, but only one of those that share their bytes."""
    from streamconv.ops import renamed

    tensors = (tensor for component in contents.components for tensor in component.tensors.values())
    return list({renamed(tensor, ""): tensor.spec for tensor in tensors}.values())


def _sums(specs: Sequence[TensorSpec]) -> dict[str, int]:
    nbytes, numel = (sum(getattr(spec, name) for spec in specs) for name in ("nbytes", "numel"))
    return {"tensors": len(specs), "parameters": numel, "bytes": nbytes}


def _by_dtype(specs: Iterable[TensorSpec]) -> dict[str, dict[str, int]]:
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.dtype.name, []).append(spec)
    return {name: _sums(group) for name, group in groups.items()}


def _component(component: Component) -> str:
    kind = (component.config or {}).get("model_type") or (component.config or {}).get("_class_name")
    parts = [component.directory or "(the only one)", component.stem]
    parts += [f"variant {component.variant}"] if component.variant else []
    parts += [str(kind)] if kind else []
    return f"{', '.join(parts)}: {count(len(component.tensors), 'tensor')}"


def _short(value: object) -> str:
    text = json.dumps(as_json(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


COMMAND = options.Command(
    "what is in a checkpoint, from its headers",
    "Show what a checkpoint holds. Reads only headers, runs nothing that it contains, writes nothing.",
    {**options.READING, **options.RESULTS},
    run,
    {"source": ("SRC", "a file or a directory, recognised by its content")},
)
