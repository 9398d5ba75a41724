"""Options that commands share, as parents for `argparse`.

Options of the plan are absent from the parsed arguments unless they are given: the library's own defaults
hold, and `verify` can tell whether the plan was spelled out. Defaults that help texts name are the library's;
importing it only to print them would take most of the time that `--help` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamconv.writers.formats import FORMATS

ENGINES = ("local", "inline")

DEFAULT_MAX_SHARD = "5GB"
DEFAULT_MEMORY = "1GiB"

_FORMATS_TO_COME = ("dcp", "megatron")
_ENGINES_TO_COME = ("ray", "slurm")

READING_ARGUMENTS = ("root", "ema", "weights", "optimizer", "source_strategy")
"""Options of the plan that also opening a checkpoint takes."""

_PLAN_ARGUMENTS = (
    "to",
    "max_shard",
    "tp",
    "root",
    "ema",
    "weights",
    "optimizer",
    "source_strategy",
    "pp",
    "strategy",
    "crc",
    "lora",
    "lora_scale",
    "recipe",
    "to_arch",
    "reverse",
    "config",
    "like",
    "allow_unmatched",
    "pad_vocab",
    "resize_vocab",
    "vocab_fill",
    "rename",
    "drop",
    "only",
    "dtype",
    "tied",
    "side_files",
)

_ROOT = "where the state dict lies in a torch file, as a dotted path (default: found by looking)"

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "the conversion or verification failed; what is finished is kept",
    2: "the call or its input is wrong; nothing was written",
    130: "interrupted; the same command goes on",
}

READ_ONLY_CODES: Mapping[int, str] = {
    0: "done",
    1: "it failed",
    2: "the call or its input is wrong",
    130: "interrupted",
}


def command_parser(
    name: str,
    description: str,
    codes: Mapping[int, str],
    parents: Sequence[argparse.ArgumentParser] = (),
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """A parser for one command, whose help ends with the exit codes."""
    made = argparse.ArgumentParser(
        prog=f"streamconv {name}",
        usage=usage,
        description=description,
        epilog=exit_codes(codes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[*parents, _debugging()],
        allow_abbrev=False,
    )
    made.set_defaults(resumable=False)
    return made


def exit_codes(codes: Mapping[int, str]) -> str:
    """What a help text ends with."""
    return "exit codes:" + "".join(f"\n  {code:<4} {meaning}" for code, meaning in codes.items())


def planning() -> argparse.ArgumentParser:
    """Options that decide what the output is."""
    parent = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parent.add_argument_group("what to write")
    group.add_argument(
        "--to",
        type=_known("format", tuple(FORMATS), _FORMATS_TO_COME),
        metavar="FORMAT",
        help=f"file format of the output: {', '.join(FORMATS)} (default: {next(iter(FORMATS))})",
    )
    group.add_argument(
        "--max-shard",
        metavar="SIZE",
        help="most bytes of tensors in one output file, in units of Hugging Face (5GB, 500MB) or powers of 1024 "
        f"(4GiB); no unit means bytes (default: {DEFAULT_MAX_SHARD})",
    )
    group.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="with --to sat or mindspore: model-parallel ranks, a file each (default: 1)",
    )
    group.add_argument(
        "--pp", type=int, metavar="N", help="with --to mindspore: stages of a pipeline (default: 1)"
    )
    group.add_argument(
        "--strategy",
        metavar="FILE",
        help="with --to mindspore: the strategy file that says how the output is split among ranks (default: by --tp "
        "and --pp)",
    )
    group.add_argument(
        "--crc",
        action="store_true",
        help="with --to mindspore: end the file with MindSpore's checksum (default: no)",
    )
    group.add_argument(
        "--dtype",
        action="append",
        metavar="DTYPE|PATTERN=DTYPE",
        help="cast floating-point tensors to BF16, F16, F32, ... (bf16, bfloat16, fp32 mean the same); "
        "with a pattern, only target names that match; may be repeated (default: as in the source)",
    )
    group.add_argument(
        "--rename",
        action="append",
        metavar="OLD=NEW",
        help="rename tensors; {i} in a pattern is an index, * any text; may be repeated, "
        "the first that matches applies (default: names are kept)",
    )
    group.add_argument(
        "--drop",
        action="append",
        metavar="PATTERN",
        help="leave out source tensors that match; may be repeated (default: none)",
    )
    group.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="leave out source tensors that match none of these; may be repeated (default: all are taken)",
    )
    group.add_argument(
        "--tied",
        choices=("keep", "drop"),
        help="of names that share their bytes, keep all, or drop all but the first (default: keep)",
    )
    group.add_argument(
        "--no-side-files",
        dest="side_files",
        action="store_false",
        help="do not copy configs, tokenizers and the like (default: they are copied)",
    )
    _add_reading(group)
    group.add_argument(
        "--ema", action="store_true", help="take the averaged weights, where a run saved both (default: no)"
    )
    group.add_argument(
        "--lora", metavar="ADAPTER", help="merge this LoRA adapter of peft, a directory (default: none)"
    )
    group.add_argument(
        "--lora-scale",
        type=float,
        metavar="X",
        help="what a LoRA's product is multiplied with: alpha / rank (default: what the adapter says; for one that "
        "lies unmerged in the checkpoint, 1 / rank)",
    )
    group = parent.add_argument_group("which architecture to write")
    group.add_argument(
        "--to-arch",
        metavar="NAME",
        help="target architecture, as llama or chatglm; the recipe is found by what SRC is "
        "(default: the architecture stays)",
    )
    group.add_argument(
        "--recipe",
        metavar="NAME|auto|FILE",
        help="a recipe by name (`streamconv recipes` lists them), the only one there is for SRC, or one from a "
        ".toml or .py file; a .toml file may also hold edits, on which those of the command line come on top "
        "(default: none)",
    )
    group.add_argument(
        "--reverse",
        action="store_true",
        help="read the recipe from its target to its source (default: forward)",
    )
    group.add_argument(
        "--config", metavar="FILE", help="the config.json of SRC, instead of its own (default: its own)"
    )
    group.add_argument(
        "--like",
        metavar="DIR",
        help="a model whose config, and whatever else it lacks, the output gets, and with which it is compared "
        "(default: none)",
    )
    group.add_argument(
        "--allow-unmatched",
        action="store_true",
        help="leave out tensors that the recipe does not know (default: refuse, and say what they are)",
    )
    group.add_argument(
        "--pad-vocab",
        type=int,
        metavar="MULTIPLE",
        help="round the rows of embedding and head up to a multiple of this (default: they stay)",
    )
    group.add_argument(
        "--resize-vocab",
        type=int,
        metavar="ROWS",
        help="give embedding and head so many rows; never fewer than the tokenizer uses (default: they stay)",
    )
    group.add_argument(
        "--vocab-fill",
        choices=("mean", "zero"),
        help="what new rows are: the mean of the others, or zero (default: mean)",
    )
    return parent


def reading() -> argparse.ArgumentParser:
    """The options of the plan that also `inspect` takes."""
    parent = argparse.ArgumentParser(add_help=False)
    _add_reading(parent)
    return parent


def _add_reading(group: argparse._ActionsContainer) -> None:
    group.add_argument("--root", metavar="KEY", help=_ROOT)
    group.add_argument(
        "--weights",
        choices=("master", "model"),
        help="of a training checkpoint, take the optimizer's weights in F32, or the model's own, mostly 16 bits "
        "(default: master, where there are any)",
    )
    group.add_argument(
        "--optimizer",
        action="store_true",
        help="take what the optimizer knows of each parameter along: optimizer/exp_avg/ and so on (default: no)",
    )
    group.add_argument(
        "--source-strategy",
        metavar="FILE",
        help="of several ranks of MindSpore, the strategy file that says what they hold, or a directory of them "
        "(default: DIR/strategy, and beside it)",
    )


def resources(workers: bool = True) -> argparse.ArgumentParser:
    """Options of memory and processes."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("resources")
    group.add_argument(
        "--memory",
        default=DEFAULT_MEMORY,
        metavar="SIZE",
        help="most bytes of buffers, in all processes together; units as for shards (default: %(default)s)",
    )
    if workers:
        group.add_argument(
            "--workers",
            type=int,
            metavar="N",
            help="number of processes (default: the processors that this one may use)",
        )
    return parent


