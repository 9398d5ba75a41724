"""Averaged copies of weights that lie in one state dict with the others, under a prefix: `model_ema.` and the like.

Some programs keep the names after the prefix, others take the dots out of them, since names of buffers have none
(CompVis/latent-diffusion: ldm/modules/ema.py `LitEma`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from streamconv.errors import listed
from streamconv.ops import Expression, renamed
from streamconv.options.records import Trait
from streamconv.readers import parts
from streamconv.readers.checkpoint import Checkpoint, Component

_INNER = ("", "module.", "model.")
"""What may stand between the prefix of a copy and the model's own names."""
_OUTER = ("", "model.", "module.", "net.", "network.", "online_model.")
"""What the weights themselves may lie under."""
_MOST_BASES = 32
"""Places under which names are searched for without their dots: programs that drop the dots have one model."""


def settled(checkpoint: Checkpoint, *, ema: bool) -> Checkpoint:
    """A checkpoint that says whether there are averaged copies; with `ema`, they stand in place of the weights."""
    copies = [_copies(component.tensors) for component in checkpoint.components]
    if not any(copies):
        return checkpoint
    some = listed(name for pairs in copies for name in pairs)
    note = (
        f"averaged copies are taken in place of the weights themselves: {some}"
        if ema
        else f"averaged copies of weights are among the tensors, and --ema takes them instead: {some}"
    )
    return replace(
        checkpoint,
        components=tuple(map(_averaged if ema else _marked, checkpoint.components, copies)),
        reported=checkpoint.reported | {Trait.AVERAGED},
        notes=(*checkpoint.notes, note),
    )


def _marked(component: Component, copies: Mapping[str, str]) -> Component:
    return replace(component, copies=copies)


def _averaged(component: Component, copies: Mapping[str, str]) -> Component:
    """A component with copies (copy -> weight) in place of the weights, and without what is beside the copies."""
    prefixes = tuple({prefix(copy) or copy for copy in copies})
    of = {weight: copy for copy, weight in copies.items()}
    tensors = {
        name: renamed(component.tensors[of.get(name, name)], name)
        for name in component.tensors
        if not name.startswith(prefixes)
    }
    return replace(component, tensors=tensors)


def prefix(name: str) -> str | None:
    """The first words of a name, up to that of averaged weights."""
    words = name.split(".")
    at = next((at for at, word in enumerate(words[:-1]) if parts.is_averaged(word)), None)
    return None if at is None else ".".join(words[: at + 1]) + "."


def _copies(tensors: Mapping[str, Expression]) -> dict[str, str]:
    """Averaged copy -> the weight that it is one of, of the same shape; empty where there are none."""
    # There are few words, however many names; and nearly all checkpoints have no averaged weights.
    words = {word for name in tensors for word in name.split(".")}
    if not any(map(parts.is_averaged, words)):
        return {}
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if above := prefix(name):
            groups.setdefault(above, []).append(name)
    pairs: dict[str, str] = {}
    dotless = _Dotless(tensors)
    for above, names in groups.items():
        pairs |= _paired(above, names, tensors, dotless)
    return pairs


class _Dotless:
    """Names by what they are without dots, below a base; made once for all prefixes that ask for it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._below: dict[str, dict[str, str]] = {}

    def find(self, base: str, rest: str) -> str | None:
        """The name below `base` that is `rest` without its dots."""
        if "." in rest:
            return None
        if base not in self._below:
            if len(self._below) == _MOST_BASES:
                return None
            below = (name for name in self._names if name.startswith(base))
            self._below[base] = {name.removeprefix(base).replace(".", ""): name for name in below}
        return self._below[base].get(rest)


def _paired(
    prefix: str, names: Collection[str], tensors: Mapping[str, Expression], dotless: _Dotless
) -> dict[str, str]:
    """The best way to pair the names under a prefix with others: where every one that is more than a number has one."""
    above = prefix[: prefix[:-1].rfind(".") + 1]
    wanted = [name for name in names if tensors[name].spec.shape]
    best: dict[str, str] = {}
    for outer in _OUTER:
        base = above + outer
        for inner in _INNER:
            found: dict[str, str] = {}
            for name in wanted:
                rest = name.removeprefix(prefix).removeprefix(inner)
                weight = base + rest if base + rest in tensors else dotless.find(base, rest)
                if weight is None or weight.startswith(prefix):
                    break
                if tensors[weight].spec.shape != tensors[name].spec.shape:
                    break
                found[name] = weight
            if len({*found.values()}) == len(wanted) > len(best):
                best = found
    return best
