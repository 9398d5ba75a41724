"""Training runs of DeepSpeed to safetensors, against its own `zero_to_fp32`; memory as they grow; a thousand ranks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from math import prod

from bench import races, samples
from bench.deepspeed_layout import Layout, Shape, fill, write
from bench.measure import Contender, race, remove, run
from bench.options import Options
from bench.options import streamconv as command
from bench.report import Section, megabytes

_GOAL = 0.35
_MEMORY_GOAL = 0.1
_RANKS = 2
_MANY = 1024
_GROWTH = (1, 3, 10)
_PLAN = """
import sys, time
began = time.monotonic()
import streamconv
plan = streamconv.plan(sys.argv[1])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(len(plan.tensors), time.monotonic() - began, peak)
"""


def deepspeed(options: Options) -> list[Section]:
    """ZeRO 2 and 3 of a Llama whose F32 weights have the wanted size."""
    races_run = [_race(options, stage, dtype) for stage in (2, 3) for dtype in ("F32", "BF16")]
    return [*races_run, _growth(options), _thousand(options)]


def _race(options: Options, stage: int, dtype: str) -> Section:
    source, out = options.directory / "deepspeed-source", options.directory / "deepspeed-out"
    shapes = _shapes(options.size)
    tag = write(source, Layout(shapes, stage, _RANKS))
    size = fill(tag)
    cast = ("--dtype", dtype) if dtype != "F32" else ()
    theirs = [
        sys.executable,
        "-m",
        "deepspeed.utils.zero_to_fp32",
        str(source),
        str(out),
        "--safe_serialization",
    ]
    name = "zero_to_fp32"
    if dtype != "F32":
        theirs = [sys.executable, "-m", "deepspeed.utils.zero_to_torch", str(source), str(out),
                  "--safe_serialization", "--dtype", "bf16"]  # fmt: skip
        name = "zero_to_torch --dtype bf16"
    contenders = [Contender(races.OURS, command(source, out, "--quiet", *cast), source, out)]
    if importlib.util.find_spec("deepspeed") is not None:
        contenders.append(Contender(name, theirs, source, out))
    weights = sorted(tag.glob("*optim_states.pt"))
    share = 1 / 3 if dtype == "F32" else 1 / 6
    contenders.append(
        Contender(f"dd of {share:.0%} of the optimizer's files", races.dd(weights, out, share), source, out)
    )
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    remove(source)
    remove(out)
    return races.section(
        f"DeepSpeed, ZeRO {stage}, to {dtype}",
        f"A Llama of {sum(map(prod, shapes.values())) / 1e6:.0f} million parameters on {_RANKS} ranks, "
        f"{megabytes(size)}, in DeepSpeed's layout. Goal: at most {_GOAL} of the time of DeepSpeed's program, and "
        f"{_MEMORY_GOAL} of its memory. What is written is a third of what the optimizer's files hold "
        "(a sixth in BF16): `dd` copies as many bytes.",
        contenders, measured, reference=contenders[1].name, goal=_GOAL, options=options,
    )  # fmt: skip


def _growth(options: Options) -> Section:
    """Peak memory as the model grows. The files are holes, which read as zeros."""
    rows = []
    for factor in _GROWTH:
        for stage in (2, 3):
            source, out = options.directory / "deepspeed-hollow", options.directory / "deepspeed-grown"
            shapes = _shapes(options.size * factor)
            write(source, Layout(shapes, stage, _RANKS))
            found = run(command(source, out, "--dtype", "BF16", "--quiet", "--memory", "256MiB"), out)
            if found.failure:
                raise RuntimeError(found.failure)
            count = sum(map(prod, shapes.values()))
            rows.append(
                [f"{stage}", f"{count / 1e6:,.0f} million", megabytes(2 * count), megabytes(found.anonymous)]
            )
            remove(source)
            remove(out)
    return Section(
        "Memory of gathering ZeRO partitions",
        "Peak of anonymous memory of all processes, with `--memory 256MiB`, to BF16.",
        ["stage", "parameters", "output", "peak"],
        rows,
    )


def _thousand(options: Options) -> Section:
    source = options.directory / "deepspeed-thousand"
    shapes = {
        f"layers.{layer}.{name}.weight": shape
        for layer in range(222)
        for name, shape in (
            ("q", (8192, 8192)), ("k", (1024, 8192)), ("v", (1024, 8192)), ("o", (8192, 8192)),
            ("gate", (28672, 8192)), ("up", (28672, 8192)), ("down", (8192, 28672)), ("norm", (8192,)), ("next", (8192,)),
        )
    } | {"embed.weight": (128256, 8192), "head.weight": (128256, 8192)}  # fmt: skip
    write(source, Layout(shapes, 3, _MANY))
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(source)], check=True, capture_output=True, text=True
    )
    tensors, seconds, peak = done.stdout.split()
    remove(source)
    return Section(
        "Planning ZeRO 3 of a thousand ranks",
        f"{len(shapes):,} parameters, {sum(map(prod, shapes.values())) / 1e9:.0f} billion numbers, {_MANY:,} ranks; "
        "holes for data. Goal: under 60 s.",
        ["tensors", "pieces", "time", "resident memory"],
        [[tensors, f"{int(tensors) * _MANY:,}", f"{float(seconds):.0f} s", megabytes(float(peak))]],
    )


def _shapes(size: int) -> Mapping[str, Shape]:
    return dict(samples.llama_of(size, "F32").tensors())
