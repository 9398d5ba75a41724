"""One module a family of models: its tables, its rules to others, its config, its tokenizer.

The only room that knows a model's name. Nothing below imports it: `register` hands its recipes to the plans, and to
the readers what identifies its checkpoints, and how ranks share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from streamconv.dtypes import DType
from streamconv.families import cogvideox_files, cogvlm, meta_llama, one_file, roles, splits, whisper
from streamconv.plans import registry
from streamconv.plans.architecture import Config
from streamconv.plans.recipe import Recipe
from streamconv.plans.roles import ROLES
from streamconv.readers import opening
from streamconv.readers.opening import Identify
from streamconv.readers.splits import NAMINGS

_IDENTIFYING = (cogvideox_files, cogvlm, meta_llama, whisper, one_file)
IDENTITIES: tuple[Identify, ...] = tuple(family.identified for family in _IDENTIFYING)
"""Of families whose checkpoints come without a `config.json`."""


def recipes() -> Sequence[Recipe]:
    """Those of all families. Their tables take a while to make, and a run that only re-shards needs none."""
    from streamconv.families.every import RECIPES

    return RECIPES


def kept(config: Config, dtype: DType) -> Iterable[str]:
    """What the library that loads a model with this config keeps in F32 in another `dtype`."""
    from streamconv.families import kept_in_fp32

    return kept_in_fp32.kept(config, dtype)


def layers_of() -> Mapping[str, tuple[str, ...]]:
    """What the layers of models without a table here are called, by model type."""
    from streamconv.families import layers

    return layers.LAYERS


def heads_of() -> registry.Heads:
    """What is known of heads that files leave out."""
    from streamconv.families import heads

    return registry.Heads(heads.has_head, heads.head_of)


def register() -> None:
    """Make these families known to readers and plans; again does no harm."""
    opening.register(*IDENTITIES)
    NAMINGS.update(splits.NAMINGS)
    ROLES[__name__] = roles.ROLES
    registry.LOADERS[__name__] = recipes
    registry.KEPT[__name__] = kept
    registry.HEADS[__name__] = heads_of
    registry.LAYERS[__name__] = layers_of
