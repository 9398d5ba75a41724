"""A trial: a few layers of a checkpoint under a config that says so, which converts in seconds and loads as the whole does.

The checkpoint is cut before anything else is made of it, so that all that follows sees a small model:

1. Names are grouped into stacks, by the first number in them. A stack is one of layers where the config counts as many;
   without a config, where it is the largest, or as high as that, and its layers have something in common.
2. Which layers are taken is asked for, or chosen: one of each kind first, and the last if there is no other like it.
3. The config says the new numbers: how many, and what it says of each layer, by place or by number.

Layers keep their numbers until tensors are selected, so that --only and --drop match the names of the source, and are
then numbered from 0. Towers with a config of their own (vision, audio) stay whole: others refer to their layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamconv.errors import Problem, UsageError, listed
from streamconv.options.effect import no_effect
from streamconv.options.fields import fields
from streamconv.options.records import PlanOptions
from streamconv.plans import roles
from streamconv.plans.architecture import Config
from streamconv.plans.edits import select
from streamconv.plans.findings import Findings
from streamconv.plans.misfit import misfits
from streamconv.plans.patterns import Pattern
from streamconv.plans.plan import TextFile
from streamconv.plans.roles import Role
from streamconv.plans.trial.cuts import INDEX, Cut, counted_by, cut_of, ranges, same_of, stacks_of
from streamconv.plans.trial.depth import config_of
from streamconv.plans.wanted import Wanted
from streamconv.readers.checkpoint import Checkpoint, Component

MARK = "TRIAL.txt"
"""The file that says so in a destination."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is converted instead of the whole.

    Attributes:
        checkpoint: cut; it has the numbers of its layers still.
        wanted: with the config and the model that it is like cut alike.
        note: what it is, in one line.
        marks: the files that say so.
    """

    checkpoint: Checkpoint
    wanted: Wanted
    note: str
    marks: tuple[TextFile, ...]


def is_trial(wanted: Wanted) -> bool:
    """Whether a few layers are asked for."""
    return wanted.options["try_layers"] is not None or wanted.options["layers"] is not None


def trial(checkpoint: Checkpoint, wanted: Wanted, used: set[Pattern]) -> Trial:
    """Cut a checkpoint to the layers that are wanted.

    Patterns of the edits that match something in the whole are added to `used`.

    Raises:
        UsageError: there are no layers, or not those, or they cannot be taken out.
    """
    cuts = {}
    for component in checkpoint.models:
        config = _judged_by(component, checkpoint, wanted)
        if cut := cut_of(component, config, wanted):
            cuts[component.directory] = cut
    if not any(len(own) < height for cut in cuts.values() for height, own in cut.taken.items()):
        raise _without_effect(checkpoint, cuts, wanted)
    aside = Findings()
    for component in checkpoint.components:
        select(component, wanted.edits, used, aside)
    # What a dtype is for is the name in the output, which layers that are not there do not get.
    used.update(pattern for pattern, _ in wanted.edits.dtype_overrides if re.search(r"\d", pattern.text))
    small = _of_all(checkpoint, cuts)
    _require_whole(checkpoint, small, wanted)
    first = next(iter(cuts.values()))
    like = None if wanted.like is None else _like(wanted.like, cuts, len(checkpoint.models), wanted)
    config = None if wanted.config is None else config_of(wanted.config, first.taken)
    lora = tuple(replace(each, tensors=_of_adapter(each.tensors, cuts.values())) for each in wanted.lora)
    said = _said(cuts)
    note = f"this is a trial, {said}: the output is for testing, and is not the model"
    text = f"A trial of a conversion, and not the model: {said}, of {checkpoint.path}.\n"
    return Trial(small, replace(wanted, config=config, like=like, lora=lora), note, (TextFile(MARK, text),))


def _judged_by(component: Component, checkpoint: Checkpoint, wanted: Wanted) -> Config | None:
    """The config that counts a component's layers."""
    if wanted.config is not None and len(checkpoint.models) == 1:
        return wanted.config
    if component.config is not None or wanted.like is None:
        return component.config
    others = wanted.like.models
    same = [each.config for each in others if each.directory == component.directory]
    return next(iter(same or [each.config for each in others if len(others) == 1]), None)


def uncounted(component: Component, targets: Collection[str], config: Config | None) -> Iterator[str]:
    """What is to be noted where a config counts more layers than are written of a component.

    `targets`: the names that are written.
    """
    heights, _ = stacks_of(component)
    for stack, height in (counted_by(heights, config) if config else {}).items():
        left = {
            int(found["index"])
            for name in targets
            if (found := INDEX.fullmatch(name)) and found["stack"] == stack
        }
        if left and len(left & {*range(height)}) < height:
            yield (
                f"of {height} layers {component.prefix}{stack}* {ranges(left)} are written, and the config says {height}: "
                f"libraries make up the others; --layers {ranges(left)} takes these with a config that says so"
            )


