"""From what a torch file holds to a state dict: which part of it is the model, and what its tensors are called.

A training checkpoint is a tree of dicts, lists and objects. The model's state dict is somewhere in it; the
place is called the root. Below the root, names are the keys joined by dots. Objects are inert records;
of a pickled module the names are those that its own `state_dict()` would give (pytorch/pytorch:
torch/nn/modules/module.py).

Nothing here recurses over the tree as it is in the file: shared parts may occur in it more often than could
be listed, and cycles occur without end. Both are errors where tensors are concerned, and are cut short in
the metadata.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, TypeVar

from streamconv.errors import CheckpointError, Problem, listed
from streamconv.ops import Expression, renamed
from streamconv.readers.pickle import Global, Record, describe
from streamconv.readers.torch_rebuild import unsupported

_T = TypeVar("_T")

_MAX_VALUES = 1 << 26
_REPEATS = 8  # how often, on average, a part may occur in several places
_FREE_NAMES = 100_000
_MAX_LISTED = 20  # names in one message
_MAX_METADATA = 1_000_000  # values; a longer string counts as more
_MAX_METADATA_DEPTH = 64
_MAX_TEXT = 1 << 16

_MODEL_KEYS = frozenset(
    {
        "ema", "ema_model", "ema_state_dict", "generator", "model", "model_ema", "model_state", "model_state_dict",
        "module", "net", "network", "params", "params_ema", "state_dict", "teacher", "unet", "weights",
    }
)  # fmt: skip
"""Keys that training programs keep a model under."""

_TRAINING_KEYS = frozenset(
    {
        "amp", "callbacks", "criterion", "dataloader", "loops", "train_state", "lr_scheduler", "lr_schedulers", "opt",
        "opt_state", "optim", "rng", "rng_state", "rng_states", "scaler", "scheduler", "schedulers",
    }
)  # fmt: skip
_TRAINING_PREFIXES = ("optimizer", "optim_", "lr_scheduler", "grad_scaler", "amp_scaler", "random_rng")
"""What training programs keep beside a model: tensors under these keys are not the model's."""

_MAX_NAME = 4096  # characters; a tree of long keys would otherwise make far more text than the file holds
_BARE_TENSOR = "tensor"
_ELLIPSIS = "..."
_TRAP = "no training program writes such a file; do not trust it"


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a file by name, and what else it holds.

    Attributes:
        tensors: in the file's order.
        metadata: values that are not tensors, by their dotted place in the file; plain JSON values.
        root: the dotted place of the mapping that holds the tensors; empty for the file's own.
        notes: what was decided and a user should know, one line each.
    """

    tensors: dict[str, Expression]
    metadata: dict[str, object]
    root: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A container in the file and the keys that lead to it."""

    keys: tuple[str, ...]
    value: object

    @property
    def name(self) -> str:
        """The keys with dots between them."""
        return ".".join(self.keys)


def flatten(content: object, root: str | None) -> StateDict:
    """The state dict in what a torch file holds.

    Args:
        content: `TorchFile.content`.
        root: the dotted place of the mapping to take; the file's own for an empty text; None to look for
            it. Then it is the top, if tensors are directly there, or else the one place that has some.

    Raises:
        CheckpointError: there is no such root, no tensor, or more than one place to choose from; a name
            occurs twice; tensors cannot be read (all of them at once); the structure is a trap.
    """
    if isinstance(content, Expression):
        return StateDict({_BARE_TENSOR: renamed(content, _BARE_TENSOR)}, {}, "", ())
    if unreadable := unsupported(content):
        raise CheckpointError(unreadable.reason, tensor=_BARE_TENSOR)
    holders, values = _holders(content)
    if not holders:
        raise CheckpointError(
            f"it holds no tensor: it is {_kind(content)}", hint="give the file with the weights"
        )
    place = _found(content, holders) if root is None else _given(content, root, holders)
    leaves = _leaves(
        place,
        holders,
        whole=root is not None or bool(place.keys),
        limit=_FREE_NAMES + _REPEATS * values,
    )
    beside = _beside(content, place, holders)
    budget = _Budget()
    metadata = {name: _plain(value, budget) for name, value in (*beside.others, *leaves.others)}
    left_out = [*beside.left_out, *leaves.left_out] if root is None else []
    return StateDict(leaves.tensors, metadata, place.name, tuple(_remarks(place, left_out, leaves.arrays)))


def holds_tensors(content: object) -> bool:
    """Whether any tensor can be reached from a value.

    Raises:
        CheckpointError: it has more parts than any checkpoint.
    """
    return isinstance(content, Expression) or bool(_holders(content)[0])


def plain(value: object) -> Any:
    """A value as JSON has it: records by their fields, tensors in words, what is too long or too deep as `...`."""
    return _plain(value, _Budget())


# -------------------------------------------------------------------------------------- the tree


