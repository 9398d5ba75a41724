"""What a training program has saved, as a tree: containers, the keys of what is in them, and tensors at the leaves.

A checkpoint is a tree of dicts, lists and objects. Objects are inert records; of a pickled module the children are
those that its own `state_dict()` would name (pytorch/pytorch: torch/nn/modules/module.py).

Nothing here recurses over the tree as it is in the file: shared parts may occur in it more often than could
be listed, and cycles occur without end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from streamconv.errors import CheckpointError
from streamconv.ops import Expression
from streamconv.readers.numpy_arrays import is_array
from streamconv.readers.pickle import Global, Record, describe
from streamconv.readers.torch_rebuild import unsupported

_T = TypeVar("_T")

_MAX_VALUES = 1 << 26
_MAX_METADATA = 1_000_000  # values; a longer string counts as more
_MAX_METADATA_DEPTH = 64
_MAX_TEXT = 1 << 16
_ELLIPSIS = "..."

TRAP = "no training program writes such a file; do not trust it"


def children(value: object) -> Iterable[tuple[object, object]]:
    """Key and value of all that may be named below a value; nothing for leaves."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if not isinstance(value, Record) or unsupported(value):
        return ()
    if is_module(value):
        return _module_children(value.fields)
    if value.items is not None:
        return children(value.items)
    return value.fields.items() or enumerate(value.args)


def is_module(value: object) -> bool:
    """Whether a record is a pickled `torch.nn.Module`."""
    if not isinstance(value, Record):
        return False
    fields = value.fields
    return all(isinstance(fields.get(part), dict) for part in ("_parameters", "_buffers", "_modules"))


def _module_children(fields: dict[object, object]) -> Iterator[tuple[object, object]]:
    """What a module's own `state_dict()` lists, in its order."""
    hidden = fields.get("_non_persistent_buffers_set")
    for part in ("_parameters", "_buffers", "_modules"):
        members = fields[part]
        assert isinstance(members, dict)
        for key, value in members.items():
            skipped = part == "_buffers" and isinstance(hidden, set) and key in hidden
            if value is not None and not skipped:
                yield key, value


def text(key: object) -> str:
    """A key as a part of a name."""
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode("utf-8", "backslashreplace")
    if isinstance(key, tuple):
        return ".".join(map(text, key))
    if isinstance(key, Record):
        return f"{key.cls.name}({', '.join(describe(arg) for arg in key.args[:4])})"
    return describe(key)


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor to torch, one that can be read or not."""
    return isinstance(value, Expression) or unsupported(value) is not None or is_array(value)


def holders(content: object) -> tuple[frozenset[int], int]:
    """The ids of all containers from which some tensor can be reached, and how many values there are.

    Raises:
        CheckpointError: there are more than any checkpoint has.
    """
    values = 0
    parents: dict[int, list[int]] = {id(content): []}
    found: list[int] = []
    todo = [content]
    while todo:
        container = todo.pop()
        holds = False
        for _, child in children(container):
            values += 1
            if is_tensor(child):
                holds = True
            elif id(child) in parents:
                parents[id(child)].append(id(container))
            elif isinstance(child, (dict, list, tuple, Record)):
                parents[id(child)] = [id(container)]
                todo.append(child)
        if holds:
            found.append(id(container))
        if values > _MAX_VALUES:
            raise CheckpointError(f"it holds more than {_MAX_VALUES} values", hint=TRAP)
    reached = set(found)
    while found:
        for parent in parents[found.pop()]:
            if parent not in reached:
                reached.add(parent)
                found.append(parent)
    return frozenset(reached), values


def at(content: object, place: str) -> object:
    """What is at a dotted place, whose keys may have dots themselves; None where nothing is."""
    todo = [(content, place)]
    while todo:
        value, rest = todo.pop()
        if not rest:
            return value
        for key, child in children(value):
            word = text(key)
            if word and (rest == word or rest.startswith(word + ".")):
                todo.append((child, rest[len(word) + 1 :]))
    return None


def holds_tensors(content: object) -> bool:
    """Whether any tensor can be reached from a value.

    Raises:
        CheckpointError: it has more parts than any checkpoint.
    """
    return isinstance(content, Expression) or bool(holders(content)[0])


def plain(value: object) -> Any:
    """A value as JSON has it: records by their fields, tensors in words, what is too long or too deep as `...`."""
    return _plain(value, _Budget())


def all_plain(values: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Values by name as JSON has them, with one bound on all of them together."""
    budget = _Budget()
    return {name: _plain(value, budget) for name, value in values}


@dataclass(slots=True)
class _Budget:
    """How many more values the metadata may have."""

    left: int = _MAX_METADATA


def _plain(value: object, budget: _Budget, depth: int = 0) -> object:
    """A value as plain JSON: records by their fields, what is too long or too deep as `...`."""
    budget.left -= 1
    if budget.left < 0 or depth > _MAX_METADATA_DEPTH:
        return _ELLIPSIS
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else describe(value)
    if isinstance(value, str):
        return _plain_text(value, budget)
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return {
            _plain_text(text(key), budget): _plain(item, budget, depth + 1)
            for key, item in _affordable(value.items(), budget)
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, budget, depth + 1) for item in _affordable(value, budget)]
    if isinstance(value, Record):
        if value.items is not None:
            return _plain(value.items, budget, depth + 1)
        if value.fields:
            return _plain(value.fields, budget, depth + 1)
        made = {"class": str(value.cls)}
        return {**made, "args": _plain(value.args, budget, depth + 1)} if value.args else made
    if isinstance(value, Expression):
        return f"tensor {value.spec.dtype} {list(value.spec.shape)}"
    return str(value) if isinstance(value, (Global, complex)) else describe(value)


def _affordable(values: Iterable[_T], budget: _Budget) -> Iterator[_T]:
    """The values, until the budget is used up."""
    for value in values:
        if budget.left <= 0:
            return
        yield value


def _plain_text(value: str, budget: _Budget) -> str:
    budget.left -= len(value) >> 6
    if len(value) > _MAX_TEXT:
        value = value[:_MAX_TEXT] + _ELLIPSIS
    return value.encode("utf-8", "backslashreplace").decode()
