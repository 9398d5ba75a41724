"""`python -m streamconv.mindformers`: the flags of MindFormers' `convert_weight.py`, for those who know them.

It prints the streamconv command that they stand for, and runs it. Where MindFormers writes one file, streamconv writes
a directory; the file that was asked for is a link to the one in it.

Source: mindspore-lab/mindformers: convert_weight.py of r1.3.0 to r1.8.0.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from streamconv import api, cli
from streamconv.cli import convert, options
from streamconv.cli.text import show, talk
from streamconv.errors import DestinationError, StreamconvError, UsageError
from streamconv.options.records import PlanOptions, ReadingOptions
from streamconv.readers import read_config_file
from streamconv.readers.files import suffixes
from streamconv.shard import CKPT, SAFETENSORS, TORCH, Naming, shard_name

_PREFIX = "mindformers-"

MODELS: Mapping[str, tuple[str, ...]] = {
    "baichuan2": ("baichuan2",),
    "bloom": ("bloom",),
    "cogvlm2": ("cogvlm2-video", "cogvlm2-image"),
    "deepseek": ("deepseek", "deepseek-v2", "deepseek-v3"),
    "deepseek1_5": ("deepseek",),
    "deepseekv3": ("deepseek-v3",),
    "glm-n": ("glm-n",),
    "glm4": ("glm4-interleaved",),
    "gpt": ("gpt",),
    "internlm": ("internlm",),
    "internlm2": ("internlm2", "internlm2-split"),
    "llama": ("llama",),
    "mixtral": ("mixtral",),
    "qwen": ("qwen", "qwen2"),
    "qwen2": ("qwen2",),
    "qwen2-moe": ("qwen2-moe",),
    "qwen2_5": ("qwen2",),
    "qwen3": ("qwen3-interleaved",),
    "qwen3-moe": ("qwen3-moe-interleaved",),
    "qwenvl": ("qwenvl",),
    "swin": ("swin",),
    "telechat": ("telechat", "telechat-moe"),
    "whisper": ("whisper",),
    "wizardcoder": ("wizardcoder",),
    "yi": ("yi",),
}
"""What `--model` takes -> the recipes that it may stand for, of which the first that fits is taken."""

_VARIANTS: Mapping[str, Mapping[str, str]] = {
    "qkv_concat": {"llama": "llama-interleaved", "qwen2": "qwen2-interleaved", "telechat": "telechat-contiguous",
                   "qwenvl": "qwenvl-concat"},
    "use_qkv_concat": {"qwenvl": "qwenvl-concat"},
    "use_gmm": {"mixtral": "mixtral-gmm", "qwen2-moe": "qwen2-moe-gmm", "deepseek-v2": "deepseek-v2-gmm"},
    "is_pretrain": {"swin": "swin-pretrained"},
}  # fmt: skip
"""A switch -> recipe -> the one that it makes of it."""

_SIZES: Mapping[str, Mapping[str, str]] = {
    "bloom": {"n_head": "n_head", "hidden_size": "hidden_size"},
    "gpt": {"layers": "n_layer"},
    "wizardcoder": {"layers": "n_layer"},
}
"""Model -> a flag with a size -> what a config of Hugging Face calls it."""

# What MindFormers takes for BLOOM's config of one name, others have the other.
_OTHER_NAMES = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "hidden_size": "n_embed"}

_WRITTEN, _SIZES_FILE = shard_name(Naming(suffix=CKPT), 1, 1), ".config.json"
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_UNNEEDED = {
    "telechat_type": "the config and the tensors say which TeleChat it is",
    "config": "MindFormers' YAML is not needed: sizes are taken from config.json",
}


def _truth(text: str) -> bool:
    """`True` and `False`, as people spell them."""
    if text.lower() not in _TRUE | _FALSE:
        raise ArgumentTypeError(f"'{text}' is neither True nor False")
    return text.lower() in _TRUE


_FLAGS: Mapping[str, dict[str, Any]] = {
    "model": {"required": True, "metavar": "MODEL", "help": ", ".join(MODELS)},
    "reversed": {
        "nargs": "?",
        "const": True,
        "default": False,
        "type": _truth,
        "metavar": "True|False",
        "help": "MindFormers to Hugging Face",
    },
    "input_path": {"required": True, "help": "a directory, or a file in it"},
    "output_path": {"required": True, "help": "a file (.ckpt), or a directory"},
    "dtype": {"choices": ("fp32", "fp16", "bf16"), "help": "default: that of the source"},
    "n_head": {"type": int, "help": "of BLOOM, where no config says it"},
    "hidden_size": {"type": int, "help": "of BLOOM, where no config says it"},
    "layers": {"type": int, "help": "of GPT-2 and WizardCoder, where no config says it"},
    **{
        name: {"type": _truth, "metavar": "True|False", "help": "choose the recipe of such weights"}
        for name in _VARIANTS
    },
    **{name: {"help": f"ignored: {why}"} for name, why in _UNNEEDED.items()},
}
"""MindFormers' flags, as `argparse` takes them."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What a command line of MindFormers stands for.

    Attributes:
        commands: the words of streamconv commands that differ by the recipe, of which the first that fits is meant.
        written: the file that they write.
        wanted: the path that the file is to have besides, or None.
    """

    commands: tuple[tuple[str, ...], ...]
    written: Path
    wanted: Path | None


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line of MindFormers' converter and return an exit code as `streamconv` does."""
    given = list(sys.argv[1:] if words is None else words)
    try:
        job = _job(*_parser().parse_known_args(given))
        parsed = [cli.parse(command) for command in job.commands]
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    except StreamconvError as error:
        talk(f"streamconv.mindformers: error: {error}")
        return error.exit_code
    return cli.perform(partial(_run, job, parsed), parsed[0])


