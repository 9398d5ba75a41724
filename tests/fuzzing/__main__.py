"""Fuzz what reads files: `python -m tests.fuzzing --minutes 10 --seed 1 [--only safetensors]`.

Prints a table of counts by target, and for each finding the command that does it again. Exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzzing import limits, loop
from tests.fuzzing.targets import TARGETS

# A target's turn, in seconds of a run that has many.
_TURN = 60.0


def main() -> int:
    """Fuzz in turns until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long, all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=TARGETS, help="one target, or several (repeat it)")
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzzing-findings"), help="where they are saved"
    )
    parser.add_argument("--log", type=Path, help="a file that has the table so far")
    parser.add_argument(
        "--slow", type=float, default=3.0, help="seconds of the processor that are too many for a small file"
    )
    parser.add_argument("--replay", type=Path, help="do a finding again")
    arguments = parser.parse_args()
    limits.expect(arguments.slow)
    if arguments.replay:
        loop.replay(arguments.replay)
        print("nothing is found")
        return 0
    names = arguments.only or list(TARGETS)
    root = loop.base()
    counts = {name: loop.Counts() for name in names}
    try:
        planted = {name: loop.planted(TARGETS[name], root / name) for name in names}
        end = time.monotonic() + 60 * arguments.minutes
        turn, number = min(_TURN, 60 * arguments.minutes / len(names)), 0
        while (left := end - time.monotonic()) > 1:
            for name in names:
                seed = f"{arguments.seed}/{name}/{number}"
                loop.fuzz(
                    name,
                    seed,
                    root / name,
                    planted[name],
                    counts[name],
                    sys.maxsize,
                    min(turn, left),
                    arguments.findings,
                )
                if arguments.log:
                    arguments.log.write_text("\n".join(loop.rows(counts)) + "\n")
                left = end - time.monotonic()
                if left < 1:
                    break
            number += 1
    finally:
        loop.remove(root)
    print("\n".join(loop.rows(counts)))
    return int(any(each.found for each in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
