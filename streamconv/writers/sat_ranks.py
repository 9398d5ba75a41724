"""A model's tensors as the model-parallel ranks of SAT hold them: one file per rank."""

from __future__ import annotations

from streamconv.writers.ranks import RankFiles

ranks = RankFiles("sat", "mp_rank_{rank:02d}")
