"""A destination through anything that may happen to it, in any order, beside a model that says what must hold.

Runs, kills between any two calls to the disk (`disk`), failing disks, reboots, a source that is written to, other plans,
bits that rot, files of other people: after each step the model knows what a run or a verification must say, and what the
destination may hold. A directory and one file beside it are taken through it together.

`STREAMCONV_MODEL_EXAMPLES=500` draws as many sequences as that, at random; by default a few, the same ones each time.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
from disk import recorded
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.numpy import save
from watched import Failing, watching

import streamconv
from streamconv.errors import ConversionError, DestinationError, StreamconvError, UsageError
from streamconv.plans import fingerprint, from_json
from streamconv.running import state
from streamconv.storage.location import locate

EXAMPLES = int(os.environ.get("STREAMCONV_MODEL_EXAMPLES", "0"))

OUT, ONE = "out", "one.safetensors"
PLANS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    OUT: ({}, {"dtype": "F16"}, {"dtype": "BF16", "max_shard": 700}, {"max_shard": 1200}, {"only": ["a.*"]}),
    ONE: ({}, {"dtype": "F16"}, {"only": ["a.*"]}),
}
CONFIG = b'{"torch_dtype": "float32"}'

Files = dict[str, bytes]


@cache
def model(content: int) -> bytes:
    """The weights of a source; with content 0 to 2 of one size, with others of another."""
    numbers = numpy.random.default_rng(content)
    rows = 6 if content < 3 else 8
    state = {name: numbers.standard_normal((rows, 10 + at)).astype("f4") for at, name in enumerate(NAMES)}
    return save(state | {"ids": numpy.arange(5) + content}, {"format": "pt"})


NAMES = ("a.0", "a.1", "b.0", "b.1", "b.2")


@cache
def reference(content: int, to: str, plan: int) -> Files:
    """What a conversion makes of it, undisturbed."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        (source / "model.safetensors").write_bytes(model(content))
        (source / "config.json").write_bytes(CONFIG)
        streamconv.convert(source, Path(scratch) / to, workers=1, **PLANS[to][plan])
        return held(Path(scratch) / to)


def held(place: Path) -> Files:
    """The files of a destination but a run's own; of one file, that, and what it grows as."""
    if place.name == ONE:
        here = [place, place.with_name(f"{place.name}.partial")]
        return {path.name: path.read_bytes() for path in here if path.exists()}
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and ".streamconv" not in path.parts
    }


@dataclass(frozen=True)
class Claim:
    """What a conversion is one of: which bytes, by which plan, and when they were written."""

    content: int
    plan: int
    fingerprint: str
    time: int


@dataclass
class Goal:
    """What the model knows of one destination.

    Attributes:
        place: where it is.
        own: where a run keeps its own files.
        claims: of all runs so far.
        foreign: files in it that are none of a run's.
        plan: of the last run.
        rotten: files under whose final names other bytes may be than were written, because of rot.
    """

    place: Path
    own: Path
    claims: list[Claim] = field(default_factory=list)
    foreign: Files = field(default_factory=dict)
    plan: int = 0
    rotten: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.place.name

    def state(self, name: str) -> tuple[Mapping[str, Any] | None, bool]:
        """A file that a run keeps there, and whether it is damaged."""
        try:
            found = state.read(locate(self.own / name), lambda document: document)
        except DestinationError:
            return None, True
        return found, False

    def claim(self, found: Mapping[str, Any] | None) -> Claim | None:
        """Whose a record or a plan is."""
        if found is None:
            return None
        if "fingerprint" in found:
            said, times = (
                found["fingerprint"],
                [time for path, _, time in found["sources"] if path.endswith(WEIGHTS)],
            )
        else:
            plan = from_json(found)
            said, times = (
                fingerprint(plan),
                [file.identity for file in plan.files if file.path.endswith(WEIGHTS)],
            )
        return next(each for each in self.claims if (each.fingerprint, each.time) == (said, times[0]))

    def whole(self, claim: Claim) -> Files:
        return reference(claim.content, self.name, claim.plan)

    def there(self) -> Files:
        return {name: data for name, data in held(self.place).items() if name not in self.foreign}

    def differing(self, claim: Claim) -> set[str]:
        """The files that are not as a conversion made them."""
        there, whole = self.there(), self.whole(claim)
        return {name for name in whole.keys() | there.keys() if whole.get(name) != there.get(name)}


