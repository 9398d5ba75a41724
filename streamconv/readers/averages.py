"""Averaged copies of weights that lie in one state dict with the others, under a prefix: `model_ema.` and the like.

Some programs keep the names after the prefix, others take the dots out of them, since names of buffers have none
(CompVis/latent-diffusion: ldm/modules/ema.py `LitEma`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from streamconv.errors import listed
from streamconv.ops import Expression, renamed
from streamconv.options import Trait
from streamconv.readers import parts
from streamconv.readers.checkpoint import Checkpoint, Component

_INNER = ("", "module.", "model.")
"""What may stand between the prefix of a copy and the model's own names."""
_OUTER = ("", "model.", "module.", "net.", "network.", "online_model.")
"""What the weights themselves may lie under."""


def settled(checkpoint: Checkpoint, *, ema: bool) -> Checkpoint:
    """A checkpoint that says whether there are averaged copies; with `ema`, they stand in place of the weights."""
    copies = [_copies(component.tensors) for component in checkpoint.components]
    if not any(copies):
        return checkpoint
    reported = checkpoint.reported | {Trait.AVERAGED}
    some = listed(name for pairs in copies for name in pairs)
    if not ema:
        note = f"averaged copies of weights are among the tensors, and --ema takes them instead: {some}"
        return replace(checkpoint, reported=reported, notes=(*checkpoint.notes, note))
    components = map(_averaged, checkpoint.components, copies)
    note = f"averaged copies are taken in place of the weights themselves: {some}"
    return replace(
        checkpoint, components=tuple(components), reported=reported, notes=(*checkpoint.notes, note)
    )


def _averaged(component: Component, copies: Mapping[str, str]) -> Component:
    """A component with copies (copy -> weight) in place of the weights, and without what is beside the copies."""
    prefixes = tuple({_prefix(copy) or copy for copy in copies})
    of = {weight: copy for copy, weight in copies.items()}
    tensors = {
        name: renamed(component.tensors[of.get(name, name)], name)
        for name in component.tensors
        if not name.startswith(prefixes)
    }
    return replace(component, tensors=tensors)


def _prefix(name: str) -> str | None:
    """The first words of a name, up to that of averaged weights."""
    words = name.split(".")
    at = next((at for at, word in enumerate(words[:-1]) if parts.is_averaged(word)), None)
    return None if at is None else ".".join(words[: at + 1]) + "."


def _copies(tensors: Mapping[str, Expression]) -> dict[str, str]:
    """Averaged copy -> the weight that it is one of, of the same shape; empty where there are none."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if prefix := _prefix(name):
            groups.setdefault(prefix, []).append(name)
    pairs: dict[str, str] = {}
    for prefix, names in groups.items():
        others = [name for name in tensors if not name.startswith(prefix)]
        pairs |= _paired(prefix, names, others, tensors)
    return pairs


def _paired(
    prefix: str, names: Collection[str], others: Collection[str], tensors: Mapping[str, Expression]
) -> dict[str, str]:
    """The best way to pair the names under a prefix with others: where every one that is more than a number has one."""
    above = prefix[: prefix[:-1].rfind(".") + 1]
    wanted = [name for name in names if tensors[name].spec.shape]
    present = {*others}
    best: dict[str, str] = {}
    for outer in _OUTER:
        base = above + outer
        bare = {name.removeprefix(base).replace(".", ""): name for name in others if name.startswith(base)}
        for inner in _INNER:
            found: dict[str, str] = {}
            for name in wanted:
                rest = name.removeprefix(prefix).removeprefix(inner)
                weight = base + rest if base + rest in present else bare.get(rest)
                if weight is not None and tensors[weight].spec.shape == tensors[name].spec.shape:
                    found[name] = weight
            if len({*found.values()}) == len(found) > len(best):
                best = found
    return best if len(best) == len(wanted) else {}