def _run(job: _Job, parsed: Sequence[Namespace], _: Namespace) -> int:
    """Convert by the first command whose plan checks; where none does, the error is that of the first."""
    if parsed[0].delete_source:
        raise UsageError(
            "--delete-source is for streamconv itself", hint=f"streamconv {shlex.join(job.commands[0])}"
        )
    opened = api.open(parsed[0].source, **options.given(ReadingOptions, parsed[0]))
    errors: list[StreamconvError] = []
    for command, arguments in zip(job.commands, parsed, strict=True):
        try:
            plan = api.plan(opened, arguments.destination, **options.given(PlanOptions, arguments))
        except StreamconvError as error:
            errors.append(error)
            continue
        show(f"streamconv {shlex.join(command)}")
        linked = _linked(job)
        code = convert.carry_out(plan, arguments)
        if code == 0 and job.wanted is not None and not (linked and job.wanted.samefile(job.written)):
            if linked:  # to what --overwrite has replaced
                job.wanted.unlink()
            os.link(job.written, job.wanted)
            show(f"{job.wanted} is {job.written}")
        return code
    raise errors[0]


def _linked(job: _Job) -> bool:
    """Whether the path that is wanted is the file that is written, as a run before has left it.

    Raises:
        DestinationError: it is something else.
    """
    if job.wanted is None or not os.path.lexists(job.wanted):
        return False
    if job.wanted.exists() and job.written.exists() and job.wanted.samefile(job.written):
        return True
    raise DestinationError("there is another file of this name", file=str(job.wanted), hint="move it away")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        allow_abbrev=False,
        prog="python -m streamconv.mindformers",
        description="MindFormers' convert_weight.py, by its own flags; prints the streamconv command that they stand for.",
        epilog="Further options go to streamconv as they are: --like HF_DIR, --max-shard, --memory, --overwrite ...",
    )
    for name, about in _FLAGS.items():
        parser.add_argument(f"--{name}", **about)
    return parser


