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
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from streamconv.plans.wanted import Wanted
from streamconv.readers.checkpoint import Checkpoint, Component

MARK = "TRIAL.txt"
"""The file that says so in a destination."""

_INDEX = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<index>\d+)(?P<rest>(?:\..*)?)", re.DOTALL)
_FROM_TO = re.compile(r"(\d+)(?:-(\d+))?")
_SHOWN = 8

Taken = Mapping[int, Sequence[int]]
"""Which layers are taken, in ascending order, by the height of their stacks."""


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


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is taken of one component.

    Attributes:
        stacks: prefix of the stacks that are cut -> their height.
        taken: see `Taken`.
        kinds: height -> the kind of each layer.
    """

    stacks: Mapping[str, int]
    taken: Taken
    kinds: Mapping[int, Sequence[int]]

    def numbered(self, name: str) -> str | None:
        """What a tensor is called among the taken layers; None where its layer is not taken."""
        found = _INDEX.fullmatch(name)
        height = self.stacks.get(found["stack"]) if found else None
        if found is None or height is None:
            return None if roles.having(Role.FURTHER, [name]) else name
        own = self.taken[height]
        index = int(found["index"])
        return f"{found['stack']}{own.index(index)}{found['rest']}" if index in own else None


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
        if cut := _cut(component, config, wanted):
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
    config = None if wanted.config is None else _config(wanted.config, first.taken)
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
    heights, _ = _stacks(component)
    for stack, height in (_counted(heights, config) if config else {}).items():
        left = {
            int(found["index"])
            for name in targets
            if (found := _INDEX.fullmatch(name)) and found["stack"] == stack
        }
        if left and len(left & {*range(height)}) < height:
            yield (
                f"of {height} layers {component.prefix}{stack}* {_ranges(left)} are written, and the config says {height}: "
                f"libraries make up the others; --layers {_ranges(left)} takes these with a config that says so"
            )


def _like(like: Checkpoint, cuts: Mapping[str, _Cut], models: int, wanted: Wanted) -> Checkpoint:
    """The model of `--like` with the same layers of what there is of it among `models`, and some of each other one."""
    found: dict[str, _Cut] = {}
    alone = models == len(like.models) == 1
    for component in like.models:
        own = next(iter(cuts.values())) if alone else cuts.get(component.directory)
        cut = _cut(component, component.config, wanted) if own is None else _alike(component, own)
        found |= {component.directory: cut} if cut else {}
    return _of_all(like, found)


# ------------------------------------------------------------------------------------ what is cut


def _cut(component: Component, config: Config | None, wanted: Wanted) -> _Cut | None:
    """Which layers of a component are taken; None where it has none, and stays whole."""
    heights, contents = _stacks(component)
    stacks = _largest(component, heights, contents) if config is None else _counted(heights, config)
    if not stacks:
        return None
    kinds: dict[int, Sequence[int]] = {}
    taken: dict[int, Sequence[int]] = {}
    for height in dict.fromkeys(stacks.values()):
        own = [contents[stack] for stack, each in stacks.items() if each == height]
        kinds[height] = _kinds(own, height, config or {})
        taken[height] = _taken(kinds[height], _periods(config or {}, height), wanted)
    return _Cut(stacks, taken, kinds)


def _stacks(component: Component) -> tuple[dict[str, int], dict[str, dict[int, set[Any]]]]:
    """The heights of what is numbered from 0 on without a gap, by its prefix; and what lies at each number."""
    contents: dict[str, dict[int, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in component.tensors.items():
        found = _INDEX.fullmatch(name)
        if found and found["stack"]:
            contents[found["stack"]][int(found["index"])].add((found["rest"], tensor.spec.shape))
    heights = {stack: len(each) for stack, each in contents.items() if max(each) == len(each) - 1}
    return heights, contents


def _counted(heights: Mapping[str, int], config: Config) -> dict[str, int]:
    """The stacks that a config counts, with the heights that it says."""
    levels = list(_levels(config))
    if any(roles.having(Role.STAGES, level) for level in levels):
        return {}
    towers = roles.having(Role.TOWER, config)
    found: dict[str, int] = {}
    for stack, highest in heights.items():
        # A tower's own words are in the names of its tensors, whatever else is as high.
        words = stack.split(".")
        if (towers and roles.having(Role.TOWER, words)) or roles.having(Role.FRONT, words):
            continue
        for level in levels:
            further = sum(
                v for key in roles.having(Role.FURTHER_LAYERS, level) if type(v := level[key]) is int
            )
            said = _heights(level)
            height = highest if highest in said else highest - further
            found |= {stack: height} if height in said and height > 0 else {}
    return found


def _largest(
    component: Component, heights: Mapping[str, int], contents: Mapping[str, Mapping[int, set[Any]]]
) -> dict[str, int]:
    """The stack with the most bytes, and those as high, where a stack's layers have something in common."""
    alike = {
        stack: height
        for stack, height in heights.items()
        if height > 1 and set.intersection(*contents[stack].values())
    }
    sizes: Counter[str] = Counter()
    for name, tensor in component.tensors.items():
        if (found := _INDEX.fullmatch(name)) and found["stack"] in alike:
            sizes[found["stack"]] += tensor.spec.nbytes
    if not sizes:
        return {}
    most = alike[sizes.most_common(1)[0][0]]
    return {stack: height for stack, height in alike.items() if height == most}


