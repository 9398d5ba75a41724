"""What the files of a DeepSpeed checkpoint say, as far as a conversion needs it. Nothing is joined here.

Keys of both kinds of files: deepspeedai/DeepSpeed: deepspeed/runtime/engine.py (`_save_checkpoint`),
deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and deepspeed/runtime/bf16_optimizer.py (`state_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.ops import Expression
from streamconv.readers import numbers, state_dict, tree
from streamconv.readers.files import load_torch
from streamconv.readers.pickle import Record, describe, elements, under
from streamconv.readers.state_dict import StateDict
from streamconv.storage.location import Location
from streamconv.tensor import Shape, Stored

_SPLIT_EXPERTS = "zero3_partitioned"

Flats = tuple[Stored, ...]
"""One-dimensional tensors: one rank's part of each parameter group, or of each sub-group."""

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """One rank's optimizer file, with its part of the master weights.

    Attributes:
        path: of the file.
        stage: 1, 2 or 3; None where it is not said, which is what `BF16_Optimizer` writes.
        flats: the rank's part of each group.
        partition_count: among how many ranks each group is split.
        moments: `exp_avg` and the like -> the rank's part of each group.
        gaps: for each group, how many elements follow each parameter; empty where nothing does.
        slices: for each group, parameter -> (first element in the rank's part, elements); empty where unknown.
        step: how many steps the optimizer has taken, or None.
        scalars: the optimizer's settings.
        version: DeepSpeed's.
    """

    path: str
    stage: int | None
    flats: Flats
    partition_count: tuple[int, ...]
    moments: Mapping[str, Flats]
    gaps: tuple[tuple[int, ...], ...]
    slices: tuple[Mapping[str, tuple[int, int]], ...]
    step: float | None
    scalars: Mapping[str, Any]
    version: str | None


@dataclass(frozen=True, slots=True)
class ModelState:
    """A file with the model's own tensors.

    Attributes:
        path: of the file.
        module: what the engine's `state_dict()` has, in its order: 16-bit weights, and empty ones in stage 3.
        buffers: which of these are buffers.
        shapes: for each group or sub-group, parameter -> shape, in the order of the flats.
        frozen_shapes: of parameters that are not trained.
        frozen: their elements: whole, or the rank's part in stage 3.
        shared: another name -> the name that it stands for.
        loose: F32 weights in a stage-0 optimizer, without names, in the optimizer's order.
        universal: `universal_checkpoint_info`, or empty.
        tensor_parallel: ranks that share one stage's tensors; None where it is not said.
        scalars: numbers and texts of the run.
        unreadable: tensors of the model that cannot be read, and why.
        averaged: places in the file of averaged weights, which a training program has added to its own state.
    """

    path: str
    module: Mapping[str, Expression]
    buffers: frozenset[str]
    shapes: tuple[Mapping[str, Shape], ...]
    frozen_shapes: Mapping[str, Shape]
    frozen: Mapping[str, Expression]
    shared: Mapping[str, str]
    loose: tuple[Expression, ...]
    universal: Mapping[str, Any]
    tensor_parallel: int | None
    scalars: Mapping[str, Value]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()


def document(path: Location) -> dict[object, object]:
    """The dict in a torch file. Raises CheckpointError where there is none."""
    found = load_torch(path).content
    if not isinstance(found, dict):
        raise CheckpointError("it does not hold a dict, as DeepSpeed's files do")
    return found


def read_optimizer(path: Location, *, moments: bool) -> OptimizerState:
    """A rank's optimizer file.

    Args:
        path: of the file.
        moments: whether the optimizer state of the weights is wanted; with many ranks, it is most of the bytes.

    Raises:
        CheckpointError: it is damaged, or not one of stages 1 to 3.
    """
    top = document(path)
    state = top.get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError("it has no 'optimizer_state_dict'")
    stage = _stage(state.get("zero_stage"))
    key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
    if key not in state:
        raise CheckpointError(
            "it holds no partition of the weights in F32",
            hint="take the 16-bit weights with --weights model, if the stage has them",
        )  # fmt: skip
    if key == "fp32_flat_groups":
        stage = 3
    flats = tuple(_flat(value, key) for value in _list(state[key], key))
    inner = state.get("optimizer_state_dict") if stage == 3 else state.get("base_optimizer_state")
    found, step, settings = _moments(inner, flats)
    step = state.get("base_optimizer_state_step", step) if step is None else step
    return OptimizerState(
        str(path),
        stage,
        flats,
        _counts(state.get("partition_count")),
        found if moments else {},
        tuple(
            tuple(_count(gap) for gap in _list(gaps, "param_alignment_paddings"))
            for gaps in _list(state.get("param_alignment_paddings", []), "param_alignment_paddings")
        ),
        tuple(_slices(each) for each in _list(state.get("param_slice_mappings", []), "slices")),
        float(step) if isinstance(step, (int, float)) else None,
        settings,
        version if isinstance(version := top.get("ds_version"), str) else None,
    )


