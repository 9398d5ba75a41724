"""Within a process that converts: every call to the system is logged, and one of them goes wrong.

A run is told by the variable STREAMCONV_FAULTS, which its workers inherit; `injected/sitecustomize.py` starts this in
them. The calls of `os` are wrapped, below everything of the package. The log has a line for each that was carried out,
which says what is not on the disk yet (`disk`), and how many there are to draw from.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "STREAMCONV_FAULTS"

READS = ("pread", "preadv")
WRITES = ("pwrite", "copy_file_range")
OF_DESCRIPTORS = (*READS, "pwrite", "fsync", "ftruncate")
OF_PLACES = ("open", "stat", "scandir", "replace", "unlink", "mkdir", "rmdir")
CALLS = (*OF_DESCRIPTORS, *OF_PLACES, "copy_file_range")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        action: `kill-self`, `kill-main`, `kill-all`, `kill-worker`, `stop`, `INT`, `TERM`, `error`, `short`, `torn`,
            `empty`, `clock`; empty for nothing but to wait.
        at: the number of the call, counted from 1 among those of this kind in one process.
        call: which; empty for any.
        side: `source` or `destination`; empty for both.
        role: `main`, `worker`; empty for both.
        code: the name of an error.
        lasting: every later call goes wrong, too.
        after: the call is carried out before.
        wait: the harness does something while the call waits.
        seconds: of a jump of the clock.
        storage: a method of a storage's role fails, and no call of the system; the role is `source` or `sink`.
    """

    action: str
    at: int
    call: str = ""
    side: str = ""
    role: str = "main"
    code: str = ""
    lasting: bool = False
    after: bool = False
    wait: bool = False
    seconds: float = 0.0
    storage: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A run: its fault, the places that count, and what of the program is set for small checkpoints."""

    scratch: str
    log: str
    source: str
    destination: str
    boot: str
    fault: dict[str, Any] | None = None
    batch: int = 1 << 14
    part: int = 1 << 16
    sync_every: float = 10.0
    patience: float = 5.0

    def environment(self) -> dict[str, str]:
        """The variables of the run."""
        paths = [str(Path(__file__).with_name("injected")), str(Path(__file__).parents[2])]
        return {**os.environ, VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": os.pathsep.join(paths)}


def main(words: list[str]) -> int:
    """A command line of the program, in a process that was told of a fault."""
    setting = Setting(**json.loads(os.environ[VARIABLE]))
    from streamconv import cli
    from streamconv.execution import execute
    from streamconv.running import destination, finisher, freeing, items, journal, record

    items._BATCH_BYTES = setting.batch
    freeing._STEP_BYTES = setting.batch
    finisher._SYNC_EVERY = setting.sync_every
    destination._LOCK_PATIENCE = setting.patience
    for module in (execute, items, journal, record):
        module.PART = setting.part  # type: ignore[attr-defined]
    injector = install(setting, "main")
    if setting.fault and not setting.fault["storage"]:
        return cli.main(words)
    from tests.watched import watching

    with watching(injector.told):
        return cli.main(words)


def install(setting: Setting, role: str) -> Injector:
    """Wrap the calls of this process."""
    from streamconv.execution import node

    node._BOOT_ID = Path(setting.boot)
    injector = Injector(setting, role)
    for name in CALLS:
        setattr(os, name, injector.wrapped(name, getattr(os, name)))
    return injector


class Injector:
    """Stands before the calls of a process."""

    def __init__(self, setting: Setting, role: str) -> None:
        self._setting, self._role = setting, role
        self._fault = Fault(**setting.fault) if setting.fault else None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._write, self._fsync = os.write, os.fsync
        self._log = os.open(setting.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._roots = {"source": setting.source, "destination": setting.destination}
        self._note("pids", f"{role} {os.getpid()}\n")

    def told(self, call: Any) -> None:
        """A call to a storage's role, which may fail."""
        name = f"{call.role}.{call.method}"
        fault = self._due(name, self._side(call.place))
        self._logged("storage", call.place, call=name)
        if fault:
            self._act(fault)

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that is counted, logged, and may go wrong."""
        carried_out = self._copying(call) if name == "copy_file_range" else self._simple(name, call)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if getattr(self._inside, "now", False):
                return call(*arguments, **options)
            self._inside.now = True
            try:
                return carried_out(*arguments, **options)
            finally:
                self._inside.now = False

        return wrapper

    # ------------------------------------------------------------------------------- calls

    def _simple(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def carried_out(*arguments: Any, **options: Any) -> Any:
            place = self._place(name, arguments)
            side = self._side(place)
            if not side:
                return call(*arguments, **options)
            if name == "fsync":
                self._logged("sync-begins", place)
            fault = self._due(name, side)
            if fault:
                if fault.action == "short" and name in (*READS, "pwrite"):
                    arguments = _halved(name, arguments)
                elif fault.action == "torn" and name == "pwrite":
                    half = _halved(name, arguments)
                    self._logged(name, place, half[2], call(*half))
                elif fault.action == "empty" and name in READS:
                    return b"" if name == "pread" else 0
                elif name == "fsync" and fault.code:
                    self._logged("sync-failed", place)
                if not fault.after:
                    self._act(fault, place if name in OF_PLACES else None)
            result = call(*arguments, **options)
            if name == "pwrite":
                self._logged(name, place, arguments[2], result)
            elif name == "replace":
                self._logged(name, place, to=os.fspath(arguments[1]))
            elif name == "open":
                created = bool(arguments[1] & os.O_CREAT and arguments[1] & os.O_EXCL)
                self._logged("create" if created else name, place)
            else:
                self._logged(name, place)
            if fault and fault.after:
                self._act(fault)
            return result

        return carried_out

    def _copying(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def carried_out(source: int, target: int, count: int, source_at: int, target_at: int) -> int:
            place = self._of_descriptor(target)
            # The file that is read is the one that a fault of the source's side strikes.
            fault = self._due("copy_file_range", "source" if self._is_source_fault() else "destination")
            if fault:
                if fault.action in ("short", "torn"):
                    count = max(count // 2, 1)
                if fault.action == "torn":
                    self._logged(
                        "copy_file_range", place, target_at, call(source, target, count, source_at, target_at)
                    )
                if fault.action == "empty":
                    return 0
                if not fault.after:
                    self._act(fault)
            result: int = call(source, target, count, source_at, target_at)
            self._logged("copy_file_range", place, target_at, result)
            if fault and fault.after:
                self._act(fault)
            return result

        return carried_out

    def _is_source_fault(self) -> bool:
        return self._fault is not None and self._fault.side == "source"

    def _place(self, name: str, arguments: tuple[Any, ...]) -> str:
        first = arguments[0] if arguments else "."
        if isinstance(first, int):
            return self._of_descriptor(first)
        return os.fsdecode(os.fspath(first))

    def _of_descriptor(self, descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def _side(self, place: str) -> str:
        for side, root in self._roots.items():
            if place == root or place.startswith(f"{root}/"):
                return side
        return ""

    # ------------------------------------------------------------------------------ faults

    def _due(self, name: str, side: str) -> Fault | None:
        """The fault, where it is this call that it strikes."""
        fault = self._fault
        if fault is None or not self._role.startswith(fault.role) or (fault.side and fault.side != side):
            return None
        if fault.storage:
            if name != fault.storage:
                return None
        elif "." in name or (fault.call and name not in fault.call.split("|")):
            return None
        with self._lock:
            self._counts["all"] += 1
            number = self._counts["all"]
        if number != fault.at and not (fault.lasting and number > fault.at):
            return None
        first = self._first()
        return fault if first or (fault.lasting and number > fault.at) or fault.role else None

    def _first(self) -> bool:
        try:
            os.close(os.open(f"{self._setting.scratch}/fired", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _act(self, fault: Fault, place: str | None = None) -> None:
        if fault.wait:
            self._note("waiting", "")
            while not Path(self._setting.scratch, "go").exists():
                time.sleep(0.002)
        action = fault.action
        if action == "kill-self":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action in ("kill-main", "kill-worker", "kill-all"):
            self._kill(action.removeprefix("kill-"))
        elif action in ("INT", "TERM"):
            self._logged("signalled", "")
            for role, pid in pids(self._setting.scratch):
                if role == "main":
                    os.kill(pid, getattr(signal, f"SIG{action}"))
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "clock":
            _jump(fault.seconds)
        elif action in ("error", "torn") and fault.code:
            code = getattr(errno, fault.code)
            raise OSError(code, os.strerror(code), *[place] * (place is not None))

    def _kill(self, role: str) -> None:
        found = [pid for each, pid in pids(self._setting.scratch) if role == "all" or each.startswith(role)]
        for pid in sorted(found, key=lambda pid: pid == os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            if role == "worker":
                return

    # --------------------------------------------------------------------------------- log

    def _logged(self, event: str, place: str, offset: int = 0, length: int = 0, **more: Any) -> None:
        entry = {
            "by": self._role,
            "pid": os.getpid(),
            "event": event,
            "place": place,
            "side": self._side(place),
        }
        if length:
            entry |= {"offset": offset, "length": length}
        self._write(self._log, json.dumps(entry | more).encode() + b"\n")

    def _note(self, name: str, text: str) -> None:
        descriptor = os.open(f"{self._setting.scratch}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._write(descriptor, text.encode())
        os.close(descriptor)


def pids(scratch: str) -> list[tuple[str, int]]:
    """The processes of a run so far, by role."""
    try:
        lines = Path(scratch, "pids").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(role, int(pid)) for role, pid in (line.split() for line in lines)]


def _halved(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    descriptor, what, *rest = arguments
    if name == "pread":
        return (descriptor, max(what // 2, 1), *rest)
    if name == "preadv":
        (buffer,) = what
        return (descriptor, [buffer[: max(len(buffer) // 2, 1)]], *rest)
    return (descriptor, memoryview(what)[: max(len(what) // 2, 1)], *rest)


def _jump(seconds: float) -> None:
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)
    if seconds > 0:
        monotonic = time.monotonic
        time.monotonic = lambda: monotonic() + seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
