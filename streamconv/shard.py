"""Shards as Hugging Face makes them: their sizes, their contents, their names, their index.

Rules and spellings follow huggingface_hub (serialization/_base.py, `split_state_dict_into_shards_factory`
and `parse_size_to_int`), transformers (modeling_utils.py, `save_pretrained` and `_add_variant`) and
diffusers (models/modeling_utils.py, pipelines/pipeline_loading_utils.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streamconv.errors import UsageError
from streamconv.tensor import TensorSpec

# ---------------------------------------------------------------------------------------------- sizes

_UNITS: dict[str, int] = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}

_SIZE = re.compile(
    r"\s*\+?(?P<number>[0-9]+|[0-9]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*(?P<unit>[kmgt]i?b)?\s*", re.IGNORECASE
)

# No disk holds 10^30 bytes, and turning much longer digits into a number takes time.
_MOST_DIGITS = 30


def parse_size(text: str) -> int:
    """The number of bytes, at least 1, that a user's text means.

    Units are those of huggingface_hub (`KB`, `MB`, `GB`, `TB`: powers of 1000, any case, blanks
    allowed), and `KiB` to `TiB` (powers of 1024); without a unit, whole bytes. A whole number is
    exact; a fraction is a double, cut off below one byte, as huggingface_hub does it.

    Raises:
        UsageError: the text is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    size = _scaled(match["number"], (match["unit"] or "").upper()) if match else 0
    if size < 1:
        raise UsageError(
            f"'{text}' is not a size of at least one byte",
            hint="write a size as 5GB, 500MB, 1.5GiB, or as whole bytes: 5000000000",
        )
    return size


def _scaled(number: str, unit: str) -> int:
    """`number` times its unit; 0 where that is not a finite number, or a fraction of a byte."""
    if number.isdigit():
        return int(number) * _UNITS[unit] if len(number) <= _MOST_DIGITS else 0
    try:
        value = float(number) * _UNITS[unit]
    except ValueError:
        return 0
    return int(value) if unit and math.isfinite(value) else 0


# -------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, slots=True)
class Entry:
    """What packing needs to know of a tensor.

    Attributes:
        nbytes: bytes of the tensor's storage.
        storage: equal for tensors that are tied: their bytes count once, and they share a shard.
            None for a tensor that is tied to no other.
    """

    name: str
    nbytes: int
    storage: Hashable | None = None


# Torch gives every storage without bytes the same identity, a null address on the same device, so that
# huggingface_hub finds all empty tensors of a model tied (serialization/_torch.py, `get_torch_storage_id`).
_EMPTY = ("empty storage",)


def entry_of(spec: TensorSpec, storage: Hashable | None = None) -> Entry:
    """The entry that makes `pack` agree with huggingface_hub's split of the same torch tensor."""
    return Entry(spec.name, spec.nbytes, storage if spec.nbytes else _EMPTY)


def pack(entries: Sequence[Entry], limit: int) -> tuple[tuple[str, ...], ...]:
    """The names in each shard, in order, with at most `limit` bytes in a shard where that is possible.

    One shard stays open while the entries are walked in their order:

        1. An entry whose storage was seen before is put aside.
        2. One larger than the limit becomes a shard at once, numbered before the open one.
        3. One that does not fit closes the open shard and opens the next. Equality fits.
        4. In the end every entry put aside joins the shard of the first of its storage.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    current_size = 0
    tied: dict[Hashable, tuple[list[str], list[str]]] = {}  # storage -> its shard, names put aside
    for entry in entries:
        if entry.storage is not None and entry.storage in tied:
            tied[entry.storage][1].append(entry.name)
            continue
        if entry.nbytes > limit:
            shard = [entry.name]
            shards.append(shard)
        else:
            if current_size + entry.nbytes > limit:
                shards.append(current)
                current, current_size = [], 0
            shard = current
            shard.append(entry.name)
            current_size += entry.nbytes
        if entry.storage is not None:
            tied[entry.storage] = (shard, [])
    if current:
        shards.append(current)
    for shard, names in tied.values():
        shard.extend(names)
    return tuple(map(tuple, shards))


def total_size(entries: Iterable[Entry]) -> int:
    """Bytes of all storages, each counted once: the `total_size` of an index."""
    held: dict[Hashable, int] = {}
    for number, entry in enumerate(entries):
        held.setdefault(number if entry.storage is None else (entry.storage,), entry.nbytes)
    return sum(held.values())


# ---------------------------------------------------------------------------------------------- names

STEMS: tuple[str, ...] = (
    "model",  # transformers
    "diffusion_pytorch_model",  # diffusers
    "adapter_model",  # peft
    "pytorch_lora_weights",  # diffusers' adapters
)
"""Stems that the libraries give to weights. Only after one of these is a dotted part a variant."""

ADAPTER_STEMS = STEMS[2:]
"""Those of adapters."""

ADAPTER_CONFIG = "adapter_config.json"
"""peft's config of an adapter."""

SAFETENSORS, TORCH, CKPT = ".safetensors", ".bin", ".ckpt"
"""Suffixes of the files that the libraries write; the last is MindSpore's."""

MINDSPORE_INDEX = "param_name_map.json"
"""MindSpore's index of safetensors: as Hugging Face's, or the map alone. Shards have names of any kind."""

# transformers' one stem that differs between formats.
_TORCH_STEMS: dict[str, str] = {"model": "pytorch_model"}


