"""Pipelines: the 16-bit weights lie in one file per layer, `layer_LL[-model_TT]-model_states.pt`, under local names.

Source: deepspeedai/DeepSpeed: deepspeed/runtime/pipe/module.py (`ckpt_layer_path`, `save_state_dict`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from streamconv.ops import Expression, renamed
from streamconv.readers.deepspeed.states import ModelState, read_tensors
from streamconv.readers.together import read_all
from streamconv.storage.location import Location
from streamconv.tensor import Shape

_TIED = "tied_modules."


def read(
    layers: Mapping[tuple[int, int], Location], models: Iterable[ModelState]
) -> list[dict[str, Expression]]:
    """The weights of each tensor-parallel rank, by the names that the partitions of F32 weights have for them.

    Args:
        layers: (layer, tensor-parallel rank) -> file.
        models: of all stages; only names and shapes are used.
    """
    named = {name: shape for model in models for group in model.shapes for name, shape in group.items()}
    ranks: dict[int, dict[str, Expression]] = {}
    opened = read_all(dict(sorted(layers.items())), read_tensors, "layers of the pipeline")
    for (layer, rank), own in opened.items():
        prefix = f"{layer}."
        if not any(prefix + name in named for name in own):
            prefix = _tied_module(own, named) or prefix
        ranks.setdefault(rank, {}).update(
            (prefix + name, renamed(tensor, prefix + name)) for name, tensor in own.items()
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _tied_module(own: Mapping[str, Expression], named: Mapping[str, Shape]) -> str | None:
    """The prefix that a tied layer has in place of its number, where its names and shapes identify it."""
    prefixes = {
        prefix
        for full in named
        for name in own
        if full.startswith(_TIED) and full.endswith(f".{name}")
        for prefix in [full.removesuffix(name)]
        if all(named.get(prefix + each) == tensor.spec.shape for each, tensor in own.items())
    }
    return prefixes.pop() if len(prefixes) == 1 else None
