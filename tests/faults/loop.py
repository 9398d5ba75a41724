"""One case after another: the runs of each, and what is checked after each run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import streamconv
from tests.faults import checks, injection
from tests.faults.cases import Case, Counts, Trouble, case
from tests.faults.checks import Violation
from tests.faults.disk import Disk
from tests.faults.injection import Fault, Setting

# Seconds after which a run hangs.
_PATIENCE = 120.0

_TIGHT = "size=48m"


@dataclass(slots=True)
class Outcome:
    """What became of a round."""

    trouble: str
    fired: bool
    code: int
    kills: bool = False
    resumed: str = ""


@dataclass(slots=True)
class _Reference:
    files: dict[str, str]
    left: dict[str, str]
    """Of the source."""
    seconds: float


class Harness:
    """Has a directory for itself, best in memory; close it."""

    def __init__(self, *, verbose: bool = False, kills: bool = False) -> None:
        memory = Path("/dev/shm")
        base = tempfile.mkdtemp(prefix="streamconv-faults-", dir=memory if memory.is_dir() else None)
        self._base = Path(base).resolve()
        self._verbose, self._kills = verbose, kills
        self._made = self._base / "made"
        self._room = self._base / "room"
        self._source, self._disk = self._room / "source", self._base / "disk"
        self._scratch, self._log = self._base / "scratch", self._base / "log"
        self._boot = self._base / "boot"
        self._references: dict[str, _Reference] = {}
        self._counts: dict[tuple[str, object], Counts] = {}
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # what is started in the background ignores it
        self.mounts = self._mounted(_TIGHT)
        if self.mounts:
            self._unmount()
        for module in pkgutil.walk_packages(streamconv.__path__, "streamconv."):
            if not module.name.endswith(("__main__", ".worker")):
                importlib.import_module(module.name)
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._made.mkdir()
        subprocess.run(
            [sys.executable, "-m", "tests.faults.sources", str(self._made)],
            check=True, env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def close(self) -> None:
        self._unmount()
        shutil.rmtree(self._base, ignore_errors=True)

    # ------------------------------------------------------------------------------- cases

    def run(self, seed: int, number: int) -> tuple[Case, list[Outcome]]:
        """One case. Raises a Violation."""
        drawn = case(seed, number, self._counted, kills=self._kills)
        randomly = random.Random(f"{seed} {number} afterwards")
        reference = self._reference(drawn)
        self._fresh(drawn, tight=any(trouble.full or trouble.read_only for trouble in drawn.troubles))
        disk, outcomes = Disk(), []
        for trouble in drawn.troubles:
            if self._verbose:
                print(f"  {drawn.name}, {drawn.way}, {drawn.started}: {trouble}", flush=True)
            outcomes.append(self._round(drawn, trouble, reference, disk, randomly))
            if outcomes[-1].code == 0:
                break
        self._finish(drawn, reference, outcomes[-1])
        return drawn, outcomes

    def _round(
        self, drawn: Case, trouble: Trouble, reference: _Reference, disk: Disk, randomly: random.Random
    ) -> Outcome:
        before = checks.tree(self._source)
        process = self._start(drawn, trouble.fault, trouble)
        if trouble.seconds:
            time.sleep(trouble.seconds * reference.seconds)
            self._kill_all(process)
        expected = before
        second: _Process | None = None
        code = None
        filler = self._disk / "filler"
        end = time.monotonic() + _PATIENCE
        waited = False
        while code is None:
            code = process.poll()
            if not waited and (self._scratch / "waiting").exists():
                waited = True
                if trouble.change:
                    self._change(trouble.change, randomly)
                    expected = checks.tree(self._source)
                if trouble.full:
                    _fill(filler)
                if trouble.second:
                    second = self._start(drawn, None, trouble, patience=0.1, name="second")
                    second.wait(_PATIENCE)
                if trouble.drop and not trouble.reboot:
                    # The call that waits fails as it goes on.
                    disk.follow(self._log)
                    if not trouble.drop_late:
                        disk.drop_doomed(randomly, trouble.drop)
                (self._scratch / "go").touch()
            if trouble.fault and trouble.fault.action == "stop" and (self._scratch / "fired").exists():
                self._continue()
            if time.monotonic() > end:
                self._kill_all(process)
                raise Violation(f"it does not end: {trouble}")
            time.sleep(0.001)
        fired = (self._scratch / "fired").exists() or bool(trouble.seconds) or trouble.read_only
        self._wait_for_workers()
        text = process.text()
        if self._verbose:
            print(
                f"    exit code {code}, {'struck' if fired else 'not struck'}\n      {text[-600:]}",
                flush=True,
            )
        disk.follow(self._log)
        if trouble.drop and trouble.reboot and code != 0:
            disk.drop_unsynced(randomly, trouble.drop)
            disk.undo_names(randomly)
            self._boot.write_text(f"boot {randomly.random()}")
        elif trouble.drop:
            disk.drop_doomed(randomly, trouble.drop)
        self._unprotect()
        filler.unlink(missing_ok=True)
        try:
            if code not in trouble.codes:
                raise Violation(f"exit code {code}, not one of {sorted(trouble.codes)}")
            checks.source_is(expected, self._source, deletes=drawn.scenario.deletes)
            checks.message_is_ours(text, code, trouble.says, self._places())
            wanted = reference.files
            if code == 0 and trouble.change and self._is_another(drawn, reference):
                wanted = self._of_changed(drawn)  # nothing was read before the change
            checks.nothing_half_is_named(self._out(drawn).parent, wanted)
            if code == 0 and trouble.says == "interrupted":
                checks.was_about_to_end(self._log)
            if code == 0:
                checks.is_the_reference(self._out(drawn).parent, wanted)
                self._check_left(drawn, reference)
            if second is not None:
                _only_one_wrote(text, second)
        except Violation as violation:
            raise Violation(f"{violation}\n    after {trouble}\n    {text.strip()[-1000:]}") from None
        if trouble.change:  # and then somebody brings the old one back
            shutil.rmtree(self._source)
            shutil.copytree(self._made / drawn.scenario.source, self._source)
        return Outcome(trouble.name, fired, code, trouble.kills)

    def _check_left(self, drawn: Case, reference: _Reference) -> None:
        if drawn.scenario.deletes and checks.contents(self._source).keys() != reference.left.keys():
            raise Violation("it ended well, and the source is not deleted")

    def _is_another(self, drawn: Case, reference: _Reference) -> bool:
        found = checks.contents(self._out(drawn).parent)
        return any(found.get(name) != digest for name, digest in reference.files.items())

    def _of_changed(self, drawn: Case) -> dict[str, str]:
        """What the source is converted to as it is now."""
        found, aside = self._out(drawn).parent, self._disk / "aside"
        found.rename(aside)
        process = self._start(drawn, None, None)
        code = process.wait(_PATIENCE)
        if code != 0:
            raise Violation(f"a source was converted that cannot be: exit code {code}\n{process.text()}")
        made = checks.contents(found)
        shutil.rmtree(found)
        aside.rename(found)
        return made

    def _finish(self, drawn: Case, reference: _Reference, last: Outcome) -> None:
        """The same command again ends well, and as an undisturbed run does."""
        process = self._start(drawn, None, None)
        code = process.wait(_PATIENCE)
        text = process.text()
        last.resumed = "resumed"
        for option, name in (("--restart", "restarted"), ("--overwrite", "overwritten")):
            if code == 0 or option not in text or not any(trouble.change for trouble in drawn.troubles):
                continue
            last.resumed = name
            process = self._start(drawn, None, None, more=(option,))
            code, text = process.wait(_PATIENCE), f"{text}\n{process.text()}"
        try:
            if code != 0:
                raise Violation(f"it does not go on: exit code {code}")
            checks.is_the_reference(self._out(drawn).parent, reference.files)
            self._check_left(drawn, reference)
        except Violation as violation:
            raise Violation(f"{violation}\n    after {drawn.troubles}\n    {text.strip()[-1000:]}") from None

    # -------------------------------------------------------------------------------- runs

    def _out(self, drawn: Case) -> Path:
        return (
            self._disk / "to" / drawn.scenario.target
            if drawn.scenario.target != "out"
            else self._disk / "out" / "out"
        )

    def _fresh(self, drawn: Case, *, tight: bool = False) -> None:
        """A source as it was made, no destination, another boot."""
        self._unmount()
        for place in (self._room, self._disk):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._made / drawn.scenario.source, self._source)
        self._disk.mkdir()
        if tight and self.mounts:
            self._mounted(_TIGHT)
        self._log.write_bytes(b"")
        self._boot.write_text("boot 0")

    def _start(
        self,
        drawn: Case,
        fault: Fault | None,
        trouble: Trouble | None,
        *,
        patience: float = 10.0,
        name: str = "scratch",
        more: tuple[str, ...] = (),
    ) -> _Process:
        scratch = self._base / name
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        out = self._out(drawn)
        out.parent.mkdir(exist_ok=True)
        if trouble is not None and trouble.read_only:
            self._protect()
        setting = Setting(
            str(scratch), str(self._log if name == "scratch" else self._base / "log of second"), str(self._source),
            str(out.parent), str(self._boot), None if fault is None else asdict(fault), drawn.way.batch,
            sync_every=drawn.way.sync_every, patience=patience,
        )  # fmt: skip
        way = drawn.way
        words = [
            str(self._source), str(out), *drawn.scenario.options, "--engine", way.engine,
            *(("--workers", str(way.workers)) if way.engine != "inline" else ()), *more,
        ]  # fmt: skip
        return _Process(setting, words, forked=drawn.started == "forked")

    def _reference(self, drawn: Case) -> _Reference:
        self._counted(drawn)
        return self._references[drawn.name]

    def _counted(self, drawn: Case) -> Counts:
        """The calls of an undisturbed run, which ends as any other of the conversion."""
        key = (drawn.name, drawn.way)
        if key not in self._counts:
            self._fresh(drawn)
            began = time.monotonic()
            process = self._start(replace(drawn, started="forked"), None, None)
            if (code := process.wait(_PATIENCE)) != 0:
                raise Violation(f"an undisturbed run ends with {code}: {process.text()}")
            seconds, out = time.monotonic() - began, self._out(drawn).parent
            made = _Reference(checks.contents(out), checks.contents(self._source), seconds)
            reference = self._references.setdefault(drawn.name, made)
            checks.is_the_reference(out, reference.files)
            self._check_left(drawn, reference)
            self._counts[key] = _counts(self._log)
        return self._counts[key]

    def _wait_for_workers(self) -> None:
        """Workers end with the batch in hand."""
        workers = [pid for _, pid in injection.pids(str(self._scratch))]
        end = time.monotonic() + _PATIENCE
        while left := checks.running(workers):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            if time.monotonic() > end:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise Violation(f"{len(left)} workers outlive their run")
            time.sleep(0.002)

    def _continue(self) -> None:
        stopped = [pid for _, pid in injection.pids(str(self._scratch)) if checks.is_stopped(pid)]
        if stopped:
            time.sleep(0.1)
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _kill_all(self, process: _Process) -> None:
        for pid in {process.pid, *(pid for _, pid in injection.pids(str(self._scratch)))}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ------------------------------------------------------------------------ disk, source

    def _places(self) -> tuple[str, ...]:
        return (str(self._source), str(self._disk))

    def _change(self, change: str, randomly: random.Random) -> None:
        """Do something to a file of the source that is not small."""
        files = sorted(
            path for path in self._source.rglob("*") if path.is_file() and path.stat().st_size > PAGE
        )
        path = randomly.choice(files)
        size = path.stat().st_size
        if change == "vanish":
            path.unlink()
        elif change == "touch":
            os.utime(path, ns=(1, 1))
        elif change == "rewrite":
            with path.open("r+b") as file:
                file.seek(randomly.randrange(size // 2, size - 64))
                file.write(randomly.randbytes(64))
        elif change == "replace":
            other = path.with_name("other")
            other.write_bytes(path.read_bytes()[: size // 2] + randomly.randbytes(size - size // 2))
            other.replace(path)
        elif change == "cut":
            os.truncate(path, randomly.randrange(size))
        elif change == "grow":
            with path.open("ab") as file:
                file.write(bytes(100))

    def _mounted(self, options: str) -> bool:
        if not checks.is_root():
            return False
        self._disk.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self._disk)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def _unmount(self) -> None:
        while self._disk.is_mount():
            subprocess.run(["umount", str(self._disk)], check=True, capture_output=True)

    def _protect(self) -> None:
        if self.mounts:
            subprocess.run(["mount", "-o", "remount,ro", str(self._disk)], check=True)

    def _unprotect(self) -> None:
        if self._disk.is_mount():
            subprocess.run(["mount", "-o", "remount,rw", str(self._disk)], check=True)


class _Process:
    """A run of the program: forked from this process, or a new Python."""

    def __init__(self, setting: Setting, words: list[str], *, forked: bool) -> None:
        self._text = Path(setting.scratch, "text")
        environment = setting.environment()
        self._code: int | None = None
        if not forked:
            with self._text.open("wb") as text:
                command = [sys.executable, "-m", "tests.faults.injection", *words]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=text, stderr=text, env=environment
                )
                self.pid = process.pid
                process.returncode = 0  # waited for here
            return
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                text_file = os.open(self._text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(text_file, 1)
                os.dup2(text_file, 2)
                os.environ.update(environment)
                code = injection.main(words)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise Violation("it does not end")
            time.sleep(0.001)
        return code

    def text(self) -> str:
        return self._text.read_text(errors="replace")


PAGE = 4096


def _only_one_wrote(first: str, second: _Process) -> None:
    """Of two runs, one is refused, or finds the work of the other."""
    code, text = second.poll(), second.text()
    if code == 2 and "another run is writing here" in text:
        return
    if code == 0 and ("already converted" in text) != ("already converted" in first):
        return
    if code == 0 and "No such file or directory" in first:  # the second has deleted the source
        return
    raise Violation(f"beside a run, a second ended with {code}\n{text[-600:]}")


def _fill(filler: Path) -> None:
    """Take all room that there is."""
    if not filler.parent.is_mount():
        return
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


def _counts(log: Path) -> Counts:
    counts: Counts = Counter()
    for line in log.read_bytes().splitlines():
        entry = json.loads(line)
        call = entry.get("call", {"create": "open", "sync-begins": ""}.get(entry["event"], entry["event"]))
        if call and entry["side"]:
            counts[entry["by"], call, entry["side"]] += 1
    return counts