@dataclass(frozen=True, slots=True)
class Naming:
    """What the names of a model's weight files are made from.

    Attributes:
        stem: as in safetensors names; the torch spelling (`pytorch_model` for `model`) follows from it.
        variant: `fp16` in `model.fp16.safetensors`, or None.
        suffix: of the files, with its dot.
    """

    stem: str = "model"
    variant: str | None = None
    suffix: str = SAFETENSORS

    @property
    def base(self) -> str:
        """The stem as this format spells it."""
        return _TORCH_STEMS.get(self.stem, self.stem) if self.suffix == TORCH else self.stem


def shard_name(naming: Naming, number: int, count: int) -> str:
    """The name of shard `number` (from 1) of `count`; without numbers where it is the only one."""
    if not 1 <= number <= count:
        raise ValueError(f"no shard {number} of {count}")
    variant = "" if naming.variant is None else f".{naming.variant}"
    part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
    return f"{naming.base}{variant}{part}{naming.suffix}"


def index_name(naming: Naming) -> str:
    """The name of the index file that lists the shards."""
    variant = "" if naming.variant is None else f".{naming.variant}"
    return f"{naming.base}{naming.suffix}.index{variant}.json"


@dataclass(frozen=True, slots=True)
class WeightName:
    """What a file name says about the file.

    Attributes:
        kind: the only file of a model, one of several shards, or the index of shards.
        number: which shard, as written: from 1 in all libraries, from 0 in some old files.
        count: of how many. Both are None except for shards.
    """

    naming: Naming
    kind: Literal["single", "shard", "index"]
    number: int | None = None
    count: int | None = None


_SUFFIX = "|".join(map(re.escape, (SAFETENSORS, TORCH)))
_DIGITS = "[0-9]{1,9}"  # five where libraries write them

# Read, besides what is written: `_` before the number (bigscience/bloom), and diffusers' older variants,
# NAME-00001-of-00003.fp16.safetensors and NAME.safetensors.fp16.index.json.
_PATTERNS: Mapping[Literal["single", "shard", "index"], re.Pattern[str]] = {
    "shard": re.compile(
        rf"(?P<base>.+?)[-_](?P<number>{_DIGITS})-of-(?P<count>{_DIGITS})"
        rf"(?:\.(?P<variant>[^.]+))?(?P<suffix>{_SUFFIX})"
    ),
    "index": re.compile(
        rf"(?P<base>.+?)(?P<suffix>{_SUFFIX})(?:\.(?P<old>[^.]+))?\.index(?:\.(?P<variant>[^.]+))?\.json"
    ),
    "single": re.compile(rf"(?P<base>.+)(?P<suffix>{_SUFFIX})"),
}


def parse_weight_name(name: str) -> WeightName | None:
    """What a file's name (without directories) says if the file holds weights; None for other names.

    The inverse of `shard_name` and `index_name` for the stems of `STEMS`. With any other stem a dotted
    part belongs to the stem: `sd_xl_1.0.safetensors` has no variant. Anything may end in `.bin`
    (`training_args.bin`), so that a single torch file is recognised by one of those stems only.
    """
    for kind, pattern in _PATTERNS.items():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        base, base_variant = _split_variant(match["base"])
        variants = {base_variant, groups.get("variant"), groups.get("old")} - {None}
        stem = _stem(base, match["suffix"])
        if stem is None or len(variants) > 1:
            return None
        naming = Naming(stem, next(iter(variants), None), match["suffix"])
        if kind == "single" and naming.suffix == TORCH and stem not in STEMS:
            return None
        if kind != "shard":
            return WeightName(naming, kind)
        number, count = int(match["number"]), int(match["count"])
        return WeightName(naming, kind, number, count) if number <= count else None
    return None


# accelerate calls the whole state of a model under FSDP `pytorch_model_fsdp.bin`; it is never written.
_STEM_OF_TORCH: dict[str, str] = {
    **{spelled: stem for stem, spelled in _TORCH_STEMS.items()},
    "pytorch_model_fsdp": "model",
}
_BASES: frozenset[str] = frozenset((*STEMS, *_STEM_OF_TORCH))


def _split_variant(base: str) -> tuple[str, str | None]:
    stem, dot, variant = base.partition(".")
    if dot and stem in _BASES and variant and "." not in variant:
        return stem, variant
    return base, None


def _stem(base: str, suffix: str) -> str | None:
    """The stem that is spelled as `base` before this suffix, or None where none is."""
    if suffix == SAFETENSORS:
        return base
    if base in _TORCH_STEMS:
        return None
    return _STEM_OF_TORCH.get(base, base)


# ---------------------------------------------------------------------------------------------- index


def weight_map(naming: Naming, shards: Sequence[Sequence[str]]) -> dict[str, str]:
    """Tensor name -> file name, for shards as `pack` returns them."""
    files = (shard_name(naming, number, len(shards)) for number in range(1, len(shards) + 1))
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


def index_json(
    files: Mapping[str, str], total_bytes: int, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """The text of an index, as transformers writes it: two blanks, sorted keys, a final newline.

    Only for more than one shard: beside a single file an index sends loaders after shards that are
    not there.

    Args:
        files: tensor name -> file name, of at least two files.
        total_bytes: see `total_size`.
        metadata: further facts for the `metadata` object, such as `total_parameters`.
    """
    if len(set(files.values())) < 2:
        raise ValueError("an index is for two shards or more")
    index = {"metadata": {**(metadata or {}), "total_size": total_bytes}, "weight_map": dict(files)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("ascii")
