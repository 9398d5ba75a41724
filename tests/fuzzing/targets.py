"""What is fuzzed: seeds, which of their files are changed, what is done with a mutant, and what must hold then."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import streamconv
from streamconv.cli import main
from streamconv.errors import StreamconvError
from streamconv.families.tokenizers import chatglm, plain
from streamconv.families.tokenizers import qwen as qwen_tokenizer
from streamconv.ops import leaves
from streamconv.plans import formula, patterns
from streamconv.plans.functions import FUNCTIONS
from streamconv.plans.table import table
from tests.fuzzing import seeds
from tests.fuzzing.limits import Finding, bounded

MOST = 1 << 20
"""Bytes that are read or converted of a mutant, which may say that it has more."""

Check = Callable[[Path, Path, Random], bool]
"""A mutant's directory, one for outputs, a chooser -> whether it was accepted. Raises our own errors, or a Finding."""


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the table that a run prints."""

    check: Check
    seeds: Sequence[seeds.Seed]
    changed: str = ""
    """Which files are mutated, by their path; all of them where it is empty."""
    writes: bool = False
    """Whether the check changes what it is given."""


# ---------------------------------------------------------------------------------------------------- checkpoints


def reading(*choices: Mapping[str, Any]) -> Check:
    """Open, look at, plan, and now and then convert and verify, with one of several sets of options."""

    def check(work: Path, out: Path, chooser: Random) -> bool:
        options = dict(chooser.choice(({}, *choices)))
        path = work
        if chooser.random() < 0.1:
            path = chooser.choice([each for each in work.rglob("*") if each.is_file()] or [work])
        size = sum(each.stat().st_size for each in work.rglob("*") if each.is_file())
        shown = chooser.random()
        if shown < 0.05:
            with bounded(size):
                return _shown("inspect", str(path))
        with bounded(size):
            opened = streamconv.open(
                path, **{key: value for key, value in options.items() if key not in PLANNING}
            )
            _within_files(opened)
        with bounded(size):
            plan = streamconv.plan(path, **options)
        if shown > 0.8 and plan.bytes_to_write < MOST:
            _converted(path, out, options)
        else:
            _read(opened)
        return True

    return check


PLANNING = {"to_arch", "to", "dtype", "max_shard"}
"""Options that are not of reading."""


def _within_files(opened: streamconv.OpenCheckpoint) -> None:
    """Every byte of every tensor lies in a file of the checkpoint."""
    sizes: dict[str, int] = {}
    for name, expression in opened.contents.items():
        for leaf in leaves(expression):
            for extent in leaf.extents:
                size = sizes.setdefault(extent.file, Path(extent.file).stat().st_size)
                if extent.offset < 0 or extent.offset + extent.length > size:
                    raise Finding("outside of its file", f"{name}: {extent}, of {size} bytes")


def _read(opened: streamconv.OpenCheckpoint) -> None:
    for name in list(opened)[:8]:
        tensor = opened[name]
        if not tensor.spec.dtype.packed and tensor.spec.nbytes < MOST:
            with bounded(MOST):
                read = tensor.numpy()
            if read.shape != tensor.shape:
                raise Finding("another shape", f"{name}: {read.shape} of {tensor.shape}")


def _converted(path: Path, out: Path, options: Mapping[str, Any]) -> None:
    with bounded(MOST):
        streamconv.convert(path, out, engine="inline", memory_budget="64MiB", **options)
        found = streamconv.verify(path, out, engine="inline", memory_budget="64MiB", **options)
    if found.problems:
        raise Finding("not what was planned", str(found.problems[0]))


def _shown(*words: str) -> bool:
    """Whether a command of the command line succeeds. It must end as its contract says."""
    code = main([*words, "--quiet"] if words[0] == "convert" else list(words))
    if code not in (0, 1, 2):
        raise Finding("exit code", f"{code} of {words}")
    return code == 0


# ------------------------------------------------------------------------------------------- tokenizers, recipes


def tokenizing(work: Path, _: Path, chooser: Random) -> bool:
    """What is made of a tokenizer's files."""
    accepted = False
    for path in work.glob("*.*"):
        data = path.read_bytes()
        if path.suffix == ".json":
            continue
        with bounded(len(data)), contextlib.suppress(StreamconvError):
            if path.suffix == ".tiktoken":
                qwen_tokenizer.convert(data, path.name, 2048)
            accepted = True
        with bounded(len(data)), contextlib.suppress(StreamconvError):
            chatglm.convert(data, path.name, 65024, 2048, 2)
            accepted = True
        settings: Any = {}
        with contextlib.suppress(ValueError, OSError):
            settings = json.loads((work / "settings.json").read_bytes())
        if isinstance(settings, dict) and path.suffix == ".model":
            with bounded(len(data)), contextlib.suppress(StreamconvError):
                plain.convert(data, path.name, settings, settings)
                accepted = True
    return accepted


