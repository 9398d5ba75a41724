"""An engine from outside the package: threads of this process, with a worker of their own each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from streamconv.execution.execute import Worker

ran = []
"""How many batches each run had."""


@contextmanager
def run(batches, settings, workers):
    def work(batch):
        worker = Worker(settings)
        try:
            return worker.run(batch)
        finally:
            worker.close()

    def counted():
        for batch in batches:
            ran[-1] += 1
            yield batch

    ran.append(0)
    with ThreadPoolExecutor(workers) as pool:
        yield (receipts for receipts in pool.map(work, counted()))
