"""Adapters whose training began by taking their first product from the base: what they add to the base as it was.

With the adapter as it was saved before training, A0 and B0, that is s (B A - B0 A0): a plain LoRA of twice the rank, as peft
makes one of the two (huggingface/peft 0.21: tuners/lora/model.py, `subtract_mutated_init`; tuners/lora/layer.py,
`update_layer`, for what changes `base_layer.weight`). Without it the base that training had cannot be made again to the bit:
it is a decomposition, of the weights or of what was seen in training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import UsageError, listed
from streamconv.ops import Affine, Concat, Expression, apply
from streamconv.plans.adapters.adapter import Adapter, saved_as, unwrapped
from streamconv.plans.adapters.sums import wide
from streamconv.readers import open_checkpoint, read_config_file
from streamconv.shard import ADAPTER_CONFIG
from streamconv.storage.location import Location

BEGINNING = "init_lora_weights"

_CHANGES_BASE = re.compile(r"(?P<kind>pissa|olora|corda|lora_ga|loftq)(_.*)?", re.IGNORECASE)
_LOST = "loftq"
"""The way after which nothing says what the base was: it is quantised, and the factors hold part of what that lost."""

_INITIAL = re.compile(r"(.*[-_.])?init(ial)?([-_.].*)?", re.IGNORECASE)
_FACTOR = re.compile(r".*\.lora_(embedding_)?(?P<side>[AB])(\.weight)?")
_SETTINGS = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether training began with another base than the one that the config names."""
    return _CHANGES_BASE.fullmatch(str(config.get(BEGINNING))) is not None


def began_there(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an adapter for the base that its training changed, which it is a plain LoRA for."""
    return {**config, BEGINNING: True} if changes_base(config) else dict(config)


def refuse_beginning(adapter: Adapter) -> None:
    """Refuse an adapter that is to be added to another base than the one that its config names.

    Raises:
        UsageError: it is one.
    """
    found = _CHANGES_BASE.fullmatch(str(adapter.config.get(BEGINNING)))
    if found is None:
        return
    kind = found["kind"].lower()
    ways = ["merge it with peft"] if kind != "lora_ga" else []
    if kind != _LOST:
        ways += [
            f"put the adapter as it was saved before training beside it, in a directory {kind}_init",
            "save it from training with save_pretrained(..., path_initial_model_for_weight_conversion=DIR)",
        ]
    raise UsageError(
        f"the adapter cannot be merged: {BEGINNING} is '{found[0]}', which changed the weights of the base before "
        "training, and it belongs to those",
        file=adapter.path,
        hint=f"{', or '.join(ways)}; where SRC is that changed base, set it to true in adapter_config.json",
    )


def without_beginning(adapter: Adapter, path: Location) -> Adapter:
    """The adapter for the base as it was, where its initial one lies in its directory or beside that; else the same one.

    Raises:
        UsageError: there are several, or what is there is not the initial one of this adapter.
    """
    found = _CHANGES_BASE.fullmatch(str(adapter.config.get(BEGINNING)))
    if found is None or found["kind"].lower() == _LOST or adapter.config.get("target_parameters"):
        return adapter
    place = _initial(path if path.is_directory() else path.parent, adapter.path)
    if place is None:
        return adapter
    opened = open_checkpoint(place)
    opened.require_readable()
    initial = {saved_as(unwrapped(name)): tensor for name, tensor in opened.items()}
    config = read_config_file(place / ADAPTER_CONFIG)
    for key, default in _SETTINGS.items():
        if (config.get(key) or default) != (adapter.config.get(key) or default):
            raise _another(
                adapter, place, f"{key} is {config.get(key)} there, and {adapter.config.get(key)} here"
            )
    tensors = {}
    for name, tensor in adapter.tensors.items():
        factor = _FACTOR.fullmatch(own := saved_as(name))
        if factor is None:
            tensors[name] = tensor
            continue
        before = initial.get(own)
        if before is None or before.spec.shape != tensor.spec.shape:
            what = "no such tensor" if before is None else f"its shape is {list(before.spec.shape)}"
            raise _another(adapter, place, f"{what} there, and {list(tensor.spec.shape)} here", name)
        tensors[name] = _both(tensor, before, first=factor["side"] == "A")
    return replace(
        adapter, tensors=tensors, config=_doubled(adapter.config), places=(*adapter.places, opened.path),
        notes=(f"the adapter began as the one in {place}, which changed the base ({found[0]}): it is taken away again",),
    )  # fmt: skip


def _initial(directory: Location, path: str) -> Location | None:
    """The directory of an initial adapter: in that of the adapter, else beside it; None where there is none."""
    for above in (directory, directory.parent):
        found = [
            entry
            for entry in above.glob("*[iI][nN][iI][tT]*")
            if _INITIAL.fullmatch(entry.name)
            and entry.place != directory.place
            and (entry / ADAPTER_CONFIG).is_file()
        ]
        if len(found) > 1:
            raise UsageError(
                f"the adapter may have begun as any of {listed([entry.name for entry in found])}", file=path,
                hint="leave the one as which it was saved before training beside it",
            )  # fmt: skip
        if found:
            return found[0]
    return None


def _another(adapter: Adapter, place: Location, why: str, name: str | None = None) -> UsageError:
    return UsageError(
        f"what lies in {place} is not what this adapter was before training: {why}", file=adapter.path, tensor=name,
        hint="put the adapter there that training saved before it began, or move that directory away",
    )  # fmt: skip


def _both(factor: Expression, before: Expression, *, first: bool) -> Expression:
    """A and A0 one below the other, or B and -B0 side by side."""
    if factor.spec.dtype != before.spec.dtype:
        factor, before = wide(factor), wide(before)
    if not first:
        before = apply(Affine(-1.0, 0.0), before)[0]
    return apply(Concat(0 if first else 1), factor, before)[0]


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of factors of twice the rank, with the same scale."""
    more = math.sqrt(2) if config.get("use_rslora") else 2
    made = {**config, BEGINNING: True}
    for key, times in (("r", 2), ("lora_alpha", more)):
        if isinstance(config.get(key), int | float):
            made[key] = config[key] * times
    for key, times in (("rank_pattern", 2), ("alpha_pattern", more)):
        made[key] = {pattern: value * times for pattern, value in (config.get(key) or {}).items()}
    return made
