"""Convert under faults: `python -m tests.faults --minutes 5 --seed 1`, or `--cases 100`.

Prints how often each fault struck and how it ended, and for each violation the command that does it again. Exit code 1
where there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # this process is forked

from tests.faults.cases import SCENARIOS
from tests.faults.checks import Violation
from tests.faults.loop import Harness, Outcome

_ENDS = {0: "done", 1: "failed", 2: "refused", 130: "interrupted", -9: "killed"}


def main() -> int:
    """Draw cases until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, help="how long")
    parser.add_argument("--cases", type=int, help="how many; without either, 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="do this one alone, and tell of each step")
    parser.add_argument("--kills", action="store_true", help="nothing but kills, up to ten of one conversion")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the number of the first")
    parser.add_argument("--log", type=Path, help="a file that has the table after each fifty cases")
    arguments = parser.parse_args()
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    most = arguments.cases or (100 if end is None else sys.maxsize)
    numbers = (
        [arguments.case] if arguments.case is not None else range(arguments.first, arguments.first + most)
    )
    harness = Harness(verbose=arguments.case is not None, kills=arguments.kills)
    if not harness.mounts:
        print("nothing can be mounted here: no full disk but by failing calls, no read-only one but so")
    table = Table()
    try:
        for number in numbers:
            if end is not None and time.monotonic() > end:
                break
            try:
                drawn, outcomes = harness.run(arguments.seed, number)
                table.add(drawn.name, outcomes)
            except Violation as violation:
                table.violations += 1
                print(
                    f"VIOLATION: python -m tests.faults --seed {arguments.seed} --case {number}{' --kills' * arguments.kills}\n    {violation}",
                    flush=True,
                )
            if arguments.log and number % 50 == 49:
                arguments.log.write_text(table.text())
    finally:
        harness.close()
    print(table.text())
    if arguments.log:
        arguments.log.write_text(table.text())
    return 1 if table.violations else 0


class Table:
    """Counts."""

    def __init__(self) -> None:
        self.violations = 0
        self._began = time.monotonic()
        self._rows: dict[str, Counter[str]] = defaultdict(Counter)
        self._formats: Counter[str] = Counter()
        self._cases = self._kills = 0

    def add(self, name: str, outcomes: list[Outcome]) -> None:
        """A case that went as it should."""
        self._cases += 1
        for outcome in outcomes:
            self._formats[name] += outcome.fired
            row = self._rows[outcome.trouble]
            if not outcome.fired:
                row["missed"] += 1
                continue
            row["struck"] += 1
            self._kills += outcome.kills
            row[_ENDS[outcome.code]] += 1
            row[outcome.resumed] += 1

    def text(self) -> str:
        """All of it."""
        columns = ("struck", *_ENDS.values(), "missed")
        width = max(map(len, self._rows), default=5)
        total: Counter[str] = Counter()
        for row in self._rows.values():
            total.update(row)
        lines = [" " * width + "".join(f"{name:>13}" for name in columns)]
        for name, row in [*sorted(self._rows.items()), ("all", total)]:
            lines.append(f"{name:<{width}}" + "".join(f"{row[column]:>13,}" for column in columns))
        found = sum(1 for name in SCENARIOS if self._formats[name])
        minutes = (time.monotonic() - self._began) / 60
        lines.append(
            f"\n{self._cases:,} cases, {total['struck']:,} faults, {self._kills:,} of them kill -9, {found} of"
            f" {len(SCENARIOS)} conversions, {minutes:.1f} minutes: {self.violations} violations"
        )
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