def _job(arguments: Namespace, passed: list[str]) -> _Job:
    """What the flags stand for.

    Raises:
        UsageError: flags that are wrong, or contradict the config.
    """
    strange = next((word for word in passed if word.startswith("--") and "_" in word.partition("=")[0]), None)
    if strange is not None:
        known = ", ".join(f"--{each}" for each in _FLAGS)
        raise UsageError(f"{strange} has no meaning here", hint=f"known: {known}")
    if arguments.model not in MODELS:
        raise UsageError(f"there is no model '{arguments.model}'", hint=f"known: {', '.join(MODELS)}")
    if (arguments.config or "").endswith(".json"):
        passed += ["--config", arguments.config]
        arguments.config = None
    for name, why in _UNNEEDED.items():
        if getattr(arguments, name) is not None:
            talk(f"--{name}: {why}")
    source = _source(Path(arguments.input_path), backwards=not arguments.reversed)
    output = Path(arguments.output_path)
    destination = output.with_suffix("") if output.suffix in suffixes() else output
    direction = () if arguments.reversed else ("--reverse",)
    to = () if arguments.reversed else ("--to", "mindspore")
    suffix = output.suffix if arguments.reversed else ""
    if suffix in (".bin", ".pt", ".pth"):
        to = ("--to", "torch")
    dtype = ("--dtype", arguments.dtype) if arguments.dtype else ()
    common = (*to, *dtype, *_config(arguments, source, destination, passed), *passed)
    commands = tuple(
        (str(source), str(destination), "--recipe", recipe, *direction, *common)
        for recipe in _recipes(arguments)
    )
    name = shard_name(Naming(suffix=TORCH if "torch" in to else SAFETENSORS), 1, 1) if suffix else _WRITTEN
    named = output != destination and (to or suffix == SAFETENSORS)
    return _Job(commands, destination / name, output if named else None)


def _source(path: Path, *, backwards: bool) -> Path:
    """The directory of the path that is given, as MindFormers often takes it; of our own file, that it is a link to."""
    written = path.with_suffix("")
    if (
        not backwards
        and path.is_file()
        and (written / _WRITTEN).is_file()
        and path.samefile(written / _WRITTEN)
    ):
        return written
    if backwards and not path.is_dir() and (path.parent / "config.json").is_file():
        return path.parent
    return path


def _recipes(arguments: Namespace) -> list[str]:
    names = list(MODELS[arguments.model])
    for switch, variants in _VARIANTS.items():
        if getattr(arguments, switch):
            known = [variants[name] for name in names if name in variants]
            if not known:
                raise UsageError(f"--{switch} is not for --model {arguments.model}")
            names = known
    return [_PREFIX + name for name in names]


def _config(arguments: Namespace, source: Path, destination: Path, passed: Sequence[str]) -> tuple[str, ...]:
    """The option for a config of the sizes that are given, where there is no other; where there is, they must agree.

    Raises:
        UsageError: they do not.
    """
    sizes = {
        key: getattr(arguments, flag)
        for flag, key in _SIZES.get(arguments.model, {}).items()
        if getattr(arguments, flag) is not None
    }
    parsed = cli.parse([str(source), str(destination), *passed])
    beside = source if source.is_dir() else source.parent
    # What a conversion of our own has written for a file of this name: a directory, or the sizes that were given.
    own = [source.with_suffix("") / "config.json", source.with_suffix(_SIZES_FILE)] * source.is_file()
    given = parsed.like or parsed.config
    places = [Path(given)] if given else [beside, *own]
    found = (place / "config.json" if place.is_dir() else place for place in places)
    place = next((each for each in found if each.is_file()), None)
    if place is not None:
        config = read_config_file(place)
        for key, value in sizes.items():
            said = config.get(key, config.get(_OTHER_NAMES[key]))
            if said is not None and said != value:
                raise UsageError(f"{key} is {said} in the config, and {value} is given", file=str(place))
        return ("--config", str(place)) if place in own else ()
    if not sizes:
        return ()
    path = destination.with_name(destination.name + _SIZES_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(sizes))
    return ("--config", str(path))


if __name__ == "__main__":
    sys.exit(main())
