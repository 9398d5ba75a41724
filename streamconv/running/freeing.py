"""`--delete-source`: a weight file of the source goes once all that the plan takes from it is safe in the destination.

What goes, and when:

1. Only files that tensors of the output are read from, that lie in the source itself and have no other name. All else
   stays: configs, tokenizers, indexes, adapters, files that the plan takes nothing of. What a link leads to is somebody
   else's, but for a snapshot in the cache of Hugging Face, of whose files no other revision has a name.
   The source gets a mark first: a destination without one may be a stranger's, and its journal is not believed.
2. The work is cut into steps, each of which ends with files that no later step reads (`steps`). A step is handed
   out when the files of the one before it are gone, so that the most that the disk holds at once is known (`peak`).
3. No file goes before all checks have held. Then, in this order: its items are written, and hashed on their way; the
   output files that they are in, whole or not, are synced; the items are read again, not from the page cache, and
   compared with their digests; the journal says that they are on the disk; `freed.json` names the file, and is
   synced; the file is as it was when the plan was made; it is removed. The last four are `Finisher`'s.

From then on the destination is the only copy: a run that resumes goes by the plan that is stored there, if the source
has a mark of that very plan and place (`is_marked`), takes as missing what `freed.json` names and nothing else, and neither makes a file again that holds what was deleted, nor gives way
to another plan (`freed`).
"""

from __future__ import annotations

import heapq
import os
import socket
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from streamconv.errors import CheckpointError, DestinationError, PlanError, Problem, UsageError, count, listed
from streamconv.execution.execute import Item, Receipt, WorkItem
from streamconv.ops import Exactness, Expression, leaves
from streamconv.plans import Plan, fingerprint
from streamconv.running.destination import FREED, RECORD, Destination
from streamconv.running.items import work_items
from streamconv.storage import writing
from streamconv.storage.files import spans
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import sink_of
from streamconv.storage.roles import Held
from streamconv.tensor import Extent, Stored

# Bytes of work in a step, at least: each one ends with a sync, and with reading again what it wrote.
_STEP_BYTES = 256 << 20

# What a file may hold besides tensors: a header, and for each tensor its entry, its name and its alignment.
_HEADER, _ENTRY = 64 << 10, 1 << 10

# The paths of a hundred thousand files.
_LARGEST = 1 << 28

# In the source: while it is being deleted, and from then on.
_LOCK, _MARK = ".streamconv-deleting", ".streamconv-deleted"

_ONLY_COPY = "give the command that began it again, which completes it; or remove the destination yourself"


@dataclass(frozen=True, slots=True)
class Step:
    """Items, by index, and the source files that no item after them reads."""

    items: tuple[int, ...]
    files: tuple[str, ...]


# -------------------------------------------------------------------------------------------- what goes


def to_be_freed(plan: Plan) -> list[str]:
    """The files that a run of a plan would delete, those that are gone already among them, in the plan's order."""
    place = locate(plan.source)
    root = (place if place.is_directory() else place.parent).canonical()
    kept = {side.source for side in plan.side_files}
    taken = {extent.file for tensor in plan.written() for extent in _extents([tensor.expression])}
    within = (root, *filter(None, [_blobs(root)]))
    return [
        file.path
        for file in plan.files
        if file.path in taken
        and file.path not in kept
        and any(locate(file.path).canonical().is_relative_to(each) for each in within)
    ]


def names(place: Location) -> list[Location]:
    """What is removed for a file: the file itself, and then the link that leads there."""
    return [place.canonical(), place] if place.is_link() else [place]


def _blobs(root: Location) -> Location | None:
    """Where the files are that the links in a snapshot lead to, if a directory is one in the cache of Hugging Face.

    That is models--OWNER--NAME/snapshots/REVISION, beside blobs/ (huggingface_hub: file_download.py).
    """
    for above in (root, *_above(root)):
        blobs = above.parent.parent / "blobs"
        if above.parent.name == "snapshots" and blobs.is_directory():
            return blobs
    return None


def _above(place: Location) -> Iterator[Location]:
    while (above := place.parent) != place:
        yield above
        place = above


@contextmanager
def locked(plan: Plan) -> Iterator[None]:
    """Keep other runs from deleting the same source, which would leave each with a part of it.

    Raises:
        UsageError: one is at it.
    """
    held = _in_source(plan, _LOCK)
    try:
        lock = sink_of(held.place).lock(held.place, f"process {os.getpid()} on {socket.gethostname()}")
    except Held as holder:
        raise UsageError(
            f"another run is deleting this source ({holder})", file=plan.source, hint="wait for it to end"
        ) from holder
    except OSError as error:
        raise UsageError(f"it cannot be locked: {error.strerror or error}", file=held.place) from error
    with lock:
        yield


