"""A run under FSDP, saved with torch.distributed.checkpoint, to safetensors; against torch's own converter."""

from __future__ import annotations

import subprocess
import sys

from bench import races, samples
from bench.measure import Contender, race, remove
from bench.options import Options
from bench.options import streamconv as command
from bench.report import Section, megabytes

_RANKS = 2
_GOAL = 0.35
_THEIRS = "dcp_to_torch_save"


def dcp(options: Options) -> list[Section]:
    """F32 weights of the wanted size and their Adam moments, on two ranks."""
    source, out = options.directory / "dcp-source", options.directory / "dcp-out"
    meeting = options.directory / "dcp-meeting"
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "bench.dcp_sample",
                f"{rank}",
                f"{_RANKS}",
                str(meeting),
                str(source),
                f"{options.size}",
            ]
        )
        for rank in range(_RANKS)
    ]
    if any(rank.wait() for rank in ranks):
        raise RuntimeError("the sample could not be made")
    files = sorted(source.glob("*.distcp"))
    module = "torch.distributed.checkpoint.format_utils"
    contenders = [
        Contender(races.OURS, command(source, out, "--quiet"), source, out),
        Contender(
            _THEIRS, [sys.executable, "-m", module, "dcp_to_torch", str(source), str(out)], source, out
        ),
        Contender("dd of a third of the files", races.dd(files, out, 1 / 3), source, out),
    ]
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    size = samples.size_of(source)
    remove(source)
    remove(out)
    meeting.unlink(missing_ok=True)
    return [
        races.section(
            "FSDP (torch.distributed.checkpoint) to safetensors",
            f"A Llama in F32 with its Adam moments on {_RANKS} ranks, {megabytes(size)}. torch's converter loads all of it, "
            "moments too, and writes one pickle; streamconv writes the weights, a third of it, as sharded safetensors.",
            contenders, measured, reference=_THEIRS, goal=_GOAL, options=options,
        )
    ]  # fmt: skip
