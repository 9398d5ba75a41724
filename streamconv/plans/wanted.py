"""What a conversion is to produce: everything that a plan is made from, besides the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from streamconv import dtypes, readers, shard
from streamconv.errors import UsageError, count
from streamconv.options.effect import require_effect
from streamconv.options.fields import fields
from streamconv.options.records import DEFAULT_MAX_SHARD, PlanOptions
from streamconv.options.spelling import either
from streamconv.plans.adapters.adapter import Adapter
from streamconv.plans.adapters.files import read_adapter
from streamconv.plans.adapters.forms import FORMS
from streamconv.plans.edits import Edits, parse_edits, read_edits
from streamconv.plans.recipe import Recipe
from streamconv.plans.recipe_file import holds_edits
from streamconv.plans.registry import architectures, named
from streamconv.plans.vocabulary import Vocabulary
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.mindspore.strategy import Layout
from streamconv.readers.mindspore.strategy import read as read_strategy
from streamconv.storage.location import locate, sought
from streamconv.writers.formats import ALONE, FORMATS, OTHER_NAMES, TO_COME, near
from streamconv.writers.layout import LARGEST

_HUGGING_FACE = frozenset({"hf", "huggingface", "hugging-face", "transformers"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a conversion is to produce.

    Attributes:
        options: what was asked for; steps take from here what needs no more than its value.
        max_shard: the most bytes of tensors in one file.
        edits: what is done to names and dtypes.
        recipe: what is done to the architecture, or None; `auto` finds it by the config and the names.
        to_arch: the architecture to find a recipe for, or None.
        strategy: of MindSpore, how each tensor is split among ranks, instead of their numbers.
        config: of the source, instead of its own.
        like: a checkpoint whose config the target has.
        vocabulary: how many rows embedding and head are to have; None: as many as they have.
        lora: adapters to merge into the source before all else, one after another.
        base: of an adapter that is to be written in another form, the model of --like, for its names.
        file: the name of the one file that the destination is, or None for a directory.
    """

    options: PlanOptions
    max_shard: int
    edits: Edits = field(default_factory=Edits)
    recipe: Recipe | Literal["auto"] | None = None
    to_arch: str | None = None
    strategy: Mapping[str, Layout] | None = None
    config: Mapping[str, Any] | None = None
    like: Checkpoint | None = None
    vocabulary: Vocabulary | None = None
    lora: tuple[Adapter, ...] = ()
    file: str | None = None
    base: Checkpoint | None = None


def format_of(file: str, options: PlanOptions) -> str:
    """The format that a destination that is one file has: the one that is asked for, or what its suffix says.

    Args:
        file: its name.
        options: those that are given.

    Raises:
        UsageError: its suffix says another, or none that can be written, or it is named as one of several shards.
    """
    suffix = PurePosixPath(file).suffix.lower()
    fitting, asked = ALONE.get(suffix, ()), options.get("to")
    parsed = shard.parse_weight_name(file)
    if parsed is not None and parsed.kind == "shard":
        raise UsageError(
            "that is the name of one shard of several", file=file, hint="name a directory, or one file"
        )
    if not fitting:
        meant = near(suffix)
        known = ", ".join(each for each in ALONE if ALONE[each])
        raise UsageError(
            f"files that end in {suffix} cannot be written",
            file=file,
            hint=(
                f"did you mean {PurePosixPath(file).with_suffix(meant)}?"
                if meant
                else f"one file can end in {known}."
            )
            + f" A directory of this name is written {file}/",
        )
    if asked is None:
        leads_to = options.get("to_arch") or str(options.get("recipe") or "") * bool(options.get("reverse"))
        own = (each for each in fitting if (naming := FORMATS[each].to_arch) and leads_to.startswith(naming))
        return next(own, fitting[0])
    if asked in FORMATS and asked not in fitting:
        raise UsageError(
            f"--to {asked} contradicts the destination, a file that ends in {suffix}",
            hint=f"leave --to out (such a file is --to {either(fitting)}), or name a directory",
        )
    return asked