def _children(value: object) -> Iterable[tuple[object, object]]:
    """Key and value of all that may be named below a value; nothing for leaves."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if not isinstance(value, Record) or unsupported(value):
        return ()
    if _is_module(value):
        return _module_children(value.fields)
    if value.items is not None:
        return _children(value.items)
    return value.fields.items() or enumerate(value.args)


def _is_module(value: object) -> bool:
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


def _text(key: object) -> str:
    """A key as a part of a name."""
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode("utf-8", "backslashreplace")
    if isinstance(key, tuple):
        return ".".join(map(_text, key))
    if isinstance(key, Record):
        return f"{key.cls.name}({', '.join(describe(arg) for arg in key.args[:4])})"
    return describe(key)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Expression) or unsupported(value) is not None


def _holders(content: object) -> tuple[frozenset[int], int]:
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
        for _, child in _children(container):
            values += 1
            if _is_tensor(child):
                holds = True
            elif id(child) in parents:
                parents[id(child)].append(id(container))
            elif isinstance(child, (dict, list, tuple, Record)):
                parents[id(child)] = [id(container)]
                todo.append(child)
        if holds:
            found.append(id(container))
        if values > _MAX_VALUES:
            raise CheckpointError(f"it holds more than {_MAX_VALUES} values", hint=_TRAP)
    holders = set(found)
    while found:
        for parent in parents[found.pop()]:
            if parent not in holders:
                holders.add(parent)
                found.append(parent)
    return frozenset(holders), values


# -------------------------------------------------------------------------------------- the root


def _given(content: object, root: str, holders: frozenset[int]) -> _Place:
    """The place that a user names. Keys may have dots in them themselves, so every way to read it counts."""
    todo: list[tuple[_Place, str]] = [(_Place((), content), root)]
    seen = set()
    while todo:
        place, rest = todo.pop()
        if not rest:
            if id(place.value) in holders:
                return place
            continue
        for key, child in _children(place.value):
            text = _text(key)
            if text and (rest == text or rest.startswith(text + ".")):
                after = rest[len(text) + 1 :]
                if (id(child), len(after)) not in seen:
                    seen.add((id(child), len(after)))
                    todo.append((_Place((*place.keys, text), child), after))
    places = _state_dicts(content, holders, training=True)
    raise CheckpointError(
        f"there is no mapping with tensors at {describe(root)}",
        hint=f"tensors are at: {_listed(places)}",
    )


def _found(content: object, holders: frozenset[int]) -> _Place:
    """The one place that holds the model's tensors."""
    places = _state_dicts(content, holders) or _state_dicts(content, holders, incidental=True)
    if not places:
        places = _state_dicts(content, holders, training=True, incidental=True)
        raise CheckpointError(
            "its only tensors are optimizer state or training state",
            hint=f"if you want them: --root KEY, with one of: {_listed(places)}",
        )
    if len(places) == 1:
        return places[0]
    known: dict[tuple[str, ...], list[_Place]] = {}
    for place in places:
        for depth, key in enumerate(place.keys):
            if key.lower() in _MODEL_KEYS:
                known.setdefault(place.keys[: depth + 1], []).append(place)
                break
    if len(known) != 1:
        raise CheckpointError(
            "more than one place may be the model",
            hint=f"choose one with --root KEY: {_listed(places)}",
        )
    ((_, inside),) = known.items()
    if len(inside) == 1:
        return inside[0]
    levels = zip(*(place.keys for place in inside), strict=False)
    return _at(content, tuple(level[0] for level in takewhile(lambda keys: len({*keys}) == 1, levels)))


def _state_dicts(
    content: object, holders: frozenset[int], *, training: bool = False, incidental: bool = False
) -> list[_Place]:
    """The places nearest the top that hold tensors themselves, breadth first.

    Args:
        content: the top.
        holders: from `_holders`.
        training: look also where training programs keep their own state.
        incidental: count also places whose only tensors are numbers and random states.
    """
    result = []
    queue = deque([_Place((), content)])
    seen = {id(content)}
    while queue:
        place = queue.popleft()
        children = list(_children(place.value))
        if _is_module(place.value) or any(
            _is_tensor(child) and (incidental or not _is_incidental(_text(key), child))
            for key, child in children
        ):
            result.append(place)
            continue
        for key, child in children:
            text = _text(key)
            if id(child) in holders and id(child) not in seen and (training or not is_training(text)):
                seen.add(id(child))
                following = _Place((*place.keys, text), child)
                if len(following.name) <= _MAX_NAME:
                    queue.append(following)
    return result


def is_model(key: str) -> bool:
    """Whether training programs keep a model under a key."""
    return key.lower() in _MODEL_KEYS


def is_training(key: str) -> bool:
    """Whether what lies under a key is the training program's own state."""
    return key.lower() in _TRAINING_KEYS or key.lower().startswith(_TRAINING_PREFIXES)


def _is_incidental(key: str, tensor: object) -> bool:
    """Whether a tensor is one that training programs keep beside a model: a counter or a random state."""
    return "rng" in key.lower() or (isinstance(tensor, Expression) and tensor.spec.shape == ())


