"""What training tools put around a model's names, and how to see through it.

`DistributedDataParallel` and DeepSpeed say `module.`, `torch.compile` `_orig_mod.`, FSDP and activation
checkpointing `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`; trainers keep the model as `model.`,
and an averaged copy of it as `model_ema.` or `ema.`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from streamconv.ops import Expression
from streamconv.plans.plan import Dropped

# Never part of a model's own name, wherever they stand.
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PREFIXES = ("module.", "model.", "state_dict.", "base_model.model.", "network.", "net.")
_AVERAGES = ("model_ema.", "ema_model.", "ema.", "module_ema.")


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """Names without their wrapping.

    Attributes:
        names: name in the source -> name of the model.
        dropped: averaged copies of tensors that are there themselves.
        notes: what was taken off, one line each.
    """

    names: Mapping[str, str]
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = field(default=())


def unwrap(tensors: Mapping[str, Expression], known: Collection[str]) -> Unwrapped:
    """See through wrappers, as far as that makes names known.

    Args:
        tensors: by their names in the source.
        known: names that the model has; where there are none, only what no model's name holds goes.
    """
    names = {name: name for name in tensors}
    notes: list[str] = []
    for part in _ANYWHERE:
        if any(part in name for name in names.values()):
            names = {source: name.replace(part, "") for source, name in names.items()}
            notes.append(f"'{part}' of a wrapped module is taken out of the names")
    dropped: list[Dropped] = []
    if not known:
        if names and all(name.startswith("module.") for name in names.values()):
            names = {source: name.removeprefix("module.") for source, name in names.items()}
            notes.append("'module.' of a wrapped model is taken off the names")
        return _distinct(tensors, names, dropped, notes)
    names, taken = _without_prefixes(names, known)
    notes += (f"'{prefix}' of a wrapped model is taken off the names" for prefix in taken)
    present = set(names.values()) & set(known)
    for source, name in list(names.items()):
        average = next((prefix for prefix in _AVERAGES if name.startswith(prefix)), None)
        if average and name not in known and name.removeprefix(average) in present:
            dropped.append(Dropped(source, f"an averaged copy of '{name.removeprefix(average)}'"))
            del names[source]
    if dropped:
        notes.append(
            f"{len(dropped)} averaged (EMA) copies are left out; to convert those instead, "
            f"use --only '{_prefix_of(dropped[0].name)}*' with --rename '{_prefix_of(dropped[0].name)}*=*'"
        )
    return _distinct(tensors, names, dropped, notes)


def _without_prefixes(names: dict[str, str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Take prefixes off, the same off all names that have it, while that makes more names known."""
    taken: list[str] = []
    while len(taken) < 3:
        hits = sum(name in known for name in names.values())
        best = None
        for prefix in _PREFIXES:
            shorter = {
                source: name.removeprefix(prefix) if name not in known else name
                for source, name in names.items()
            }
            found = sum(name in known for name in shorter.values())
            if found > hits:
                hits, best = found, (prefix, shorter)
        if best is None:
            # Two wrappers may have to go before the first name is known: look one step further.
            best = _two_prefixes(names, known)
            if best is None:
                break
        taken.append(best[0])
        names = best[1]
    return names, taken


def _two_prefixes(names: dict[str, str], known: Collection[str]) -> tuple[str, dict[str, str]] | None:
    if any(name in known for name in names.values()):
        return None
    for first in _PREFIXES:
        for second in _PREFIXES:
            shorter = {
                source: name.removeprefix(first + second) if name.startswith(first + second) else name
                for source, name in names.items()
            }
            if any(name in known for name in shorter.values()):
                return first + second, shorter
    return None


def _distinct(
    tensors: Mapping[str, Expression], names: dict[str, str], dropped: list[Dropped], notes: list[str]
) -> Unwrapped:
    """The names, unless two tensors got the same one: then they are what they were."""
    if len(set(names.values())) < len(names):
        return Unwrapped({name: name for name in tensors})
    return Unwrapped(names, tuple(dropped), tuple(notes))


def _prefix_of(name: str) -> str:
    return next((prefix for prefix in _AVERAGES if name.startswith(prefix)), "")