def running() -> argparse.ArgumentParser:
    """Options of how a plan is run."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("running")
    group.add_argument(
        "--engine",
        type=_known("engine", ENGINES, _ENGINES_TO_COME),
        metavar="ENGINE",
        help="who does the work: local (processes on this machine) or inline (this process alone); "
        "default: local where there are several workers and at least 256MiB of work",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished conversion, or a model that stands in DST (default: refuse)",
    )
    group.add_argument(
        "--restart",
        action="store_true",
        help="throw away an unfinished conversion in DST (default: go on with it)",
    )
    group.add_argument(
        "--checksum",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also read back and hash what only the kernel copied, so that conversion.json has a checksum for "
        "every tensor, at the cost of reading those bytes again (default: --no-checksum)",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="verify right after, which reads source and output once more (default: no)",
    )
    return parent


def talking() -> argparse.ArgumentParser:
    """Options of what is said while work is done."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="print nothing but errors (default: no)")
    group.add_argument(
        "--log-json",
        action="store_true",
        help="print JSON lines on stderr instead of text: status, summary, error (default: no)",
    )
    return parent


def results(full: bool = True) -> argparse.ArgumentParser:
    """Options of how results are shown."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("results")
    group.add_argument("--json", action="store_true", help="print one JSON document (default: text)")
    if full:
        group.add_argument(
            "--full",
            action="store_true",
            help="a line for every tensor, and lists to their end (default: equal layers are one line)",
        )
    return parent


def plan_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the plan that were given, as `streamconv.plan` takes them."""
    return {name: getattr(arguments, name) for name in _PLAN_ARGUMENTS if hasattr(arguments, name)}


def _debugging() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--debug", action="store_true", help="print a traceback with an error (default: no)")
    return parent


def _known(kind: str, known: Sequence[str], to_come: Sequence[str]) -> Callable[[str], str]:
    """A converter for `argparse` that refuses other values, and says which of them are only not there yet."""

    def chosen(text: str) -> str:
        if text in known:
            return text
        fault = "is not supported yet" if text in to_come else f"is no {kind}"
        raise argparse.ArgumentTypeError(f"'{text}' {fault}; known are {', '.join(known)}")

    return chosen
