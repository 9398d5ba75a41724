"""What training tools put around a model's names, and how it is removed.

`DistributedDataParallel` and DeepSpeed say `module.`, `torch.compile` `_orig_mod.`, FSDP and activation
checkpointing `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`, Lightning before 2.0 `_forward_module.`;
trainers keep the model as `model.`. peft puts the factors of a LoRA beside a layer, and its weight below
`base_layer.`; what it trains as a whole lies below `modules_to_save.NAME.`, and `original_module.` is as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from streamconv.plans.findings import Findings
from streamconv.plans.plan import Targets

ANYWHERE = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_orig_module",
)
"""Words that are never part of a model's own name, wherever they stand."""
_AROUND = r"modules_to_save\.[^.]+|modules_to_save|original_module|base_layer"
"""What peft puts around a layer; without the name of the adapter where it saves a resized embedding."""
FACTORS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
"""What peft puts beside the weight of a layer."""

LEFTOVERS = re.compile(rf"(^|\.)({'|'.join((*ANYWHERE, _AROUND, FACTORS))})(\.|$)")
"""What training puts into names, and no model has: a library that reads the rest passes over them."""
LEFT = "rename it with --rename, or leave it out with --drop; an adapter is merged with --lora"

# What a prefix of a wrapped model consists of.
_WRAPPERS = frozenset({"module", "model", "state_dict", "base_model", "network", "net", "transformer"})
_DEEPEST = 4


def unwrap(tensors: Targets, known: Collection[str], findings: Findings) -> Targets:
    """Tensors by the model's names for them, as far as removing wrappers makes names known.

    Without known names, only what is never part of a model's name is removed. Two tensors never get one name: where
    they would, all keep theirs.
    """
    found = {name: name for name in tensors}
    notes: list[str] = []
    for word in ANYWHERE:
        part = f"{word}."
        if any(part in name for name in found.values()):
            found = {source: name.replace(part, "") for source, name in found.items()}
            notes.append(f"'{part}' of a wrapped module is taken out of the names")
    if known and not any(name in known for name in found.values()):
        base = left_off(found.values(), known)
        if base:
            found = {source: base + name for source, name in found.items()}
            notes.append(f"'{base}', which a model without its head leaves off, is put before the names")
    for prefix, _ in _prefixes(found.values(), known).most_common():
        if set(prefix[:-1].split(".")) <= _WRAPPERS:
            found = {source: _stripped(name, prefix, known) for source, name in found.items()}
            notes.append(f"'{prefix}' of a wrapped model is taken off the names")
    left = {name: tensors[source] for source, name in found.items()}
    if len(left) < len(tensors):
        return tensors
    findings.notes += notes
    return left


def plain(name: str) -> str:
    """A name without what peft puts around a layer."""
    return re.sub(rf"\.({_AROUND})(?=\.)", "", name)


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
