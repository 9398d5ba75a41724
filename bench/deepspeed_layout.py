"""DeepSpeed checkpoints in DeepSpeed's layout without DeepSpeed: of any size, as holes or with contents.

Keys and order are those of files that DeepSpeed 0.19 has written; `tests/test_deepspeed.py` reads such files and
these alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from streamconv.ops import Expression, leaves
from streamconv.readers import torch_zip
from streamconv.storage.location import locate

Shape = tuple[int, ...]

_SUB_GROUP = 1_000_000_000
_TAG = "global_step10"
_BLOCK = 32 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """A model under ZeRO.

    Attributes:
        shapes: of its parameters, in order.
        stage: 2 or 3.
        ranks: data-parallel ranks.
        model_rank: of the model-parallel rank that this is.
        extra: more keys of the model's states.
    """

    shapes: Mapping[str, Shape]
    stage: int
    ranks: int
    model_rank: int = 0
    extra: Mapping[str, Any] | None = None


def write(directory: Path, layout: Layout, values: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint; its tag's directory.

    Args:
        directory: where `latest` goes.
        layout: what to write.
        values: the F32 weights. Without them, all tensors' bytes are holes.
    """
    tag = directory / _TAG
    tag.mkdir(parents=True, exist_ok=True)
    (directory / "latest").write_text(_TAG)
    rows = _rows_of_stage_3(layout, values) if layout.stage == 3 else _rows_of_stage_2(layout, values)
    for rank, flats in enumerate(rows):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_{layout.model_rank:02d}_optim_states.pt"
        _save(_optimizer(layout, flats), tag / name, hollow=values is None)
    for rank in range(layout.ranks if layout.stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if layout.stage == 3 else ""
        name = f"{prefix}mp_rank_{layout.model_rank:02d}_model_states.pt"
        _save(_model(layout, values), tag / name, hollow=values is None)
    return tag


def fill(tag: Path) -> int:
    """Put random bytes, finite as F32 and as BF16, where a checkpoint's files have holes; bytes of all files."""
    numbers = torch.randn(_BLOCK // 4, generator=torch.Generator().manual_seed(0)) * 0.02
    block = memoryview(numbers.bfloat16().float().numpy()).cast("B")
    total = 0
    for path in sorted(tag.iterdir()):
        extents = {extent for tensor in _tensors(torch_zip.load(locate(path)).content) for leaf in leaves(tensor)
                   for extent in leaf.extents}  # fmt: skip
        with path.open("r+b") as file:
            for extent in sorted(extents, key=lambda extent: extent.offset):
                for start in range(0, extent.length, _BLOCK):
                    os.pwrite(
                        file.fileno(), block[: min(_BLOCK, extent.length - start)], extent.offset + start
                    )
        total += path.stat().st_size
    return total


def _tensors(value: object) -> list[Expression]:
    if isinstance(value, Expression):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


def _rows_of_stage_2(layout: Layout, values: Mapping[str, torch.Tensor] | None) -> list[list[torch.Tensor]]:
    """Each rank's part of the one group, the padding at the end left off."""
    total = sum(map(prod, layout.shapes.values()))
    part = -(-total // (2 * layout.ranks)) * 2
    bounds = [min(rank * part, total) for rank in range(layout.ranks + 1)]
    if values is None:
        return [[torch.empty(end - start)] for start, end in pairwise(bounds)]
    row = torch.cat([values[name].float().reshape(-1) for name in layout.shapes])
    return [[row[start:end].clone()] for start, end in pairwise(bounds)]


def _rows_of_stage_3(layout: Layout, values: Mapping[str, torch.Tensor] | None) -> list[list[torch.Tensor]]:
    """Each rank's pieces of each sub-group's parameters, end to end."""
    rows: list[list[torch.Tensor]] = []
    for rank in range(layout.ranks):
        flats = []
        for group in _sub_groups(layout.shapes):
            pieces = {name: -(-prod(layout.shapes[name]) // layout.ranks) for name in group}
            if values is None:
                flats.append(torch.empty(sum(pieces.values())))
                continue
            parts = []
            for name, count in pieces.items():
                own = values[name].float().reshape(-1)[rank * count : (rank + 1) * count]
                parts.append(torch.nn.functional.pad(own, (0, count - len(own))))
            flats.append(torch.cat(parts))
        rows.append(flats)
    return rows


def _sub_groups(shapes: Mapping[str, Shape]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held + prod(shape) > _SUB_GROUP and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += prod(shape)
    return groups


def _optimizer(layout: Layout, flats: Sequence[torch.Tensor]) -> dict[str, Any]:
    moments = {
        index: {
            "step": torch.tensor(10.0),
            "exp_avg": torch.empty_like(flat),
            "exp_avg_sq": torch.empty_like(flat),
        }
        for index, flat in enumerate(flats)
    }
    base = {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]}
    if layout.stage == 3:
        state = {
            "zero_stage": 3,
            "partition_count": layout.ranks,
            "optimizer_state_dict": base,
            "fp32_flat_groups": list(flats),
        }
    else:
        state = {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": list(flats),
            "zero_stage": layout.stage,
            "group_paddings": [0],
            "partition_count": [layout.ranks],
        }
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}


def _model(layout: Layout, values: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
    shapes = layout.shapes
    if layout.stage == 3:
        module = {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes}
        groups = [{name: torch.Size(shapes[name]) for name in group} for group in _sub_groups(shapes)]
    else:
        row = torch.empty(sum(map(prod, shapes.values())), dtype=torch.bfloat16)
        module, at = {}, 0
        for name, shape in shapes.items():
            module[name] = row[at : at + prod(shape)].view(shape)
            if values is not None:
                module[name].copy_(values[name])
            at += prod(shape)
        groups = [{name: torch.Size(shape) for name, shape in shapes.items()}]
    return {
        "module": module, "buffer_names": [], "optimizer": None, "param_shapes": groups, "frozen_param_shapes": None,
        "shared_params": {}, "frozen_param_fragments": None, "global_steps": 10, "dp_world_size": layout.ranks,
        "mp_world_size": 1, "ds_config": {}, "ds_version": "0.19.8", **(layout.extra or {}),
    }  # fmt: skip


def _save(document: dict[str, Any], path: Path, *, hollow: bool) -> None:
    if hollow:
        with torch.serialization.skip_data():
            torch.save(document, path)
    else:
        torch.save(document, path)
