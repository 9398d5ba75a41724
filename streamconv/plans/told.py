"""What the files around quantised weights say of them: the config, files beside it, and the metadata of the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import orjson

from streamconv.errors import PlanError
from streamconv.plans.architecture import Config
from streamconv.plans.file_patterns import matches
from streamconv.plans.recipe import Making

FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside a config that say how weights are quantised: modelopt's, GPTQ's, AWQ's."""

_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Told:
    """What the files around the weights say of how they are quantised.

    Attributes:
        settings: the `quantization_config`, or what stands for it; empty where nothing does.
        entries: what files' metadata says of single weights, by their names.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The `quant_method`, in lower case; empty where none is said."""
        return str(self.settings.get("quant_method", "")).lower()

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        """What `config_groups` says, which has a group for each way to quantise."""
        groups = self.settings.get("config_groups")
        known = groups.values() if isinstance(groups, Mapping) else ()
        return [each for each in known if isinstance(each, Mapping)]

    def ignores(self, module: str) -> bool:
        """Whether a list of layers that stay as they were names a module.

        Lists are read as their owners do: `re:` and a regular expression from the start of the name, wildcards, and
        names or what they begin or end with, up to a dot.
        """
        keys = (
            "ignore",
            "modules_to_not_convert",
            "ignored_layers",
            "exclude_modules",
            "llm_int8_skip_modules",
        )
        each = (text for key in keys for text in _texts(self.settings.get(key)))
        return any(_names(text, module) for text in each)

    def weights_of(self, module: str) -> list[Mapping[str, Any]]:
        """What `config_groups` say of a module's weights, those that name it first."""
        ordered = sorted(
            self.groups,
            key=lambda group: not any(_names(text, module) for text in _texts(group.get("targets"))),
        )
        return [group["weights"] for group in ordered if isinstance(group.get("weights"), Mapping)]

    def blocks(self, module: str) -> list[tuple[int, int]]:
        """Sizes of blocks that may be meant for a module."""
        said = [
            self.settings.get("weight_block_size"),
            *(w.get("block_structure") for w in self.weights_of(module)),
        ]
        said = [each.split("x") if isinstance(each, str) else each for each in said]
        found = [
            (int(each[0]), int(each[1]))
            for each in said
            if isinstance(each, list) and len(each) == 2 and all(str(size).isdecimal() for size in each)
        ]
        return [*(each for each in found if min(each) > 0), _BLOCK]


def told_by(making: Making) -> Told:
    """What the config says, or a file beside it.

    Raises:
        PlanError: that is not JSON.
    """
    entries = {name: _entry(value) for name, value in making.metadata.items()}
    said = next((each for each in _settings(making.config or {}) if isinstance(each, Mapping)), None)
    if said is not None:
        return Told(_flat(said), entries)
    if bits := (making.config or {}).get("quantization_bit"):
        return Told({"quantization_bit": bits}, entries)
    for file, method in zip(FILES, ("modelopt", "gptq", "awq"), strict=True):
        text = making.read(file)
        if text is not None:
            try:
                document = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise PlanError(
                    f"it is not JSON, and says how weights are quantised: {error}", file=file
                ) from None
            if isinstance(document, dict):
                return Told({"quant_method": method, **_flat(document)}, entries)
    return Told({}, entries)


def _flat(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what modelopt has one step down."""
    inner = said.get("quantization")
    return {**said, **inner} if isinstance(inner, Mapping) else said


def _settings(config: Config) -> Iterator[Any]:
    for key, value in config.items():
        if key in ("quantization_config", "compression_config"):
            yield value
        elif isinstance(value, Mapping):
            yield from _settings(value)


def _entry(value: Any) -> Any:
    """What is JSON in a file's metadata."""
    try:
        return orjson.loads(value) if isinstance(value, str) and value[:1] == "{" else value
    except orjson.JSONDecodeError:
        return value


def _texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _names(text: str, module: str) -> bool:
    """Whether an entry of a config's list is about a module."""
    if text.startswith("re:"):
        return matches(text[3:], module, "quantization_config")
    if any(sign in text for sign in "*?["):
        return fnmatchcase(module, text)
    return module == text or module.startswith(f"{text}.") or module.endswith(f".{text}")
