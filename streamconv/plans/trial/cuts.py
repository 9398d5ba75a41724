"""The stacks of layers in a component, and which layers of them are taken."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamconv.errors import UsageError, listed
from streamconv.plans import roles
from streamconv.plans.architecture import Config
from streamconv.plans.roles import Role
from streamconv.plans.trial.depth import Taken, heights_of, is_per_layer, levels_of, periods_of
from streamconv.plans.wanted import Wanted
from streamconv.readers.checkpoint import Component

INDEX = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<index>\d+)(?P<rest>(?:\..*)?)", re.DOTALL)
"""A name by the first number in it."""
_FROM_TO = re.compile(r"(\d+)(?:-(\d+))?")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Cut:
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
        found = INDEX.fullmatch(name)
        height = self.stacks.get(found["stack"]) if found else None
        if found is None or height is None:
            return None if roles.having(Role.FURTHER, [name]) else name
        own = self.taken[height]
        index = int(found["index"])
        return f"{found['stack']}{own.index(index)}{found['rest']}" if index in own else None


def cut_of(component: Component, config: Config | None, wanted: Wanted) -> Cut | None:
    """Which layers of a component are taken; None where it has none, and stays whole."""
    heights, contents = stacks_of(component)
    stacks = _largest(component, heights, contents) if config is None else counted_by(heights, config)
    if not stacks:
        return None
    kinds: dict[int, Sequence[int]] = {}
    taken: dict[int, Sequence[int]] = {}
    for height in dict.fromkeys(stacks.values()):
        own = [contents[stack] for stack, each in stacks.items() if each == height]
        kinds[height] = _kinds(own, height, config or {})
        taken[height] = _taken(kinds[height], periods_of(config or {}, height), wanted)
    return Cut(stacks, taken, kinds)


def same_of(component: Component, cut: Cut) -> Cut:
    """The same layers of a model in another naming."""
    heights, _ = stacks_of(component)
    further = {stack: height for stack, height in heights.items() if height in cut.taken}
    counted = counted_by(heights, component.config) if component.config else further
    return replace(cut, stacks={stack: each for stack, each in counted.items() if each in cut.taken})


def stacks_of(component: Component) -> tuple[dict[str, int], dict[str, dict[int, set[Any]]]]:
    """The heights of what is numbered from 0 on without a gap, by its prefix; and what lies at each number."""
    contents: dict[str, dict[int, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in component.tensors.items():
        found = INDEX.fullmatch(name)
        if found and found["stack"]:
            contents[found["stack"]][int(found["index"])].add((found["rest"], tensor.spec.shape))
    heights = {stack: len(each) for stack, each in contents.items() if max(each) == len(each) - 1}
    return heights, contents


def counted_by(heights: Mapping[str, int], config: Config) -> dict[str, int]:
    """The stacks that a config counts, with the heights that it says."""
    levels = list(levels_of(config))
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
            said = heights_of(level)
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
        if (found := INDEX.fullmatch(name)) and found["stack"] in alike:
            sizes[found["stack"]] += tensor.spec.nbytes
    if not sizes:
        return {}
    most = alike[sizes.most_common(1)[0][0]]
    return {stack: height for stack, height in alike.items() if height == most}


def _kinds(stacks: Sequence[Mapping[int, set[Any]]], height: int, config: Config) -> list[int]:
    """The kind of each layer, as the first of its kind: tensors and shapes, and what the config says of it, are alike."""
    lists = [
        value
        for level in levels_of(config)
        for key, value in level.items()
        if is_per_layer(key, value, height)
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


def ranges(numbers: Iterable[int]) -> str:
    """`0-1,31`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ",".join(shown[:_SHOWN]) + (",..." if len(shown) > _SHOWN else "")
