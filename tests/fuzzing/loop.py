"""Run mutants in processes of their own, count them, and keep those that reach new lines to be changed further."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

from streamconv.errors import StreamconvError
from tests.fuzzing import limits, seeds
from tests.fuzzing.grammars import mutated, words
from tests.fuzzing.targets import TARGETS, Target, clear, is_changed

Tree = dict[str, bytes]
"""A directory: path -> content."""

_PACKAGE = str(Path(limits.__file__).parents[2] / "streamconv")
_MOST_KEPT = 300
# Seconds without a word of a process, after which it is taken to wait for something that never comes.
_PATIENCE = 300.0
# How often the lines of a function are still looked at that has shown none that is new for a while.
_OFTEN, _SELDOM = 30, 32


@dataclass(slots=True)
class Found:
    """One thing that must not be, and how often."""

    kind: str
    message: str
    directory: str
    count: int = 1


@dataclass(slots=True)
class Counts:
    """What came of a target."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    lines: set[tuple[str, int]] = field(default_factory=set)
    corpus: list[Tree] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)


class Lines:
    """The lines of the program that this thread has reached."""

    def __init__(self, known: set[tuple[str, int]]) -> None:
        self.known = known
        self.fresh = False
        self._codes: dict[CodeType, str | None] = {}
        self._calls: dict[CodeType, int] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at what runs inside; `fresh` says whether there was a new line."""
        self.fresh = False
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, _: str, __: Any) -> Any:
        code = frame.f_code
        if code not in self._codes:
            ours = code.co_filename.startswith(_PACKAGE)
            self._codes[code] = code.co_filename[len(_PACKAGE) :] if ours else None
        if self._codes[code] is None:
            return None
        calls = self._calls[code] = self._calls.get(code, 0) + 1
        return self._line if calls < _OFTEN or calls % _SELDOM == 0 else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            place = (self._codes[frame.f_code] or "", frame.f_lineno)
            if place not in self.known:
                self.known.add(place)
                self.fresh = True
                self._calls[frame.f_code] = 0
        return self._line


class Plain(Random):
    """Chooses what is usual, for seeds, which are to be accepted."""

    def random(self) -> float:
        """Neither seldom nor often."""
        return 0.5

    def choice(self, seq: Any) -> Any:
        """The first."""
        return seq[0]


class Desk:
    """A directory in which one mutant after the other lies, written only where it differs from the one before."""

    def __init__(self, root: Path) -> None:
        self.work, self.out = root / "work", root / "out"
        self._held: Tree = {}
        clear(self.work)

    def lay(self, tree: Tree) -> None:
        """Make the directory be that tree."""
        for path in self._held.keys() - tree.keys():
            (self.work / path).unlink(missing_ok=True)
        if not self._held:
            clear(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        for path, data in tree.items():
            if self._held.get(path) is data:
                continue
            file = self.work / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            os.utime(file, ns=(seeds.TIME, seeds.TIME))
        self._held = tree

    def tidy(self, target: Target) -> None:
        """Remove what a case made."""
        clear(self.out)
        if target.writes:
            self._held = {}


def tree_of(directory: Path) -> Tree:
    """A directory's files."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def planted(target: Target, root: Path) -> list[Tree]:
    """The trees of a target's seeds, made where its mutants will lie: plans know their sources by their paths."""
    made = []
    for seed in target.seeds:
        clear(root)
        (root / "work").mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()):
            seed(root / "work")
        made.append(tree_of(root / "work"))
    clear(root)
    return made


def mutant(chooser: Random, target: Target, corpus: list[Tree], planted: list[Tree]) -> Tree:
    """A tree with something wrong."""
    tree = dict(chooser.choice(corpus if corpus and chooser.random() < 0.6 else planted))
    for _ in range(chooser.choice((1, 1, 1, 2, 4))):
        paths = [path for path in tree if is_changed(target, path)]
        if not paths:
            break
        path = chooser.choice(paths)
        match chooser.randrange(40):
            case 0:
                del tree[path]
            case 1:
                name = words(chooser, path.rpartition("/")[2]).replace("/", "_").replace("\0", "0")[:80]
                name = name.encode(errors="replace")[:200].decode(errors="ignore")
                if name.strip(".") and len(path) < 300:
                    tree[path[: path.rfind("/") + 1] + name] = tree.pop(path)
            case 2:
                tree[path] = tree[chooser.choice(list(tree))]
            case 3:
                other = chooser.choice(planted)
                tree[path] = other.get(path, b"")
            case 4:
                tree[path] = tree[path][: chooser.randrange(len(tree[path]) + 1)]
            case _:
                tree[path] = mutated(chooser, tree[path])
    # A name cannot be both that of a file and of a directory.
    return {
        path: data for path, data in tree.items() if not any(other.startswith(path + "/") for other in tree)
    }


