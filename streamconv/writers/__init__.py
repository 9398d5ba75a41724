"""Writers: specs in, a file's layout out. One module a format, each with `check` and `layout`."""

from __future__ import annotations

from collections.abc import Mapping

from streamconv.writers import mindspore, mindspore_safetensors, safetensors, torch_zip
from streamconv.writers.layout import (
    LARGEST,
    FileLayout,
    Literal,
    Patch,
    Placement,
    Plain,
    Target,
    Wrapping,
    Writer,
)

WRITERS: Mapping[str, Writer] = {
    "safetensors": safetensors,
    "torch": torch_zip,
    "sat": torch_zip,
    "mindspore": mindspore,
    "mindspore-safetensors": mindspore_safetensors,
}
"""Format, as `--to` spells it, -> its writer."""

__all__ = [
    "LARGEST",
    "WRITERS",
    "FileLayout",
    "Literal",
    "Patch",
    "Placement",
    "Plain",
    "Target",
    "Wrapping",
    "Writer",
]
