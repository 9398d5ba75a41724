"""What loads the output has to find: a config that says what is written, under a file name and names that it knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from streamconv.dtypes import DType, by_name
from streamconv.errors import count
from streamconv.ops import Expression
from streamconv.plans.architecture import Config
from streamconv.plans.plan import Targets
from streamconv.plans.roles import Role, having
from streamconv.plans.wrappers import LEFT, LEFTOVERS
from streamconv.readers.checkpoint import Component
from streamconv.shard import ADAPTER_CONFIG, ADAPTER_STEMS, STEMS

_TRANSFORMERS, _DIFFUSERS, *_ = STEMS
_ADAPTER, _LORA = ADAPTER_STEMS
_CLASS = "_class_name"  # in configs of diffusers

_VARIANTS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""Variants that name a dtype, as those who publish models do."""

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Under which configs of transformers 4 and 5 say what dtype the weights have."""
_QUANTISED = "quantization_config"  # what it says of dtypes is of its own codes

_TIED = "tie_word_embeddings"


def file_stem(component: Component, config: Config | None) -> str:
    """What the library of a component's config calls its weight files; where no config says whose it is, as they were."""
    if config is None or component.stem in ADAPTER_STEMS:
        return component.stem
    if config.get("model_type") or config.get("architectures"):
        return _TRANSFORMERS
    return _DIFFUSERS if _CLASS in config else component.stem


def file_variant(component: Component, written: DType | None) -> str | None:
    """The variant in the names of a component's files, without one that says another dtype than is written."""
    said = _VARIANTS.get(component.variant or "")
    return None if said is not None and written is not None and written.name != said else component.variant


def config_file(stem: str) -> str | None:
    """The file that a library looks for beside weights of this stem; None where it needs none."""
    return {_ADAPTER: ADAPTER_CONFIG, _LORA: None}.get(stem, "config.json")


def common_dtype(tensors: Iterable[Expression]) -> DType | None:
    """The dtype of most floating-point elements, codes of quantised weights left aside; None where there are none."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.spec.dtype.kind == "float" and tensor.spec.dtype.bits >= 16:
            elements[tensor.spec.dtype.name] += tensor.spec.numel
    return by_name(elements.most_common(1)[0][0]) if elements else None


def settled(
    config: Config, targets: Targets, shared: Mapping[str, str], name: str, notes: list[str], *, made: bool
) -> Config:
    """A config that says what is written: the dtype of the weights, and whether the head is the embedding.

    Args:
        config: as it is.
        targets: what is written of its component.
        shared: see `Transformed`.
        name: of the file, for the notes.
        notes: what is changed is added.
        made: whether a recipe made it, which knows what to say; else what is not said is the library's default.
    """
    dtype = common_dtype(tensor for _, tensor in targets.values())
    if dtype is not None and dtype.torch_name is not None:
        changed = _with_dtype(config, dtype.torch_name)
        if changed != config:
            notes.append(f"{name}: its dtype becomes {dtype.torch_name}")
        config = changed
    tied = _tied(targets, shared)
    said = said_of_ties(config)
    if said == {False} and _lacks_head(config, targets):
        notes.append(f"there is no head among the tensors, and {name} says that it is not the embedding")
    if tied is None or said == {tied} or not (said or (config.get("architectures") and not made)):
        return config
    if tied:
        notes.append(f"{name}: {_TIED} becomes true: the head is left out, and is the embedding")
    else:
        notes.append(f"{name}: {_TIED} becomes false: head and embedding are written as two tensors")
    return with_tie(config, tied)


def unread(names: Collection[str]) -> str | None:
    """What is to be noted of names that training has left, if there are any."""
    left = [name for name in names if LEFTOVERS.search(name)]
    if not left:
        return None
    return f"no library reads what training puts into names, {count(len(left), 'name')} such as {left[0]}: {LEFT}"


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token, by its name."""
    return bool(having(Role.HEAD, [name]) or having(Role.EMBEDDING, [name]))


def is_needed(tensor: Expression, config: Config | None) -> bool:
    """Whether a model without one of its tensors is not whole: it is no buffer, and no head that is the embedding."""
    name, dtype = tensor.spec.name, tensor.spec.dtype
    if dtype.kind != "float" or having(Role.BUFFER, [name]):
        return False
    return not (having(Role.HEAD, [name]) and True in said_of_ties(config or {}))


def _with_dtype(config: Any, torch_name: str) -> Any:
    """A config with every dtype that it states, also for its parts, replaced."""
    if not isinstance(config, Mapping):
        return config
    return {
        key: torch_name
        if key in _DTYPE_KEYS
        and isinstance(value, str)
        and value.removeprefix("torch.") not in (torch_name, "auto")
        else value
        if key == _QUANTISED
        else _with_dtype(value, torch_name)
        for key, value in config.items()
    }


def _tied(targets: Targets, shared: Mapping[str, str]) -> bool | None:
    """Whether the head is the embedding, as it is written; None where that is not told, or both may be said."""
    heads, embeddings = ({*having(role, [*targets, *shared])} for role in (Role.HEAD, Role.EMBEDDING))
    if having(Role.SCALED, embeddings):
        return None
    pairs = [
        (name, first)
        for name, first in shared.items()
        if {name, first} & heads and {name, first} & embeddings
    ]
    if pairs:
        return True if any(name not in targets for name, _ in pairs) else None
    return False if any(_of_one(head, each) for head in heads for each in embeddings) else None


def _of_one(head: str, embedding: str) -> bool:
    """Whether a head is that of the model with an embedding: it lies beside it, or beside what holds it."""
    return f"{embedding}.".startswith(head.rpartition(".")[0].rpartition(".")[0])


def _lacks_head(config: Config, names: Collection[str]) -> bool:
    """Whether a language model has embeddings of tokens and no head."""
    classes = config.get("architectures")
    is_language_model = isinstance(classes, list) and any(
        str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in classes
    )
    return is_language_model and bool(having(Role.EMBEDDING, names)) and not having(Role.HEAD, names)


def said_of_ties(config: Config) -> set[bool]:
    """What a config says of whether the head is the embedding, also for its parts."""
    return {value for value in _values(config) if isinstance(value, bool)}


def _values(config: Config) -> Iterator[Any]:
    for key, value in config.items():
        if key == _TIED:
            yield value
        elif isinstance(value, Mapping):
            yield from _values(value)


def with_tie(config: Config, tied: bool, top: bool = True) -> dict[str, Any]:
    """A config that says whether the head is the embedding, also where it says so of its parts."""
    said = {
        key: with_tie(value, tied, top=False) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    return {**said, _TIED: tied} if top or _TIED in config else said