def _at(content: object, keys: tuple[str, ...]) -> _Place:
    value = content
    for wanted in keys:
        value = next(child for key, child in _children(value) if _text(key) == wanted)
    return _Place(keys, value)


# ------------------------------------------------------------------------------------- the leaves


@dataclass(slots=True)
class _Leaves:
    """What is below the root: tensors by their names there, everything else by its place in the file."""

    tensors: dict[str, Expression] = field(default_factory=dict)
    others: list[tuple[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Places that hold tensors which are not taken."""
    arrays: list[tuple[str, object]] = field(default_factory=list)
    """NumPy arrays inside the pickle."""


def _leaves(place: _Place, holders: frozenset[int], *, whole: bool, limit: int) -> _Leaves:
    """Name everything below a place, in the file's order.

    Args:
        place: the root.
        holders: from `_holders`.
        whole: take all of it, also what training programs keep directly at the place.
        limit: how many names there may be.

    Raises:
        CheckpointError: see `flatten`.
    """
    leaves = _Leaves()
    problems: list[Problem] = []
    above = f"{place.name}." if place.keys else ""
    path = [("", iter(_children(place.value)), id(place.value))]
    on_path = {id(place.value)}
    steps = 0
    while path:
        prefix, children, container = path[-1]
        for key, child in children:
            name = prefix + _text(key)
            steps += 1
            if steps > limit:
                raise CheckpointError("the same parts occur in it far too many times over", hint=_TRAP)
            if len(name) > _MAX_NAME:
                raise CheckpointError(f"it has names of {len(name)} characters", hint=_TRAP)
            if isinstance(child, Expression):
                problem = _name_problem(name, leaves.tensors)
                if problem:
                    problems.append(Problem(problem, tensor=describe(name, quote="")))
                else:
                    leaves.tensors[name] = renamed(child, name)
            elif unreadable := unsupported(child):
                problems.append(Problem(unreadable.reason, tensor=describe(name, quote="")))
            elif id(child) not in holders:
                (leaves.arrays if _is_array(child) else leaves.others).append((above + name, child))
            elif not whole and len(path) == 1 and is_training(name):
                leaves.left_out.append(above + name)
            elif id(child) in on_path:
                raise CheckpointError(f"{describe(name)} contains itself", hint=_TRAP)
            else:
                path.append((f"{name}.", iter(_children(child)), id(child)))
                on_path.add(id(child))
                break
        else:
            path.pop()
            on_path.discard(container)
    if problems:
        raise CheckpointError(f"tensors that cannot be read: {len(problems)}", problems=problems)
    return leaves


def _name_problem(name: str, taken: Mapping[str, object]) -> str | None:
    """Why a tensor cannot have this name."""
    if not name:
        return "its name is empty"
    if name in taken:
        return "two tensors have this name"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not valid Unicode"
    return None


def _is_array(value: object) -> bool:
    """Whether a record is a NumPy array, whose elements are inside the pickle."""
    return (
        isinstance(value, Record)
        and value.cls.module.partition(".")[0] == "numpy"
        and value.cls.name in ("_reconstruct", "_frombuffer", "ndarray")
    )


def _remarks(place: _Place, left_out: Sequence[str], arrays: Sequence[tuple[str, object]]) -> Iterator[str]:
    """What a user should know about the choice."""
    if isinstance(place.value, Record) and _is_module(place.value):
        yield f"it is a pickled {place.value.cls}; names are those of its state_dict(), without its hooks"
    if left_out:
        here = describe(place.name) if place.keys else "the top"
        yield f"took what is at {here} for the model, and left out the tensors at {_listed(left_out)}"
    if arrays:
        yield f"left out NumPy arrays, which are inside the pickle: {_listed([name for name, _ in arrays])}"


# ----------------------------------------------------------------------------------- the metadata


def _beside(content: object, place: _Place, holders: frozenset[int]) -> _Leaves:
    """What lies beside the way to the root, without names for its tensors."""
    result = _Leaves()
    value = content
    for depth, wanted in enumerate(place.keys):
        following = value
        for key, child in _children(value):
            text = _text(key)
            name = ".".join((*place.keys[:depth], text))
            if id(child) in holders and text == wanted:
                following = child
            elif id(child) in holders or _is_tensor(child):
                result.left_out.append(name)
            else:
                result.others.append((name, child))
        value = following
    return result


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
            _plain_text(_text(key), budget): _plain(item, budget, depth + 1)
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


def _plain_text(text: str, budget: _Budget) -> str:
    budget.left -= len(text) >> 6
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + _ELLIPSIS
    return text.encode("utf-8", "backslashreplace").decode()


def _kind(value: object) -> str:
    return f"an object of {value.cls}" if isinstance(value, Record) else describe(value)


def _listed(names: Sequence[str | _Place]) -> str:
    """Names for a message, the first of them where there are many."""
    texts = (name if isinstance(name, str) else name.name for name in names)
    return listed((describe(text, quote="") or "(the top)" for text in texts), _MAX_LISTED)
