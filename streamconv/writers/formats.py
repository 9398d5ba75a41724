"""The formats that can be written: one record each, which says everything except how a file is laid out.

A new one is a module of this package (see `layout.Writer`) and a row here. Modules are named, not imported: the
command line reads this table for its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Literal, cast

from streamconv.shard import CKPT, MINDSPORE_INDEX, SAFETENSORS, TORCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from typing import Any

    from streamconv.errors import Problem
    from streamconv.writers.layout import Wrapping, Writer
    from streamconv.writers.ranks import RankLayout

    Opinion = Callable[[Path, list[str]], Iterable[Problem]]


@dataclass(frozen=True, slots=True)
class Format:
    """A format that can be written.

    Attributes:
        name: as `--to` takes it.
        module: its writer.
        suffix: of its files.
        one_file: whether loaders take a single file; others take shards, too.
        index: the file that lists shards; empty: what Hugging Face calls it.
        wrapping: whether a file holds anything around the tensors: what a recipe says, or what one has to say.
        ranks: the module whose `ranks` lays out the files of several; empty: there is no such layout.
        own: what its reader calls a checkpoint that is in its naming already; `around` says what is around such a model.
        options: options of a plan, by name, that act on this format and not on every one.
        library: the module whose `opinion` has the library that owns the format open a file; empty: none is asked.
        beside_config: whether loaders of the format look for a `config.json` beside the weights.
        to_arch: the naming that loaders of the format expect, which `--recipe auto` leads to; empty: any.
    """

    name: str
    module: str
    suffix: str
    one_file: bool = False
    index: str = ""
    wrapping: Literal["none", "possible", "needed"] = "none"
    ranks: str = ""
    own: str = ""
    options: frozenset[str] = frozenset()
    library: str = ""
    beside_config: bool = False
    to_arch: str = ""

    @property
    def writer(self) -> Writer:
        """The two functions that lay out its files."""
        return cast("Writer", import_module(self.module))

    @property
    def rank_layout(self) -> RankLayout | None:
        """The function that lays out the files of several ranks."""
        return cast("RankLayout", import_module(self.ranks).ranks) if self.ranks else None

    def around(self, config: Mapping[str, Any] | None, ranks: int) -> Wrapping:
        """What a model that is in its naming already has around its tensors, with this config, on so many ranks."""
        return cast("Wrapping", import_module(self.ranks).around(config, ranks))

    @property
    def opinion(self) -> Opinion | None:
        """The function that says what the library that owns the format finds wrong with a file."""
        return cast("Opinion", import_module(self.library).opinion) if self.library else None


_WRITERS = "streamconv.writers."
_SAFETENSORS = _WRITERS + "safetensors"
_SHARDS = frozenset({"max_shard"})
_RANKS = frozenset({"tp", "pp", "strategy"})

_ROWS = (
    Format("safetensors", _SAFETENSORS, SAFETENSORS, options=_SHARDS, library=_SAFETENSORS, beside_config=True),
    Format("torch", _WRITERS + "torch_zip", TORCH, wrapping="possible", options=_SHARDS, beside_config=True),
    Format("mindspore", _WRITERS + "mindspore", CKPT, one_file=True,
           ranks=_WRITERS + "mindspore_ranks", options=_RANKS | {"crc"}, to_arch="mindformers"),
    Format("mindspore-safetensors", _WRITERS + "mindspore_safetensors", SAFETENSORS, index=MINDSPORE_INDEX,
           library=_SAFETENSORS,
           ranks=_WRITERS + "mindspore_ranks", options=_RANKS | _SHARDS, to_arch="mindformers"),
    Format("sat", _WRITERS + "torch_zip", ".pt", wrapping="needed",
           ranks=_WRITERS + "sat_ranks", own="SAT", options=frozenset({"tp"})),
)  # fmt: skip

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
"""Every format by its name; the first is the default."""

OTHER_NAMES: dict[str, str] = {
    **dict.fromkeys(("st", "sft", "safetensor"), "safetensors"),
    **dict.fromkeys(("bin", "pt", "pth", "pytorch", "pytorch-bin", "pickle", "torch-zip"), "torch"),
    **dict.fromkeys(("ckpt", "ms", "mindspore-ckpt"), "mindspore"),
}
"""What people call a format besides its name: suffixes, libraries."""

ALONE: dict[str, tuple[str, ...]] = {
    ".safetensors": ("safetensors", "mindspore-safetensors"),
    **dict.fromkeys((".bin", ".pt", ".pth"), ("torch", "sat")),
    ".ckpt": ("torch", "mindspore"),
    **dict.fromkeys((".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".npz", ".npy", ".pkl", ".json"), ()),
    **dict.fromkeys((".txt", ".zip", ".tar", ".gz", ".tgz", ".7z", ".hdf5", ".pickle", ".pb", ".tflite"), ()),
}
"""Suffixes of a destination that is one file, and the formats that it may have, the likeliest first; none of them where
no such file can be written."""

_WRITTEN = tuple(suffix for suffix, fitting in ALONE.items() if fitting)
_SHORT = {".sft": SAFETENSORS, ".st": SAFETENSORS, ".th": ".pth"}


def near(suffix: str) -> str | None:
    """The suffix of weight files that was meant by one that is none, where it is near one."""
    if suffix in ALONE:
        return None
    return _SHORT.get(suffix) or next(iter(get_close_matches(suffix, _WRITTEN, n=1, cutoff=0.8)), None)


TO_COME = frozenset(
    {"dcp", "torch_dist", "gguf", "megatron", "megatron-core", "megatron-legacy", "megatron-lm", "mcore"}
)
"""Formats that are known and cannot be written yet."""
