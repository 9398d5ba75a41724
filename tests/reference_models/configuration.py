"""What the configs of all reference models share: the way to and from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


def not_in_json(default: Any) -> Any:
    """A field that steers the reference model and that config.json does not hold."""
    return field(default=default, metadata={"json": False})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields are those of config.json under their real names; None is written as absence."""

    def identity(self) -> dict[str, Any]:
        """model_type, architectures and auto_map, as published."""
        raise NotImplementedError

    def generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json; None where the published checkpoint has no such file."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json."""
        return self.identity() | {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.metadata.get("json", True) and getattr(self, each.name) is not None
        }

    @classmethod
    def from_json(cls, contents: Mapping[str, Any]) -> Self:
        """The config that config.json describes; keys that the reference model does not know are left out."""
        known = {each.name for each in fields(cls) if each.metadata.get("json", True)}
        return cls(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in contents.items()
                if key in known
            }
        )
