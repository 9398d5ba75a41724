"""From what a checkpoint holds to a state dict: which part of it is the model, and what its tensors are called.

A training checkpoint is a tree (`readers.tree`). The model's state dict is somewhere in it; the place is called the
root. Below the root, names are the keys joined by dots. The same rules find it in a torch file, in the names of a
checkpoint of torch.distributed, and in the files of ranks:

1. A state dict is a mapping with tensors in it, nearest the top. Tensors beside the key of a model are loose.
2. What is the training program's own (`readers.parts`) is no candidate, and neither are counters and random states.
3. What lies under the key of a model goes before what looks like a state dict, and that before anything else.
4. Of averaged weights and others, the others are taken; `--ema` takes the averaged ones.
5. Where that leaves several, none is picked: they are named, and `--root` chooses.

`candidates` has rules 1 to 3, and `root` the rest; `leaves` names what is at the root, and `readable` says which of it
can be read. `averaged` is about averages that need the model beside them, and `notes` about what users should know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from streamconv.errors import CheckpointError, listed
from streamconv.ops import Expression, renamed
from streamconv.options.records import Trait
from streamconv.readers import parts
from streamconv.readers.state_dict.averaged import by_order, completed, require_model
from streamconv.readers.state_dict.candidates import Candidate, candidates_in
from streamconv.readers.state_dict.leaves import named_below, named_beside
from streamconv.readers.state_dict.notes import on_choice, on_twins
from streamconv.readers.state_dict.readable import flat_parameter, read_leaf, require_some
from streamconv.readers.state_dict.root import chosen, given
from streamconv.readers.tree import all_plain, holders, is_module, is_tensor

_REPEATS = 8  # how often, on average, a part may occur in several places
_FREE_NAMES = 100_000
_BARE_TENSOR = "tensor"


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a file by name, and what else it holds.

    Attributes:
        tensors: in the file's order.
        metadata: values that are not tensors, by their dotted place in the file; plain JSON values.
        root: the dotted place of the mapping that holds the tensors; empty for the file's own.
        notes: what was decided and a user should know, one line each.
        unreadable: tensors that are there and cannot be read, by name, and why.
        reported: what there is that options apply to.
        optimizers: the dotted places of optimizer state.
    """

    tensors: dict[str, Expression]
    metadata: dict[str, object]
    root: str
    notes: tuple[str, ...]
    unreadable: dict[str, str] = field(default_factory=dict)
    reported: frozenset[str] = frozenset()
    optimizers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """The leaves of the state dict as they are in the tree.

    Attributes:
        leaves: by name; whatever `tree.is_tensor` takes for a tensor.
        others: values that are not tensors, by their dotted place in the tree.
        root: the dotted place of the mapping that holds the leaves; empty for the top.
        notes: what was decided and a user should know, one line each.
        reported: what there is that options apply to.
        optimizers: the dotted places of optimizer state.
    """

    leaves: dict[str, object]
    others: list[tuple[str, object]]
    root: str
    notes: tuple[str, ...]
    reported: frozenset[str]
    optimizers: tuple[str, ...]


def flatten(content: object, root: str | None, *, ema: bool = False, optimizer: bool = False) -> StateDict:
    """The state dict in what a torch file holds. Arguments and errors are those of `select`.

    Raises:
        CheckpointError: no tensor can be read (with the reasons of all); see `select`.
    """
    if is_tensor(content):
        found = Selection({_BARE_TENSOR: content}, [], "", (), frozenset(), ())
    else:
        found = select(content, root, ema=ema, optimizer=optimizer)
    tensors: dict[str, Expression] = {}
    unreadable: dict[str, str] = {}
    for name, leaf in found.leaves.items():
        read = flat_parameter(name) or read_leaf(leaf)
        if isinstance(read, str):
            unreadable[name] = read
        else:
            tensors[name] = renamed(read, name)
    require_some(tensors, unreadable)
    return StateDict(
        tensors,
        all_plain(found.others),
        found.root,
        found.notes,
        unreadable,
        found.reported,
        found.optimizers,
    )