def _kinds(stacks: Sequence[Mapping[int, set[Any]]], height: int, config: Config) -> list[int]:
    """The kind of each layer, as the first of its kind: tensors and shapes, and what the config says of it, are alike."""
    lists = [
        value
        for level in _levels(config)
        for key, value in level.items()
        if _is_per_layer(key, value, height)
    ]
    looks = [
        (frozenset().union(*(each[index] for each in stacks)), *(repr(each[index]) for each in lists))
        for index in range(height)
    ]
    first: dict[Any, int] = {}
    return [first.setdefault(look, index) for index, look in enumerate(looks)]


def _taken(kinds: Sequence[int], periods: Sequence[int], wanted: Wanted) -> Sequence[int]:
    """The layers to take.

    Raises:
        UsageError: there are none of those that are asked for, or they cannot be put together.
    """
    height = len(kinds)
    if (text := wanted.options["layers"]) is not None:
        asked = [index for index in _numbers(text) if index < height]
        if not asked:
            raise UsageError(f"--layers {text}: there are {height} layers, 0 to {height - 1}")
        if not _in_step(asked, periods):
            raise UsageError(
                f"--layers {text}: by the config, layers of a kind come every {listed(map(str, periods))}, and these would "
                "have places of other kinds",
                hint=f"take the first ones: --layers 0-{len(asked) - 1}",
            )
        return asked
    number = min(wanted.options["try_layers"] or 1, height)
    # Where it is unlike all others, it may be for being the last.
    last = [height - 1] * (kinds.count(kinds[-1]) == 1)
    first = [*last, 0] if number == 1 and kinds.count(0) > 1 else [0, *last]
    chosen = sorted(list(dict.fromkeys([*first, *kinds, *range(height)]))[:number])
    return chosen if _in_step(chosen, periods) else range(number)


def _numbers(text: str) -> list[int]:
    """`0-1` or `0-2,31` as numbers."""
    found: set[int] = set()
    for each in text.split(","):
        match = _FROM_TO.fullmatch(each.strip())
        if match is None or len(each) > 2 * _SHOWN or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--layers {text}", hint="write --layers 0-1, or 0-2,31")
        found.update(range(int(match[1]), min(int(match[2] or match[1]), int(match[1]) + (1 << 16)) + 1))
    return sorted(found)


def _in_step(layers: Sequence[int], periods: Iterable[int]) -> bool:
    """Whether each layer has, among those that are taken, a place of its own kind."""
    return all(index % period == place % period for period in periods for place, index in enumerate(layers))


# ------------------------------------------------------------------------------------- the config


def _levels(config: Config) -> Iterator[Config]:
    """A config and those in it, but for towers."""
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and not roles.having(Role.TOWER, [key]):
            yield from _levels(value)


def _counts(level: Config) -> list[str]:
    """The keys that say how many layers there are of something."""
    apart = {
        key
        for role in (Role.FURTHER_LAYERS, Role.FIRST_LAYERS, Role.LAST_LAYERS)
        for key in roles.having(role, level)
    }
    keys = roles.having(Role.HEIGHT, level)
    return [key for key in keys if type(level[key]) is int and key not in apart]


def _heights(level: Config) -> set[int]:
    """How many layers there are by a config, of anything; where it gives no number, by the list of their kinds."""
    lists = (level[key] for key in roles.having(Role.KINDS, level))
    listed_kinds = {len(each) for each in lists if isinstance(each, list | str)}
    return {level[key] for key in _counts(level)} or listed_kinds


def _is_per_layer(key: str, value: object, height: int) -> bool:
    """Whether a value has an entry for each layer; few other lists are as long."""
    if roles.having(Role.LAYER_NUMBERS, [key]) or roles.having(Role.NOT_PER_LAYER, [key]):
        return False
    return (
        isinstance(value, list | str)
        and len(value) == height
        and (isinstance(value, list) or bool(roles.having(Role.LETTERS, [key])))
    )


