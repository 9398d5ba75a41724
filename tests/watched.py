"""Storages for tests: calls are recorded, or fail where they are told to, before another storage carries them out.

    calls = Calls()
    with watching(calls):
        streamconv.convert(source, destination, workers=1)
    assert [call.place for call in calls.of("publish")] == ...

    with watching(Failing("write", OSError(errno.ENOSPC, "No space left on device"), after=3)): ...

Work in other processes goes past them: use them with one worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import orjson

from streamconv.storage.resolve import STORAGES, Storage
from streamconv.storage.roles import Sink, Source


@dataclass(frozen=True, slots=True)
class Call:
    """One call to a storage.

    Attributes:
        role: which of the two was called; a file that one of them opened has its role.
        method: see `roles`.
        place: the file or directory.
        arguments: the others; of bytes, how many.
    """

    role: Literal["source", "sink"]
    method: str
    place: str
    arguments: tuple[Any, ...] = ()


Watch = Callable[[Call], None]
"""Is told of each call before it is carried out; what it raises is what the caller gets."""


@dataclass(slots=True)
class Calls:
    """A record of all calls, from any thread."""

    made: list[Call] = field(default_factory=list)

    def __call__(self, call: Call) -> None:
        self.made.append(call)

    def of(self, *methods: str) -> list[Call]:
        """The calls of some methods, in order."""
        return [call for call in self.made if call.method in methods]


class Failing:
    """Has a method fail after so many calls to it went well.

    Args:
        method: its name.
        error: what each further call raises.
        after: calls that go well before.
        place: what a place must contain to count.
    """

    def __init__(self, method: str, error: BaseException, after: int = 0, place: str = "") -> None:
        self._method, self._error, self._left, self._place = method, error, after, place
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> None:
        if call.method == self._method and self._place in call.place:
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    raise self._error


def watched(storage: Storage, watch: Watch) -> Storage:
    """A storage that tells of each call before it passes it on."""
    sink = storage.sink
    return Storage(
        lambda: cast(Source, _Watched(storage.source(), watch, "source")),
        None if sink is None else lambda: cast(Sink, _Watched(sink(), watch, "sink")),
    )


@contextmanager
def watching(watch: Watch, scheme: str = "") -> Iterator[None]:
    """Tell of each call to a storage (the empty scheme: the local disk) for a while."""
    had = STORAGES[scheme]
    STORAGES[scheme] = watched(had, watch)
    try:
        yield
    finally:
        STORAGES[scheme] = had


class _Watched:
    """Stands before a role, or before a file that one opened, whose place it then knows."""

    def __init__(
        self, inner: Any, watch: Watch, role: Literal["source", "sink"], place: str | None = None
    ) -> None:
        self._inner, self._watch, self._role, self._place = inner, watch, role, place

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._told(name, found) if callable(found) else found

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _told(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # Storages know their own open files, and copy between those in ways of their own.
            plain = [each._inner if isinstance(each, _Watched) else each for each in arguments]
            shown = tuple(
                len(each) if isinstance(each, (bytes, memoryview)) else each
                for each in (*plain, *options.values())
                if isinstance(each, (int, str, bytes, memoryview))
            )
            place = str(shown[0]) if self._place is None else self._place
            shown = shown[1:] if self._place is None else shown
            self._watch(Call(self._role, name, place, shown))
            result = method(*plain, **options)
            if name == "open":
                return _Watched(result, self._watch, self._role, place)
            return result

        return call


def noted(journal: Path) -> list[list[Any]]:
    """The entries of items in a run's journal: index, bytes, and what else a receipt says. A torn line is left out."""
    lines = journal.read_bytes().split(b"\n") if journal.exists() else []
    entries = [orjson.loads(text) for _, _, text in (line.partition(b" ") for line in lines[:-1]) if text]
    return [entry for entry in entries if isinstance(entry, list)]
