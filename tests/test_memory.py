"""Promise two: peak memory is the budget, whatever the size of a tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from streamconv.errors import UsageError
from streamconv.execution import memory
from streamconv.execution.memory import MIN_ARENA, budget

MIB = 1 << 20


def sparse(path: Path, tensors: dict[str, list[int]]) -> Path:
    """A safetensors file of F32 zeros that takes no room on the disk."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4
        for count in shape:
            size *= count
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


PROGRAM = """
import sys, psutil, streamconv
from streamconv.execution.memory import _anonymous
result = streamconv.convert(sys.argv[1], sys.argv[2], dtype="BF16", memory_budget=sys.argv[3], workers=int(sys.argv[4]))
print(result.peak_memory)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "size", "workers"),
    [
        ({"one": [1 << 14, 1 << 15]}, "128MiB", 2),
        ({"row": [1, 1 << 28]}, "64MiB", 1),
        ({f"t{i}": [1 << 10, 1 << 10] for i in range(250)}, "32MiB", 2),
    ],
    ids=["a tensor of 2 GiB", "a row of 1 GiB", "many tensors"],
)
def test_the_peak_stays_in_the_budget(
    tmp_path: Path, tensors: dict[str, list[int]], size: str, workers: int
) -> None:
    source = sparse(tmp_path / "model.safetensors", tensors)
    arguments = [str(source), str(tmp_path / "out"), size, str(workers)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True
    )
    allowed = int(size.removesuffix("MiB")) * MIB + 64 * MIB * (workers + 1)
    assert int(done.stdout) < allowed


def test_a_budget_is_divided_and_never_exceeded() -> None:
    for total in (4 * MIB, 5 * MIB, 100 * MIB, 1 << 30, 1 << 40):
        for workers in (None, 1):
            found = budget(total, workers)
            assert found.workers * found.arena <= total
            assert MIN_ARENA <= found.arena <= memory.MAX_ARENA


@pytest.mark.parametrize(
    ("total", "workers", "smallest"), [(1, None, "4MiB"), (10 * MIB, 3, "12MiB"), (0, 1, "4MiB")]
)
def test_too_little_is_refused_with_what_would_do(total: int, workers: int | None, smallest: str) -> None:
    with pytest.raises(UsageError, match=f"the smallest that works is {smallest}"):
        budget(total, workers)
    assert budget(int(smallest.removesuffix("MiB")) * MIB, workers).arena == MIN_ARENA


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused(workers: int) -> None:
    with pytest.raises(UsageError):
        budget(1 << 30, workers)


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, 8),
    ],
)
def test_processors_are_those_the_control_group_grants(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], processors: int
) -> None:
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: set(range(8)))
    root = Path("/sys/fs/cgroup")
    monkeypatch.setattr(memory, "_text", lambda path: files.get(str(path.relative_to(root)), ""))
    assert memory.processors() == processors