def _periods(config: Config, height: int) -> list[int]:
    """After how many layers those of a kind come again, as far as no list says the kind of each."""
    found = []
    for level in _levels(config):
        keys = roles.having(Role.PERIOD, level)
        if not any(_is_per_layer(key, value, height) for key, value in level.items()):
            keys += roles.having(Role.PERIOD_OF_KINDS, level)
        found += [level[key] for key in keys if type(level[key]) is int and level[key] > 1]
        cycles = (level[key] for key in roles.having(Role.CYCLE, level))
        found += [len(each) for each in cycles if isinstance(each, list) and 1 < len(each) != height]
    return found


def _config(config: Config, taken: Taken) -> dict[str, Any]:
    """A config that says which layers are taken."""
    made = {
        key: _config(value, taken)
        if isinstance(value, Mapping) and not roles.having(Role.TOWER, [key])
        else value
        for key, value in config.items()
    }
    further = roles.having(Role.FURTHER_LAYERS, config)
    for height in sorted(_heights(config) & taken.keys()):
        own = taken[height]
        if len(own) == height:
            continue
        made |= {key: len(own) for key in _counts(config) if config[key] == height}
        made |= {key: 0 for key in further if type(config[key]) is int}
        for key in roles.having(Role.OUTPUTS, config):  # of layers by their names; without, it is the last
            made.pop(key, None)
        for key in roles.having(Role.FIRST_LAYERS, config):
            if type(config[key]) is int and config[key] >= 0:
                made[key] = sum(index < config[key] for index in own)
        for key in roles.having(Role.LAST_LAYERS, config):
            if type(config[key]) is int:
                made[key] = sum(index >= height - config[key] for index in own)
        for key, value in config.items():
            if _is_per_layer(key, value, height):
                entries = [value[index] for index in own]
                made[key] = "".join(entries) if isinstance(value, str) else entries
            elif roles.having(Role.LAYER_NUMBERS, [key]) and isinstance(value, list):
                made[key] = [own.index(each) for each in value if each in own]
            elif (kinds := _repeated(value)) and len(kinds) == height:
                made[key] = [[[kinds[index] for index in own], 1]]
    return made


def _repeated(value: object) -> list[Any]:
    """What `[[["global", "local"], 12]]` stands for; nothing where it is not of this form."""
    if not isinstance(value, list) or not all(
        isinstance(each, list) and len(each) == 2 and isinstance(each[0], list) and type(each[1]) is int
        for each in value
    ):
        return []
    return [kind for kinds, times in value for kind in kinds * min(times, 1 << 10)]


# ---------------------------------------------------------------------------------- what is made


def _of_all(checkpoint: Checkpoint, cuts: Mapping[str, _Cut]) -> Checkpoint:
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


def _of_one(component: Component, cut: _Cut) -> Component:
    names = {name: cut.numbered(name) for name in component.tensors}
    return replace(
        component,
        tensors={name: component.tensors[name] for name, to in names.items() if to is not None},
        config=None if component.config is None else _config(component.config, cut.taken),
        unreadable={name: why for name, why in component.unreadable.items() if cut.numbered(name)},
        lacking={name: why for name, why in component.lacking.items() if cut.numbered(name)},
        numbered={name: to for name, to in names.items() if to not in (None, name)},
    )


def _alike(component: Component, cut: _Cut) -> _Cut:
    """The same layers of a model in another naming."""
    heights, _ = _stacks(component)
    further = {stack: height for stack, height in heights.items() if height in cut.taken}
    counted = _counted(heights, component.config) if component.config else further
    return replace(cut, stacks={stack: each for stack, each in counted.items() if each in cut.taken})


def _of_adapter(tensors: Mapping[str, Any], cuts: Collection[_Cut]) -> dict[str, Any]:
    """The tensors of an adapter to layers that are taken; its names have more before them, and end alike."""
    gone = {
        f"{stack}{index}."
        for cut in cuts
        for stack, height in cut.stacks.items()
        for index in set(range(height)).difference(cut.taken[height])
    }
    kept = {}
    for name, tensor in tensors.items():
        found = _INDEX.fullmatch(name)
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


def _said(cuts: Mapping[str, _Cut]) -> str:
    """Which layers of what are taken, and which kinds are not."""
    parts = []
    for directory, cut in cuts.items():
        for height, own in cut.taken.items():
            if len(own) == height:
                continue
            place = f" of {directory}/" if directory else ""
            parts.append(f"{'layer' if len(own) == 1 else 'layers'} {_ranges(own)} of {height}{place}")
            kinds = cut.kinds[height]
            if absent := {*kinds}.difference(kinds[index] for index in own):
                parts[-1] += (
                    f" (none like {_ranges(absent)}: --layers {_ranges([*own, *absent])} has all kinds)"
                )
    return ", ".join(parts)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-1,31`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ",".join(shown[:_SHOWN]) + (",..." if len(shown) > _SHOWN else "")


def _without_effect(checkpoint: Checkpoint, cuts: Mapping[str, _Cut], wanted: Wanted) -> UsageError:
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
