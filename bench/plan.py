"""Planning a very large checkpoint: 100,000 tensors in 400 shards, whose data are holes."""

from __future__ import annotations

import sys

from bench import samples
from bench.measure import Contender, race, remove, spread
from bench.options import Options, streamconv
from bench.report import Section, megabytes

_TENSORS, _SHARDS, _SHAPE = 100_000, 400, (4096, 1024)
_GOAL_SECONDS, _GOAL_MEMORY = 5.0, 500_000_000

_API = "import sys, streamconv; print(len(streamconv.plan(sys.argv[1], dtype=sys.argv[2] or ()).tensors))"


def plan(options: Options) -> Section:
    """Time and memory of planning, by the command line and by the API, unchanged and cast."""
    source = options.directory / "plan-source"
    samples.write_hollow(source, _TENSORS, _SHARDS, _SHAPE)
    nowhere = options.directory / "plan-out"
    command = streamconv("plan", source, "--json")
    contenders = [
        Contender("streamconv plan --json", command, source, nowhere),
        Contender("streamconv plan --json --dtype F16", [*command, "--dtype", "F16"], source, nowhere),
        Contender("streamconv.plan()", [sys.executable, "-c", _API, str(source), ""], source, nowhere),
        Contender(
            'streamconv.plan(dtype="F16")', [sys.executable, "-c", _API, str(source), "F16"], source, nowhere
        ),
    ]
    # Headers were just written and are cached; warming would read the holes, which are terabytes.
    outcome = race(contenders, options.runs, "as is", 0.0, options.say)
    rows = []
    for contender in contenders:
        name = contender.name
        if name in outcome.failures:
            rows.append([name, "failed", "", outcome.failures[name].splitlines()[-1].replace("|", "/")[:120]])
            continue
        seconds = spread([result.seconds / _GOAL_SECONDS for result in outcome.results[name]])
        memory = outcome.anonymous(name)
        rows.append([name, str(seconds), megabytes(memory), f"{memory / _GOAL_MEMORY:.2f}"])
    remove(source)
    return Section(
        f"Planning {_TENSORS:,} tensors in {_SHARDS} shards",
        f"Whole headers, and holes for data; the goals are {_GOAL_SECONDS:.0f} s and {megabytes(_GOAL_MEMORY)}.",
        ["", "time / goal", "memory", "memory / goal"],
        rows,
    )
