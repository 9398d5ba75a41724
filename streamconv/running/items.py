"""A plan as work items: what engines are given, in which order and how many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from streamconv.engines import Batch
from streamconv.errors import Problem, listed
from streamconv.execution.difference import Difference
from streamconv.execution.execute import PART, CheckItem, ChecksumItem, Item, WorkItem
from streamconv.ops import Expression, leaves
from streamconv.plans import Plan
from streamconv.storage.files import spans
from streamconv.tensor import Stored

# Items are handed out in batches of about this many bytes, so that a hundred thousand small tensors
# do not cost a message each; and of at most so many items, so that a batch is done quickly.
_BATCH_BYTES = 64 << 20
_BATCH_ITEMS = 1024

# Storage copies so many bytes in the time in which a worker computes one.
_COPYING = 8


def work_items(plan: Plan, paths: Sequence[str | None]) -> list[WorkItem]:
    """Every range of bytes of a plan's output, in order; an item's index is its position.

    Args:
        plan: what to do.
        paths: for each of the plan's outputs, the file that its items belong in; None where none are wanted.
    """
    items: list[WorkItem] = []
    for tensor in sorted(plan.written(), key=lambda tensor: (tensor.file, tensor.offset)):
        path = paths[tensor.file]
        if path is None:
            continue
        for start, stop in _parts(tensor.spec.nbytes):
            name, expression = tensor.spec.name, tensor.expression
            items.append(WorkItem(len(items), name, expression, start, stop, path, tensor.offset))
    return items


def check_items(plan: Plan, first: int) -> list[CheckItem]:
    """What a plan relies on, as items whose indexes begin at `first`, after those of `work_items`."""
    items: list[CheckItem] = []
    for check in plan.checks:
        for start, stop in _parts(check.left.spec.nbytes):
            items.append(
                CheckItem(
                    first + len(items), check.meaning, check.left, check.right, start, stop, check.tolerance
                )
            )
    return items


def checksum_items(plan: Plan, first: int) -> list[ChecksumItem]:
    """Source files' own checksums, as items whose indexes begin at `first`."""
    return [ChecksumItem(index, checksum) for index, checksum in enumerate(plan.checksums, first)]


def by_files_read(items: Iterable[Item]) -> dict[frozenset[str], list[WorkItem]]:
    """The items that are written, by the files that they read."""
    of: dict[int, frozenset[str]] = {}
    found: dict[frozenset[str], list[WorkItem]] = {}
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
            read = of[id(expression)] = frozenset(
                extent.file for leaf in leaves(expression) for extent in leaf.extents
            )
        found.setdefault(read, []).append(item)
    return found


def problem(item: Item, difference: Difference) -> Problem:
    """The problem of a file that differs from the plan, or of a check that fails."""
    element, expected, found = difference.element, difference.expected, difference.found
    if isinstance(item, CheckItem):
        left, right = _where(item.left), _where(item.right)
        places = (f" in {left}", f" in {right}") if left and right and left != right else ("", "")
        return Problem(
            f"{item.meaning}: element {element} is {expected}{places[0]}, not {found}{places[1]}",
            tensor=item.name,
            hint="the plan relies on their being equal",
        )
    if isinstance(item, ChecksumItem):
        return Problem(
            f"its bytes have the {item.checksum.kind} {found}, not {expected}",
            file=item.checksum.extents[0].file,
            tensor=item.name,
            hint=item.meaning,
        )
    return Problem(f"element {element} is {found}, expected {expected}", file=item.path, tensor=item.name)


def computed(items: Iterable[Item]) -> int:
    """Bytes to compute in some items; those that only storage moves count as far fewer."""
    total = 0
    for item in items:
        moved = isinstance(item, WorkItem) and isinstance(item.expression, Stored)
        total += (item.stop - item.start) // (_COPYING if moved else 1)
    return total


def _where(expression: Expression) -> str:
    """The files that an expression is read from."""
    found = (extent.file for leaf in leaves(expression) for extent in leaf.extents)
    return listed(dict.fromkeys(found), 2)


def batches(items: Sequence[Item]) -> list[Batch]:
    """Items in batches of about `_BATCH_BYTES`: checks first, then what is written, each in order."""
    written = [item for item in items if isinstance(item, WorkItem)]
    checked = [item for item in items if not isinstance(item, WorkItem)]
    return [*_batches(checked), *_batches(written)]


def _batches(items: Iterable[Item]) -> Iterator[Batch]:
    batch: list[Item] = []
    size = 0
    for item in items:
        length = item.stop - item.start
        if batch and (size + length > _BATCH_BYTES or len(batch) == _BATCH_ITEMS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def _parts(nbytes: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PART, nbytes)) for start in range(0, nbytes, PART))
