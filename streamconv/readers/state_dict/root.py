"""Which of the places that hold tensors is the model: the one that a user names, or the only one (rules 3 to 5 of the package)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from streamconv.errors import CheckpointError, listed
from streamconv.readers.pickle import describe
from streamconv.readers.state_dict.candidates import CLEAR, COUNTERS, Candidate, likeness
from streamconv.readers.state_dict.place import Place, at, listed_places, shape_of
from streamconv.readers.tree import children, is_module, is_tensor, text


def given(content: object, root: str, holding: frozenset[int], candidates: Sequence[Candidate]) -> Place:
    """The place that a user names. Keys may have dots in them themselves, so every way to read it counts."""
    todo: list[tuple[Place, str]] = [(Place((), content), root)]
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
                    todo.append((Place((*place.keys, word), child), after))
    raise CheckpointError(
        f"there is no mapping with tensors at {describe(root)}",
        hint=f"tensors are at: {listed_places([each.place for each in candidates])}",
    )


def chosen(content: object, candidates: Sequence[Candidate], *, ema: bool) -> Place:
    """The one place that holds the model's tensors."""
    models = [each for each in candidates if each.own is None]
    averaged = [each for each in candidates if each.averaged and (ema or each.own is None)]
    plain = [each for each in models if not each.averaged]
    if len(plain) < len(candidates) and all(each.rank == COUNTERS for each in plain):
        plain = []
    chosen = averaged if averaged and (ema or not plain) else plain
    if not chosen:
        kinds = listed(dict.fromkeys(each.own for each in candidates if each.own))
        raise CheckpointError(
            f"it holds no weights, only {kinds}",
            hint=f"give the file with the weights; if you want these: --root KEY, with one of: "
            f"{listed_places([each.place for each in candidates])}",
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
        return at(content, common)
    own_inside = any(each.own and each.place.keys[: len(common)] == common for each in candidates)
    all_of_them = (
        f"; all of them together: --root {describe('.'.join(common), quote='')}"
        if together and not own_inside
        else ""
    )
    besides = f"; averaged weights, with --ema: {listed_places([each.place for each in averaged])}"
    raise CheckpointError(
        "more than one place may be the model",
        hint=f"choose one with --root KEY: {listed_places([each.place for each in foremost])}"
        + all_of_them
        + (besides if averaged and chosen is plain else ""),
    )


def _rivals(candidates: Sequence[Candidate], depth: int) -> bool:
    """Whether places below one key are models of their own, rather than the parts of one, by their structure.

    Names with dots are those of a whole state dict: several such are several models. In a tree of modules, some module
    has its weights directly, as `{"embedding": {"tokens": {"weight"}}, "encoder": {"layers.0.weight"}}` of Megatron
    has. Where all have the same names and shapes, as a teacher and its student, they are models too; layers that have
    are numbered.
    """
    whole = [is_module(each.place.value) or likeness(each.place.value) == CLEAR for each in candidates]
    if all(whole) or (any(whole) and all(len(each.place.keys) == depth + 1 for each in candidates)):
        return True
    contents: dict[str, set[tuple[object, ...]]] = {}
    for each in candidates:
        key, *rest = each.place.keys[depth:] or [""]
        own = contents.setdefault(key, set())
        own |= {
            (*rest, name, shape_of(child)) for name, child in children(each.place.value) if is_tensor(child)
        }
    plain = [{name for *_, name, _ in own} for own in contents.values()]
    if all(len(each.place.keys) == depth + 1 for each in candidates) and all(
        each == plain[0] for each in plain
    ):
        # Nothing tells a generator and its discriminator from the layers of a model, but for layers with numbers.
        return not any(key[-1:].isdecimal() for key in contents)
    first, *others = contents.values()
    return all(first == other for other in others) and not any(key[-1:].isdecimal() for key in contents)
