"""Every option, once: its name, type, default and help, and what it applies to.

A field of a record below is an option. The parsers of the command line, the keywords of `streamconv.open`, `plan`,
`convert` and `verify` (and their types), the arguments that a conversion records and what
readers are given are derived from these records. To add an option, add a field, and use it where it acts.

An option that has no effect is refused. Its field says with which sources or other options it has one; the record of
a target format says which options act on it (`writers.formats`), and one that no format names acts on all. A default
is never refused, and neither is an option that asks for what is so already (`--dtype BF16` for a model in BF16).

A package outside adds a row to `ADDED` instead. Nothing here is heavy to import: `--help` needs it.
"""

from __future__ import annotations

import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    TypedDict,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from streamconv.errors import Problem, UsageError
from streamconv.storage.location import locate

PathLike = str | Path
Size = str | int

Options = TypeVar("Options")
"""A record of options."""

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


@dataclass(frozen=True, slots=True)
class Option:
    """What an option is, besides its name and its type.

    Attributes:
        default: its value where it is not given.
        help: for the command line; without the default.
        otherwise: what happens without it, in words, where the default's value does not say so.
        metavar: what its value is called.
        flag: its spelling, where that is not `--name`.
        source: what the source has where the option has an effect, any of it; empty: all sources do.
        beside: options, by name, that give it an effect.
        against: options, by name, that leave it without one.
        met: values besides the default that are never refused: they ask for what happens in any case.
        record: how its value is recorded, where the type does not say so.
        types: the alternatives of its type without `None`; filled in from the record.
    """

    default: Any
    help: str
    otherwise: str = ""
    metavar: str | None = None
    flag: str = ""
    source: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    met: tuple[Any, ...] = ()
    record: Callable[[Any], Any] | None = None
    types: tuple[Any, ...] = ()

    @property
    def repeats(self) -> bool:
        """Whether giving it again adds to it."""
        return any(get_origin(each) is Sequence for each in self.types)

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The only values that its type has, or None."""
        return next((get_args(each) for each in self.types if get_origin(each) is Literal), None)

    @property
    def convert(self) -> type:
        """The plain type that its text stands for."""
        return next((each for each in (bool, int, float) if self.types == (each,)), str)

    def is_given(self, value: Any) -> bool:
        """Whether a value asks for something that the default does not."""
        return value not in (None, self.default, *self.met) and not (self.repeats and not value)

    def accepts(self, value: Any) -> bool:
        """Whether a value out of a record has the right type."""
        if value is None:
            return self.default is None
        if self.choices is not None:
            return value in self.choices
        if self.repeats:
            return isinstance(value, list) and all(isinstance(each, str) for each in value)
        plain = tuple(each for each in (str, int, float) if each in self.types) or (bool,)
        plain += (int,) * (float in plain)  # a whole number is one, and Python callers write it so
        return isinstance(value, plain) and (bool in self.types) == isinstance(value, bool)

    def recorded(self, value: Any) -> Any:
        """A value as JSON holds it."""
        if value is None:
            return None
        if self.record is not None:
            return self.record(value)
        if self.repeats:
            return [value] if isinstance(value, str) else list(value)
        return locate(value).place if Path in self.types else value


class Source(Protocol):
    """What options may apply to: an open checkpoint."""

    @property
    def format(self) -> str:
        """What its reader recognised."""

    @property
    def traits(self) -> frozenset[str]:
        """What it has that options apply to."""


class Choice(Protocol):
    """What options may apply to: what another option names, such as a format that can be written, or an engine."""

    @property
    def options(self) -> frozenset[str]:
        """The options, by name, that act on it and not on every one."""


class Named(Protocol):
    """What carries a name, as a recipe does."""

    @property
    def name(self) -> str:
        """Its name."""


def _recipe(recipe: PathLike | Named) -> str:
    """A recipe as arguments name it: files by their absolute path."""
    if not isinstance(recipe, PathLike):
        return recipe.name
    return locate(recipe).place if Path(recipe).suffix else str(recipe)


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
    max_shard: Annotated[Size, Option(
        DEFAULT_MAX_SHARD, "maximum bytes of tensors in one output file, in units of Hugging Face (5GB, 500MB) or "
        "powers of 1024 (4GiB); no unit means bytes",
        metavar="SIZE", against=("tp", "pp", "strategy"),
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
    tied: Annotated[Literal["keep", "drop"] | None, Option(
        None, "of tied tensors (names that share their bytes), keep all, or drop all but the first",
        otherwise="keep",
    )]
    side_files: Annotated[bool, Option(
        True, "do not copy configs, tokenizers and the like",
        otherwise="they are copied", flag="--no-side-files",
    )]
    lora: Annotated[PathLike | None, Option(
        None, "merge this LoRA adapter of peft, a directory",
        otherwise="none", metavar="ADAPTER",
    )]
    lora_scale: Annotated[float | None, Option(
        None, "what the product of a LoRA's factors is multiplied by: alpha / rank",
        otherwise="what the adapter says; 1 / rank for a LoRA that lies unmerged in the source",
        metavar="X", source=(Trait.LORA,), beside=("lora",),
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
        otherwise="local where there are several workers and at least 256MiB of work", metavar="ENGINE",
    )]


class RunningOptions(TypedDict, total=False):
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


ADDED: dict[type, dict[str, Any]] = {}
"""What packages outside add to a record, and so to all that hold it: `Annotated[type, Option(...)]` by name."""


def fields(record: type) -> Mapping[str, Option]:
    """The options of a record, by name, in its order; what is added comes last."""
    hints = dict(_hints(record))
    for each, added in ADDED.items():
        if _hints(each).keys() <= hints.keys():
            hints |= added
    return {
        name: replace(option, types=_alternatives(hint.__origin__), flag=option.flag or _flag(name))
        for name, hint in hints.items()
        for option in hint.__metadata__
    }


@cache
def _hints(record: type) -> Mapping[str, Any]:
    """The types of a record's fields; working them out compiles text, and every call of the API asks for them."""
    return get_type_hints(record, include_extras=True)


