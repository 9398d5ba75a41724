"""A short run of the fuzzers, always the same one; `python -m tests.fuzzing` makes long ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from streamconv.errors import UsageError
from tests.fuzzing import limits, loop
from tests.fuzzing.targets import TARGETS, Target

CASES = {
    "plan": 8,
    "journal": 8,
    "record": 8,
    "state": 8,
    "deleted": 8,
    "tokenizers": 8,
    "model-tokenizers": 8,
    "configs": 12,
}


@pytest.fixture
def root() -> Iterator[Path]:
    directory = loop.base()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_refused_or_right(name: str, root: Path, tmp_path: Path) -> None:
    counts = loop.Counts()
    trees = loop.planted(TARGETS[name], root)
    loop.fuzz(name, f"ci/{name}", root, trees, counts, CASES.get(name, 30), 600, tmp_path)
    assert not counts.found, "\n".join(loop.rows({name: counts}))
    assert counts.cases and counts.accepted >= min(len(trees), counts.cases)


def lines(place: Path) -> None:
    (place / "a.txt").write_text("1 2 3\n" * 20)


def fuzzed(check, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> loop.Counts:
    """Ten cases of a target whose check is given."""
    monkeypatch.setitem(TARGETS, "toy", Target(check, (lines,)))
    counts = loop.Counts()
    loop.fuzz("toy", "0", root, loop.planted(TARGETS["toy"], root), counts, 10, 60, tmp_path / "kept")
    return counts


def take_memory(*_: object) -> bool:
    with limits.bounded(100):
        return len(bytearray(limits.MEMORY + (64 << 20))) > 0


def take_time(*_: object) -> bool:
    with limits.bounded(100, seconds=0.05):
        while True:
            pass


def look_outside(*_: object) -> bool:
    return bool(Path("/etc/passwd").read_bytes())


def write_outside(work: Path, *_: object) -> bool:
    (work.parent.parent / "outside.txt").write_text("x")
    return True


def remove_outside(work: Path, *_: object) -> bool:
    (work.parent.parent / "nothing").unlink(missing_ok=True)
    return True


def run_code(*_: object) -> bool:
    return os.system("true") == 0


def break_down(*_: object) -> bool:
    raise KeyError("x")


def die(*_: object) -> bool:
    os.abort()


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (take_memory, "memory"), (take_time, "hang"), (look_outside, "opened outside"), (write_outside, "written outside"),
        (remove_outside, "changed outside"), (run_code, "code was run"), (break_down, "KeyError"), (die, "killed by signal 6"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_found(
    check, kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = fuzzed(check, root, tmp_path, monkeypatch)
    (found,) = counts.found.values()
    assert found.kind.startswith(kind)
    assert (Path(found.directory) / "work" / "a.txt").is_file()


def test_our_own_errors_are_refusals(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise UsageError("no")

    counts = fuzzed(refuse, root, tmp_path, monkeypatch)
    assert (counts.cases, counts.refused, len(counts.found)) == (10, 10, 0)


def test_what_reaches_new_lines_is_changed_further(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(work: Path, *_: object) -> bool:
        import streamconv

        streamconv.shard.parse_size((work / "a.txt").read_text(errors="replace").split()[0])
        return True

    counts = fuzzed(check, root, tmp_path, monkeypatch)
    assert counts.corpus and any("shard.py" in file for file, _ in counts.lines)


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_differ_in_what_is_to_be_changed(name: str, root: Path) -> None:
    trees = loop.planted(TARGETS[name], root)
    chooser = Random(1)
    made = [loop.mutant(chooser, TARGETS[name], [], trees) for _ in range(30)]
    assert len({tuple(sorted(tree.items())) for tree in made}) > 20