def resolved(options: PlanOptions, file: str | None = None) -> Wanted:
    """What options ask for, with every file that they name read; `file` is the only one that is to be written, if any.

    Raises:
        CheckpointError: such a file is damaged.
        UsageError: an option cannot be read, or has no effect with the others.
    """
    to = options["to"]
    _check_names(to, options["to_arch"])
    for name in ("tp", "pp", "pad_vocab", "resize_vocab", "try_layers"):
        if (number := cast(Mapping[str, Any], options)[name]) is not None and number < 1:
            raise UsageError(f"{fields(PlanOptions)[name].flag} {number}", hint="at least 1")
    recipe, edits = _recipe(options)
    if options["reverse"] and not isinstance(recipe, Recipe):
        raise UsageError("--reverse needs a recipe by name", hint="or name where to go with --to-arch")
    if options["to_arch"] is not None and isinstance(recipe, Recipe):
        raise UsageError(
            f"--to-arch has no effect with recipe {recipe.name}, which leads to one architecture",
            hint="leave it out, or let --recipe auto find the recipe",
        )
    require_effect(PlanOptions, options, "to", FORMATS)
    if recipe == "auto" and options["to_arch"] is None:
        options = {**options, "to_arch": FORMATS[to].to_arch or None}
    size, dtype = options["max_shard"], options["dtype"]
    multiple, rows = options["pad_vocab"], options["resize_vocab"]
    given = parse_edits(
        options["rename"],
        options["drop"],
        options["only"],
        [dtype] if isinstance(dtype, str) else dtype,
        options["tied"] or "keep",
    )
    if size is None:
        size = DEFAULT_MAX_SHARD if file is None else LARGEST
    strategy, config, like = (options[name] for name in ("strategy", "config", "like"))
    return Wanted(
        options,
        max_shard=size if isinstance(size, int) else shard.parse_size(size),
        edits=given if edits is None else given.over(edits),
        recipe=recipe,
        to_arch=options["to_arch"],
        strategy=None if strategy is None else read_strategy(locate(strategy)),
        config=None if config is None else readers.read_config_file(config),
        like=None if like is None else readers.open_model(like),
        vocabulary=Vocabulary(multiple, rows, options["vocab_fill"]) if multiple or rows else None,
        lora=_adapters(options),
        file=file,
    )


def _check_names(to: str, to_arch: str | None) -> None:
    """Refuse a name that is no format's, or a format's where an architecture's is asked for, with what was meant.

    Raises:
        UsageError: it is so.
    """
    if to not in FORMATS:
        fault = "cannot be written yet" if to.lower() in TO_COME else "is not a known format"
        meant = _meant(to.lower())
        known = f"known are {', '.join(FORMATS)}"
        raise UsageError(f"'{to}' {fault}; {known}", hint=meant)
    if to_arch is None or to_arch in FORMS or to_arch in architectures():
        return
    name = to_arch.lower()
    file_format = OTHER_NAMES.get(name, name)
    if name in _HUGGING_FACE:
        raise UsageError(f"there is no architecture '{to_arch}'", hint="did you mean --to-arch hf?")
    if file_format in FORMATS or name in TO_COME:
        raise UsageError(
            f"--to-arch {to_arch} names a file format, not an architecture",
            hint=f"did you mean --to {file_format}?",
        )
    if near := get_close_matches(name, sorted({*FORMS, *architectures()}), n=1):
        raise UsageError(f"there is no architecture '{to_arch}'", hint=f"did you mean --to-arch {near[0]}?")


def _meant(name: str) -> str | None:
    """The option that was meant by `--to NAME`, or None where nothing is near."""
    if name in _HUGGING_FACE:
        return "for files as Hugging Face writes them leave --to out; for its names of tensors it is --to-arch hf"
    if name in architectures():
        return f"did you mean --to-arch {name}, which names the tensors?"
    with suppress(UsageError):
        return f"did you mean --dtype {dtypes.parse(name)}?"
    other = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, FORMATS, n=1)), None)
    return other and f"did you mean --to {other}?"


def _recipe(options: PlanOptions) -> tuple[Recipe | Literal["auto"] | None, Edits | None]:
    """The recipe that is named, or the edits of the file that is."""
    recipe = options["recipe"]
    if recipe == "auto":
        return "auto", None
    if isinstance(recipe, Recipe):
        recipe.check()
    if recipe is None or isinstance(recipe, Recipe):
        return recipe, None
    if not isinstance(recipe, str | Path):
        raise UsageError(f"a recipe is a name, a file or a Recipe, not a {type(recipe).__name__}")
    return (None, read_edits(locate(recipe))) if holds_edits(recipe) else (named(str(recipe)), None)


def _adapters(options: PlanOptions) -> tuple[Adapter, ...]:
    """The adapters, in order, each with the scale that is given for it."""
    known = fields(PlanOptions)
    paths, scales = (
        known[name].each(cast(Mapping[str, Any], options)[name]) for name in ("lora", "lora_scale")
    )
    if paths and len(scales) > len(paths):
        raise UsageError(
            f"there are {len(scales)} scales for {count(len(paths), 'adapter')}",
            hint="give --lora-scale after the --lora that it is for",
        )
    return tuple(
        read_adapter(sought(path), scale)
        for path, scale in zip(paths, [*scales, *[None] * len(paths)], strict=False)
    )
