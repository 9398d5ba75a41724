"""What training tools put around a model's names, and how it is removed.

`DistributedDataParallel` and DeepSpeed say `module.`, `torch.compile` `_orig_mod.`, FSDP and activation
checkpointing `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`, Lightning before 2.0 `_forward_module.`;
trainers keep the model as `model.`, and an averaged copy of it as `model_ema.` or `ema.`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from streamconv.plans.findings import Findings
from streamconv.plans.plan import Dropped, Targets

# Never part of a model's own name, wherever they stand.
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.",
             "_orig_module.")  # fmt: skip
# What a prefix of a wrapped model consists of, and that of an averaged copy.
_WRAPPERS = frozenset({"module", "model", "state_dict", "base_model", "network", "net", "transformer"})
_AVERAGES = frozenset({"model_ema", "ema_model", "ema", "module_ema"})
_DEEPEST = 4


def unwrap(tensors: Targets, known: Collection[str], findings: Findings) -> Targets:
    """Tensors by the model's names for them, as far as removing wrappers makes names known.

    Without known names, only what is never part of a model's name is removed. Two tensors never get one name: where
    they would, all keep theirs.
    """
    found = {name: name for name in tensors}
    notes: list[str] = []
    for part in _ANYWHERE:
        if any(part in name for name in found.values()):
            found = {source: name.replace(part, "") for source, name in found.items()}
            notes.append(f"'{part}' of a wrapped module is taken out of the names")
    if known and not any(name in known for name in found.values()):
        base = left_off(found.values(), known)
        if base:
            found = {source: base + name for source, name in found.items()}
            notes.append(f"'{base}', which a model without its head leaves off, is put before the names")
    prefixes = _prefixes(found.values(), known)
    copies: dict[str, str] = {}
    for prefix, _ in prefixes.most_common():
        words = set(prefix[:-1].split("."))
        if words <= _WRAPPERS:
            found = {source: _stripped(name, prefix, known) for source, name in found.items()}
            notes.append(f"'{prefix}' of a wrapped model is taken off the names")
        elif words <= _WRAPPERS | _AVERAGES:
            present = set(found.values())
            for source, name in found.items():
                if name.startswith(prefix) and name.removeprefix(prefix) in present:
                    copies[source] = name.removeprefix(prefix)
            if copies:
                notes.append(
                    f"averaged (EMA) copies under '{prefix}' are left out; --ema takes those instead of the others"
                )
    left = {name: tensors[source] for source, name in found.items() if source not in copies}
    if len(left) + len(copies) < len(tensors):
        return tensors
    for source, name in copies.items():
        findings.dropped += (
            Dropped(origin, f"an averaged copy of '{name}'") for origin in tensors[source][0]
        )
    findings.notes += notes
    return left


def left_off(names: Collection[str], known: Collection[str]) -> str:
    """The first word of known names that these lack, as those of a model without its head do; empty where none does."""
    words = dict.fromkeys(name[: name.find(".") + 1] for name in known)
    return max(("", *words), key=lambda word: sum(word + name in known for name in names))


def _prefixes(names: Collection[str], known: Collection[str]) -> Counter[str]:
    """What stands before known names, and how often."""
    if not known:
        whole = bool(names) and all(name.startswith("module.") for name in names)
        return Counter({"module.": len(names)} if whole else {})
    count: Counter[str] = Counter()
    for name in names:
        if name in known:
            continue
        parts = name.split(".")
        for depth in range(1, min(_DEEPEST, len(parts))):
            if ".".join(parts[depth:]) in known:
                count[".".join(parts[:depth]) + "."] += 1
                break
    return count


def _stripped(name: str, prefix: str, known: Collection[str]) -> str:
    """A name without a prefix, unless the model knows it with it."""
    return name if name in known else name.removeprefix(prefix)
