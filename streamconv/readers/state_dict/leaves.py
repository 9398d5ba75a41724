"""The names of what is below the root and beside it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from streamconv.errors import CheckpointError, Problem
from streamconv.readers import parts
from streamconv.readers.pickle import describe
from streamconv.readers.state_dict.place import MAX_NAME, Place
from streamconv.readers.tree import TRAP, children, is_tensor, text


@dataclass(slots=True)
class Leaves:
    """What is below the root: tensors by their names there, everything else by its place in the file."""

    tensors: dict[str, object] = field(default_factory=dict)
    others: list[tuple[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Places that hold tensors which are not taken."""


def named_below(place: Place, holding: frozenset[int], *, whole: bool, limit: int) -> Leaves:
    """Name everything below a place, in the file's order.

    Args:
        place: the root.
        holding: from `tree.holders`.
        whole: take all of it, also what training programs keep directly at the place.
        limit: how many names there may be.

    Raises:
        CheckpointError: see `flatten`.
    """
    leaves = Leaves()
    problems: list[Problem] = []
    above = f"{place.name}." if place.keys else ""
    average = parts.average_prefix(place.value)
    path = [("", iter(children(place.value)), id(place.value))]
    on_path = {id(place.value)}
    steps = 0
    while path:
        prefix, inner, container = path[-1]
        for key, child in inner:
            name = prefix + text(key)
            steps += 1
            if steps > limit:
                raise CheckpointError("the same parts occur in it far too many times over", hint=TRAP)
            if len(name) > MAX_NAME:
                raise CheckpointError(f"it has names of {len(name)} characters", hint=TRAP)
            if is_tensor(child):
                own = None if whole else parts.own_tensor(name)
                short = _within(name, average)
                if own or short is None:
                    leaves.left_out.append(above + name)
                elif problem := _name_problem(short, leaves.tensors):
                    problems.append(Problem(problem, tensor=describe(short, quote="")))
                else:
                    leaves.tensors[short] = child
            elif id(child) not in holding:
                leaves.others.append((above + name, child))
            elif not whole and len(path) == 1 and (parts.own_state(name, child) or parts.is_averaged(name)):
                leaves.left_out.append(above + name)
            elif id(child) in on_path:
                raise CheckpointError(f"{describe(name)} contains itself", hint=TRAP)
            else:
                path.append((f"{name}.", iter(children(child)), id(child)))
                on_path.add(id(child))
                break
        else:
            path.pop()
            on_path.discard(container)
    if not whole:
        _leave_out_steps(leaves, above)
    if problems:
        raise CheckpointError(f"tensors that cannot be named: {len(problems)}", problems=problems)
    return leaves


def _leave_out_steps(leaves: Leaves, above: str) -> None:
    """Take out the numbers that lie beside an optimizer's state of a parameter in a flat state dict."""
    prefixes = {parts.moment_prefix(name.removeprefix(above)) for name in leaves.left_out} - {None}
    if prefixes:
        for name, leaf in list(leaves.tensors.items()):
            before, dot, word = name.rpartition(".")
            if before + dot in prefixes and parts.is_incidental(word, leaf):
                leaves.left_out.append(above + name)
                del leaves.tensors[name]


def _within(name: str, prefix: str | None) -> str | None:
    """A name as the model has it whose average it is of; None for what is beside the average."""
    if prefix is None:
        return name
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _name_problem(name: str, taken: Container[str]) -> str | None:
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


def named_beside(content: object, place: Place, holding: frozenset[int]) -> Leaves:
    """What lies beside the way to the root, without names for its tensors."""
    result = Leaves()
    value = content
    for depth, wanted in enumerate(place.keys):
        following = value
        for key, child in children(value):
            word = text(key)
            name = ".".join((*place.keys[:depth], word))
            if id(child) in holding and word == wanted:
                following = child
            elif id(child) in holding or is_tensor(child):
                result.left_out.append(name)
            else:
                result.others.append((name, child))
        value = following
    return result