def filled(record: type[Options], given: Options) -> Options:
    """Every option of a record: what is given, and the defaults of the rest.

    Raises:
        TypeError: a name that is not an option of the record.
    """
    known, values = fields(record), cast(Mapping[str, Any], given)
    for name in values.keys() - known.keys():
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"there is no option '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return cast(Options, {name: values.get(name, option.default) for name, option in known.items()})


def part(record: type[Options], given: object) -> Options:
    """Those of the given options that belong to a record."""
    values = cast(Mapping[str, Any], given)
    return cast(Options, {name: values[name] for name in fields(record) if name in values})


def recorded(record: type[Options], options: Options) -> dict[str, Any]:
    """Options as JSON holds them, from which the same plan can be made anywhere: paths are absolute."""
    values = cast(Mapping[str, Any], options)
    return {name: option.recorded(values[name]) for name, option in fields(record).items()}


def from_record(record: type[Options], document: object) -> Options:
    """Options as they were recorded.

    Raises:
        UsageError: the record is of another version, or was changed.
    """
    known = fields(record)
    values = document if isinstance(document, dict) else {"arguments": document}
    odd = [name for name, value in values.items() if name not in known or not known[name].accepts(value)]
    if odd:
        raise UsageError(
            f"the options on record cannot be used: {', '.join(map(str, odd))}",
            hint="give the options of the conversion, those of this version",
        )
    return cast(Options, values)


def spelled(record: type[Options], options: Options) -> tuple[str, ...]:
    """The options that ask for something, each as it is given on the command line, ready for a shell."""
    values, words = cast(Mapping[str, Any], recorded(record, options)), []
    for name, option in fields(record).items():
        if option.is_given(value := values[name]):
            given = value if isinstance(value, list) else [value]
            words += [
                option.flag if isinstance(each, bool) else f"{option.flag} {shlex.quote(str(each))}"
                for each in given
            ]
    return tuple(words)


def quoted(text: str) -> str:
    """A word of a command line, in quotes whatever it is."""
    word = shlex.quote(text)
    return word if word != text else f"'{text}'"


def dropping(name: str) -> str:
    """The option that leaves out a tensor by its name, or by a pattern, to be pasted into a shell.

    What would open a field of a pattern, or a terminal would act on, is a star.
    """
    pattern = quoted("".join("*" if each in "{}" or not each.isprintable() else each for each in name))
    return f"--drop={pattern}" if name.startswith("-") else f"--drop {pattern}"


def require_effect(
    record: type[Options],
    options: Options,
    chooser: str = "",
    choices: Mapping[str, Choice] = MappingProxyType({}),
    source: Source | None = None,
) -> None:
    """Refuse options that would have no effect.

    Args:
        record: whose options these are.
        options: all of them.
        chooser: the option that names one of `choices`, or nothing where the library chooses.
        choices: by name.
        source: None where it is not read yet, so that options that apply to it cannot be judged.

    Raises:
        UsageError: options that do not apply.
    """
    known, values = fields(record), cast(Mapping[str, Any], options)
    given = [name for name, option in known.items() if option.is_given(values[name])]
    problems = []
    for name in given:
        option = known[name]
        takers = [each for each, choice in choices.items() if name in choice.options]
        beside, against = ([known[each].flag for each in names] for names in (option.beside, option.against))
        stopped = [known[each].flag for each in option.against if each in given]
        acts = (
            not (takers or option.source or beside)
            or (takers and values[chooser] in (None, *takers))
            or (option.source and (source is None or not source.traits.isdisjoint(option.source)))
            or not set(given).isdisjoint(option.beside)
        )
        if acts and not stopped:
            continue
        if acts:
            where, uses = f"with {either(stopped)}", [f"use without {either(against)}"]
        elif source is not None and option.source:
            where, uses = f"on this source ({source.format})", [*option.source]
        elif takers:
            where, uses = f"with {known[chooser].flag} {values[chooser]}", []
        else:
            where, uses = f"without {either(beside)}", []
        if not acts:
            uses += [
                *(f"{known[chooser].flag} {each}" for each in takers),
                *(f"use with {each}" for each in beside),
            ]
        problems.append(no_effect(option, where, either(uses)))
    if len(problems) == 1:
        raise UsageError(problems[0].message, hint=problems[0].hint)
    if problems:
        raise UsageError("there are options that have no effect", problems=problems)


def no_effect(option: Option, where: str, uses: str) -> Problem:
    """The problem of an option that has no effect."""
    return Problem(f"{option.flag} has no effect {where}", hint=f"it is for {uses}; leave it out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(each for each in get_args(hint) if each is not type(None))
    return (hint,)


def either(words: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
