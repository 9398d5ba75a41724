"""What a conversion is to produce: everything that a plan is made from, besides the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamconv.plans.edits import Edits
from streamconv.plans.lora import Adapter
from streamconv.plans.recipe import Recipe
from streamconv.plans.vocabulary import Vocabulary
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.mindspore.strategy import Layout


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a conversion is to produce.

    Attributes:
        to: the target format, a name of `writers.formats.FORMATS`.
        max_shard: the most bytes of tensors in one file.
        ranks: model-parallel ranks, each with a file of its own, where the format has such.
        stages: of a pipeline, where the format has such.
        strategy: of MindSpore, how each tensor is split among ranks, instead of the two.
        crc: end files of MindSpore with a checksum.
        edits: what is done to names and dtypes.
        recipe: what is done to the architecture, or None; `auto` finds it by the config and the names.
        to_arch: the architecture to find a recipe for, or None.
        reverse: whether `recipe` is read backwards.
        config: of the source, instead of its own.
        like: a checkpoint whose config the target has.
        vocabulary: how many rows embedding and head are to have; None: as many as they have.
        lora: an adapter to merge into the source before all else.
        lora_scale: of a LoRA that lies unmerged in the source; None: 1 / rank.
        allow_unmatched: whether tensors that the recipe does not know are left out.
        side_files: whether configs, tokenizers and the like come along.
        arguments: the options all this was made from, kept in the plan.
    """

    to: str = "safetensors"
    max_shard: int = 5 * 1000**3
    ranks: int = 1
    stages: int = 1
    strategy: Mapping[str, Layout] | None = None
    crc: bool = False
    edits: Edits = field(default_factory=Edits)
    recipe: Recipe | Literal["auto"] | None = None
    to_arch: str | None = None
    reverse: bool = False
    config: Mapping[str, Any] | None = None
    like: Checkpoint | None = None
    vocabulary: Vocabulary | None = None
    lora: Adapter | None = None
    lora_scale: float | None = None
    allow_unmatched: bool = False
    side_files: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
