"""CogVLM of SAT to Hugging Face, from one model-parallel rank and from four, against `cp` and the usual script."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy

import streamconv
from bench import races
from bench.measure import Contender, race, remove
from bench.options import Options
from bench.options import streamconv as command
from bench.report import Section, megabytes
from streamconv import dtypes
from streamconv.families.cogvlm import SAT_COGVLM
from streamconv.families.splits import SAT
from streamconv.readers.splits import WHOLE
from streamconv.tensor import TensorSpec
from streamconv.writers import torch_zip
from streamconv.writers.layout import About, FileLayout, Target, Wrapping

_EVA = {
    "num_layers": 63, "hidden_size": 1792, "num_attention_heads": 16, "inner_hidden_size": 15360, "in_channels": 3,
    "patch_size": 14, "max_sequence_length": 1226, "layernorm_epsilon": 1e-6, "image_size": [490, 490],
}  # fmt: skip
_CONFIG = {
    "model_class": "CogVLMModel", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000,
    "inner_hidden_size": 11008, "eva_args": _EVA,
}  # fmt: skip
_LAYER_BYTES = 790_000_000  # of one language layer, both experts, in BF16
_BLOCK = 16 << 20


def sat(options: Options) -> list[Section]:
    """The run on samples of the wanted size, and the plan of the published one."""
    return [_run(options, ranks) for ranks in (1, 4)] + [_plan(options)]


def _run(options: Options, ranks: int) -> Section:
    source, out = options.directory / "sat-source", options.directory / "sat-out"
    layers = max(options.size // _LAYER_BYTES, 1)
    config = {**_CONFIG, "num_layers": layers, "eva_args": {**_EVA, "num_layers": 2}}
    size = _write(source, config, ranks, filled=True)
    script = [sys.executable, "-m", "bench.baselines", "sat", str(source), str(out)]
    contenders = [
        Contender(races.OURS, command(source, out, "--recipe", "sat-cogvlm", "--quiet"), source, out),
        Contender("cp -r", ["cp", "-r", str(source), str(out)], source, out),
        Contender("torch.load, rename, torch.save", script, source, out),
    ]
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    remove(source)
    remove(out)
    return races.section(
        f"CogVLM of SAT, {ranks} model-parallel rank{'s' if ranks > 1 else ''}",
        f"CogVLM-17B's shapes, language layers: {layers}, {megabytes(size)} of BF16. The script loads all ranks, joins "
        "and renames their tensors, and saves them; SAT's own merge needs a process and a GPU for each rank besides.",
        contenders, measured, reference="cp -r", goal=None, options=options,
    )  # fmt: skip


def _plan(options: Options) -> Section:
    """All 35 GB of the published model as holes."""
    rows = []
    for ranks in (1, 8):
        source = options.directory / "sat-hollow"
        size = _write(source, _CONFIG, ranks, filled=False)
        began = time.monotonic()
        plan = streamconv.plan(source, recipe="sat-cogvlm")
        seconds = time.monotonic() - began
        rows.append([f"{ranks}", megabytes(size), f"{len(plan.tensors):,}", f"{seconds:.1f} s"])
        remove(source)
    return Section(
        "Planning CogVLM-17B of SAT",
        "Whole archives, and holes for data.",
        ["ranks", "size", "tensors", "time"],
        rows,
    )


def _write(directory: Path, config: dict[str, Any], ranks: int, *, filled: bool) -> int:
    """A SAT checkpoint with random contents, or none; returns its bytes."""
    (directory / "1").mkdir(parents=True)
    (directory / "latest").write_text("1")
    (directory / "model_config.json").write_text(json.dumps({**config, "model_parallel_size": ranks}))
    block = (
        (numpy.random.default_rng(0).standard_normal(_BLOCK // 4, numpy.float32) * numpy.float32(0.02))
        .view(numpy.uint16)[1::2]
        .tobytes()
    )
    table = SAT_COGVLM.tensors(SAT_COGVLM.sizes_of(config))
    targets = [
        Target(TensorSpec(name, dtypes.by_name("BF16"), _part(name, declared.shape, ranks)))
        for name, declared in table.items()
        if not declared.optional
    ]
    total = 0
    for rank in range(ranks):
        name = f"mp_rank_{rank:02d}_model_states.pt"
        layout = torch_zip.layout(targets, About(name, wrapping=Wrapping(name, "module")))
        _fill(directory / "1" / name, layout, block if filled else b"")
        total += layout.size
    return total


def _part(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The shape of one rank's part."""
    sharding = SAT.sharding(name) or WHOLE
    if not sharding.cuts(shape):
        return shape
    return tuple(size // ranks if axis == sharding.axis else size for axis, size in enumerate(shape))


def _fill(path: Path, layout: FileLayout, block: bytes) -> None:
    """A file of this layout; its checksums are left wrong, which no reader of tensors looks at."""
    with path.open("wb") as file:
        file.truncate(layout.size)
        for literal in layout.literals:
            file.seek(literal.offset)
            file.write(literal.data)
        for place in layout.placements if block else ():
            file.seek(place.offset)
            for start in range(0, place.length, len(block)):
                file.write(block[: place.length - start])