def require_deletable(plan: Plan, gone: Collection[str], *, allow_loss: bool) -> None:
    """Refuse to delete a source that holds more than the output, or that would not be gone then.

    Raises:
        UsageError: no file would go, or one could not.
        PlanError: something of the source would be nowhere any more, which is not allowed.
    """
    files = to_be_freed(plan)
    there = [path for path in files if path not in gone]
    cached = _cached(plan)
    lasting = [problem for path in there for problem in _lasting(path, cached)]
    same: dict[Hashable, str] = {}
    for path in there:
        inode = locate(path).inode()
        if inode is not None and same.setdefault(inode, path) != path:
            lasting.append(Problem(f"it is {same[inode]} under another name", file=path))
    if not files:
        lasting = [Problem("no file that is read lies in it", file=plan.source)]
    if lasting:
        raise UsageError(
            "--delete-source cannot free the source", hint="leave it out", problems=_several(lasting)
        )
    if plan.trial:
        raise UsageError(
            "--delete-source has no effect on a trial of a few layers, which leaves the others out"
        )
    losses = [] if allow_loss else list(_losses(plan, files))
    if losses:
        raise PlanError(
            "--delete-source would delete more than the output has; nothing was written",
            hint="--allow-loss deletes it even so",
            problems=losses,
        )


def _cached(plan: Plan) -> Counter[str]:
    """How many links of all snapshots of a cache lead to each file in there; empty where the source is in none."""
    place = locate(plan.source)
    blobs = _blobs((place if place.is_directory() else place.parent).canonical())

    def walk(directory: Location) -> Iterator[str]:
        for entry in directory.entries():
            if entry.is_link():
                yield entry.canonical().place
            elif entry.is_directory():
                yield from walk(entry)

    return Counter(walk(blobs.parent / "snapshots") if blobs else ())


def _lasting(path: str, cached: Mapping[str, int]) -> Iterator[Problem]:
    """Why a file cannot be deleted, or its space would not be free then."""
    place = locate(path)
    inside = place.is_link() and cached.get(place.canonical().place) == 1
    if not place.source.alone(names(place)[0].place) or (place.is_link() and not inside):
        what = "it has another name (a hard link), under which it would stay"
        if place.is_link():
            what = "it is a link, and what it leads to may be in use elsewhere"
        yield Problem(what, file=path, hint="name as the source where the file itself is, and alone")
        return
    try:
        for name in names(place):
            sink_of(path).check_writable(name.parent.place)
    except OSError as error:
        yield Problem(f"nothing can be deleted there: {error.strerror or error}", file=path)
    except UsageError:
        yield Problem("nothing can be deleted in its storage", file=path)


def _losses(plan: Plan, files: Sequence[str]) -> Iterator[Problem]:
    """What would be nowhere once these files are gone."""
    for exactness in (Exactness.ROUNDING, Exactness.LOSSY):
        names = [tensor.spec.name for tensor in plan.tensors if tensor.exactness is exactness]
        if names:
            yield Problem(
                f"values of {count(len(names), 'tensor')} are not kept ({exactness.label}): {listed(names, 3)}"
            )
    cut = _cut(plan)
    if cut:
        yield Problem(f"elements of {count(len(cut), 'tensor')} are left out: {listed(cut, 3)}")
    if plan.dropped:
        names = [tensor.name for tensor in plan.dropped]
        yield Problem(f"{count(len(names), 'tensor')} left out: {listed(names, 3)}")
    for path, (size, runs) in besides(plan, files).items():
        if size > _HEADER + _ENTRY * runs:
            yield Problem(f"it holds {size:,} bytes that nothing is made of", file=path)


def _cut(plan: Plan) -> list[str]:
    """Source tensors of which fewer elements are written than they have, those that are computed with apart.

    Tensors that are joined or split together are counted together. What is written twice may hide what is not.
    """
    found: dict[Hashable, Stored] = {}
    together: dict[Hashable, Hashable] = {}

    def first(key: Hashable) -> Hashable:
        while together[key] != key:
            together[key] = key = together[together[key]]
        return key

    some: list[tuple[Hashable, int]] = []
    for tensor in plan.written():
        read = leaves(tensor.expression)
        if not read or tensor.exactness > Exactness.VALUE_EXACT:
            continue
        keys: list[Hashable] = [(leaf.extents[:1], leaf.spec.numel) for leaf in read]
        found.update(zip(keys, read, strict=True))
        for key in keys:
            together.setdefault(key, key)
            together[first(key)] = first(keys[0])
        some.append((keys[0], tensor.spec.numel))
    left: Counter[Hashable] = Counter()
    for key, leaf in found.items():
        left[first(key)] += leaf.spec.numel
    for key, numel in some:
        left[first(key)] -= numel
    return [leaf.spec.name for key, leaf in found.items() if left[first(key)] > 0]


