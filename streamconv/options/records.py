"""Every option, once: its name, type, default and help, and what it applies to.

A field of a record below is an option. To add one, add a field, and use it where it acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypedDict

from streamconv.options.option import Option
from streamconv.storage.location import locate

PathLike = str | Path
Size = str | int

Weights = Literal["master", "model"]
"""Which copy of the weights: the optimizer's in F32, or the model's own."""

DEFAULT_MAX_SHARD = "5GB"
DEFAULT_MEMORY = "1GiB"


class Trait(StrEnum):
    """What a source can have that options apply to; its reader reports it (`Checkpoint.traits`)."""

    TORCH = "torch files, and checkpoints of torch.distributed"
    AVERAGED = "a checkpoint that has averaged weights"
    MASTER = "a DeepSpeed checkpoint with an optimizer's weights"
    OPTIMIZER = "a training checkpoint with optimizer state"
    RANKS = "a directory of MindSpore's ranks"
    LORA = "a model with an unmerged LoRA"
    ONE_MODEL = "a checkpoint of one model"


class Named(Protocol):
    """What carries a name, as a recipe does."""

    @property
    def name(self) -> str:
        """Its name."""


def _recipe(recipe: PathLike | Named) -> str:
    """A recipe as arguments name it: files by their absolute path."""
    if not isinstance(recipe, PathLike):
        return recipe.name
    return str(recipe) if is_name(recipe) else locate(recipe).place


def is_name(recipe: PathLike) -> bool:
    """Whether a recipe is given by its name, and not as a file."""
    return not Path(recipe).suffix


# A table: a field is its type, its default, its help, and what else there is to it.
# fmt: off
class ReadingOptions(TypedDict, total=False):
    """How the source is read."""

    root: Annotated[str | None, Option(
        None, "where the state dict lies in a torch file, or in a checkpoint of torch.distributed, as a dotted path",
        otherwise="it is searched for", metavar="KEY", source=(Trait.TORCH,),
    )]
    ema: Annotated[bool, Option(
        False, "take the averaged weights of a run that saved both",
        source=(Trait.AVERAGED,),
    )]
    weights: Annotated[Weights | None, Option(
        None, "of a training checkpoint, take the optimizer's F32 weights, or the model's own, mostly 16-bit",
        otherwise="master, where there are any", source=(Trait.MASTER,),
    )]
    optimizer: Annotated[bool, Option(
        False, "also take the optimizer state of each parameter: optimizer/exp_avg/ and so on",
        source=(Trait.OPTIMIZER,),
    )]
    source_strategy: Annotated[PathLike | None, Option(
        None, "the strategy file that says what each of MindSpore's ranks holds, or a directory of them",
        otherwise="SRC/strategy, and beside it", metavar="FILE", source=(Trait.RANKS,),
    )]


class WritingOptions(TypedDict, total=False):
    """What the output is."""

    to: Annotated[str, Option(
        "safetensors", "file format of the output", metavar="FORMAT", otherwise="what DST's suffix says, or safetensors",
    )]
    max_shard: Annotated[Size | None, Option(
        None, "maximum bytes of tensors in one output file, in units of Hugging Face (5GB, 500MB) or "
        "powers of 1024 (4GiB); no unit means bytes",
        otherwise=f"{DEFAULT_MAX_SHARD}, and one file where DST is one", metavar="SIZE", against=("tp", "pp", "strategy"),
    )]
    tp: Annotated[int, Option(
        1, "with --to sat or mindspore: number of model-parallel ranks, with a file for each",
        metavar="N", against=("strategy",),
    )]
    pp: Annotated[int, Option(
        1, "with --to mindspore: number of pipeline stages",
        metavar="N", against=("strategy",),
    )]
    strategy: Annotated[PathLike | None, Option(
        None, "with --to mindspore: the strategy file that says how the output is split among ranks",
        otherwise="by --tp and --pp", metavar="FILE",
    )]
    crc: Annotated[bool, Option(False, "with --to mindspore: end the file with MindSpore's checksum")]
    dtype: Annotated[str | Sequence[str], Option(
        (), "cast floating-point tensors to BF16, F16, F32, ... (bf16, bfloat16, fp32 mean the same); with a "
        "pattern, only tensors whose target name matches",
        otherwise="as in the source", metavar="DTYPE|PATTERN=DTYPE",
    )]
    rename: Annotated[Sequence[str], Option(
        (), "rename tensors; {i} in a pattern is an index, * any text; the first pattern that matches applies",
        otherwise="names are kept", metavar="OLD=NEW",
    )]
    drop: Annotated[Sequence[str], Option(
        (), "leave out source tensors that match",
        otherwise="none", metavar="PATTERN",
    )]
    only: Annotated[Sequence[str], Option(
        (), "leave out source tensors that match none of these",
        otherwise="all are taken", metavar="PATTERN",
    )]
    try_layers: Annotated[int | None, Option(
        None, "take a few layers, one of each kind first, with a config that says so: a trial, which loads as the whole "
        "would; --only and --drop match the names in SRC, and the layers are then numbered from 0",
        otherwise="all layers", metavar="N", flag="--try", against=("layers",),
    )]
    layers: Annotated[str | None, Option(
        None, "the same with the layers of these numbers, such as 0-1 or 0-2,31",
        otherwise="all layers", metavar="LAYERS",
    )]
    tied: Annotated[Literal["keep", "drop"] | None, Option(
        None, "of tied tensors (names that share their bytes), keep all, or drop all but the first",
        otherwise="keep",
    )]
    side_files: Annotated[bool, Option(
        True, "do not copy configs, tokenizers and the like",
        otherwise="they are copied", flag="--no-side-files",
    )]
    lora: Annotated[PathLike | Sequence[PathLike] | None, Option(
        None, "merge this LoRA adapter of peft, a directory; several are merged one after another",
        otherwise="none", metavar="ADAPTER",
    )]
    lora_scale: Annotated[float | Sequence[float | None] | None, Option(
        None, "what the product of a LoRA's factors is multiplied by, alpha / rank: of the --lora before it, or of a "
        "LoRA that lies unmerged in the source",
        otherwise="what the adapter says; 1 / rank for a LoRA that lies unmerged in the source",
        metavar="X", source=(Trait.LORA,), beside=("lora",), of="lora",
    )]
    keep_lora: Annotated[bool, Option(
        False, "leave a LoRA that lies unmerged in the source apart: of a training run, write the adapter alone",
        otherwise="it is merged into the weights beside it", source=(Trait.LORA,),
    )]


class ArchitectureOptions(TypedDict, total=False):
    """What becomes of the architecture, its names and its sizes."""

    to_arch: Annotated[str | None, Option(
        None, "target architecture: the last part of a recipe's name (`streamconv recipes`); the recipe follows from "
        "what SRC is",
        otherwise="the architecture stays", metavar="NAME",
    )]
    recipe: Annotated[PathLike | Named | None, Option(
        None, "a recipe by name (`streamconv recipes` lists them), or from a .toml or .py file; auto takes the "
        "only one that fits SRC. A .toml file may also hold edits, which those of the command line are "
        "added to",
        otherwise="none", metavar="NAME|auto|FILE", record=_recipe,
    )]
    ignore: Annotated[Sequence[str], Option(
        (), "with a recipe that quantises, leave tensors that match as they are",
        otherwise="embeddings, heads, norms, routers and parts for images or sound are", metavar="PATTERN",
        beside=("recipe",),
    )]
    reverse: Annotated[bool, Option(
        False, "read the recipe from its target to its source",
        otherwise="forward", beside=("recipe",),
    )]
    config: Annotated[PathLike | None, Option(
        None, "take this config.json as that of SRC",
        otherwise="its own", metavar="FILE", source=(Trait.ONE_MODEL,),
    )]
    like: Annotated[PathLike | None, Option(
        None, "a model that the output is to be like: its config is taken, and the files and components that SRC "
        "lacks; what could not be loaded in its place is refused",
        otherwise="none", metavar="DIR",
    )]
    allow_mismatch: Annotated[bool, Option(
        False, "write what is unlike the model of --like, or not of the architecture of --config",
        otherwise="it is refused", beside=("like", "config"),
    )]
    allow_unmatched: Annotated[bool, Option(
        False, "leave out tensors that the recipe does not know",
        otherwise="they are listed, and the plan is refused", beside=("recipe", "to_arch"),
    )]
    pad_vocab: Annotated[int | None, Option(
        None, "round the rows of embedding and head up to a multiple of this",
        otherwise="they stay", metavar="MULTIPLE",
    )]
    resize_vocab: Annotated[int | None, Option(
        None, "give embedding and head this many rows; never fewer than the tokenizer uses",
        otherwise="they stay", metavar="ROWS",
    )]
    vocab_fill: Annotated[Literal["mean", "zero"], Option(
        "mean", "values of new rows: the mean of the others, or zero",
        beside=("pad_vocab", "resize_vocab"),
    )]


class PlanOptions(ReadingOptions, WritingOptions, ArchitectureOptions, total=False):
    """All that a plan is made from, besides the source."""


class DeletingOptions(TypedDict, total=False):
    """Whether the source goes."""

    delete_source: Annotated[bool, Option(
        False, "delete each weight file of SRC once all that is taken from it is written, synced and re-read, so that "
        "the disk need not hold the model twice; all other files stay",
        otherwise="the source stays",
    )]
    allow_loss: Annotated[bool, Option(
        False, "delete the source though values are rounded, or tensors left out, that are nowhere else then",
        otherwise="that is refused", beside=("delete_source",),
    )]


class PlanningOptions(PlanOptions, DeletingOptions, total=False):
    """What `plan` takes: whether the source goes decides how much disk is needed."""


class MemoryOptions(TypedDict, total=False):
    """How much memory may be used."""

    memory_budget: Annotated[Size, Option(
        DEFAULT_MEMORY, "maximum bytes of buffers, in all processes together; units as for shards",
        metavar="SIZE", flag="--memory",
    )]


class ResourceOptions(MemoryOptions, total=False):
    """Memory and processes."""

    workers: Annotated[int | None, Option(
        None, "number of processes",
        otherwise="as many as there are processors for this one", metavar="N", met=(1,),
    )]
    engine: Annotated[str | None, Option(
        None, "what runs the work, in processes on this machine (local) or in this one (inline)",
        otherwise="local where there are several workers, and 256MiB to compute or 2GiB to copy", metavar="ENGINE",
    )]


class RunningOptions(DeletingOptions, total=False):
    """How a plan is run."""

    overwrite: Annotated[bool, Option(
        False, "replace a finished conversion, or a model, in DST",
        otherwise="refuse",
    )]
    restart: Annotated[bool, Option(
        False, "discard an unfinished conversion in DST",
        otherwise="resume it",
    )]
    checksum: Annotated[bool, Option(
        False, "also read back and hash what only the kernel copied, so that conversion.json has a checksum for "
        "every tensor; reads those bytes once more",
        otherwise="--no-checksum", flag="--checksum|--no-checksum",
    )]


class CheckingOptions(TypedDict, total=False):
    """How much of a destination is looked at."""

    headers: Annotated[bool, Option(
        False, "read no tensor: compare names, dtypes, shapes, sizes and the files without tensors, which takes seconds",
        otherwise="every byte is compared",
    )]


# fmt: on
class CheckOptions(ResourceOptions, CheckingOptions, total=False):
    """What `verify` takes where there is no source."""


class VerifyOptions(PlanOptions, CheckOptions, total=False):
    """What `verify` takes."""


class ConvertOptions(PlanOptions, ResourceOptions, RunningOptions, total=False):
    """What `convert` takes."""
