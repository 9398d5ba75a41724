"""The engine of several local processes, each fed over its own pipe by a thread of this one.

Own processes rather than `multiprocessing`: those import the caller's main module again, and outlive a
parent that is killed. These run `streamconv.engines.worker`, and end when their pipe does.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from streamconv.errors import ConversionError
from streamconv.execution.execute import Item, Receipt, Settings
from streamconv.storage.resolve import STORAGES, portable


@contextmanager
def run(
    batches: Iterable[Sequence[Item]], settings: Settings, workers: int
) -> Iterator[Iterator[list[Receipt]]]:
    """See `engines.Engine`."""
    processes: list[subprocess.Popen[bytes]] = []
    feed = _Feed(batches)
    done: queue.SimpleQueue[list[Receipt] | BaseException | None] = queue.SimpleQueue()
    threads: list[threading.Thread] = []
    try:
        for _ in range(workers):
            processes.append(_start())
            arguments = (processes[-1], settings, feed, done)
            threads.append(threading.Thread(target=_serve, args=arguments, daemon=True))
            threads[-1].start()
        yield _results(done, len(threads))
    finally:
        feed.stop()
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                _close(pipe)


class _Feed:
    """An iterator that several threads may ask for the next batch."""

    def __init__(self, batches: Iterable[Sequence[Item]]) -> None:
        self._batches = iter(batches)
        self._lock = threading.Lock()
        self._stopped = False

    def next(self) -> Sequence[Item] | None:
        with self._lock:
            return None if self._stopped else next(self._batches, None)

    def stop(self) -> None:
        self._stopped = True


def _start() -> subprocess.Popen[bytes]:
    """A worker that finds this very package, in a process group that the terminal's ^C does not reach."""
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


def _serve(
    process: subprocess.Popen[bytes],
    settings: Settings,
    feed: _Feed,
    done: queue.SimpleQueue[list[Receipt] | BaseException | None],
) -> None:
    """Feed one worker until there are no more batches; any failure ends the whole run."""
    requests, replies = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
    try:
        pickle.dump((settings, portable()), requests)
        while (batch := feed.next()) is not None:
            pickle.dump(batch, requests, protocol=pickle.HIGHEST_PROTOCOL)
            requests.flush()
            reply = pickle.load(replies)  # noqa: S301 - from our own worker, over a pipe nobody else holds
            if isinstance(reply, BaseException):
                raise reply
            done.put(reply)
        done.put(None)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        done.put(_died(process))
    except BaseException as error:  # handed to the consumer, which raises it in its own thread
        done.put(error)


def _died(process: subprocess.Popen[bytes]) -> ConversionError:
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return ConversionError(
        f"a worker process {how}",
        hint="if the machine ran out of memory, lower --memory or --workers; run the same command again to resume",
    )


def _results(
    done: queue.SimpleQueue[list[Receipt] | BaseException | None], running: int
) -> Iterator[list[Receipt]]:
    while running:
        result = done.get()
        if result is None:
            running -= 1
        elif isinstance(result, BaseException):
            raise result
        else:
            yield result


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        return  # what was still buffered for a worker that is gone