def read_model(path: Location) -> ModelState:
    """A file of model states.

    Raises:
        CheckpointError: it is damaged.
    """
    top = document(path)
    shapes = top.get("param_shapes")
    groups = [shapes] if isinstance(shapes, dict) else _list(shapes or [], "param_shapes")
    masters = elements(top, "optimizer", "fp32_groups")
    loose = [each for group in masters for each in (group if isinstance(group, list) else [group])]
    if any(
        under(layer, "checkpoint_format") == _SPLIT_EXPERTS for layer in elements(top, "ds_autoep_layers")
    ):
        raise CheckpointError(
            "its experts are split among replica groups (AutoEP under stage 3), which is not put together",
            hint="save a universal checkpoint with DeepSpeed's ds_to_universal, and convert that",
        )
    module = top.get("module")
    info = top.get("universal_checkpoint_info")
    shared = top.get("shared_params")
    degree = under(top, "checkpoint_parallel_dimensions", "tp_degree")
    own = _flattened(module)
    return ModelState(
        str(path),
        own.tensors if own is not None else {},
        frozenset(name for name in _list(top.get("buffer_names", []), "buffer_names") if isinstance(name, str)),
        tuple(_shapes(group) for group in groups),
        _shapes(top.get("frozen_param_shapes") or {}),
        tensors(top.get("frozen_param_fragments") or {}),
        {
            alias: name
            for alias, name in (shared.items() if isinstance(shared, dict) else ())
            if isinstance(alias, str) and isinstance(name, str)
        },
        tuple(each for each in loose if isinstance(each, Expression)),
        {key: value for key, value in info.items() if isinstance(key, str)} if isinstance(info, dict) else {},
        degree if type(degree) is int and degree > 0 else None,
        {
            key: tree.plain(value)
            for key, value in top.items()
            if isinstance(key, str) and isinstance(value, (int, float, str, bool))
        },
        own.unreadable if own is not None else {},
        state_dict.averages(top),
    )  # fmt: skip


def read_fragments(path: Location) -> dict[str, Expression]:
    """One rank's parts of the frozen parameters, and nothing else, from a file of model states."""
    return tensors(document(path).get("frozen_param_fragments") or {})


def read_tensors(path: Location) -> dict[str, Expression]:
    """The tensors in a file that holds a plain dict of them."""
    return tensors(document(path))


def tensors(value: object) -> dict[str, Expression]:
    """The tensors in a dict by their names; anything else in it is left out."""
    own = _flattened(value)
    return {} if own is None else own.tensors


def _flattened(value: object) -> StateDict | None:
    """A state dict; None where there is no tensor in a value."""
    if not isinstance(value, dict) or not tree.holds_tensors(value):
        return None
    return state_dict.flatten(value, "")


def _moments(state: object, flats: Flats) -> tuple[dict[str, Flats], float | None, dict[str, Any]]:
    """Per-element states of the optimizer by name, the number of steps, and its settings."""
    by_group = under(state, "state")
    # It is a list in elastic checkpoints.
    listed = list(by_group.values()) if isinstance(by_group, dict) else elements(state)
    parts = [part for part in listed if isinstance(part, dict)]
    groups = [group for group in elements(state, "param_groups") if isinstance(group, dict)]
    settings = [
        tree.plain({key: value for key, value in group.items() if key != "params"}) for group in groups
    ]
    counted = (_number(part.get("step")) for part in (*parts, *groups))
    step = next((found for found in counted if found is not None), None)
    moments = {}
    for name in parts[0] if parts else ():
        found = [value for part in parts if isinstance(value := part.get(name), Stored)]
        each_row = all(len(value.spec.shape) == 1 and value.spec.shape != (1,) for value in found)
        if isinstance(name, str) and name != "step" and each_row and len(found) == len(flats):
            moments[name] = tuple(found)
    return moments, step, {"param_groups": settings} if settings else {}


def _number(value: object) -> float | None:
    """A number, or the value of a one-element tensor, whose few bytes are read."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    found = numbers.values(value) if isinstance(value, Stored) and value.spec.numel == 1 else None
    return float(found[0]) if found else None


def _stage(value: object) -> int | None:
    number = value.args[0] if isinstance(value, Record) and value.args else value
    if number is None:
        return None
    if number not in (0, 1, 2, 3):
        raise CheckpointError(f"its ZeRO stage is {describe(number)}; 1, 2 and 3 are known")
    return number if isinstance(number, int) else None


def _list(value: object, key: str) -> Sequence[object]:
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(f"its '{key}' is {describe(value)}, not a list")
    return value


def _flat(value: object, key: str) -> Stored:
    if isinstance(value, Stored) and len(value.spec.shape) == 1:
        return value
    shape = list(value.spec.shape) if isinstance(value, Expression) else describe(value)
    raise CheckpointError(f"'{key}' holds {shape}, where one row of numbers is expected")


def _counts(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple(_count(each) for each in values)


def _count(value: object) -> int:
    count = numbers.natural(value)
    if count is None:
        raise CheckpointError(f"{describe(value)} stands where a count is expected")
    return count


def _shapes(value: object) -> dict[str, Shape]:
    if not isinstance(value, dict):
        raise CheckpointError("its 'param_shapes' is not a dict of shapes")
    return {str(name): _shape(name, shape) for name, shape in value.items()}


def _shape(name: object, value: object) -> Shape:
    shape = numbers.shape(value)
    if shape is None:
        raise CheckpointError("its shape is impossible", tensor=describe(name, quote=""))
    return shape


def _slices(value: object) -> dict[str, tuple[int, int]]:
    if not isinstance(value, dict):
        return {}
    found = {}
    for name, address in value.items():
        start, count = under(address, "start"), under(address, "numel")
        if isinstance(name, str) and type(start) is int and type(count) is int:
            found[name] = (start, count)
    return found
