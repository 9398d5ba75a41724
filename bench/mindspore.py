"""Hugging Face to MindSpore's `.ckpt` and back, against `cp` and MindSpore's own saving and loading of the same tensors."""

from __future__ import annotations

import importlib.util
import sys

from bench import races, samples
from bench.measure import Contender, race, remove, run
from bench.options import Options
from bench.options import streamconv as command
from bench.report import Section, megabytes


def mindspore(options: Options) -> list[Section]:
    """A Llama in BF16, there and back."""
    source, there, out = (options.directory / f"mindspore-{part}" for part in ("hf", "ms", "out"))
    size = samples.write_llama(source, options.size, "BF16", min(options.size, 5_000_000_000))
    forward = command(source, there, "--to", "mindspore", "--recipe", "auto", "--quiet")
    sections = []
    contenders = [
        Contender(races.OURS, forward, source, there),
        Contender("cp -r", ["cp", "-r", str(source), str(there)], source, there),
    ]
    if importlib.util.find_spec("mindspore") is not None:
        script = [sys.executable, "-m", "bench.baselines", "to-mindspore", str(source), str(there)]
        contenders.append(Contender("save_checkpoint", script, source, there))
    sections.append(_section("Hugging Face to MindSpore", contenders, size, options))
    remove(there)
    if run(forward, there).failure:
        raise RuntimeError("the sample could not be made")
    back = command(
        there / "model.ckpt",
        out,
        "--recipe",
        "mindformers-llama",
        "--config",
        source / "config.json",
        "--quiet",
    )
    contenders = [
        Contender(races.OURS, back, there, out),
        Contender("cp -r", ["cp", "-r", str(there), str(out)], there, out),
    ]
    if importlib.util.find_spec("mindspore") is not None:
        script = [
            sys.executable,
            "-m",
            "bench.baselines",
            "from-mindspore",
            str(there / "model.ckpt"),
            str(out),
        ]
        contenders.append(Contender("load_checkpoint", script, there, out))
    sections.append(_section("MindSpore to Hugging Face", contenders, size, options))
    for path in (source, there, out):
        remove(path)
    return sections


def _section(title: str, contenders: list[Contender], size: int, options: Options) -> Section:
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    return races.section(
        title,
        f"A Llama, {megabytes(size)} of BF16, the names of MindFormers. MindSpore's own functions only save and load the same "
        "tensors; MindFormers' converter loads the model with transformers besides.",
        contenders, measured, reference="cp -r", goal=None, options=options,
    )  # fmt: skip
