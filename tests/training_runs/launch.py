"""Start a worker in as many processes as a run has ranks, once for all tests of a session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]
_SECONDS = 540


def launched(out: Path, module: str, world: int, *arguments: str) -> Path:
    """Where `python -m module OUT ARGUMENTS...` has written, started in `world` processes unless it has run.

    Tests run in several processes themselves: the first one that asks starts the run, the others wait.
    """
    done = out / "done"
    out.parent.mkdir(parents=True, exist_ok=True)
    # One at a time, whatever is run: two runs could be given the same port.
    with filelock.FileLock(out.parent / "launch.lock"):
        if not done.exists():
            out.mkdir(exist_ok=True)
            _run(out, module, world, arguments)
            done.touch()
    return out


def _run(out: Path, module: str, world: int, arguments: tuple[str, ...]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # DeepSpeed compiles on first use, under a lock that a killed run would leave to all later ones.
        "TORCH_EXTENSIONS_DIR": str(out.parent / "torch_extensions"),
    }
    ranks = []
    for rank in range(world):
        log = (out / f"rank_{rank}.log").open("wb")
        command = [sys.executable, "-m", module, str(out), *arguments]
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        )
        log.close()
    try:
        codes = [process.wait(_SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if any(codes):
        failed = codes.index(next(code for code in codes if code))
        raise RuntimeError((out / f"rank_{failed}.log").read_text(errors="replace")[-4000:])
