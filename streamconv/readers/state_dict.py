"""From what a checkpoint holds to a state dict: which part of it is the model, and what its tensors are called.

A training checkpoint is a tree (`readers.tree`). The model's state dict is somewhere in it; the place is called the
root. Below the root, names are the keys joined by dots. The same rules find it in a torch file, in the names of a
checkpoint of torch.distributed, and in the files of ranks:

1. A state dict is a mapping with tensors in it, nearest the top. Tensors beside the key of a model are loose.
2. What is the training program's own (`readers.parts`) is no candidate, and neither are counters and random states.
3. What lies under the key of a model goes before what looks like a state dict, and that before anything else.
4. Of averaged weights and others, the others are taken; `--ema` takes the averaged ones.
5. Where that leaves several, none is picked: they are named, and `--root` chooses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import takewhile

from streamconv.errors import CheckpointError, Problem, listed
from streamconv.ops import Expression, renamed
from streamconv.options import Trait
from streamconv.readers import numpy_arrays, parts
from streamconv.readers.moments import only_way
from streamconv.readers.pickle import Record, describe
from streamconv.readers.torch_rebuild import unsupported
from streamconv.readers.tree import TRAP, all_plain, children, holders, is_module, is_tensor, text

_REPEATS = 8  # how often, on average, a part may occur in several places
_FREE_NAMES = 100_000
_MAX_LISTED = 20  # names in one message

_MAX_NAME = 4096  # characters; a tree of long keys would otherwise make far more text than the file holds
_BARE_TENSOR = "tensor"

# Ranks of state dicts: 0 is what lies under the key of a model.
_CLEAR, _LIKELY, _UNCLEAR, _COUNTERS = 1, 2, 3, 4

_WEIGHTS = {"weight", "bias"}

_FLAT_PARAMETERS = ("flat_param", "_flat_param")
_FLAT = (
    "it is a flat parameter of FSDP1, whose parts only the running model knows; save with "
    "StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT"
)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A container in the file and the keys that lead to it."""

    keys: tuple[str, ...]
    value: object

    @property
    def name(self) -> str:
        """The keys with dots between them."""
        return ".".join(self.keys)


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A place that holds tensors.

    Attributes:
        place: which.
        own: what it is, where it is the training program's own.
        averaged: whether its weights are averaged ones.
        known: the keys down to that of a model, where there is one.
        rank: what goes first, from 0.
    """

    place: _Place
    own: str | None
    averaged: bool
    known: tuple[str, ...] | None
    rank: int


_Inside = tuple[str, object, str | None]
"""A key, what is at it, and what that is where it is the training program's own."""


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


def require_some(tensors: Sized, unreadable: Mapping[str, str]) -> None:
    """Refuse a state dict of which no tensor can be read.

    Raises:
        CheckpointError: there are only such; a problem for each.
    """
    if unreadable and not tensors:
        problems = [Problem(why, tensor=describe(name, quote="")) for name, why in unreadable.items()]
        raise CheckpointError(f"tensors that cannot be read: {len(problems)}", problems=problems)


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
    candidates = _candidates(content, holding)
    if root is None:
        place = _found(content, candidates, ema=ema)
    else:
        place = _given(content, root, holding, candidates)
    if root is None and isinstance(place.value, (list, tuple)) and place.name in _averaged(candidates):
        return _by_order(content, place, candidates)
    whole = root is not None or is_module(place.value)
    leaves = _leaves(place, holding, whole=whole, limit=_FREE_NAMES + _REPEATS * values)
    if root is None and not leaves.tensors and leaves.left_out:
        kinds = listed(dict.fromkeys(map(parts.own_kind, leaves.left_out)))
        raise CheckpointError(
            f"it holds no weights, only {kinds}",
            hint="give the file with the weights; if you want these: --root ''",
        )
    beside = _beside(content, place, holding)
    left_out = [] if root is not None else [*beside.left_out, *leaves.left_out]
    optimizers = tuple(each.place.name for each in candidates if each.own == parts.OPTIMIZER)
    if optimizer:
        left_out = [name for name in left_out if not _is_of(name, optimizers)]
    averaged = _averaged(candidates)
    tensors, completed = leaves.tensors, ""
    if root is None and ema and place.name in averaged:
        tensors, completed = _completed(content, place, leaves.tensors)
    inside = any(place.name == name or place.name.startswith(f"{name}.") for name in averaged)
    return Selection(
        tensors,
        [*beside.others, *leaves.others],
        place.name,
        (
            *_remarks(place, left_out, averaged if root is None else []),
            *([completed] if completed else []),
            *(_twins(leaves.tensors) if root is None else ()),
        ),
        frozenset({Trait.TORCH, *([Trait.AVERAGED] if inside or (averaged and root is None) else [])}),
        optimizers,
    )