def tried(target: Target, desk: Desk, root: Path, chooser: Random) -> bool:
    """Do with the mutant on the desk what its target does; see `Check`."""
    with (
        limits.watched(root),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        accepted = target.check(desk.work, desk.out, chooser)
    if "internal error" in said.getvalue():
        raise limits.Finding("internal error", said.getvalue()[-500:])
    return accepted


def _kind(error: BaseException) -> str:
    """What a finding is counted under: its kind, or where in the program it came from."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE)
    ]
    where = f" at {frames[-1].filename[len(_PACKAGE) + 1 :]}:{frames[-1].lineno}" if frames else ""
    return (error.kind if isinstance(error, limits.Finding) else type(error).__name__) + where


def _child(
    pipe: Any, name: str, root: Path, seed: str, known: Counts, trees: list[Tree], until: tuple[int, float]
) -> None:
    """Cases until there are so many, or it is so late; their counts go through the pipe."""
    target = TARGETS[name]
    chooser = Random(seed)
    lines = Lines(known.lines)
    desk = Desk(root)
    counts = Counts(lines=known.lines, corpus=known.corpus)
    limits.begin()
    began = time.process_time()
    while counts.cases < until[0] and time.monotonic() < until[1]:
        case = f"{seed}/{counts.cases}"
        # The seeds themselves come first: they are accepted, or a reader has forgotten its format.
        is_seed = counts.cases < len(trees) and not known.cases
        tree = trees[counts.cases] if is_seed else mutant(chooser, target, counts.corpus, trees)
        desk.lay(tree)
        pipe.send(("begins", case))
        counts.cases += 1
        try:
            with lines.watched():
                counts.accepted += tried(target, desk, root, Plain() if is_seed else Random(case))
        except StreamconvError:
            counts.refused += 1
        except BaseException as error:
            kind = _kind(error)
            if kind not in counts.found:
                pipe.send(("found", case, kind, "".join(traceback.format_exception(error))[-4000:], tree))
            counts.found.setdefault(kind, Found(kind, str(error)[:300], "")).count += 1
            if isinstance(error, MemoryError):
                break  # what is left of this process is not to be trusted
        if lines.fresh and len(counts.corpus) < _MOST_KEPT and sum(map(len, tree.values())) < 1 << 20:
            counts.corpus.append(tree)
        desk.tidy(target)
    counts.seconds = time.process_time() - began
    pipe.send(("ends", counts))
    pipe.close()


def fuzz(
    name: str, seed: str, root: Path, trees: list[Tree], counts: Counts, most: int, seconds: float, kept: Path
) -> None:
    """Run cases of one target in a process of its own, and add what came of them to its counts.

    Args:
        name: of the target.
        seed: what the cases are made of.
        root: where mutants lie.
        trees: of its seeds.
        counts: what is known so far.
        most: how many cases.
        seconds: how long.
        kept: where findings are saved.
    """
    deadline = time.monotonic() + seconds
    ours, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(
        target=_child, args=(theirs, name, root, seed, counts, trees, (most, deadline))
    )
    process.start()
    theirs.close()
    begun, cases = seed, 0
    try:
        while True:
            if not ours.poll(_PATIENCE):
                raise EOFError
            match ours.recv():
                case ("begins", begun):
                    cases += 1
                case ("found", case, kind, message, tree):
                    _keep(counts, kept, name, root, case, kind, message, tree)
                case ("ends", told):
                    counts.cases += told.cases
                    counts.accepted += told.accepted
                    counts.refused += told.refused
                    counts.seconds += told.seconds
                    counts.lines |= told.lines
                    counts.corpus = told.corpus
                    for kind, found in told.found.items():
                        counts.found[kind].count += found.count - 1
                    break
    except EOFError:
        process.kill()
        process.join()
        kind = f"killed by signal {-(process.exitcode or 0)}"
        _keep(
            counts,
            kept,
            name,
            root,
            begun,
            kind,
            "the process died, or did not answer",
            tree_of(root / "work"),
        )
        counts.cases += cases
    finally:
        process.join(5)
        process.kill()
        ours.close()


def _keep(
    counts: Counts, kept: Path, name: str, root: Path, case: str, kind: str, message: str, tree: Tree
) -> None:
    if kind in counts.found:
        counts.found[kind].count += 1
        return
    directory = kept / f"{name}-{len(counts.found) + 1}"
    number = 1
    while directory.exists():
        number += 1
        directory = kept / f"{name}-{len(counts.found) + number}"
    for path, data in tree.items():
        file = directory / "work" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    about = {"target": name, "case": case, "root": str(root), "kind": kind, "message": message}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "case.json").write_text(json.dumps(about, indent=1))
    counts.found[kind] = Found(kind, message.strip().rpartition("\n")[2][:200], str(directory), 1)


def replay(directory: Path) -> None:
    """Do once more what led to a finding, in this process; the error that was found comes out."""
    about = json.loads((directory / "case.json").read_text())
    root = Path(about["root"])
    desk = Desk(root)
    tree = tree_of(directory / "work")
    desk.lay(tree)
    limits.begin()
    try:
        tried(TARGETS[about["target"]], desk, root, Random(about["case"]))
    finally:
        clear(root)


def base() -> Path:
    """A directory for mutants, in memory where there is one."""
    memory = Path("/dev/shm")
    return Path(
        tempfile.mkdtemp(prefix="streamconv-fuzzing-", dir=memory if memory.is_dir() else None)
    ).resolve()


def rows(counts: Mapping[str, Counts]) -> Iterator[str]:
    """The table of counts."""
    yield f"{'target':<22}{'cases':>9}{'accepted':>10}{'refused':>9}{'lines':>7}{'CPU s':>8}{'found':>7}"
    for name, each in [*counts.items(), ("all", _sum(counts))]:
        yield (
            f"{name:<22}{each.cases:>9,}{each.accepted:>10,}{each.refused:>9,}{len(each.lines):>7,}"
            f"{each.seconds:>8.0f}{len(each.found):>7}"
        )
    for name, each in counts.items():
        for found in each.found.values():
            yield f"{name}: {found.kind} ({found.count} times): {found.message}"
            yield f"    python -m tests.fuzzing --replay {found.directory}"


def _sum(counts: Mapping[str, Counts]) -> Counts:
    total = Counts()
    for name, each in counts.items():
        total.cases += each.cases
        total.accepted += each.accepted
        total.refused += each.refused
        total.seconds += each.seconds
        total.lines |= each.lines
        total.found |= {f"{name}/{kind}": found for kind, found in each.found.items()}
    return total


def remove(directory: Path) -> None:
    """Remove a directory of mutants."""
    shutil.rmtree(directory, ignore_errors=True)
