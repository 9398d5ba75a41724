"""The engine of several local processes, each fed over its own pipe by a thread of this one.

Own processes rather than `multiprocessing`: those import the caller's main module again, and outlive a
killed parent. These run `streamconv.engines.worker`, and end when their pipe does.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from streamconv.errors import ConversionError
from streamconv.execution.execute import Item, Receipt, Settings
from streamconv.storage.resolve import STORAGES, portable

# Batches that are handed out for each worker: the next is there when one is done.
_AHEAD = 2


@contextmanager
def run(
    batches: Iterable[Sequence[Item]], settings: Settings, workers: int
) -> Iterator[Iterator[list[Receipt]]]:
    """See `engines.Engine`."""
    processes: list[subprocess.Popen[bytes]] = []
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def perform(batch: Sequence[Item]) -> list[Receipt]:
        process = idle.get()
        try:
            return _asked(process, batch)
        finally:
            idle.put(process)

    pool = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            processes.append(_start())
            pickle.dump((settings, portable()), _pipe(processes[-1].stdin))
            idle.put(processes[-1])
        yield _in_any_order(pool, perform, batches, _AHEAD * workers)
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.wait()
            _pipe(process.stdout).close()
            with suppress(BrokenPipeError):  # what was still buffered for a worker that is gone
                _pipe(process.stdin).close()


def _in_any_order(
    pool: Executor,
    perform: Callable[[Sequence[Item]], list[Receipt]],
    batches: Iterable[Sequence[Item]],
    most: int,
) -> Iterator[list[Receipt]]:
    """Results as they are done, with at most so many batches under way."""
    pending: set[Future[list[Receipt]]] = set()
    for batch in batches:
        pending.add(pool.submit(perform, batch))
        if len(pending) >= most:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in as_completed(pending))


def _start() -> subprocess.Popen[bytes]:
    """Start a worker that imports this very package, in a process group that ^C does not reach."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"), *_found_in(portable()))))
    # NumPy's linear algebra would reserve memory for threads that nothing here uses.
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.Popen(
            # -P: the working directory may be a checkpoint's, and nothing in there is ever imported.
            [sys.executable, "-P", "-m", "streamconv.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,
            # The destination's lock is inherited, and so held until the last worker is gone.
            close_fds=False,
        )
    except OSError as error:
        raise ConversionError(
            f"a worker process cannot be started: {error.strerror or error}",
            hint="lower --workers; run the same command again to resume",
        ) from error


def _found_in(storages: Iterable[str]) -> Iterator[str]:
    """The directories that the modules of some storages were imported from."""
    for name in storages:
        package, *_ = getattr(STORAGES[name].source, "__module__", "").split(".")
        file = getattr(sys.modules.get(package), "__file__", None)
        if file:
            yield str(Path(file).parents[Path(file).stem == "__init__"])


def _asked(process: subprocess.Popen[bytes], batch: Sequence[Item]) -> list[Receipt]:
    """The receipts of a batch from a worker. Raises what it raised, or a ConversionError where it has died."""
    try:
        pickle.dump(batch, _pipe(process.stdin), protocol=pickle.HIGHEST_PROTOCOL)
        _pipe(process.stdin).flush()
        reply = pickle.load(_pipe(process.stdout))  # noqa: S301 - from our own worker, over a pipe nobody else holds
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise _died(process) from None
    if isinstance(reply, BaseException):
        raise reply
    return cast("list[Receipt]", reply)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    """A worker has both."""
    return cast("IO[bytes]", pipe)


def _died(process: subprocess.Popen[bytes]) -> ConversionError:
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return ConversionError(
        f"a worker process {how}",
        hint="if the machine ran out of memory, lower the memory budget (--memory) or the number of workers; run the same command again to resume",
    )
