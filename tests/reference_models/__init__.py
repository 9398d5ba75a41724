"""Small, plain PyTorch models of architectures that transformers has no class for: oracles for conversions.

One module an architecture. Each has a `Config` (the fields of the real config.json under their own names), a
`Model` whose state dict has exactly the keys and shapes of the real checkpoint, `write`, which makes a directory
with random weights in the layout of the real one, and `load`, which reads such a directory.

Token models are called as `model(ids, cache=None)`, ids `[batch, time]`, and give logits `[batch, time, vocab]`.
With a `Cache` the ids continue what went before:

    model = chatglm.write(directory, chatglm.Config(rope_ratio=500), seed=1)
    cache = Cache()
    steps = [model(ids[:, i : i + 1], cache) for i in range(ids.shape[1])]

Nothing here imports streamconv or transformers.
"""

from reference_models.layers import Cache

__all__ = ["Cache"]