def _like(like: Checkpoint, cuts: Mapping[str, Cut], models: int, wanted: Wanted) -> Checkpoint:
    """The model of `--like` with the same layers of what there is of it among `models`, and some of each other one."""
    found: dict[str, Cut] = {}
    alone = models == len(like.models) == 1
    for component in like.models:
        own = next(iter(cuts.values())) if alone else cuts.get(component.directory)
        cut = cut_of(component, component.config, wanted) if own is None else same_of(component, own)
        found |= {component.directory: cut} if cut else {}
    return _of_all(like, found)


def _of_all(checkpoint: Checkpoint, cuts: Mapping[str, Cut]) -> Checkpoint:
    """A checkpoint with the layers that are taken of each component."""
    alone = next(iter(cuts.values())) if len(checkpoint.models) == 1 and cuts else None
    made, configs = [], set()
    for component in checkpoint.components:
        cut = alone if component.kind == "optimizer" else cuts.get(component.directory)
        if cut is None:
            made.append(component)
            continue
        made.append(_of_one(component, cut))
        if made[-1].config != component.config:
            configs.add(f"{component.prefix}config.json")
    side_files = tuple(name for name in checkpoint.side_files if name not in configs)
    return replace(checkpoint, components=tuple(made), side_files=side_files, checksums=())


def _of_one(component: Component, cut: Cut) -> Component:
    names = {name: cut.numbered(name) for name in component.tensors}
    return replace(
        component,
        tensors={name: component.tensors[name] for name, to in names.items() if to is not None},
        config=None if component.config is None else config_of(component.config, cut.taken),
        unreadable={name: why for name, why in component.unreadable.items() if cut.numbered(name)},
        lacking={name: why for name, why in component.lacking.items() if cut.numbered(name)},
        numbered={name: to for name, to in names.items() if to not in (None, name)},
    )


def _of_adapter(tensors: Mapping[str, Any], cuts: Collection[Cut]) -> dict[str, Any]:
    """The tensors of an adapter to layers that are taken; its names have more before them, and end alike."""
    gone = {
        f"{stack}{index}."
        for cut in cuts
        for stack, height in cut.stacks.items()
        for index in set(range(height)).difference(cut.taken[height])
    }
    kept = {}
    for name, tensor in tensors.items():
        found = INDEX.fullmatch(name)
        place = f"{found['stack']}{found['index']}." if found else ""
        if not any(place.endswith(each) or each.endswith("." + place) for each in gone if place):
            kept[name] = tensor
    return kept


def _require_whole(checkpoint: Checkpoint, small: Checkpoint, wanted: Wanted) -> None:
    """Refuse what the config does not fit any more, where it fits the whole.

    Raises:
        UsageError: so it is.
    """
    problems: list[Problem] = []
    for before, after in zip(checkpoint.models, small.models, strict=True):
        if before.config is None or after.config is None or before is after or wanted.config is not None:
            continue
        tensors = {after.numbered.get(name, name): tensor for name, tensor in after.tensors.items()}
        wrong = misfits(after.config, tensors)
        problems += wrong if wrong and not misfits(before.config, before.tensors) else []
        if keys := roles.having(Role.WITH_LAYERS, before.config):
            problems.append(
                Problem(f"by the config's {keys[0]}, there are tensors with a part for each layer")
            )
    if problems:
        raise UsageError(
            "these layers do not make a model by themselves",
            hint="try others (--layers 0-3), or leave it out",
            problems=problems,
        )


def _said(cuts: Mapping[str, Cut]) -> str:
    """Which layers of what are taken, and which kinds are not."""
    parts = []
    for directory, cut in cuts.items():
        for height, own in cut.taken.items():
            if len(own) == height:
                continue
            place = f" of {directory}/" if directory else ""
            parts.append(f"{'layer' if len(own) == 1 else 'layers'} {ranges(own)} of {height}{place}")
            kinds = cut.kinds[height]
            if absent := {*kinds}.difference(kinds[index] for index in own):
                parts[-1] += (
                    f" (none like {ranges(absent)}: --layers {ranges([*own, *absent])} has all kinds)"
                )
    return ", ".join(parts)


def _without_effect(checkpoint: Checkpoint, cuts: Mapping[str, Cut], wanted: Wanted) -> UsageError:
    """Why there is nothing to leave out."""
    name = "layers" if wanted.options["layers"] is not None else "try_layers"
    if cuts:
        heights = sorted({height for cut in cuts.values() for height in cut.taken})
        where = f"on a model of {listed(map(str, heights))} layers"
    else:
        where = "here: there are no layers" + (
            " that the config counts" if any(each.config for each in checkpoint.models) else " to be seen"
        )
    problem = no_effect(fields(PlanOptions)[name], where, "models with more layers")
    hint = problem.hint if cuts else f"{problem.hint}, or take tensors by their names with --only"
    return UsageError(problem.message, hint=hint)