def _is_of(name: str, places: Sequence[str]) -> bool:
    """Whether a place is one of some, or what holds only them."""
    return any(place == name or place.startswith(f"{name}.") for place in places)


def _averaged(candidates: Sequence[_Candidate]) -> list[str]:
    return [each.place.name for each in candidates if each.averaged]


def _by_order(content: object, place: _Place, candidates: Sequence[_Candidate]) -> Selection:
    """The model's state dict with averaged weights that are a list without names, in the order of its parameters.

    Raises:
        CheckpointError: shapes do not say which parameters they are.
    """
    if all(each.own or each.averaged or each.rank == _COUNTERS for each in candidates):
        raise CheckpointError(
            f"the averaged weights at {describe(place.name)} have no names, and no model is beside them that has",
            hint="save them with the names of the model, or give the file that has both",
        )
    averaged = [child for _, child in children(place.value) if isinstance(child, Expression)]
    model = select(content, None)
    weights = {name: leaf for name, leaf in model.leaves.items() if isinstance(leaf, Expression)}
    found = only_way([each.spec.shape for each in averaged], [each.spec.shape for each in weights.values()])
    if model.root == place.name or found is None:
        raise CheckpointError(
            f"the averaged weights at {describe(place.name)} have no names, and their shapes do not say which of the "
            f"{len(weights)} tensors of the model they are",
            hint="leave --ema out",
        )
    names = list(weights)
    leaves = model.leaves | {names[at]: each for at, each in zip(found, averaged, strict=True)}
    note = (
        f"averaged weights at {describe(place.name)} have no names, and are taken to be in the model's order"
    )
    return replace(model, leaves=leaves, notes=(note,))


def _completed(content: object, place: _Place, averaged: dict[str, object]) -> tuple[dict[str, object], str]:
    """Averaged weights with what is of the model and has no average, such as its buffers; and a note of it."""
    try:
        model = select(content, None)
    except CheckpointError:
        return averaged, ""
    own = {_bare(name): leaf for name, leaf in model.leaves.items()}
    known = {_bare(name): name for name in averaged}
    rest = [name for name in own if name not in known]
    if (
        model.root == place.name
        or not rest
        or not all(
            name in own and _shape(own[name]) == _shape(averaged[full]) for name, full in known.items()
        )
    ):
        return averaged, ""
    whole = {name: averaged.get(known.get(_bare(name), ""), leaf) for name, leaf in model.leaves.items()}
    return whole, f"tensors without an average are those of {describe(model.root)}: {listed(rest)}"


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _shape(leaf: object) -> object:
    return leaf.spec.shape if isinstance(leaf, Expression) else None


def is_plain(names: Iterable[str]) -> bool:
    """Whether names in a flat state dict are those of a model's tensors alone, so that nothing has to be chosen."""
    return not any(parts.may_be_own(name) or flat_parameter(name) for name in names)


def holds_weights(content: object) -> bool:
    """Whether a tree has tensors that are not all a training program's own."""
    holding, _ = holders(content)
    return any(each.own is None for each in _candidates(content, holding)) if holding else False


def averages(content: object) -> tuple[str, ...]:
    """The dotted places of averaged weights in a tree."""
    candidates = _candidates(content, holders(content)[0])
    return tuple(each.place.name for each in candidates if each.averaged)


def optimizers(content: object) -> tuple[str, ...]:
    """The dotted places of optimizer state in a tree."""
    candidates = _candidates(content, holders(content)[0])
    return tuple(each.place.name for each in candidates if each.own == parts.OPTIMIZER)


# -------------------------------------------------------------------------------------- the root


def _given(content: object, root: str, holding: frozenset[int], candidates: Sequence[_Candidate]) -> _Place:
    """The place that a user names. Keys may have dots in them themselves, so every way to read it counts."""
    todo: list[tuple[_Place, str]] = [(_Place((), content), root)]
    seen = set()
    while todo:
        place, rest = todo.pop()
        if not rest:
            if id(place.value) in holding:
                return place
            continue
        for key, child in children(place.value):
            word = text(key)
            if word and (rest == word or rest.startswith(word + ".")):
                after = rest[len(word) + 1 :]
                if (id(child), len(after)) not in seen:
                    seen.add((id(child), len(after)))
                    todo.append((_Place((*place.keys, word), child), after))
    raise CheckpointError(
        f"there is no mapping with tensors at {describe(root)}",
        hint=f"tensors are at: {_listed([each.place for each in candidates])}",
    )


