"""What a call of `python -m bench` asks for."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Cache


@dataclass(frozen=True, slots=True)
class Options:
    """Options of all benchmarks.

    Attributes:
        size: bytes of the samples.
        runs: turns that count.
        directory: where samples and results are written; removed by the caller.
        mergekit: the `mergekit-yaml` program, or None where it is not installed.
        caches: states of the page cache to measure in.
        rest: seconds of idleness before each run.
        bare: only streamconv, and what it is held against.
        cgroup: the directory of the memory control group hierarchy in which a limited group is made.
    """

    size: int
    runs: int
    directory: Path
    mergekit: Path | None
    caches: tuple[Cache, ...]
    rest: float
    bare: bool
    cgroup: Path

    def say(self, line: str) -> None:
        """Tell the user what happens meanwhile; results go to standard output."""
        print(line, file=sys.stderr, flush=True)


def streamconv(*arguments: str | Path) -> list[str]:
    """The command that runs this environment's streamconv, as its users start it."""
    program = Path(sys.executable).parent / "streamconv"
    return [str(program), *map(str, arguments)]


def find_mergekit(given: str | None) -> Path | None:
    """The `mergekit-yaml` program: the one given, or that of this environment."""
    beside = Path(sys.executable).parent / "mergekit-yaml"
    found = given or (str(beside) if beside.exists() else shutil.which("mergekit-yaml"))
    return Path(found) if found else None
