"""Engines: who runs which work items. All give the same receipts for the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from streamconv.engines import inline, processes
from streamconv.execution.execute import Receipt, Settings, WorkItem

Batch = Sequence[WorkItem]

Engine = Callable[[Iterable[Batch], Settings, int], AbstractContextManager[Iterator[list[Receipt]]]]
"""Takes batches, what each worker is told, and how many workers there may be; gives, inside a `with`,
the receipts of each batch in the order in which they are done. Leaving the `with` stops all work."""

ENGINES: dict[str, Engine] = {"inline": inline.run, "local": processes.run}
"""Engines by the name that `--engine` takes; `inline` is `local` with one worker."""

__all__ = ["ENGINES", "Batch", "Engine"]
