"""A model's tensors as MindSpore's ranks hold them: the mirror of what `readers.mindspore.ranks` joins.

A rank's files are called as MindFormers calls what it loads.
"""

from __future__ import annotations

from streamconv.writers.ranks import RankFiles

ranks = RankFiles("mindformers", "rank_{rank}/checkpoint_{rank}", strategy="strategy.json")
