"""The files around the weights: configs that are no longer true are rewritten, others are copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import orjson

from streamconv.dtypes import DType
from streamconv.plans.findings import Findings
from streamconv.plans.plan import Output, SideFile, TextFile
from streamconv.plans.transform import Transformed
from streamconv.readers.checkpoint import Checkpoint, Component

# Keys under which configs of transformers 4 and 5 say what dtype the weights have.
_DTYPE_KEYS = ("dtype", "torch_dtype")

# What peft calls its weights and its config.
_ADAPTER, _ADAPTERS_CONFIG = "adapter_model", "adapter_config.json"


def companions(
    checkpoint: Checkpoint,
    component: Component,
    made: Transformed,
    dtype: DType | None,
    output: Output,
    findings: Findings,
) -> None:
    """Add the files around one component that a recipe changes, or a dtype for all its floating-point tensors."""
    prefix = component.prefix
    output.texts += (
        TextFile(name[1:] if name.startswith("/") else prefix + name, text)
        for name, text in made.files.texts.items()
    )
    output.left_out += (prefix + name for name in made.files.left_out)
    if made.files.left_out:
        listed = ", ".join(f"{prefix}{name} ({reason})" for name, reason in made.files.left_out.items())
        findings.notes.append(f"not copied: {listed}")
    config, is_adapter = made.config, made.component.stem == _ADAPTER
    if config is None:
        return
    name = f"{prefix}{_ADAPTERS_CONFIG if is_adapter else 'config.json'}"
    if dtype is not None and dtype.torch_name is not None:
        changed = _with_dtype(config, dtype.torch_name)
        if changed != config:
            findings.notes.append(f"{name}: its dtype becomes {dtype.torch_name}")
        config = changed
    if config != component.config or name not in checkpoint.side_files:
        output.texts.append(TextFile(name, orjson.dumps(config, option=orjson.OPT_INDENT_2).decode() + "\n"))


def side_files(checkpoint: Checkpoint, made: Collection[str]) -> tuple[SideFile, ...]:
    """The files to copy: all side files but those of which `made` has the path."""
    paths = {name: checkpoint.directory / name for name in sorted(checkpoint.side_files) if name not in made}
    states = ((name, path, path.state()) for name, path in paths.items())
    return tuple(SideFile(path.place, name, state.size, state.identity) for name, path, state in states)


def _with_dtype(config: Any, torch_name: str) -> Any:
    """A config with every dtype that it states, also for its parts, replaced."""
    if not isinstance(config, Mapping):
        return config
    return {
        key: torch_name if key in _DTYPE_KEYS and isinstance(value, str) else _with_dtype(value, torch_name)
        for key, value in config.items()
    }
