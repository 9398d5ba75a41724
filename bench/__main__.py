"""`python -m bench [PART ...]`: measure, print tables, write `bench/results.md` and `docs/memory.png`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from bench import figure, races
from bench.adapters import adapters
from bench.dcp import dcp
from bench.deepspeed import deepspeed
from bench.families import families
from bench.measure import Cache
from bench.memory import hierarchy, memory
from bench.mindspore import mindspore
from bench.options import Options, find_mergekit
from bench.plan import plan
from bench.quantised import quantised
from bench.report import Section, write
from bench.sat import sat
from streamconv.shard import parse_size


def _reshard(options: Options) -> list[Section]:
    return [races.reshard(options).section]


def _cast(options: Options) -> list[Section]:
    found = races.cast(options)
    for outcome in found.races[:1]:
        if races.OURS in outcome.results and not options.bare:
            size = f"{options.size / 1e9:.0f} GB" if options.size >= 1e9 else f"{options.size / 1e6:.0f} MB"
            figure.draw(outcome, f"{size} of F32 weights to BF16")
    return [found.section]


PARTS: dict[str, Callable[[Options], list[Section]]] = {
    "reshard": _reshard,
    "cast": _cast,
    "transpose": lambda options: [races.transpose(options).section],
    "families": families,
    "adapters": adapters,
    "quantised": quantised,
    "sat": sat,
    "deepspeed": deepspeed,
    "dcp": dcp,
    "mindspore": mindspore,
    "plan": lambda options: [plan(options)],
    "memory": memory,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all where none is named"
    )
    parser.add_argument("--size", default="2GB", help="bytes of the samples (default 2GB)")
    parser.add_argument("--runs", type=int, default=3, help="turns that count (default 3)")
    parser.add_argument(
        "--directory", help="where to work: 3 times the size must fit (default: a temporary one)"
    )
    parser.add_argument(
        "--mergekit", metavar="PATH", help="the mergekit-yaml program, where it is not beside python"
    )
    parser.add_argument("--caches", default="warm,cold", help="states of the page cache (default warm,cold)")
    parser.add_argument(
        "--cgroup", default=str(hierarchy()), help="where to make a limited group (default %(default)s)"
    )
    parser.add_argument(
        "--rest", type=float, default=0.0, help="seconds of idleness before each run (default 0)"
    )
    parser.add_argument(
        "--bare", action="store_true", help="only streamconv and what it is held against; writes no file"
    )
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown or given.runs < 1 or not set(given.caches.split(",")) <= {"warm", "cold"}:
        parser.error(
            f"unknown: {', '.join(unknown)}" if unknown else "--runs is at least 1, --caches warm or cold"
        )
    # A run that is ended cleans up as one that is interrupted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sections = _measure(given)
    if not given.bare:
        write(sections, given.runs)
    print("\n".join(map(str, sections)))


def _measure(given: Any) -> list[Section]:
    # Below /tmp there may be no disk but memory: the default is a place that outlives a reboot.
    with tempfile.TemporaryDirectory(
        prefix="streamconv-bench-", dir=given.directory or "/var/tmp"
    ) as directory:
        options = Options(
            size=parse_size(given.size),
            runs=given.runs,
            directory=Path(directory),
            mergekit=find_mergekit(given.mergekit),
            caches=cast("tuple[Cache, ...]", tuple(given.caches.split(","))),
            rest=given.rest,
            bare=given.bare,
            cgroup=Path(given.cgroup),
        )
        return [section for part in given.parts or PARTS for section in PARTS[part](options)]


if __name__ == "__main__":
    main()