def _found(content: object, candidates: Sequence[_Candidate], *, ema: bool) -> _Place:
    """The one place that holds the model's tensors."""
    models = [each for each in candidates if each.own is None]
    averaged = [each for each in candidates if each.averaged and (ema or each.own is None)]
    plain = [each for each in models if not each.averaged]
    if len(models) < len(candidates) and all(each.rank == _COUNTERS for each in plain):
        plain = []
    chosen = averaged if averaged and (ema or not plain) else plain
    if not chosen:
        kinds = listed(dict.fromkeys(each.own for each in candidates if each.own))
        raise CheckpointError(
            f"it holds no weights, only {kinds}",
            hint=f"give the file with the weights; if you want these: --root KEY, with one of: "
            f"{_listed([each.place for each in candidates])}",
        )
    first = min(each.rank for each in chosen)
    foremost = [each for each in chosen if each.rank == first]
    if len(foremost) == 1:
        return foremost[0].place
    keys = [each.place.keys for each in foremost]
    levels = zip(*keys, strict=False)
    common = tuple(level[0] for level in takewhile(lambda level: len({*level}) == 1, levels))
    known = {each.known for each in foremost}
    together = len(known) == 1 and known != {None}
    if together and not _rivals(foremost, len(common)):
        return _at(content, common)
    own_inside = any(each.own and each.place.keys[: len(common)] == common for each in candidates)
    all_of_them = (
        f"; all of them together: --root {describe('.'.join(common), quote='')}"
        if together and not own_inside
        else ""
    )
    besides = f"; averaged weights, with --ema: {_listed([each.place for each in averaged])}"
    raise CheckpointError(
        "more than one place may be the model",
        hint=f"choose one with --root KEY: {_listed([each.place for each in foremost])}"
        + all_of_them
        + (besides if averaged and chosen is plain else ""),
    )


def _rivals(candidates: Sequence[_Candidate], depth: int) -> bool:
    """Whether places below one key are models of their own, rather than the parts of one, by their structure.

    Names with dots are those of a whole state dict: several such are several models. In a tree of modules, some module
    has its weights directly, as `{"embedding": {"tokens": {"weight"}}, "encoder": {"layers.0.weight"}}` of Megatron
    has. Where all have the same names and shapes, as a teacher and its student, they are models too; layers that have
    are numbered.
    """
    whole = [is_module(each.place.value) or _likeness(each.place.value) == _CLEAR for each in candidates]
    if all(whole) or (any(whole) and all(len(each.place.keys) == depth + 1 for each in candidates)):
        return True
    contents: dict[str, set[tuple[object, ...]]] = {}
    for each in candidates:
        key, *rest = each.place.keys[depth:] or [""]
        own = contents.setdefault(key, set())
        own |= {
            (*rest, name, _shape(child)) for name, child in children(each.place.value) if is_tensor(child)
        }
    first, *others = contents.values()
    return all(first == other for other in others) and not any(key[-1:].isdecimal() for key in contents)


def _candidates(content: object, holding: frozenset[int]) -> list[_Candidate]:
    """The places nearest the top that hold tensors, breadth first, and what each of them is."""
    result: list[_Candidate] = []
    queue = deque([(_Place((), content), parts.own_state("", content), False)])
    seen = {id(content)}
    while queue:
        place, own, averaged = queue.popleft()
        averaged = averaged or parts.average_prefix(place.value) is not None
        here, inside = _split(place, holding, own)
        inner = parts.averages_inside(place.value)
        if here is not None:
            known = next(
                (place.keys[: at + 1] for at, key in enumerate(place.keys) if parts.is_model(key)), None
            )
            result.append(_Candidate(place, own, averaged, known, 0 if known else here))
        for name, child, what in inside:
            following = _Place((*place.keys, name), child)
            if id(child) not in seen and len(following.name) <= _MAX_NAME:
                seen.add(id(child))
                queue.append((following, what, averaged or name in inner or parts.is_averaged(name)))
    return result


def _split(place: _Place, holding: frozenset[int], own: str | None) -> tuple[int | None, list[_Inside]]:
    """The rank of a place as a state dict, None where it is none; and what inside it may be one itself."""
    if is_module(place.value) or own == parts.OPTIMIZER or parts.average_prefix(place.value) is not None:
        return _CLEAR, []
    members = [(text(key), child) for key, child in children(place.value)]
    nested: list[_Inside] = [
        (name, child, own or parts.own_state(name, child)) for name, child in members if id(child) in holding
    ]
    if own is not None:
        return (_UNCLEAR if any(is_tensor(child) for _, child in members) else None), nested
    names = [name for name, child in members if is_tensor(child) and not parts.is_beside(name, child)]
    apart: list[_Inside] = []
    inner: list[_Inside] = []
    for each in nested:
        (apart if each[2] or parts.is_averaged(each[0]) else inner).append(each)
    ranks = [0 if parts.is_model(name) else _likeness(child) for name, child, _ in inner]
    best, here = min(ranks, default=_UNCLEAR), _likeness_of(names)
    if not names and any(is_tensor(child) for _, child in members) and not inner:
        return _COUNTERS, apart
    if not names or (best <= _CLEAR < here) or (best == 0 and not _are_weights(names)):
        return None, nested  # what is beside the key of a model, or beside clear names, is loose
    if best < here or best == 0:
        return best, nested  # neither is clearly a part of the other
    return here, apart


