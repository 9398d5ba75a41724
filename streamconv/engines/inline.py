"""The engine of one worker: this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from streamconv.execution.execute import Item, Receipt, Settings, Worker


@contextmanager
def run(
    batches: Iterable[Sequence[Item]], settings: Settings, workers: int
) -> Iterator[Iterator[list[Receipt]]]:
    """See `engines.Engine`."""
    del workers
    with closing(Worker(settings)) as worker:
        yield (worker.run(batch) for batch in batches)
