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
   synced; the file is as it was when the plan was made; it is removed. All but the first are `Finisher`'s.

From then on the destination is the only copy (`deleted`). A run that resumes goes by the plan that is stored there. It
takes as missing what `freed.json` names and nothing else. It makes no file again that holds what was deleted, and
gives way to no other plan.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import PlanError, Problem, UsageError, count, listed, shortened
from streamconv.execution.execute import Item
from streamconv.ops import Exactness, Expression, leaves
from streamconv.options.fields import fields
from streamconv.options.records import PlanOptions
from streamconv.plans import Plan
from streamconv.running.coverage import left_out
from streamconv.running.destination import Destination
from streamconv.running.items import by_files_read, work_items
from streamconv.storage import writing
from streamconv.storage.location import Location, locate
from streamconv.storage.resolve import sink_of
from streamconv.tensor import Extent

# Bytes of work in a step, at least: each one ends with a sync, and with reading again what it wrote.
_STEP_BYTES = 256 << 20

# What a file may hold besides tensors. Before the first: a header or a pickle. After the last: an archive's directory.
# Both have an entry for each tensor, with its name. Between two: alignment, and what an archive has around a member.
_HEADER, _TRAILER, _ENTRY, _BETWEEN = 16 << 10, 4 << 10, 512, 8 << 10


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
    beside = _beside(plan, root)
    return [
        file.path
        for file in plan.files
        if file.path in taken
        and file.path not in kept
        and any(locate(file.path).canonical().is_relative_to(each) for each in within)
        and not any(locate(file.path).canonical().is_relative_to(each) for each in beside)
    ]


def remaining(plan: Plan) -> list[str]:
    """Those of them that are there."""
    return [path for path in to_be_freed(plan) if locate(path).exists()]


def _beside(plan: Plan, root: Location) -> list[Location]:
    """Places in a source that other options name, as an adapter: they are no part of it."""
    known = fields(PlanOptions)
    named = [
        locate(place).canonical()
        for name, value in plan.arguments.items()
        if name in known and Path in known[name].types
        for place in (value if isinstance(value, list | tuple) else [value])
        if isinstance(place, str)
    ]
    return [place for place in named if not root.is_relative_to(place)]


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
        lasting = [
            Problem(
                "no file that is read lies in it: what is there are links to elsewhere, or nothing is taken of it",
                file=plan.source,
                hint="name as the source where the files themselves are",
            )
        ]
    if lasting:
        raise UsageError(
            "--delete-source cannot free the source", hint="leave it out", problems=shortened(lasting)
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
    kept = (tensor.expression for tensor in plan.written() if tensor.exactness <= Exactness.VALUE_EXACT)
    cut = [
        tensor.spec.name
        for tensor in left_out(
            kept, ((check.left, check.right) for check in plan.checks if not check.tolerance)
        )
    ]
    if cut:
        yield Problem(f"elements of {count(len(cut), 'tensor')} are left out: {listed(cut, 3)}")
    if plan.dropped:
        names = [tensor.name for tensor in plan.dropped]
        yield Problem(f"{count(len(names), 'tensor')} left out: {listed(names, 3)}")
    for path, (first, *between, last) in besides(plan, files).items():
        entries = _ENTRY * (len(between) + 1)
        most = [_HEADER + entries, *[_BETWEEN] * len(between), _TRAILER + entries]
        odd = sum(gap for gap, usual in zip((first, *between, last), most, strict=True) if gap > usual)
        if odd:
            yield Problem(f"it holds {odd:,} bytes that nothing is made of", file=path)


def besides(plan: Plan, files: Sequence[str]) -> dict[str, list[int]]:
    """Of each file, the bytes that are neither written nor compared: before the first that is, between two, at the end."""
    sizes = {file.path: file.size for file in plan.files}
    compared = [side for check in plan.checks for side in (check.left, check.right)]
    held: dict[str, set[tuple[int, int]]] = {path: set() for path in files}
    for extent in _extents([*(tensor.expression for tensor in plan.written()), *compared]):
        if extent.file in held:
            held[extent.file].add((extent.offset, extent.offset + extent.length))
    return {path: _gaps(sizes[path], runs) for path, runs in held.items()}


def _gaps(size: int, runs: Iterable[tuple[int, int]]) -> list[int]:
    """Bytes before, between and after runs, each of which is from its first byte to the one after its last."""
    gaps, end = list[int](), 0
    for start, stop in sorted(runs):
        gaps.append(max(start - end, 0))
        end = max(end, stop)
    return [*gaps, size - end]


def _extents(expressions: Iterable[Expression]) -> Iterator[Extent]:
    return (extent for each in expressions for leaf in leaves(each) for extent in leaf.extents)


# -------------------------------------------------------------------------------------------- in which order


def steps(plan: Plan, items: Sequence[Item], done: Collection[int], gone: Collection[str]) -> list[Step]:
    """All items that are written, in the order in which they free the source, cut where files of it can go.

    Next is always the file that takes the least space on balance: what is left of the items that read it, less
    what it holds. Items that are done keep their place, so that a run that resumes frees what they read first.
    """
    there = [path for path in to_be_freed(plan) if path not in gone]
    kinds = by_files_read(items)
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