def _likeness(value: object) -> int:
    """The rank of the tensors directly in a value."""
    return _likeness_of([key for key, child in children(value) if isinstance(key, str) and is_tensor(child)])


def _likeness_of(names: Sequence[str]) -> int:
    """How much names are those of a module's tensors."""
    if any("." in name for name in names):
        return _CLEAR
    return _LIKELY if _WEIGHTS & {*names} else _UNCLEAR


def _are_weights(names: Sequence[str]) -> bool:
    """Whether some of names are those of parameters, whatever module has them."""
    return any(name.rpartition(".")[2] in _WEIGHTS for name in names)


def _at(content: object, keys: tuple[str, ...]) -> _Place:
    value = content
    for wanted in keys:
        value = next(child for key, child in children(value) if text(key) == wanted)
    return _Place(keys, value)


# ------------------------------------------------------------------------------------- the leaves


@dataclass(slots=True)
class _Leaves:
    """What is below the root: tensors by their names there, everything else by its place in the file."""

    tensors: dict[str, object] = field(default_factory=dict)
    others: list[tuple[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Places that hold tensors which are not taken."""


def _leaves(place: _Place, holding: frozenset[int], *, whole: bool, limit: int) -> _Leaves:
    """Name everything below a place, in the file's order.

    Args:
        place: the root.
        holding: from `tree.holders`.
        whole: take all of it, also what training programs keep directly at the place.
        limit: how many names there may be.

    Raises:
        CheckpointError: see `flatten`.
    """
    leaves = _Leaves()
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
            if len(name) > _MAX_NAME:
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


def _leave_out_steps(leaves: _Leaves, above: str) -> None:
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


def flat_parameter(name: str) -> str | None:
    """Why a tensor of this name cannot be read, where it is one of FSDP1's flat parameters."""
    return _FLAT if name.rpartition(".")[2].startswith(_FLAT_PARAMETERS) else None


def read_leaf(leaf: object) -> Expression | str:
    """A tensor of the tree, or why it cannot be read."""
    if isinstance(leaf, Expression):
        return leaf
    problem = unsupported(leaf)
    return numpy_arrays.read(leaf) if problem is None else problem.reason


def _remarks(place: _Place, left_out: Sequence[str], averaged: Sequence[str]) -> Iterator[str]:
    """What a user should know about the choice."""
    if isinstance(place.value, Record) and is_module(place.value):
        yield f"it is a pickled {place.value.cls}; names are those of its state_dict(), without its hooks"
    here = describe(place.name) if place.keys else "the top"
    if left_out:
        yield f"took what is at {here} for the model, and left out the tensors at {_listed(left_out)}"
    if place.name in averaged:
        yield f"the weights at {here} are averaged ones; --root takes others"
    elif averaged:
        yield f"averaged weights are at {_listed(averaged)}: --ema takes them"


def _twins(leaves: Mapping[str, object]) -> Iterator[str]:
    """Prefixes in one state dict under which the same modules are, as a teacher and its student in one module are."""
    groups: dict[str, dict[str, object]] = {}
    prefix = ""
    while leaves and len(groups) < 2:
        groups = {}
        for name, leaf in leaves.items():
            word, _, rest = name[len(prefix) :].partition(".")
            groups.setdefault(word, {})[rest] = _shape(leaf)
        if len(groups) == 1:
            (word,) = groups
            prefix += f"{word}."
            if not all(name.startswith(prefix) for name in leaves):
                return
    alike: dict[tuple[int, frozenset[tuple[str, object]]], list[str]] = {}
    for word, inner in groups.items():
        of_modules = any("." in rest for rest in inner)
        if of_modules and not word[-1:].isdecimal() and not parts.is_averaged(word):
            alike.setdefault((len(inner), frozenset(inner.items())), []).append(f"{prefix}{word}.")
    for prefixes in alike.values():
        if len(prefixes) > 1:
            yield (
                f"the same names are below {_listed(prefixes)}: all are taken; "
                f"--only {describe(prefixes[0] + '*')} takes one of them"
            )


# ----------------------------------------------------------------------------------- the metadata


def _beside(content: object, place: _Place, holding: frozenset[int]) -> _Leaves:
    """What lies beside the way to the root, without names for its tensors."""
    result = _Leaves()
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


def _listed(names: Sequence[str | _Place]) -> str:
    """Names for a message, the first of them where there are many."""
    texts = (name if isinstance(name, str) else name.name for name in names)
    return listed((describe(word, quote="") or "(the top)" for word in texts), _MAX_LISTED)