def with_recipe(work: Path, out: Path, chooser: Random) -> bool:
    """Plan with a recipe, or a file of edits."""
    file = work / chooser.choice(("recipe.toml", "recipe.toml", "edits.toml"))
    with bounded(file.stat().st_size if file.is_file() else 0):
        plan = streamconv.plan(work, recipe=str(file), reverse=chooser.random() < 0.2)
    if chooser.random() < 0.2 and plan.bytes_to_write < MOST:
        with bounded(MOST):
            streamconv.convert(work, out, recipe=str(file), engine="inline", memory_budget="64MiB")
    return True


def language(work: Path, _: Path, chooser: Random) -> bool:
    """Formulas, programs, patterns and tables, one a line, over the keys of a config."""
    accepted = False
    if not (work / "lines.txt").is_file():
        return False
    names = {
        "n": 4,
        "x": [1, 2, 3],
        "s": "text",
        "d": {"k": [1]},
        "f": 0.5,
        "hidden": 8,
        "heads": 2,
        "none": None,
    }
    for line in (work / "lines.txt").read_text(errors="replace").split("\n")[:40]:
        for use in (
            lambda text: formula.evaluate(text, names),
            lambda text: formula.run(text, names, {}),
            lambda text: formula.check_program(text, names, FUNCTIONS),
            lambda text: formula.substituted(text, {"n": "heads + 1"}),
            lambda text: (
                patterns.Pattern.parse(text) if hasattr(patterns.Pattern, "parse") else patterns.Pattern(text)
            ),
            table,
        ):
            with bounded(len(line)), contextlib.suppress(StreamconvError):
                use(line)
                accepted = True
    return accepted


# ------------------------------------------------------------------------------------------------ files of ours


def state(work: Path, _: Path, chooser: Random) -> bool:
    """Go on, verify and look with damaged files of ours; `overwrite` and `restart` make all well again."""
    source, out = work / "source", work / "out"
    model = {path.name: path.read_bytes() for path in source.iterdir()}
    outside = work / "outside.txt"
    outside.write_text("stays")
    accepted = False
    ranks = (out / "rank_0").exists()
    options: dict[str, Any] = {"to": "mindspore", "tp": 2} if ranks else {"dtype": "BF16", "max_shard": 100}
    for use in chooser.sample(
        (
            lambda: streamconv.verify(out, engine="inline"),
            lambda: streamconv.verify(out, headers=True),
            lambda: streamconv.verify(source, out, engine="inline"),
            lambda: streamconv.open(out),
            lambda: streamconv.convert(source, out, engine="inline", memory_budget="64MiB", **options),
        ),
        2,
    ):
        with bounded(MOST), contextlib.suppress(StreamconvError):
            use()
            accepted = True
    with bounded(MOST):
        streamconv.convert(
            source, out, engine="inline", memory_budget="64MiB", restart=True, overwrite=True, **options
        )
        found = streamconv.verify(source, out, engine="inline", **options)
    if found.problems:
        raise Finding("not made well by --restart --overwrite", str(found.problems[0]))
    if outside.read_text() != "stays" or {path.name: path.read_bytes() for path in source.iterdir()} != model:
        raise Finding("the source changed", str(source))
    return accepted


def deleted(work: Path, _: Path, chooser: Random) -> bool:
    """Go on, look and start over where files of a source are deleted: what they held stays, whatever files of ours say."""
    source, out, other = work / "source", work / "out", work / "other"
    accepted = False
    for use, goal in chooser.sample(
        (
            (lambda: streamconv.convert(source, out, delete_source=True, **SHARDED), out),
            (lambda: streamconv.convert(source, out, **SHARDED), out),
            (lambda: streamconv.convert(source, out, delete_source=True, restart=True, overwrite=True, **SHARDED), out),
            (lambda: streamconv.convert(source, out, overwrite=True, dtype="BF16", engine="inline"), None),
            (lambda: streamconv.convert(source, other, **SHARDED), other),
            (lambda: streamconv.verify(out, engine="inline"), None),
            (lambda: streamconv.verify(source, out, engine="inline"), None),
            (lambda: streamconv.open(out), None),
        ),
        3,
    ):  # fmt: skip
        try:
            with bounded(MOST), seeds.small_steps():
                use()
        except StreamconvError:
            goal = None
        else:
            accepted = True
        _nothing_is_lost(source, out)
        if goal:
            _whole(goal)
    return accepted


SHARDED: Mapping[str, Any] = {"max_shard": 300, "engine": "inline", "memory_budget": "64MiB"}
"""Options of a conversion that copies bytes as they are."""