def select(content: object, root: str | None, *, ema: bool = False, optimizer: bool = False) -> Selection:
    """Find the model's state dict in a tree, and name its leaves.

    Args:
        content: `TorchFile.content`, or a tree of the same kind.
        root: the dotted place of the mapping to take; the tree's own for an empty text; None to look for it.
        ema: take the averaged weights where there are also others.
        optimizer: optimizer state is taken too, and not left out.

    Raises:
        CheckpointError: there is no such root, no tensor, or more than one place to choose from; a name
            occurs twice; the structure is a trap.
    """
    holding, values = holders(content)
    if not holding:
        raise CheckpointError(
            f"it holds no tensor: it is {parts.what_it_is(content)}", hint="give the file with the weights"
        )
    candidates = candidates_in(content, holding)
    if root is None:
        place = chosen(content, candidates, ema=ema)
    else:
        place = given(content, root, holding, candidates)
    if root is None and isinstance(place.value, (list, tuple)) and place.name in _averaged(candidates):
        require_model(place, candidates)
        model = select(content, None)
        filled, note = by_order(place, model.root, model.leaves)
        return replace(model, leaves=filled, notes=(note,))
    whole = root is not None or is_module(place.value)
    leaves = named_below(place, holding, whole=whole, limit=_FREE_NAMES + _REPEATS * values)
    if root is None and not leaves.tensors and leaves.left_out:
        kinds = listed(dict.fromkeys(map(parts.own_kind, leaves.left_out)))
        raise CheckpointError(
            f"it holds no weights, only {kinds}",
            hint="give the file with the weights; if you want these: --root ''",
        )
    beside = named_beside(content, place, holding)
    left_out = [] if root is not None else [*beside.left_out, *leaves.left_out]
    optimizers = tuple(each.place.name for each in candidates if each.own == parts.OPTIMIZER)
    if optimizer:
        left_out = [name for name in left_out if not _is_of(name, optimizers)]
    averaged = _averaged(candidates)
    tensors, note = leaves.tensors, ""
    if root is None and ema and place.name in averaged:
        with suppress(CheckpointError):  # there need not be a model beside them
            model = select(content, None)
            if model.root != place.name:
                tensors, note = completed(leaves.tensors, model.root, model.leaves)
    inside = any(place.name == name or place.name.startswith(f"{name}.") for name in averaged)
    return Selection(
        tensors,
        [*beside.others, *leaves.others],
        place.name,
        (
            *on_choice(place, left_out, averaged if root is None else []),
            *([note] if note else []),
            *(on_twins(leaves.tensors) if root is None else ()),
        ),
        frozenset({Trait.TORCH, *([Trait.AVERAGED] if inside or (averaged and root is None) else [])}),
        optimizers,
    )


def _is_of(name: str, places: Sequence[str]) -> bool:
    """Whether a place is one of some, or what holds only them."""
    return any(place == name or place.startswith(f"{name}.") for place in places)


def _averaged(candidates: Sequence[Candidate]) -> list[str]:
    return [each.place.name for each in candidates if each.averaged]


def is_plain(names: Iterable[str]) -> bool:
    """Whether names in a flat state dict are those of a model's tensors alone, so that nothing has to be chosen."""
    return not any(parts.may_be_own(name) or flat_parameter(name) for name in names)


def holds_weights(content: object) -> bool:
    """Whether a tree has tensors that are not all a training program's own."""
    holding, _ = holders(content)
    return any(each.own is None for each in candidates_in(content, holding)) if holding else False


def averages(content: object) -> tuple[str, ...]:
    """The dotted places of averaged weights in a tree."""
    candidates = candidates_in(content, holders(content)[0])
    return tuple(each.place.name for each in candidates if each.averaged)


def optimizers(content: object) -> tuple[str, ...]:
    """The dotted places of optimizer state in a tree."""
    candidates = candidates_in(content, holders(content)[0])
    return tuple(each.place.name for each in candidates if each.own == parts.OPTIMIZER)
