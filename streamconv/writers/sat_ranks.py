"""A model's tensors as the model-parallel ranks of SAT hold them: one file per rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from streamconv.readers.sat import CONFIG
from streamconv.writers.layout import Wrapping
from streamconv.writers.ranks import RankFiles

ranks = RankFiles("sat", "mp_rank_{rank:02d}")


def around(config: Mapping[str, Any] | None, count: int) -> Wrapping:
    """What a model that is SAT's already has around its tensors, on so many ranks."""
    texts = {"latest": "1"}
    if config is not None:
        texts[CONFIG] = json.dumps({**config, "model_parallel_size": count}, indent=4) + "\n"
    return Wrapping("1/mp_rank_00_model_states.pt", "module", texts=texts)