WEIGHTS = "model.safetensors"
FAILURES = ("write", "copy_from", "sync", "publish", "create", "remove")
goals = st.sampled_from([OUT, ONE])
flags = st.fixed_dictionaries({}, optional={
    "overwrite": st.just(True), "restart": st.just(True), "checksum": st.just(True),
})  # fmt: skip


class Destinations(RuleBasedStateMachine):
    """The program and the model, side by side."""

    @initialize()
    def begin(self) -> None:
        self.base = Path(tempfile.mkdtemp())
        self.source = self.base / "source"
        self.source.mkdir()
        (self.source / "config.json").write_bytes(CONFIG)
        self.clock, self.boot = 1, 1
        self.write(0)
        self.goals = {
            OUT: Goal(self.base / OUT, self.base / OUT / ".streamconv"),
            ONE: Goal(self.base / ONE, self.base / ".streamconv" / ONE),
        }
        (self.base / "notes.txt").write_text("mine")
        (self.base / "boot").write_text("1")
        self.patch = mock.patch.multiple("streamconv.execution.node", _BOOT_ID=self.base / "boot")
        self.small = mock.patch("streamconv.running.items._BATCH_BYTES", 300)
        self.often = mock.patch("streamconv.running.finisher._SYNC_EVERY", 0.0)
        for each in (self.patch, self.small, self.often):
            each.start()

    def teardown(self) -> None:
        if hasattr(self, "base"):
            for each in (self.patch, self.small, self.often):
                each.stop()
            shutil.rmtree(self.base)

    # What happens around a run.

    def write(self, content: int) -> None:
        self.content, self.clock = content, self.clock + 1
        (self.source / "new").write_bytes(model(content))
        (self.source / "new").replace(self.source / "model.safetensors")
        self.touch()

    def touch(self) -> None:
        os.utime(self.source / "model.safetensors", ns=(self.clock * 10**9,) * 2)

    @rule(how=st.sampled_from(["replaced", "written to", "touched"]), content=st.integers(0, 3))
    def source_changes(self, how: str, content: int) -> None:
        if how == "replaced":
            self.write(content)
            return
        self.clock += 1
        if how == "written to":
            self.content = content
            (self.source / "model.safetensors").write_bytes(model(content))
        self.touch()

    @rule()
    def reboot(self) -> None:
        self.boot += 1
        (self.base / "boot").write_text(f"{self.boot}")

    @rule(name=st.sampled_from(["thesis.tex", "deep/notes.txt", "training.partial"]))
    def somebody_keeps_a_file_there(self, name: str) -> None:
        goal = self.goals[OUT]
        (goal.place / name).parent.mkdir(parents=True, exist_ok=True)
        (goal.place / name).write_bytes(b"years of work")
        goal.foreign[name] = b"years of work"

    @rule(to=goals, which=st.floats(0, 1, exclude_max=True), at=st.floats(0, 1, exclude_max=True),
          how=st.sampled_from(["flip", "cut", "delete"]), own=st.booleans())  # fmt: skip
    def rot(self, to: str, which: float, at: float, how: str, own: bool) -> None:
        goal = self.goals[to]
        if own:
            names = [path for path in sorted(goal.own.rglob("*")) if path.is_file()]
        else:
            names = [
                goal.place.parent / name if to == ONE else goal.place / name for name in sorted(goal.there())
            ]
        names = [path for path in names if path.stat().st_size]
        if not names:
            return
        path = names[int(which * len(names))]
        data = path.read_bytes()
        here = int(at * len(data))
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(data[:here] + (bytes([data[here] ^ 1]) + data[here + 1 :]) * (how == "flip"))
        if not own:
            goal.rotten.add(path.name.removesuffix(".partial"))

    # Runs.

    def expected(self, goal: Goal, wanted: Claim, overwrite: bool, restart: bool, checksum: bool) -> str:
        """What a run says: that it did it, "before" that it was done, or "refused"."""
        (found, damaged), (plan, torn) = goal.state("conversion.json"), goal.state("plan.json")
        if damaged or (torn and found is None):
            return "done" if overwrite or restart else "refused"
        finished, running = goal.claim(found), goal.claim(plan)
        if finished is not None and found is not None:
            if overwrite or (goal.name == ONE and not goal.place.exists()):
                return "done"
            there = goal.there()
            sizes = all(
                name in there and len(there[name]) == row["size"] for name, row in found["files"].items()
            )
            hashed = all("xxh3_128" in row for rows in found["tensors"].values() for row in rows.values())
            same = (finished.fingerprint, finished.time) == (wanted.fingerprint, wanted.time)
            return "before" if same and sizes and (hashed or not checksum) else "refused"
        if running is not None:
            same = (running.fingerprint, running.time) == (wanted.fingerprint, wanted.time)
            return "done" if restart or same else "refused"
        return "done" if overwrite or not held(goal.place) else "refused"

    @contextmanager
    def disturbed(self, kind: str, after: int) -> Iterator[None]:
        if kind == "killed":
            with recorded(self.base, after):
                yield
        elif kind:
            with watching(Failing(kind, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after)):
                yield
        else:
            yield

    @rule(to=goals, plan=st.integers(0, 4), flags=flags)
    def converted(self, to: str, plan: int, flags: dict[str, bool]) -> None:
        self.run(to, plan, flags)

    @rule(to=goals, plan=st.integers(0, 4), flags=flags, after=st.integers(3, 70))
    def killed(self, to: str, plan: int, flags: dict[str, bool], after: int) -> None:
        self.run(to, plan, flags, "killed", after)

    @rule(to=goals, flags=st.just({}) | flags)
    def converted_again(self, to: str, flags: dict[str, bool]) -> None:
        self.run(to, self.goals[to].plan, flags)

    @rule(to=goals, flags=st.just({}) | flags, after=st.integers(3, 70))
    def killed_again(self, to: str, flags: dict[str, bool], after: int) -> None:
        self.run(to, self.goals[to].plan, flags, "killed", after)

    @rule(to=goals, flags=flags, call=st.sampled_from(FAILURES), after=st.integers(0, 8))
    def out_of_room(self, to: str, flags: dict[str, bool], call: str, after: int) -> None:
        self.run(to, self.goals[to].plan, flags, call, after)

    def run(self, to: str, plan: int, flags: dict[str, bool], kind: str = "", after: int = 0) -> None:
        goal, plan = self.goals[to], plan % len(PLANS[to])
        options = PLANS[to][plan]
        made = fingerprint(streamconv.plan(self.source, goal.place, **options))
        wanted = Claim(self.content, plan, made, self.clock * 10**9)
        expected = self.expected(
            goal, wanted, **{"overwrite": False, "restart": False, "checksum": False, **flags}
        )
        resumed = goal.claim(goal.state("plan.json")[0]) is not None and "restart" not in flags
        goal.claims.append(wanted)
        goal.plan = plan
        said = "ended"
        with self.disturbed(kind, after):
            try:
                result = streamconv.convert(self.source, goal.place, workers=1, **options, **flags)
                said = "before" if result.finished_before else "done"
            except DestinationError as error:
                assert error.exit_code == 2
                said = "refused"
            except ConversionError as error:
                assert kind and "No space left" in str(error), error
                assert error.exit_code == 1
        assert said == expected or (kind and said == "ended"), (said, expected)
        if said in ("done", "before"):
            assert goal.claim(goal.state("conversion.json")[0]) == wanted
            assert not goal.state("plan.json")[0] or said == "before"
        if said == "done":
            differing = goal.differing(wanted)
            assert differing <= (goal.rotten if resumed else set()), "it is not what was asked for"
            goal.rotten = differing

    # Verification.

    def recorded(self) -> bool:
        return any((goal.own / "conversion.json").exists() for goal in self.goals.values())

    @precondition(lambda self: self.recorded())
    @rule(to=goals, headers=st.booleans())
    def verify_with_its_record(self, to: str, headers: bool) -> None:
        goal = self.goals[to]
        found, damaged = goal.state("conversion.json")
        before = held(goal.place)
        try:
            said = streamconv.verify(goal.place, workers=1, headers=headers)
        except UsageError:
            assert (found is None and not damaged) or not goal.place.exists()
            return
        except DestinationError:
            assert damaged
            return
        assert found is not None
        claim = goal.claim(found)
        assert claim is not None
        differing = goal.differing(claim)
        there, whole = goal.there(), goal.whole(claim)
        if not differing:
            assert not said.problems
        elif not headers or any(len(there.get(name, b"")) != len(data) for name, data in whole.items()):
            assert not said.whole
            assert said.problems or {Path(each.file).name for each in said.unchecked} >= differing
        assert held(goal.place) == before

    @precondition(lambda self: self.recorded())
    @rule(to=goals)
    def verify_with_its_source(self, to: str) -> None:
        goal = self.goals[to]
        claim = goal.claim(goal.state("conversion.json")[0])
        if claim is None or not goal.place.exists():
            return
        now = Claim(self.content, claim.plan, "", 0)
        try:
            said = streamconv.verify(self.source, goal.place, workers=1)
        except StreamconvError as error:
            assert goal.differing(now), error
            return
        assert bool(said.problems) == bool(goal.differing(now))

    # What holds at any time.

    @invariant()
    def nothing_else_is_touched(self) -> None:
        if not hasattr(self, "goals"):
            return
        assert sorted(path.name for path in self.source.iterdir()) == ["config.json", "model.safetensors"]
        assert (self.source / "model.safetensors").read_bytes() == model(self.content)
        assert (self.source / "model.safetensors").stat().st_mtime_ns == self.clock * 10**9
        assert (self.source / "config.json").read_bytes() == CONFIG
        assert (self.base / "notes.txt").read_text() == "mine"
        foreign = self.goals[OUT].foreign
        found = held(self.base / OUT)
        assert {name: found.get(name) for name in foreign} == foreign
        names = {path.name.removesuffix(".partial") for path in self.base.iterdir()}
        assert names <= {OUT, ONE, "source", "notes.txt", "boot", ".streamconv"}

    @invariant()
    def what_has_a_name_is_whole(self) -> None:
        for goal in getattr(self, "goals", {}).values():
            there = goal.there()
            wholes = [goal.whole(claim) for claim in goal.claims]
            for name, data in there.items():
                if not name.endswith(".partial") and name not in goal.rotten:
                    assert any(whole.get(name) == data for whole in wholes), f"{name} is not whole"
            for name in there:
                if name.endswith(".index.json") and not goal.rotten:
                    assert any(
                        whole.get(name) == there[name] and whole.items() <= there.items() for whole in wholes
                    ), f"{name}, and not all that it names"

    @invariant()
    def what_is_on_record_is_there(self) -> None:
        for goal in getattr(self, "goals", {}).values():
            claim = goal.claim(goal.state("conversion.json")[0])
            if claim is not None:
                assert {
                    name for name in goal.differing(claim) if not name.endswith(".partial")
                } <= goal.rotten


Destinations.TestCase.settings = settings(
    max_examples=EXAMPLES or 40,
    stateful_step_count=30,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestDestinations = pytest.mark.slow(Destinations.TestCase)
