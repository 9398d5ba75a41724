"""`streamconv demo`: make a sample, convert it, verify it, and race against `cp`, in a directory of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from streamconv.cli import convert, options
from streamconv.cli.text import duration, printable, show, size, talk
from streamconv.options import Option, ResourceOptions

SUMMARY = "make a sample, convert it, verify it, race against cp"

DEFAULT_SIZE = "200MB"
SMALLEST = 1_000_000

_RUNS = 3
_VOCABULARY = 1024
_HEAD = 64
# What lies on the disk at the worst moment: the sample, its conversion, and the two racers' copies. A tenth
# more is for the file system.
_ROOM = 4 * 1.1

# A scale that keeps the numbers like those of a trained model; the seed makes every sample the same.
_SCALE = 0.02
_SEED = 0
_BLOCK = 1 << 20


class SampleOptions(TypedDict, total=False):
    """What the demonstration works with."""

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


@dataclass(frozen=True, slots=True)
class Model:
    """The dimensions of a Llama of about a given size; `layers` fill what the embeddings leave."""

    hidden: int
    layers: int

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward part, as Llama rounds it."""
        return -(-self.hidden * 8 // 3 // 64) * 64

    @property
    def key_rows(self) -> int:
        """Rows of the key and value projections: a key head for four query heads."""
        return max(self.hidden // 4, _HEAD)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, as `LlamaForCausalLM` has them."""
        hidden, wide = self.hidden, self.intermediate
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (self.key_rows, hidden),
            "self_attn.v_proj.weight": (self.key_rows, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        return {
            "model.embed_tokens.weight": (_VOCABULARY, hidden),
            **{
                f"model.layers.{number}.{name}": shape
                for number in range(self.layers)
                for name, shape in layer.items()
            },
            "model.norm.weight": (hidden,),
            "lm_head.weight": (_VOCABULARY, hidden),
        }

    def config(self) -> dict[str, Any]:
        """The `config.json` that goes with it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // _HEAD,
            "num_key_value_heads": self.key_rows // _HEAD,
            "vocab_size": _VOCABULARY,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        }


def parser() -> ArgumentParser:
    """The command's options."""
    description = (
        "Make a sample checkpoint (a torch file of a small Llama in F32), convert it to safetensors in BF16, "
        f"verify that,\nthen re-shard the sample and copy it with cp, {_RUNS} times each in turn, and compare. "
        f"Needs {_ROOM:.1f} times\nthe size on the disk."
    )
    groups = {"sample": SampleOptions, **options.RESOURCES}
    made = options.command_parser("demo", description, options.READ_ONLY_CODES, groups)
    made.set_defaults(quiet=False, log_json=False)
    return made


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
        convert.run(convert.parser().parse_args(words, Namespace(**vars(arguments))))
        _race(sample, place, wanted, arguments)
    if arguments.keep:
        show(f"kept: {printable(str(sample))} and {printable(str(converted))}")
    return 0


def fitting(wanted: int) -> Model:
    """The widest model of at least eight layers that has about `wanted` bytes in F32."""
    for hidden in (4096, 2048, 1024, 512, 256, 128, 64):
        without, one = _bytes(Model(hidden, 0)), _bytes(Model(hidden, 1))
        layers = round((wanted - without) / (one - without))
        if layers >= 8 or hidden == 64:
            return Model(hidden, max(layers, 1))
    raise AssertionError("the last width always fits")


def write_sample(directory: Path, model: Model) -> None:
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
    targets = [Target(TensorSpec(name, single, shape)) for name, shape in model.shapes().items()]
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
    (directory / "config.json").write_bytes(orjson.dumps(model.config(), option=orjson.OPT_INDENT_2))


def _bytes(model: Model) -> int:
    import math

    return 4 * sum(map(math.prod, model.shapes().values()))


@contextmanager
def _workplace(keep: str | None, wanted: int) -> Iterator[Path]:
    """The directory to work in, on a disk with room; what is only for the race goes in any case."""
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

    racers: dict[str, Callable[[Path], None]] = {
        "re-sharding": reshard,
        "cp -r": lambda target: _copy(sample, target),
    }
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    for turn in range(_RUNS):
        talk(f"re-sharding against cp -r, turn {turn + 1} of {_RUNS}")
        # Who goes first changes, so that neither always finds the quieter disk.
        for name in sorted(racers, reverse=bool(turn % 2)):
            seconds[name].append(_timed(racers[name], place / "race"))
    ours, theirs = (statistics.median(seconds[name]) for name in ("re-sharding", "cp -r"))
    show(
        f"speed    re-sharding took {duration(ours)}, cp -r {duration(theirs)}: {ours / theirs:.2f} times as long "
        f"(medians of {_RUNS}, in turn, both until the data was on the disk)"
    )


def _timed(racer: Callable[[Path], None], target: Path) -> float:
    """Seconds for one turn, beginning with nothing left to be written from before."""
    os.sync()
    began = time.perf_counter()
    racer(target)
    taken = time.perf_counter() - began
    shutil.rmtree(target)
    return taken


def _copy(source: Path, target: Path) -> None:
    """`cp -r`, then what streamconv also does: wait until every file is on the disk."""
    from streamconv.storage import writing
    from streamconv.storage.location import locate

    subprocess.run(["cp", "-r", str(source), str(target)], check=True)  # noqa: S603, S607 - the user's own cp
    for path in sorted(target.rglob("*")):
        if path.is_file():
            writing.sync(locate(path))
    writing.sync(locate(target))
