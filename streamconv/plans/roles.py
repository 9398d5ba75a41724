"""What models call the tensors that have a role of their own, and their configs the sizes that all models have.

That is asked of models of which there is no table. The words are those of families, and are registered from above.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from functools import lru_cache

from streamconv.plans.architecture import Config


class Role(Enum):
    """What a name is that of."""

    HEAD = auto()  # a tensor that gives a number for each token
    EMBEDDING = auto()  # one with a row for each token
    ROUTER = auto()  # a tensor that chooses among experts
    LOOKED_UP = auto()  # one whose rows are looked up, and that no layer multiplies with
    LEFT_OUT = auto()  # a layer that files may leave out, because its weight is the embedding
    TURNED = auto()  # a matrix whose side is longer towards what it makes; broad, it lies [in, out]
    SCALED = auto()  # an embedding; a config that says it is the head too says more by that
    BUFFER = auto()  # one that models compute, and files may leave out
    LAYERS = auto()  # a config's number of layers
    FURTHER_LAYERS = auto()  # that of layers which it does not count with the others
    WIDTH = auto()  # a config's width of the embeddings
    OTHER_WIDTH = auto()  # where a config has it, embeddings have a width of their own

    # What is told of layers, of which a trial takes a few.
    FURTHER = auto()  # a tensor of what predicts further tokens, beside the layers
    HEIGHT = auto()  # a config's number of layers of any kind
    FIRST_LAYERS = auto()  # how many of the first are of a kind
    LAST_LAYERS = auto()  # how many of the last are
    LAYER_NUMBERS = auto()  # the numbers of those that are
    NOT_PER_LAYER = auto()  # a list that has no entry for each layer, whatever its length
    LETTERS = auto()  # text with a letter for each layer
    PERIOD = auto()  # after how many layers one of a kind comes again
    PERIOD_OF_KINDS = auto()  # the same, where no list says the kind of each
    KINDS = auto()  # a list of the kind of each layer, which may be all that tells their number
    CYCLE = auto()  # a list of kinds that come again and again
    OUTPUTS = auto()  # which layers give something, by names or numbers
    FRONT = auto()  # in the names of stacks that are no layers, but what comes before them
    STAGES = auto()  # where a config has it, layers are of ever other sizes
    TOWER = auto()  # a part for images or sound, to whose layers others may refer; also in names
    WITH_LAYERS = auto()  # where a config has it, some tensor outside has a part for each layer


Names = Mapping[Role, tuple[str, ...]]
"""Of tensors: the last parts of their names, as regular expressions. Of configs: keys, of which the first counts."""

ROLES: dict[str, Names] = {}
"""What is registered, by the package that has it."""


def having(role: Role, names: Iterable[str]) -> list[str]:
    """Those of some tensors' names that have a role."""
    pattern = _pattern(words(role))
    return [name for name in names if pattern.fullmatch(name)]


def layers(config: Config) -> tuple[int, ...]:
    """How many layers there may be by a config, without further ones and with them; empty where it does not say."""
    count, *_ = *_numbers(Role.LAYERS, config), None
    return () if count is None else (count, count + sum(_numbers(Role.FURTHER_LAYERS, config)))


def width(config: Config) -> int | None:
    """How wide the embeddings are by a config; None where it does not say."""
    found, *_ = *_numbers(Role.WIDTH, config), None
    return None if any(config.get(key) for key in words(Role.OTHER_WIDTH)) else found


def words(role: Role) -> tuple[str, ...]:
    """The regular expressions of a role, those of all families."""
    return tuple(word for names in ROLES.values() for word in names.get(role, ()))


@lru_cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({'|'.join(words)})" if words else "(?!)")


def _numbers(role: Role, config: Config) -> list[int]:
    return [config[key] for key in words(role) if isinstance(config.get(key), int)]
