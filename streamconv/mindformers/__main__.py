"""`python -m streamconv.mindformers`: the flags of MindFormers' `convert_weight.py`, for those who know them.

It prints the streamconv command that they stand for, and runs it. Where MindFormers writes one file, streamconv writes
a directory; the file that was asked for is a link to the one in it.

Source: mindspore-lab/mindformers: convert_weight.py of r1.3.0 to r1.8.0.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import orjson

from streamconv import api
from streamconv.cli import main as run
from streamconv.cli.text import show, talk
from streamconv.errors import StreamconvError, UsageError
from streamconv.readers import read_config_file

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

_TRUE = frozenset({"true", "1", "yes", "on"})
_UNNEEDED = {
    "telechat_type": "which TeleChat it is, its config and its tensors tell",
    "config": "MindFormers' YAML is not needed: sizes are taken from config.json",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line of MindFormers' converter and return an exit code as `streamconv` does."""
    parser = _parser()
    given = list(sys.argv[1:] if words is None else words)
    try:
        arguments, rest = parser.parse_known_args(given)
        switches, passed = _switches(rest)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    except UsageError as error:
        talk(f"streamconv.mindformers: error: {error}")
        return 2
    try:
        command, written, wanted = _command(arguments, switches, passed)
    except StreamconvError as error:
        talk(f"streamconv.mindformers: error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    show(f"streamconv {shlex.join(command)}")
    code = run(command)
    if code == 0 and wanted is not None and not wanted.exists():
        os.link(written, wanted)
        show(f"{wanted} is {written}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m streamconv.mindformers",
        description="MindFormers' convert_weight.py, by its own flags; prints the streamconv command that they stand for.",
        epilog="Further options go to streamconv as they are: --like HF_DIR, --max-shard, --memory, --overwrite ...",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--reversed", action="store_true", help="MindFormers to Hugging Face")
    parser.add_argument("--input_path", required=True, help="a directory, or a file in it")
    parser.add_argument("--output_path", required=True, help="a file (.ckpt), or a directory")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: that of the source")
    parser.add_argument("--n_head", type=int, help="of BLOOM, where no config says it")
    parser.add_argument("--hidden_size", type=int, help="of BLOOM, where no config says it")
    parser.add_argument("--layers", type=int, help="of GPT-2 and WizardCoder, where no config says it")
    parser.add_argument("--is_pretrain", help="Swin before finetuning")
    parser.add_argument("--telechat_type", help="not needed: config and tensors tell")
    return parser


def _switches(rest: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """MindFormers' further options, `--key value` or `--key=value` with an underscore, and those of streamconv."""
    switches: dict[str, str] = {}
    passed: list[str] = []
    known = {*_VARIANTS, *_UNNEEDED}
    words = iter(rest)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in known and not (key == "config" and value.endswith(".json")):
            switches[key] = value if equals else next(words, "")
        elif word.startswith("--") and "_" in key:
            raise UsageError(
                f"--{key} has no meaning here",
                hint=f"known: {', '.join(f'--{each}' for each in sorted(known))}",
            )
        else:
            passed.append(word)
    return switches, passed


def _command(
    arguments: argparse.Namespace, switches: dict[str, str], passed: list[str]
) -> tuple[list[str], Path, Path | None]:
    """The words of the streamconv command, the file that it writes, and the path that it is to have besides.

    Raises:
        UsageError: flags that are wrong, or contradict the config.
    """
    if arguments.model not in MODELS:
        raise UsageError(f"there is no model '{arguments.model}'", hint=f"known: {', '.join(MODELS)}")
    for key in ("is_pretrain", "telechat_type"):
        if getattr(arguments, key) is not None:
            switches[key] = getattr(arguments, key)
    for key in switches.keys() & _UNNEEDED.keys():
        talk(f"--{key}: {_UNNEEDED[key]}")
    source = _source(Path(arguments.input_path), backwards=not arguments.reversed)
    output = Path(arguments.output_path)
    destination = (
        output.with_suffix("")
        if output.suffix in (".ckpt", ".bin", ".pt", ".pth", ".safetensors")
        else output
    )
    options: list[str] = []
    if not arguments.reversed:
        options += ["--to", "mindspore"]
    elif output.suffix in (".bin", ".pt", ".pth"):
        options += ["--to", "torch"]
    if arguments.dtype:
        options += ["--dtype", arguments.dtype]
    config = _config(arguments, source, destination, passed)
    if config is not None:
        options += ["--config", str(config)]
    names = _recipes(arguments.model, switches)
    reading = {"reverse": not arguments.reversed, "config": config}
    recipe = _first_that_fits(source, names, reading, passed)
    command = [str(source), str(destination), "--recipe", recipe]
    if not arguments.reversed:
        command.append("--reverse")
    command += [*options, *passed]
    written = destination / ("pytorch_model.bin" if "torch" in options else "model.ckpt")
    return command, written, output if output != destination and "--to" in options else None


def _source(path: Path, *, backwards: bool) -> Path:
    """MindFormers often takes the directory of the path that it is given."""
    if backwards and not path.is_dir() and (path.parent / "config.json").is_file():
        return path.parent
    return path


def _recipes(model: str, switches: Mapping[str, str]) -> list[str]:
    names = list(MODELS[model])
    for switch, variants in _VARIANTS.items():
        if switches.get(switch, "").lower() in _TRUE:
            known = [variants[name] for name in names if name in variants]
            if not known:
                raise UsageError(f"--{switch} is not for --model {model}")
            names = known
    return [_PREFIX + name for name in names]


def _config(
    arguments: argparse.Namespace, source: Path, destination: Path, passed: Sequence[str]
) -> Path | None:
    """A config of the sizes that are given, where there is no other; where there is, they must agree.

    Raises:
        UsageError: they do not.
    """
    sizes = {
        key: getattr(arguments, flag)
        for flag, key in _SIZES.get(arguments.model, {}).items()
        if getattr(arguments, flag) is not None
    }
    like = next(
        (word for before, word in pairwise(passed) if before in ("--like", "--config")),
        None,
    )
    place = Path(like) if like else source if source.is_dir() else source.parent
    place = place / "config.json" if place.is_dir() else place
    if place.is_file():
        config = read_config_file(place)
        for key, value in sizes.items():
            said = config.get(key, config.get(_OTHER_NAMES[key]))
            if said is not None and said != value:
                raise UsageError(f"{key} is {said} in the config, and {value} is given", file=str(place))
        return None
    if not sizes:
        return None
    path = destination.with_name(destination.name + ".config.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(sizes))
    return path


def _first_that_fits(
    source: Path, names: Sequence[str], reading: Mapping[str, object], passed: Sequence[str]
) -> str:
    """The first recipe by which a plan checks; the first of all where none does, for its error to be told."""
    if len(names) == 1:
        return names[0]
    like = next((word for before, word in pairwise(passed) if before == "--like"), None)
    for name in names:
        try:
            api.plan(source, recipe=name, reverse=bool(reading["reverse"]), like=like)
        except StreamconvError:
            continue
        return name
    return names[0]


if __name__ == "__main__":
    sys.exit(main())
