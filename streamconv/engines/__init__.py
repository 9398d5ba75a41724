"""Engines: who runs which work items. All give the same receipts for the same batches.

The contract between engines, storage and the run that trusts a receipt:

    1. A receipt is given when the item's bytes are written, and says on which node.
    2. Workers that share the coordinator's page cache leave syncing to it: the finisher syncs files that it knows
       to be written, and the journal says what was synced.
    3. Other workers are told to sync (`Settings.sync`) before they give a receipt, which then is `durable`.
    4. A receipt that is neither durable nor from the coordinator's node ends the run: a sync there would not
       reach its bytes, and the journal would record what may be lost.
    5. Batches are taken as there is work for them, not all at once. One may be empty: there is nothing to do yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from streamconv.errors import UsageError
from streamconv.storage.resolve import portable, scheme

if TYPE_CHECKING:
    from streamconv.execution.execute import Item, Receipt, Settings

Batch = Sequence["Item"]

Run = Callable[[Iterable[Batch], "Settings", int], AbstractContextManager[Iterator["list[Receipt]"]]]
"""Takes batches, the settings of each worker, and how many workers there may be; gives, inside a `with`,
the receipts of each batch as they are done, in any order. Leaving the `with` stops all work."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to run work items.

    Attributes:
        run: see `Run`.
        shares_page_cache: whether all its workers are on the coordinator's node.
        in_process: whether they are in the coordinator's process, and so share its storages.
        options: options, by name, that act on this engine and not on every one.
    """

    run: Run
    shares_page_cache: bool = True
    in_process: bool = False
    options: frozenset[str] = frozenset({"workers"})


def _module(name: str) -> Run:
    """The function `run` of a module, which is imported when it is called: `--help` reads the table."""
    return lambda *given: import_module(name).run(*given)


ENGINES: dict[str, Engine] = {
    "local": Engine(_module("streamconv.engines.processes")),
    "inline": Engine(_module("streamconv.engines.inline"), in_process=True, options=frozenset()),
}
"""Engines by the name that `--engine` takes: `local` is processes on this node, `inline` is this process.
A new one is a module, and a row here."""

_TO_COME = frozenset({"ray", "slurm"})

# For less work than this, in bytes that are computed, starting processes takes longer than it saves.
_WORTH_PROCESSES = 256 << 20


def named(name: str) -> Engine:
    """The engine of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in ENGINES:
        fault = "cannot be used yet" if name in _TO_COME else "is not a known engine"
        raise UsageError(f"'{name}' {fault}; known are {', '.join(ENGINES)}")
    return ENGINES[name]


def chosen(name: str | None, workers: int, nbytes: int, places: Iterable[str] = ()) -> Engine:
    """The engine that was asked for, or where none was, the one that suits the workers and the bytes to compute.

    Raises:
        UsageError: there is no such engine, or its workers cannot use the storage of one of the places.
    """
    alone = {scheme(place) for place in places} - {"", *portable()}
    if name is None:
        name = "local" if workers > 1 and nbytes >= _WORTH_PROCESSES and not alone else "inline"
    engine = named(name)
    if alone and not engine.in_process:
        raise UsageError(
            f"--engine {name} cannot be used with {alone.pop()}://, which only this process has",
            hint="use --engine inline",
        )
    return engine
