"""What a config says of layers: how many there are, which are alike, and the same of a few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamconv.plans import roles
from streamconv.plans.architecture import Config
from streamconv.plans.roles import Role

Taken = Mapping[int, Sequence[int]]
"""Which layers are taken, in ascending order, by the height of their stacks."""


def levels_of(config: Config) -> Iterator[Config]:
    """A config and those in it, but for towers."""
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and not roles.having(Role.TOWER, [key]):
            yield from levels_of(value)


def _counts(level: Config) -> list[str]:
    """The keys that say how many layers there are of something."""
    apart = {
        key
        for role in (Role.FURTHER_LAYERS, Role.FIRST_LAYERS, Role.LAST_LAYERS)
        for key in roles.having(role, level)
    }
    keys = roles.having(Role.HEIGHT, level)
    return [key for key in keys if type(level[key]) is int and key not in apart]


def heights_of(level: Config) -> set[int]:
    """How many layers there are by a config, of anything; where it gives no number, by the list of their kinds."""
    lists = (level[key] for key in roles.having(Role.KINDS, level))
    listed_kinds = {len(each) for each in lists if isinstance(each, list | str)}
    return {level[key] for key in _counts(level)} or listed_kinds


def is_per_layer(key: str, value: object, height: int) -> bool:
    """Whether a value has an entry for each layer; few other lists are as long."""
    if roles.having(Role.LAYER_NUMBERS, [key]) or roles.having(Role.NOT_PER_LAYER, [key]):
        return False
    return (
        isinstance(value, list | str)
        and len(value) == height
        and (isinstance(value, list) or bool(roles.having(Role.LETTERS, [key])))
    )


def periods_of(config: Config, height: int) -> list[int]:
    """After how many layers those of a kind come again, as far as no list says the kind of each."""
    found = []
    for level in levels_of(config):
        keys = roles.having(Role.PERIOD, level)
        if not any(is_per_layer(key, value, height) for key, value in level.items()):
            keys += roles.having(Role.PERIOD_OF_KINDS, level)
        found += [level[key] for key in keys if type(level[key]) is int and level[key] > 1]
        cycles = (level[key] for key in roles.having(Role.CYCLE, level))
        found += [len(each) for each in cycles if isinstance(each, list) and 1 < len(each) != height]
    return found


def config_of(config: Config, taken: Taken) -> dict[str, Any]:
    """A config that says which layers are taken."""
    made = {
        key: config_of(value, taken)
        if isinstance(value, Mapping) and not roles.having(Role.TOWER, [key])
        else value
        for key, value in config.items()
    }
    further = roles.having(Role.FURTHER_LAYERS, config)
    for height in sorted(heights_of(config) & taken.keys()):
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
            if is_per_layer(key, value, height):
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
