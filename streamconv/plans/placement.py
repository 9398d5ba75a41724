"""Which target goes into which file, and where in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from streamconv import shard
from streamconv.errors import Problem, listed
from streamconv.ops import Reshape, Split, apply, renamed
from streamconv.options.effect import no_effect
from streamconv.options.fields import fields
from streamconv.options.records import PlanOptions
from streamconv.options.spelling import dropping
from streamconv.plans.findings import Findings
from streamconv.plans.plan import Output, OutputFile, PlannedTensor, TextFile
from streamconv.plans.registry import leading
from streamconv.plans.transform import Transformed
from streamconv.plans.wanted import Wanted
from streamconv.shard import Naming
from streamconv.writers import layout
from streamconv.writers.formats import FORMATS
from streamconv.writers.layout import LARGEST, About, Placement, Target, Wrapping
from streamconv.writers.ranks import Part, Whole

_DIRECTORY = "name a directory, with no suffix of a weight file"


def is_unfit(made: Transformed, wanted: Wanted) -> bool:
    """Whether the format is for models in its own program's naming, and this is none."""
    return FORMATS[wanted.options["to"]].wrapping == "needed" and made.wrapping is None


def unfitting(unfit: Sequence[Transformed], wanted: Wanted, *, others: bool) -> Iterator[Problem]:
    """What to do about models that the format is not for.

    Args:
        unfit: those of the models that `is_unfit` says it of.
        wanted: what names the format.
        others: whether there are models that fit.
    """
    to = wanted.options["to"]
    ways = {made.component.directory: leading(made.component, FORMATS[to].name) for made in unfit}
    for directory, recipes in ways.items():
        what = f", which {directory}/ is not in" if directory else ""
        if recipes:
            hint = "what leads there: " + " or ".join(f"--recipe {each.name} --reverse" for each in recipes)
        else:
            hint = "there is no recipe that leads there from this model"
            if directory and (others or any(ways.values())):
                hint += f": leave it out with {dropping(directory + '/*')}"
        yield Problem(f"--to {to} is for models in its own naming{what}", hint=hint)


def place(made: Transformed, wanted: Wanted, output: Output, findings: Findings) -> None:
    """Decide file and offset of every target of a component that is not unfit. Ranks have files of their own."""
    form = FORMATS[wanted.options["to"]]
    if form.wrapping == "none":
        made = replace(made, wrapping=None)
    lay_out = form.rank_layout
    ranks, stages = wanted.options["tp"], wanted.options["pp"]
    parts: Sequence[Part] = ()
    if lay_out is not None and (ranks * stages > 1 or wanted.strategy is not None):
        tensors = {name: expression for name, (_, expression) in made.targets.items()}
        before = len(findings.problems)
        with findings.collecting():
            parts = lay_out(Whole(tensors, ranks, stages, wanted.strategy, made.config, made.wrapping))
        if len(findings.problems) > before:
            return
    if parts and wanted.file:
        findings.problems.append(
            Problem(
                f"there is a file for each of {len(parts)} ranks, and the destination is one", hint=_DIRECTORY
            )
        )
        return
    if not parts:
        _place(made, wanted, output, findings)
    for part in parts:
        prefix = made.component.prefix
        output.texts += (TextFile(prefix + path, text) for path, text in part.texts.items())
        rank = replace(
            made,
            component=replace(made.component, stem=part.stem or made.component.stem),
            targets={name: (made.targets[name][0], tensor) for name, tensor in part.tensors.items()},
            wrapping=part.wrapping,
            shared={},
        )
        _place(rank, replace(wanted, max_shard=LARGEST), output, findings)


def _place(made: Transformed, wanted: Wanted, output: Output, findings: Findings) -> None:
    """The files of one rank, or of all there is."""
    form = FORMATS[wanted.options["to"]]
    component, writer = made.component, form.writer
    specs = {name: expression.spec for name, (_, expression) in made.targets.items()}
    problems = layout.problems(writer, list(specs.values()))
    wrapping = made.wrapping
    if problems or not specs:
        findings.problems += problems
        return
    # Names that share their bytes have the first one's name as their storage.
    storages = {first: first for first in made.shared.values()} | dict(made.shared)
    entries = [shard.entry_of(spec, storages.get(name)) for name, spec in specs.items()]
    shards_option = fields(PlanOptions)["max_shard"]
    # What is around the tensors is around all of them: there is one file.
    one_file = form.one_file or wrapping is not None or component.one_file
    if not form.one_file and one_file and shards_option.is_given(wanted.options["max_shard"]):
        where = f"on {wrapping.path if wrapping else 'a model that is loaded from one file'}"
        findings.problems.append(no_effect(shards_option, where, "weights in files of their own"))
    shards = [list(specs)] if one_file else shard.pack(entries, wanted.max_shard)
    naming = Naming(component.stem, None if form.one_file else component.variant, form.suffix)
    gone = {name: kept for name, kept in made.shared.items() if name not in specs}
    if wanted.file and (problem := _several(wanted, len(shards), wrapping)):
        findings.problems.append(problem)
        return
    for number, names in enumerate(shards, 1):
        path = wrapping.path if wrapping else shard.shard_name(naming, number, len(shards))
        targets = [Target(specs[name], storages.get(name)) for name in names]
        about = About(
            wanted.file or PurePosixPath(path).name,
            gone if len(shards) == 1 else {},
            wrapping,
            wanted.options["crc"],
        )
        with findings.collecting():
            file = writer.layout(targets, about)
            output.tensors += [_planned(made, spot, len(output.files)) for spot in file.placements]
            output.files.append(OutputFile(wanted.file or component.prefix + path, file))
    if wrapping:
        output.texts += (TextFile(component.prefix + path, text) for path, text in wrapping.texts.items())
    if len(shards) > 1 and (form.suffix, component.stem) == (shard.TORCH, shard.STEMS[1]):
        findings.notes.append(
            f"{component.prefix}: diffusers loads a model in several {form.suffix} files with use_safetensors=False only; "
            "without --max-shard or with --to safetensors it needs nothing"
        )
    if len(shards) > 1:
        text = shard.index_json(shard.weight_map(naming, shards), shard.total_size(entries), gone)
        output.texts.append(
            TextFile(component.prefix + (form.index or shard.index_name(naming)), text.decode())
        )


def _several(wanted: Wanted, shards: int, wrapping: Wrapping | None) -> Problem | None:
    """Why a component does not fit in the one file that is wanted; None where it does."""
    if shards > 1:
        size = wanted.options["max_shard"]
        return Problem(
            f"--max-shard {size} makes {shards} files, and the destination is one",
            hint=f"leave it out, or {_DIRECTORY}",
        )
    if wrapping is not None and wrapping.texts:
        return Problem(
            f"such a checkpoint is not one file: {listed(wrapping.texts)} goes with it",
            hint=_DIRECTORY,
        )
    return None


def _planned(made: Transformed, spot: Placement, file: int) -> PlannedTensor:
    """A target, or the part of it that goes to one place."""
    sources, whole = made.targets[spot.name]
    if spot.length == whole.spec.nbytes:
        return PlannedTensor(sources, whole, file, spot.offset)
    width = whole.spec.dtype.itemsize
    first, count = spot.start // width, spot.length // width
    rest = whole.spec.numel - first - count
    (flat,) = apply(Reshape((whole.spec.numel,)), whole)
    sizes = [size for size in (first, count, rest) if size]
    parts = apply(Split(0, tuple(sizes)), flat)
    return PlannedTensor(sources, renamed(parts[1 if first else 0], spot.name), file, spot.offset)