def _nothing_is_lost(source: Path, out: Path) -> None:
    """Every tensor of a file that is not in the source any more is in the destination, under whatever name."""
    held = [path.read_bytes() for path in out.glob("*.safetensors*")]
    for file, tensors in seeds.shards().items():
        for name, tensor in tensors.items():
            data = tensor.numpy().tobytes()
            at_home = (source / file).is_file() and (source / file).read_bytes().endswith(data)
            if not at_home and not any(data in each for each in held):
                raise Finding("a tensor is lost", f"{name} of {file}")


def _whole(goal: Path) -> None:
    """A conversion that says that it has ended has every tensor."""
    opened = streamconv.open(goal)
    for tensors in seeds.shards().values():
        for name, tensor in tensors.items():
            if name not in opened or opened[name].numpy().tobytes() != tensor.numpy().tobytes():
                raise Finding("not what was planned", name)


def lines(place: Path) -> None:
    """Lines of the small languages."""
    (place / "lines.txt").write_text(
        "\n".join(
            (
                "hidden // heads if n > 2 else max(1, n)", "2 ** n * hidden % 7 - -1", "d['k'][0] + len(x)", "n in [1, 4] and not none",
                "a = n + 1", "q, k, v = x", "q, k, v = chunk(x, 0, 3)", "w = transpose(reshape(x, [heads, hidden // heads, n]), 0, 1)",
                "layers.{i}.attn.{q,k,v}_proj.weight [hidden, 3 * heads]", "?h.{i}.inv_freq [hidden // heads // 2]",
                "experts.{0..7}.w{1,2}.weight", "min(9, 8) or s", "'a' not in s", "bool(f) and int(f * 4)",
            )
        )
    )  # fmt: skip


TARGETS: Mapping[str, Target] = {
    "safetensors": Target(reading({"dtype": "BF16"}, {"to": "torch"}), (seeds.safetensors_file,)),
    "index": Target(reading({"max_shard": 100}), (seeds.safetensors_index, seeds.bin_index)),
    "torch-zip": Target(
        reading({"ema": True}, {"optimizer": True}, {"root": "model"}),
        (seeds.torch_zip, seeds.torch_training, seeds.torch_protocol_4),
    ),
    "torch-legacy": Target(reading({"root": "model"}), (seeds.torch_legacy, seeds.torch_legacy_training)),
    "numpy": Target(reading(), (seeds.numpy_arrays,)),
    "deepspeed": Target(
        reading({"optimizer": True}, {"weights": "model"}),
        (seeds.zero_2, seeds.zero_3, seeds.zero_pipeline, seeds.universal),
    ),
    "dcp": Target(
        reading({"optimizer": True}, {"root": "model"}),
        (seeds.distributed, seeds.distributed_safetensors, seeds.rank_files),
    ),
    "sat": Target(reading({"ema": True}), (seeds.sat,)),
    "mindspore": Target(
        reading({"optimizer": True}),
        (seeds.mindspore_ckpt, seeds.mindspore_safetensors, seeds.mindspore_sharded),
    ),
    "mindspore-ranks": Target(
        reading(), (seeds.mindspore_ranks, seeds.mindspore_safetensors_ranks, seeds.mindspore_strategies)
    ),
    "strategies": Target(reading(), (seeds.mindspore_strategies, seeds.mindspore_ranks), r"strategy"),
    "diffusers": Target(reading(), (seeds.pipeline,)),
    "sentence-transformers": Target(reading(), (seeds.sentence_transformers,)),
    "configs": Target(
        reading({"to_arch": "llama"}, {"to_arch": "hf"}, {"to_arch": "qwen2"}, {"to_arch": "mindformers"}),
        (
            seeds.chatglm_model,
            seeds.baichuan_model,
            seeds.internlm2_model,
            seeds.qwen_model,
            seeds.llama_model,
        ),
        r"\.json$",
    ),
    "tokenizers": Target(tokenizing, (seeds.tokenizers,)),
    "model-tokenizers": Target(
        reading({"to_arch": "llama"}),
        (seeds.chatglm_model, seeds.baichuan_model, seeds.qwen_model, seeds.llama_model),
        r"token",
    ),
    "recipes": Target(with_recipe, (seeds.recipe,), r"toml$|config"),
    "language": Target(language, (lines,)),
    "plan": Target(state, (seeds.unfinished,), r"plan\.json$", writes=True),
    "journal": Target(state, (seeds.unfinished,), r"journal$", writes=True),
    "record": Target(state, (seeds.finished, seeds.finished_ranks), r"conversion\.json$", writes=True),
    "deleted": Target(
        deleted,
        (seeds.half_deleted, seeds.deleted),
        r"^out/\.streamconv/|/\.streamconv-deleted$",
        writes=True,
    ),
    "state": Target(state, (seeds.unfinished, seeds.finished), r"^out/", writes=True),
}


def is_changed(target: Target, path: str) -> bool:
    """Whether a file of a seed is one to mutate."""
    return re.search(target.changed, path) is not None


def clear(directory: Path) -> None:
    """Remove what a check left."""
    shutil.rmtree(directory, ignore_errors=True)