def besides(plan: Plan, files: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of each file, how many bytes are neither written nor compared, as headers are; and how many runs of bytes are."""
    sizes = {file.path: file.size for file in plan.files}
    compared = [side for check in plan.checks for side in (check.left, check.right)]
    held: dict[str, set[tuple[int, int]]] = {path: set() for path in files}
    for extent in _extents([*(tensor.expression for tensor in plan.written()), *compared]):
        if extent.file in held:
            held[extent.file].add((extent.offset, extent.offset + extent.length))
    return {path: (sizes[path] - _covered(runs), len(runs)) for path, runs in held.items()}


def _covered(runs: Iterable[tuple[int, int]]) -> int:
    """Bytes in the union of runs, each from its first byte to the one after its last."""
    total = end = 0
    for start, stop in sorted(runs):
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total


def _extents(expressions: Iterable[Expression]) -> Iterator[Extent]:
    return (extent for each in expressions for leaf in leaves(each) for extent in leaf.extents)


def _several(problems: Sequence[Problem], most: int = 20) -> list[Problem]:
    more = [Problem(f"and {len(problems) - most:,} more")] if len(problems) > most else []
    return [*problems[:most], *more]


# -------------------------------------------------------------------------------------------- in which order


def steps(plan: Plan, items: Sequence[Item], done: Collection[int], gone: Collection[str]) -> list[Step]:
    """All items that are written, in the order in which they free the source, cut where files of it can go.

    Next is always the file that takes the least space on balance: what is left of the items that read it, less
    what it holds. Items that are done keep their place, so that a run that resumes frees what they read first.
    """
    there = [path for path in to_be_freed(plan) if path not in gone]
    kinds = _kinds(items)
    readers: dict[str, list[frozenset[str]]] = {path: [] for path in there}
    weight = {
        kind: sum(item.stop - item.start for item in group if item.index not in done)
        for kind, group in kinds.items()
    }
    for kind in kinds:
        for path in kind & readers.keys():
            readers[path].append(kind)
    cost = {path: sum(weight[kind] for kind in readers[path]) for path in there}
    holds = {path: writing.allocated(locate(path)) for path in there}
    position = {path: at for at, path in enumerate(there)}
    queue = [(cost[path] - holds[path], position[path], path) for path in there]
    heapq.heapify(queue)
    left, freed, found = dict(kinds), set[str](), list[Step]()
    while queue:
        balance, _, path = heapq.heappop(queue)
        if path in freed or balance != cost[path] - holds[path]:
            continue  # it was put in again since, at what it costs now
        taken, touched = list[int](), dict[str, None]()
        for kind in readers[path]:
            if kind in left:
                taken += (item.index for item in left.pop(kind))
                for other in kind & readers.keys():
                    cost[other] -= weight[kind]
                    touched[other] = None
        ready = [path, *(each for each in touched if each != path and left.keys().isdisjoint(readers[each]))]
        freed.update(ready)
        for other in touched.keys() - freed:
            heapq.heappush(queue, (cost[other] - holds[other], position[other], other))
        found.append(Step(tuple(sorted(taken)), tuple(sorted(ready, key=position.__getitem__))))
    rest = sorted(item.index for group in left.values() for item in group)
    return _merged([*found, *([Step(tuple(rest), ())] if rest else [])], items)


def _kinds(items: Sequence[Item]) -> dict[frozenset[str], list[WorkItem]]:
    """The items that are written, by the files that they read."""
    of: dict[int, frozenset[str]] = {}
    kinds: dict[frozenset[str], list[WorkItem]] = {}
    for item in items:
        if not isinstance(item, WorkItem):
            continue
        expression = item.expression
        if isinstance(expression, Stored):
            read = frozenset(
                path for path, _, _ in spans(expression.extents, item.start, item.stop - item.start)
            )
        elif id(expression) in of:
            read = of[id(expression)]
        else:
            read = of[id(expression)] = frozenset(extent.file for extent in _extents([expression]))
        kinds.setdefault(read, []).append(item)
    return kinds


def _merged(found: Sequence[Step], items: Sequence[Item]) -> list[Step]:
    """Steps of some size: what is a little more is held for a while, and what is a sync each is done at once."""
    merged: list[Step] = []
    size = 0
    for step in found:
        if merged and size < _STEP_BYTES:
            merged[-1] = Step((*merged[-1].items, *step.items), (*merged[-1].files, *step.files))
        else:
            merged.append(step)
            size = 0
        size += sum(items[index].stop - items[index].start for index in step.items)
    return [Step(tuple(sorted(step.items)), step.files) for step in merged]


# -------------------------------------------------------------------------------------------- how much room it takes


def peak(
    plan: Plan,
    destination: Destination,
    items: Sequence[Item] | None = None,
    done: Collection[int] = (),
    gone: Collection[str] = (),
) -> int:
    """The most bytes that a run adds at any time to what its disk holds now.

    Files of the source count as freed where they share their disk with the destination.
    """
    if items is None:
        items = work_items(plan, [""] * len(plan.outputs))
    here = destination.directory.source.disk((destination.directory / "_").place)
    headers = sum(len(literal.data) for output in plan.outputs for literal in output.layout.literals)
    others = sum(side.size for side in plan.side_files) + sum(
        len(text.content.encode()) for text in plan.texts
    )
    used = most = headers
    for step in steps(plan, items, done, gone):
        used += sum(items[index].stop - items[index].start for index in step.items if index not in done)
        most = max(most, used)
        used -= sum(
            writing.allocated(locate(path))
            for path in step.files
            if here is not None
            and locate(path).canonical().source.disk(locate(path).canonical().place) == here
        )
    return max(most, used + others)


# -------------------------------------------------------------------------------------------- what is gone


def freed(destination: Destination) -> frozenset[str]:
    """The source files that runs have deleted; one that is there all the same is none of them.

    Beside the record of a conversion that is whole, what cannot be read is taken for nothing.

    Raises:
        DestinationError: that cannot be known, and the destination may be the only copy of something.
    """
    try:
        named = _named(destination.own / FREED)
    except DestinationError:
        if not (destination.own / RECORD).exists():
            raise
        return frozenset()
    return frozenset(path for path in named if not locate(path).exists())


def _in_source(plan: Plan, name: str) -> Location:
    """A file of ours in the source, or beside one that is a file itself."""
    place = locate(plan.source)
    return place / name if place.is_directory() else place.parent / f"{name}-{place.name}"


def is_marked(plan: Plan, destination: Destination) -> bool:
    """Whether the source says that it is deleted for this plan into this destination, which may be a stranger's."""
    place = _in_source(plan, _MARK)
    try:
        return place.is_file() and orjson.loads(place.read(_LARGEST)) == _marking(plan, destination)
    except (CheckpointError, ValueError):
        return False


def mark(plan: Plan, destination: Destination) -> None:
    """Have the source say so, before a run whose journal is to be believed from then on."""
    if not is_marked(plan, destination):
        writing.write_whole(_in_source(plan, _MARK), orjson.dumps(_marking(plan, destination)))


def _marking(plan: Plan, destination: Destination) -> dict[str, str]:
    return {"plan": fingerprint(plan), "destination": destination.place.canonical().place}


def note(destination: Destination, paths: Iterable[str]) -> None:
    """Note, before source files are deleted, that they may be."""
    place = destination.own / FREED
    writing.write_whole(place, orjson.dumps(sorted({*_named(place), *paths})))


def _named(place: Location) -> list[str]:
    if not place.exists():
        return []
    try:
        found: Any = orjson.loads(place.read(_LARGEST))
        if isinstance(found, list) and all(isinstance(path, str) and "\0" not in path for path in found):
            return found
        what = "it is no list of files"
    except CheckpointError as error:
        what = error.headline.message
    except orjson.JSONDecodeError as error:
        what = f"it is damaged: {error}"
    raise DestinationError(
        f"what a run has deleted of its source cannot be known: {what}",
        file=str(place),
        hint="the destination may hold the only copy, and is left as it is; remove it yourself if it does not",
    )


def require_no_only_copy(destination: Destination, gone: Collection[str]) -> None:
    """Refuse to give up what a destination holds where it is the only copy.

    Raises:
        DestinationError: it is.
    """
    if gone:
        raise DestinationError(
            "parts of a source were deleted as they were written here: this is the only copy of them",
            file=str(destination),
            hint=_ONLY_COPY,
            problems=_several([Problem("was deleted", file=path) for path in sorted(gone)], 5),
        )


def require_kept(items: Sequence[Item], done: Mapping[int, Receipt], gone: Collection[str]) -> None:
    """Refuse to go on where something would have to be made again out of files that are deleted.

    Raises:
        DestinationError: it would.
    """
    if not gone:
        return
    lost = [
        Problem("is not whole any more, and was made of files that are deleted", item.path, item.name)
        for kind, group in _kinds(items).items()
        if not kind.isdisjoint(gone)
        for item in group
        if item.index not in done
    ]
    if lost:
        raise DestinationError(
            "the destination lacks parts that cannot be made again; nothing in it was changed",
            hint=f"put these back as they were, and give the command again: {listed(sorted(gone))}",
            problems=_several(lost),
        )
