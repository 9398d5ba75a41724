"""Memory: what a budget holds to, whatever the size of a tensor or of a model; and a hard limit, survived."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import samples
from bench.measure import Measurement, prepare, remove, run
from bench.options import Options, streamconv
from bench.report import Section, megabytes

# One F32 tensor of 2 GiB.
_LONE = (32768, 16384)

# What an interpreter with its libraries may take on top of the budget, a process.
_ALLOWANCE = 64 << 20

_LIMIT = 512 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion under a budget."""

    name: str
    source: Path
    budget: int
    arguments: tuple[str, ...]


def memory(options: Options) -> list[Section]:
    """Peaks against budgets, then the same in a control group that kills."""
    lone, model = options.directory / "memory-tensor", options.directory / "memory-model"
    samples.write_tensor(lone / "model.safetensors", _LONE, "F32")
    size = samples.write_llama(model, options.size, "F32", min(options.size, 5_000_000_000))
    llama = f"a model of {size / 1e9:.1f} GB"
    cast = ("--dtype", "BF16")
    cases = [
        Case("one tensor of 2 GiB, F32 to BF16", lone, 128 << 20, cast),
        Case(f"{llama}, F32 to BF16", model, 128 << 20, cast),
        Case(f"{llama}, F32 to BF16", model, 1 << 30, cast),
        Case(f"{llama}, re-sharded", model, 128 << 20, ("--max-shard", str(options.size // 5))),
    ]
    sections = [_budgets(cases, options), _limited(cases[:2], options)]
    remove(lone)
    remove(model)
    return sections


def _budgets(cases: Sequence[Case], options: Options) -> Section:
    rows = []
    for case in cases:
        found = _convert(case, options)
        options.say(f"memory: {case.name}, {megabytes(case.budget)}: {megabytes(found.anonymous)}")
        allowed = case.budget + found.processes * _ALLOWANCE
        verdict = "failed" if found.failure else f"{found.anonymous / allowed:.2f}"
        rows.append([
            case.name, megabytes(case.budget), str(found.processes), megabytes(allowed),
            megabytes(found.anonymous), verdict,
        ])  # fmt: skip
    return Section(
        "Memory against the budget",
        f"The most anonymous memory of all processes together; allowed are `--memory` and {megabytes(_ALLOWANCE)} "
        "for each process's interpreter and libraries.",
        ["", "--memory", "processes", "allowed", "memory", "memory / allowed"],
        rows,
    )


def _limited(cases: Sequence[Case], options: Options) -> Section:
    title = f"Memory under a hard limit of {megabytes(_LIMIT)}"
    try:
        with _group(options.cgroup, _LIMIT) as group:
            rows = [_survival(case, group, options) for case in cases]
            rows.append(_control(group))
    except OSError as error:
        options.say(f"memory: no control group can be made: {error}")
        return Section(title, f"Not measured: no memory control group can be made here ({error}).", [], [])
    return Section(
        title,
        "Run in a control group in which the kernel kills what takes more; page cache counts, and is given back "
        "under pressure. The last row shows that the limit bites.",
        ["", "--memory", "outcome", "memory"],
        rows,
    )


def _survival(case: Case, group: Group, options: Options) -> list[str]:
    found = _convert(case, options, group)
    options.say(f"memory: {case.name} in {megabytes(_LIMIT)}: {found.failure or 'survived'}")
    outcome = f"failed: {found.failure.splitlines()[-1][:120]}" if found.failure else "survived"
    return [case.name, megabytes(case.budget), outcome, megabytes(found.anonymous)]


def _control(group: Group) -> list[str]:
    """A process that takes more than the limit must die."""
    greedy = [sys.executable, "-c", f"bytes(b'x') * {_LIMIT * 5 // 4}"]
    found = run(group.inside(greedy))
    return [
        "a process that takes more",
        "",
        "killed" if found.failure else "survived",
        megabytes(found.anonymous),
    ]


def _convert(case: Case, options: Options, group: Group | None = None) -> Measurement:
    out = options.directory / "memory-out"
    command = streamconv(case.source, out, "--memory", str(case.budget), "--quiet", *case.arguments)
    prepare(out, case.source, "cold")
    found = run(group.inside(command) if group else command, out)
    remove(out)
    return found


# ---------------------------------------------------------------------------------- control groups


@dataclass(frozen=True, slots=True)
class Group:
    """A memory control group that was made for this run."""

    path: Path

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command, started in the group."""
        enter = f"echo $$ > {shlex.quote(str(self.path / 'cgroup.procs'))} && exec {shlex.join(command)}"
        return ["sh", "-c", enter]


@contextmanager
def _group(hierarchy: Path, limit: int) -> Iterator[Group]:
    """A group of its own with a limit, of version 1 or 2; nothing of others is changed.

    Raises:
        OSError: groups are not writable here, or the hierarchy has no memory controller.
    """
    path = hierarchy / f"streamconv-bench-{os.getpid()}"
    path.mkdir()
    try:
        # Version 1 and 2; swap would let a process live on beyond the limit.
        one, two = path / "memory.limit_in_bytes", path / "memory.max"
        _set(one if one.exists() else two, limit)
        for swap, value in (("memory.memsw.limit_in_bytes", limit), ("memory.swap.max", 0)):
            if (path / swap).exists():
                _set(path / swap, value)
        yield Group(path)
    finally:
        path.rmdir()


def _set(path: Path, value: int) -> None:
    if not path.exists():
        raise OSError(f"{path} is not there")
    path.write_text(str(value))


def hierarchy() -> Path:
    """Where the memory control groups of this system are, by version."""
    one = Path("/sys/fs/cgroup/memory")
    return one if one.is_dir() else Path("/sys/fs/cgroup")
