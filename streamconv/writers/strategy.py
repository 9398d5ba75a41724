"""Strategies, as MindSpore reads them: how each tensor is split, made from what a naming says."""

from __future__ import annotations

import json
from collections.abc import Mapping

from streamconv.ops import Expression
from streamconv.readers.mindspore.strategy import Layout
from streamconv.readers.splits import WHOLE, Naming


def layouts(tensors: Mapping[str, Expression], naming: Naming, ranks: int, stages: int) -> dict[str, Layout]:
    """How tensors are split among tensor-parallel ranks and stages of a pipeline.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    result: dict[str, Layout] = {}
    for name, stage in naming.stages(tensors, stages).items():
        cut = (naming.sharding(name) or WHOLE).axis if ranks > 1 else None
        axes = tuple((0,) if axis == cut else () for axis in range(len(tensors[name].spec.shape)))
        result[name] = Layout((stage,), (ranks,), axes)
    return result


def strategy_json(how: Mapping[str, Layout]) -> str:
    """The strategy as a file that MindSpore reads; of several stages, merged as its own tool does."""
    several = any(layout.stages != (0,) for layout in how.values())
    items = {
        f"{stage}-{name}" if several else name: {
            "dev_matrix": list(layout.grid),
            "tensor_map": [axes[0] if axes else -1 for axes in layout.axes],
            "param_split_shape": [],
            "indices_offset": [],
            "field": 0,
            "opt_weight_shard_step": 0,
            "opt_weight_shard_size": 0,
        }
        for name, layout in how.items()
        for stage in layout.stages
    }
    document = {"current_stage": 0, "parallel_strategy_item": {}, "parallel_layout_item": items}
    return json.dumps(document, indent=1) + "\n"
