"""An adapter's files, whatever program wrote them: the tensors, and the config or what takes its place.

peft writes `adapter_config.json` beside, diffusers puts the same settings into the file's header, kohya's programs and
ComfyUI have an alpha beside the factors, or none, which means that it is the rank. A training run has the config beside it,
or above. (huggingface/diffusers 0.42: loaders/lora_base.py, `lora_adapter_metadata`.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from streamconv import readers
from streamconv.errors import UsageError
from streamconv.plans.adapters.adapter import KIND, Adapter, is_part, of_peft, unwrapped
from streamconv.plans.adapters.beginnings import without_beginning
from streamconv.plans.loading import is_vocabulary
from streamconv.readers.checkpoint import Checkpoint
from streamconv.shard import ADAPTER_CONFIG
from streamconv.storage.location import Location

_SETTINGS = "lora_adapter_metadata"
_OTHERS = (
    (re.compile(r"\.((mindpet|tk)_delta_)?lora_[abAB]$"), "of MindFormers: make it peft's first, --recipe mindformers-...-lora"),
    (re.compile(r"\.matrix_[AB]\.\d+"), "of SAT: merge it where it lies, with the base weights in one checkpoint"),
)  # fmt: skip


def read_adapter(path: Location, scale: float | None) -> Adapter:
    """The adapter in a file or directory; `scale` takes the place of what it says.

    Raises:
        UsageError: there is none.
        CheckpointError: it is damaged.
    """
    if not path.exists():
        raise UsageError("there is no such adapter", file=str(path), hint="give its directory, or its file")
    opened = readers.open_checkpoint(path)
    config = config_of(path, opened)
    opened.require_readable()
    own = {unwrapped(name): tensor for name, tensor in opened.items()}
    if not config.get(KIND) and not any(map(is_part, own)):
        other = next((hint for pattern, hint in _OTHERS if any(pattern.search(name) for name in own)), None)
        raise UsageError(
            "there is no adapter in it: no tensor is a factor of one, and no adapter_config.json is beside it",
            file=str(path),
            hint=f"it looks like an adapter {other}"
            if other
            else "--lora takes an adapter, and SRC the base",
        )
    if any(name.endswith(".weight") and of_peft(name) and not is_part(name) for name in own) and _holds_base(
        own
    ):
        # A run that saved the frozen base too: what was not trained is the base's own.
        own = {name: tensor for name, tensor in own.items() if is_part(name) or "modules_to_save" in name}
    if not config and any(map(of_peft, own)):
        config = {KIND: "LORA"}
    return without_beginning(Adapter(own, config, str(path), scale, (opened.path,)), path)


def _holds_base(own: Mapping[str, object]) -> bool:
    """Whether what is there is a whole model with its adapter: layers beside the factors have their weights.

    An embedding and a head alone are what peft saves where these are adapted: they may have rows that the base has not.
    """
    held = [name for name in own if name.endswith(".base_layer.weight")]
    known = [name.replace(".base_layer.", ".") for name in held]
    return any(not is_vocabulary(name) for name in known)


def config_beside(path: Location) -> Mapping[str, Any] | None:
    """The `adapter_config.json` beside an adapter, or above it; None where there is none."""
    directory = path if path.is_directory() else path.parent
    for place in (directory, directory.parent):
        if (place / ADAPTER_CONFIG).is_file():
            return readers.read_config_file(place / ADAPTER_CONFIG)
    return None


def config_of(path: Location, opened: Checkpoint) -> Mapping[str, Any]:
    """The config of an adapter that is open, or what takes its place; empty where there is none."""
    if (config := config_beside(path)) is not None:
        return config
    stored = opened.metadata.get(_SETTINGS)
    try:
        settings = orjson.loads(stored) if isinstance(stored, str) else {}
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{_SETTINGS} in its header is not JSON: {error}", file=str(path)) from None
    return settings if isinstance(settings, dict) else {}


def described(adapter: Adapter, ranks: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The config that peft reads of a LoRA: what its own says, these ranks and alphas by module, the rest as its tensors show."""
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0]
    others = {re.escape(module): each for module, each in ranks.items() if each != (rank, alpha)}
    parts = {part for each in adapter.modules.values() for part in each}
    known = {key: value for key, value in adapter.config.items() if "." not in key}
    return {
        KIND: "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "use_dora": "lora_magnitude_vector" in parts,
        "lora_bias": "lora_B.bias" in parts,
        "modules_to_save": sorted({name.split(".")[-2] for name in adapter.replacing if "." in name}) or None,
        **known,
        "target_modules": known.get("target_modules") or sorted(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {module: each for module, (each, _) in others.items()},
        "alpha_pattern": {module: each for module, (_, each) in others.items()},
    }
