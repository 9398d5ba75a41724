"""What is drawn: the conversion, how it runs, and what goes wrong when."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.faults.injection import Fault
from tests.faults.sources import SCENARIOS, Scenario

Engine = Literal["inline", "local"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a conversion runs."""

    engine: Engine
    workers: int
    batch: int
    sync_every: float


WAYS = (
    Way("inline", 1, 1 << 14, 0.0),
    Way("inline", 1, 1 << 18, 10.0),
    Way("local", 2, 1 << 16, 0.0),
    Way("local", 3, 1 << 17, 10.0),
)

Counts = Counter[tuple[str, str, str]]
"""Calls of an undisturbed run, by role, call and side."""

Change = Literal["", "vanish", "touch", "rewrite", "replace", "cut", "grow"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One round of a case: a run, and what happens to it.

    Attributes:
        name: a row of the table.
        fault: within the process.
        kills: it is a kill -9, and others may follow.
        change: of a file of the source, while the call of the fault waits.
        full: the disk is filled meanwhile.
        second: another run is started meanwhile.
        drop: the share of pages that are lost: of a failed sync, or of a crash of the machine.
        drop_late: they are lost after the run, and not at once.
        reboot: the machine goes off.
        read_only: the destination is, from the beginning.
        seconds: after which all processes are killed, as a share of an undisturbed run.
        codes: exit codes that are right.
        says: what the message must contain, unless the exit code is 0.
    """

    name: str
    codes: frozenset[int]
    fault: Fault | None = None
    kills: bool = False
    change: Change = ""
    full: bool = False
    second: bool = False
    drop: float = 0.0
    drop_late: bool = False
    reboot: bool = False
    read_only: bool = False
    seconds: float = 0.0
    says: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """All that a number stands for."""

    number: int
    name: str
    scenario: Scenario
    way: Way
    started: Literal["forked", "executed"]
    troubles: tuple[Trouble, ...] = field(default=())


class Draw:
    """Draws what goes wrong, from the calls of an undisturbed run."""

    def __init__(self, randomly: random.Random, counts: Counts, *, local: bool) -> None:
        self.random, self._counts, self.local = randomly, counts, local
        self.share = 1.0
        """Of the calls of an undisturbed run, how many come in question."""

    def role(self) -> str:
        return self.random.choice(("main", "worker")) if self.local else "main"

    def at(self, role: str, calls: str = "", side: str = "") -> int:
        """The number of a call in one process; late ones as often as early ones."""
        wanted = calls.split("|") if calls else []
        counted: Counter[str] = Counter()
        for (by, call, where), count in self._counts.items():
            named = call in wanted if wanted else "." not in call
            if by.startswith(role) and named and (not side or where == side):
                counted[by] += count
        most = max(counted.values(), default=1) * self.share
        return self.random.randint(1, max(int(most), 1))

    def fault(self, action: str, calls: str = "", side: str = "", role: str = "", **more: object) -> Fault:
        role = role or self.role()
        at = self.at(role, calls, "" if "copy_file_range" in calls else side)
        return replace(Fault(action, at, calls, side, role), **more)  # type: ignore[arg-type]


KILLED, DONE, FAILED, REFUSED, INTERRUPTED = -9, 0, 1, 2, 130
_FAILS = frozenset({DONE, FAILED, REFUSED})


def _kill(which: str, **more: bool) -> Callable[[Draw], Trouble]:
    def drawn(draw: Draw) -> Trouble:
        after = draw.random.random() < 0.5
        name = {"main": "kill -9 of the run", "all": "kill -9 of all"}[which]
        fault = draw.fault(f"kill-{which}", after=after, role="" if which == "all" else "main")
        return Trouble(name, frozenset({KILLED, DONE}), fault, kills=True)

    return drawn


def _kill_worker(draw: Draw) -> Trouble:
    if not draw.local:
        return _kill("main")(draw)
    fault = draw.fault("kill-self", role="worker", after=draw.random.random() < 0.5)
    return Trouble(
        "kill -9 of a worker", frozenset({FAILED, DONE}), fault, kills=True, says="killed by signal 9"
    )


def _kill_by_time(draw: Draw) -> Trouble:
    return Trouble(
        "kill -9 of all, by the clock",
        frozenset({KILLED, DONE}),
        kills=True,
        seconds=draw.random.uniform(0.05, 1.1),
    )


def _signal(name: str) -> Callable[[Draw], Trouble]:
    def drawn(draw: Draw) -> Trouble:
        return Trouble(f"SIG{name}", frozenset({INTERRUPTED, DONE}), draw.fault(name), says="interrupted")

    return drawn


def _stop(draw: Draw) -> Trouble:
    return Trouble("SIGSTOP, SIGCONT", frozenset({DONE}), draw.fault("stop"))


def _full(draw: Draw) -> Trouble:
    calls = "open|mkdir|pwrite|ftruncate|fsync|replace"
    fault = draw.fault("", calls, "destination", "main", wait=True)
    return Trouble("full disk", _FAILS, fault, full=True)


def _error(name: str, code: str, calls: str, side: str, says: str) -> Callable[[Draw], Trouble]:
    def drawn(draw: Draw) -> Trouble:
        lasting = draw.random.random() < 0.5
        return Trouble(name, _FAILS, draw.fault("error", calls, side, code=code, lasting=lasting), says=says)

    return drawn


def _storage(draw: Draw) -> Trouble:
    """A role of a storage fails, above the calls of the system."""
    method, side = draw.random.choice(_METHODS)
    fault = draw.fault("error", method, side, "main", code="EIO")
    return Trouble(
        "EIO of a storage's role", _FAILS, replace(fault, call="", storage=method), says="Input/output error"
    )


_METHODS = [
    *((f"source.{method}", "source") for method in ("state", "entries", "open", "read", "read_into", "mapped")),
    *((f"source.{method}", "destination") for method in ("state", "entries", "open", "read")),
    *(
        (f"sink.{method}", "destination")
        for method in (
            "create", "make_directory", "open", "write", "copy_from", "sync", "publish", "remove", "remove_directory",
            "lock", "allocated", "free", "begin_sync",
        )
    ),
]  # fmt: skip


def _short(draw: Draw) -> Trouble:
    calls = draw.random.choice(
        ("pread|preadv", "pwrite", "copy_file_range", "pread|preadv|pwrite|copy_file_range")
    )
    fault = draw.fault("short", calls, lasting=draw.random.random() < 0.7)
    return Trouble("short reads and writes", frozenset({DONE}), fault)


def _torn(draw: Draw) -> Trouble:
    calls = draw.random.choice(("pwrite", "copy_file_range", "pwrite|copy_file_range"))
    code = draw.random.choice(("EIO", "ENOSPC", "EDQUOT"))
    fault = draw.fault("torn", calls, "destination", code=code)
    return Trouble("torn writes", _FAILS, fault, says=_WORDS[code])


_WORDS = {
    "EIO": "Input/output error", "ENOSPC": "the disk is full|No space left on device", "EDQUOT": "quota", "EROFS": "Read-only file system",
}  # fmt: skip


def _empty(draw: Draw) -> Trouble:
    calls = draw.random.choice(("pread|preadv", "copy_file_range"))
    fault = draw.fault("empty", calls, "source", lasting=draw.random.random() < 0.5)
    return Trouble("a source that ends early", _FAILS, fault)


def _sync(draw: Draw) -> Trouble:
    fault = draw.fault(
        "error", "fsync", "destination", "main", code=draw.random.choice(("EIO", "ENOSPC")), wait=True
    )
    late = draw.random.random() < 0.5
    return Trouble(
        "failed sync, its pages dropped", _FAILS, fault, drop=draw.random.choice((0.3, 1.0)), drop_late=late,
        says=_WORDS[fault.code],
    )  # fmt: skip


def _changed(change: Change, name: str) -> Callable[[Draw], Trouble]:
    def drawn(draw: Draw) -> Trouble:
        calls = "" if draw.random.random() < 0.5 else "preadv|copy_file_range|pwrite"
        return Trouble(name, _FAILS, draw.fault("", calls, wait=True), change=change)

    return drawn


def _read_only(draw: Draw) -> Trouble:
    if draw.random.random() < 0.4:
        return Trouble(
            "read-only destination", frozenset({FAILED, REFUSED}), read_only=True, says=_WORDS["EROFS"]
        )
    calls = "mkdir|pwrite|ftruncate|replace|unlink|rmdir|fsync|copy_file_range"
    fault = draw.fault("error", calls, "destination", code="EROFS", lasting=True)
    return Trouble("read-only destination", _FAILS, fault, says=_WORDS["EROFS"])


def _second(draw: Draw) -> Trouble:
    fault = draw.fault("", "", "destination", "main", wait=True)
    return Trouble("two runs at once", frozenset({DONE}), fault, second=True)


def _reboot(draw: Draw) -> Trouble:
    fault = draw.fault("kill-all", after=draw.random.random() < 0.5)
    drop = draw.random.choice((0.0, 0.3, 0.7, 1.0))
    return Trouble(
        "reboot, unsynced pages dropped", frozenset({KILLED, DONE}), fault, kills=True, drop=drop, reboot=True
    )


def _clock(draw: Draw) -> Trouble:
    seconds = draw.random.choice((-3.2e8, -86400.0, -5.0, 5.0, 86400.0, 3.2e8))
    return Trouble("clock jumps", frozenset({DONE}), draw.fault("clock", seconds=seconds))


_READING = "pread|preadv|copy_file_range"
_LOOKING = "open|stat|scandir"
_WRITING = "pwrite|copy_file_range|ftruncate"
_NAMING = "open|replace|unlink|mkdir|rmdir"

_KILLS = (_kill("main"), _kill("all"), _kill_worker, _kill_by_time, _reboot)
_MOST_ROUNDS = 10

TROUBLES: tuple[Callable[[Draw], Trouble], ...] = (
    _kill("main"), _kill("main"), _kill("all"), _kill_worker, _kill_worker, _kill_by_time,
    _signal("TERM"), _signal("INT"), _stop, _full,
    _error("EIO, reading", "EIO", _READING, "source", _WORDS["EIO"]),
    _error("EIO, looking", "EIO", _LOOKING, "", _WORDS["EIO"]),
    _error("EIO, writing", "EIO", _WRITING, "destination", _WORDS["EIO"]),
    _error("EIO, naming", "EIO", _NAMING, "destination", _WORDS["EIO"]),
    _error("ENOSPC, writing", "ENOSPC", _WRITING, "destination", _WORDS["ENOSPC"]),
    _storage, _short, _torn, _empty, _sync, _sync,
    _changed("vanish", "source vanishes"), _changed("rewrite", "source is written to"), _changed("touch", "source is touched"),
    _changed("replace", "source is replaced"), _changed("cut", "source is cut"), _changed("grow", "source grows"),
    _read_only, _second, _reboot, _reboot, _clock,
)  # fmt: skip
"""Each as often as the others; what stands twice, twice as often."""


def _dealt(seed: int, number: int, what: str, count: int) -> int:
    """A number below `count`: a pack of cards, dealt to the end and then shuffled again."""
    turn, at = divmod(number, count)
    return random.Random(f"{seed} {what} {turn}").sample(range(count), count)[at]


def head(seed: int, number: int) -> tuple[Case, random.Random]:
    """A case without what goes wrong, and what its troubles are drawn with."""
    names = list(SCENARIOS)
    name = names[_dealt(seed, number, "scenario", len(names))]
    randomly = random.Random(f"{seed} {number}")
    way = randomly.choice(WAYS)
    started: Literal["forked", "executed"] = "executed" if randomly.random() < 0.1 else "forked"
    return Case(number, name, SCENARIOS[name], way, started), randomly


def case(seed: int, number: int, counted: Callable[[Case], Counts], *, kills: bool = False) -> Case:
    """A case; `counted` gives the calls of its undisturbed run. With `kills`, each round is one."""
    found, randomly = head(seed, number)
    draw = Draw(randomly, counted(found), local=found.way.engine == "local")
    pack = _KILLS if kills else TROUBLES
    first = pack[_dealt(seed, number, "trouble", len(pack))]
    troubles = [first(draw)]
    while len(troubles) < _MOST_ROUNDS and randomly.random() < (
        0.95 if kills else 0.75 if troubles[-1].kills else 0.3
    ):
        draw.share = 0.15 if kills else 0.5  # less is left to do
        troubles.append(randomly.choice(_KILLS if troubles[-1].kills else TROUBLES)(draw))
    if found.scenario.deletes:  # nobody can bring back what was changed
        troubles = [_reboot(draw) if trouble.change else trouble for trouble in troubles]
        codes = frozenset({DONE, FAILED, REFUSED})  # of two runs, the second may find no source any more
        troubles = [replace(trouble, codes=codes) if trouble.second else trouble for trouble in troubles]
    return replace(found, troubles=tuple(troubles))
