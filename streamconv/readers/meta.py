"""The config of a Llama as Meta publishes it: `params.json`, and what it leaves to the shapes.

Source: meta-llama/llama: llama/model.py (`ModelArgs`), llama/generation.py (the files).
"""

from __future__ import annotations

from dataclasses import replace

import orjson

from streamconv.readers.checkpoint import Checkpoint

_PARAMS = "params.json"
_MAX_SIZE = 1 << 20
_EMBEDDING, _UP = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"


def identified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a config from `params.json`, where that and Meta's names are there, and no config is."""
    (component, *more) = checkpoint.components
    path = checkpoint.directory / _PARAMS
    if (
        more
        or component.config is not None
        or not {_EMBEDDING, _UP} <= set(component.tensors)
        or not path.is_file()
        or path.stat().st_size > _MAX_SIZE
    ):
        return checkpoint
    try:
        params = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        return checkpoint
    if not isinstance(params, dict):
        return checkpoint
    # The file says -1, or nothing, where the tokenizer or a formula decides.
    sizes = {
        "vocab_size": component.tensors[_EMBEDDING].spec.shape[0],
        "ffn_dim": component.tensors[_UP].spec.shape[0],
    }
    config = {"model_type": "meta-llama", **params, **sizes}
    return replace(checkpoint, components=(replace(component, config=config),))
