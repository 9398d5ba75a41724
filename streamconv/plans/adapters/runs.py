"""A LoRA of peft that lies in a training run: made what peft loads, or merged into the frozen base beside it.

DeepSpeed, FSDP, accelerate and torch save what the wrapped model calls its tensors: the factors below the adapter's name, and
the base's weights, where the run has them, below `base_layer`. (huggingface/peft 0.21: utils/save_and_load.py.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import UsageError, count, listed
from streamconv.ops import Expression, renamed
from streamconv.plans.adapters.adapter import (
    KIND,
    PREFIX,
    Adapter,
    adapter_names,
    is_part,
    saved_as,
    unwrapped,
)
from streamconv.plans.adapters.beginnings import began_there
from streamconv.plans.adapters.files import config_beside, described
from streamconv.plans.adapters.merging import merge
from streamconv.plans.findings import Findings
from streamconv.plans.wrappers import plain
from streamconv.readers.checkpoint import Component
from streamconv.shard import ADAPTER_STEMS
from streamconv.storage.location import Location

_SAVED, _BEFORE = ".modules_to_save.", ".original_module."


def settled(
    component: Component,
    path: Location,
    scale: float | None,
    findings: Findings,
    *,
    keep: bool,
    as_wide: bool,
) -> Component:
    """A component whose LoRA is merged into the base beside it; where there is none, or with `keep`, the adapter alone.

    Raises:
        UsageError: what it is multiplied by is not known, or there are several adapters.
        PlanError: it does not fit.
    """
    own = {unwrapped(name).removeprefix(PREFIX): tensor for name, tensor in component.tensors.items()}
    parts = {name: tensor for name, tensor in own.items() if is_part(name) or _SAVED in name}
    names = adapter_names(parts) | {
        name.split(_SAVED)[1].partition(".")[0] for name in parts if _SAVED in name
    }
    if len(names) > 1:
        raise UsageError(
            f"there are {len(names)} adapters in it: {listed(sorted(names))}",
            file=str(path), hint="take one of them: --drop '*.NAME.*' for each of the others",
        )  # fmt: skip
    config = dict(config_beside(path) or {})
    base = {plain(name): tensor for name, tensor in own.items() if name not in parts and _BEFORE not in name}
    has_base = any(".base_layer." in name for name in own)
    if keep or not has_base:
        return _alone(component, path, parts if has_base else own, config, scale, findings)
    adapter = Adapter(
        {PREFIX + name: tensor for name, tensor in parts.items()},
        # The base beside it is the one that training began with, changed or not.
        began_there(config) or {KIND: "LORA"},
        str(path),
        scale,
    )
    under_own = {name: renamed(tensor, name) for name, tensor in base.items()}
    findings.notes.append("the frozen base and the adapter lie in one checkpoint, and are merged")
    return merge(replace(component, tensors=under_own), adapter, findings, as_wide=as_wide)


def _alone(
    component: Component, path: Location, parts: Mapping[str, Expression], config: dict[str, Any], scale: float | None,
    findings: Findings,
) -> Component:  # fmt: skip
    """The adapter as peft saves it: names, and a config that says its scale."""
    tensors = {}
    for name, tensor in parts.items():
        saved = PREFIX + saved_as(name)
        tensors[saved] = renamed(tensor, saved)
    made = Adapter(tensors, config)
    if scale is not None or not config:
        ranks = {
            module: parts[part].spec.shape[0]
            for module, parts in made.modules.items()
            for part in ("lora_A", "lora_embedding_A")
            if part in parts
        }
        if scale is None or not ranks:
            raise UsageError(
                "the adapter's alpha is not known: there is no adapter_config.json beside it",
                file=str(path), hint="put it there, or give the scale, alpha / rank, with --lora-scale",
            )  # fmt: skip
        config = described(made, {module: (rank, scale * rank) for module, rank in ranks.items()})
    findings.notes.append(
        f"the adapter in it is written as peft loads it, {count(len(made.modules), 'layer')}"
        + (": without the frozen base beside it" if len(parts) < len(component.tensors) else "")
    )
    return replace(
        component, directory="", stem=ADAPTER_STEMS[0], variant=None, tensors=tensors, config=config
    )
