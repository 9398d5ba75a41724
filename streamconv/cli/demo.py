"""`streamconv demo`: make a sample, convert it, verify it, and race against `cp`, in a directory of its own."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

from streamconv.cli import convert, options
from streamconv.cli.text import duration, printable, show, size, talk
from streamconv.options.option import Option
from streamconv.options.records import ResourceOptions

DEFAULT_SIZE = "200MB"
SMALLEST = 1_000_000

_RUNS = 3
_VOCABULARY = 1024
_HEAD = 64
# Peak disk use: the sample, its conversion, and a copy in the race, with room to spare.
_ROOM = 4 * 1.1

# A scale that keeps the numbers like those of a trained model; the seed makes every sample the same.
_SCALE = 0.02
_SEED = 0
_BLOCK = 1 << 20


class SampleOptions(TypedDict, total=False):
    """The sample, and where it is made."""

    size: Annotated[
        str, Option(DEFAULT_SIZE, f"bytes of the sample, at least {size(SMALLEST)}", metavar="SIZE")
    ]
    keep: Annotated[
        str | None,
        Option(
            None,
            "work in DIR, which must not exist, and keep the sample and its conversion",
            otherwise="a temporary directory, removed at the end",
            metavar="DIR",
        ),
    ]


def run(arguments: Namespace) -> int:
    """Run all steps, and report."""
    from streamconv import api, shard
    from streamconv.errors import UsageError

    api.budget(**options.given(ResourceOptions, arguments))  # refuses before anything is made
    wanted = shard.parse_size(arguments.size)
    if wanted < SMALLEST:
        raise UsageError(
            f"--size {arguments.size} is too small for a model", hint=f"at least {size(SMALLEST)}"
        )
    with _workplace(arguments.keep, wanted) as place:
        sample, converted = place / "sample", place / "converted"
        talk(f"making a sample of {size(wanted)} in {printable(str(sample))}")
        write_sample(sample, fitting(wanted))
        words = [str(sample), str(converted), "--dtype", "BF16", "--verify"]
        words += ["--max-shard", str(max(wanted // 10, 1))]
        show(f"streamconv {shlex.join(words)}")
        convert.run(convert.COMMAND.parser("convert").parse_args(words, Namespace(**vars(arguments))))
        _race(sample, place, wanted, arguments)
    if arguments.keep:
        show(f"kept: {printable(str(sample))} and {printable(str(converted))}")
    return 0


def config_of(hidden: int, layers: int) -> dict[str, Any]:
    """The `config.json` of a Llama: a key head for four query heads, and feed-forward as wide as Llama rounds it."""
    heads = hidden // _HEAD
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": -(-hidden * 8 // 3 // 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    from streamconv.families.llama import LLAMA

    return {name: tensor.shape for name, tensor in LLAMA.tensors(LLAMA.sizes_of(config)).items()}


def fitting(wanted: int) -> dict[str, Any]:
    """The widest model of at least eight layers that has about `wanted` bytes in F32."""
    for hidden in (4096, 2048, 1024, 512, 256, 128, 64):
        without, one = (
            4 * sum(map(math.prod, shapes(config_of(hidden, layers)).values())) for layers in (0, 1)
        )
        layers = round((wanted - without) / (one - without))
        if layers >= 8 or hidden == 64:
            return config_of(hidden, max(layers, 1))
    raise AssertionError("the last width always fits")


def write_sample(directory: Path, config: Mapping[str, Any]) -> None:
    """Write a model of random numbers as `pytorch_model.bin` and `config.json`, in bounded memory."""
    import numpy
    import orjson

    from streamconv import dtypes
    from streamconv.execution import patches
    from streamconv.storage import writing
    from streamconv.storage.files import Files
    from streamconv.storage.location import locate
    from streamconv.tensor import TensorSpec
    from streamconv.writers import torch_zip
    from streamconv.writers.layout import About, Target

    directory.mkdir(parents=True)
    path = directory / "pytorch_model.bin"
    single = dtypes.by_name("F32")
    targets = [Target(TensorSpec(name, single, shape)) for name, shape in shapes(config).items()]
    layout = torch_zip.layout(targets, About(path.name))
    writing.create(locate(path), layout.size)
    random = numpy.random.default_rng(_SEED)
    with Files() as files:
        for literal in layout.literals:
            files.write(str(path), literal.data, literal.offset)
        for place in layout.placements:
            for start in range(0, place.length, _BLOCK):
                elements = min(_BLOCK, place.length - start) // single.itemsize
                block = random.standard_normal(elements, numpy.float32) * numpy.float32(_SCALE)
                files.write(str(path), block.data, place.offset + start)
    patches.apply(layout, str(path))
    (directory / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))


@contextmanager
def _workplace(keep: str | None, wanted: int) -> Iterator[Path]:
    """The directory to work in, on a disk with enough room; temporary unless it is to be kept."""
    from streamconv.errors import DestinationError
    from streamconv.running.destination import free_space

    place = Path(keep) if keep else Path(tempfile.gettempdir())
    if keep and place.exists():
        raise DestinationError("--keep names what exists already", file=keep, hint="name a new directory")
    needed, free = round(wanted * _ROOM), free_space(place)
    if free is not None and needed > free:
        raise DestinationError(
            f"{size(needed)} are needed on the disk, {size(free)} are free",
            file=str(place),
            hint="choose a smaller --size, or another disk with --keep (or TMPDIR)",
        )
    if keep:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="streamconv-demo-") as temporary:
        yield Path(temporary)


def _race(sample: Path, place: Path, wanted: int, arguments: Namespace) -> None:
    """Re-sharding, which only moves bytes, against `cp -r`, both until the data is on the disk."""
    from streamconv import api

    if shutil.which("cp") is None:
        show("cp is not installed here; nothing to compare with")
        return

    def reshard(target: Path) -> None:
        resources = options.given(ResourceOptions, arguments)
        api.convert(sample, target, max_shard=max(wanted // 5, 1), **resources)

    def copy(target: Path) -> None:
        subprocess.run(["cp", "-r", str(sample), str(target)], check=True)  # noqa: S603, S607 - the user's own cp
        os.sync()  # as streamconv also does: wait until every file is on the disk

    racers = {"re-sharding": reshard, "cp -r": copy}
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    for turn in range(_RUNS):
        talk(f"re-sharding against cp -r, turn {turn + 1} of {_RUNS}")
        # They take turns at going first, so that neither always has the quieter disk.
        for name in sorted(racers, reverse=bool(turn % 2)):
            seconds[name].append(_timed(racers[name], place / "race"))
    ours, theirs = (statistics.median(seconds[name]) for name in ("re-sharding", "cp -r"))
    show(
        f"speed    re-sharding took {duration(ours)}, cp -r {duration(theirs)}: {ours / theirs:.2f} times as long "
        f"(medians of {_RUNS}, in turn, both until the data was on the disk)"
    )


def _timed(racer: Callable[[Path], None], target: Path) -> float:
    """Seconds for one turn, once everything written before is on the disk."""
    os.sync()
    began = time.perf_counter()
    racer(target)
    taken = time.perf_counter() - began
    shutil.rmtree(target)
    return taken


COMMAND = options.Command(
    "make a sample, convert it, verify it, race against cp",
    "Make a sample checkpoint (a torch file of a small Llama in F32), convert it to safetensors in BF16, verify that,\n"
    f"then re-shard the sample and copy it with cp, {_RUNS} times each in turn, and compare. Needs {_ROOM:.1f} times\n"
    "the size on the disk.",
    {"sample": SampleOptions, **options.RESOURCES},
    run,
    defaults={"quiet": False, "log_json": False},
)
