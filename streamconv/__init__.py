"""Convert checkpoints of very large models between formats: planned from headers, streamed in bounded
memory, resumable, verified.

    import streamconv

    checkpoint = streamconv.open("path/to/model")
    checkpoint["model.norm.weight"].numpy()
    plan = streamconv.plan("path/to/model", dtype="BF16", max_shard="5GB")
    streamconv.convert("path/to/model", "path/to/output", dtype="BF16")
    streamconv.verify("path/to/model", "path/to/output")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamconv.running import __version__

if TYPE_CHECKING:
    from streamconv.api import convert, open, plan, verify

__all__ = ["__version__", "convert", "open", "plan", "verify"]


def __getattr__(name: str) -> Any:
    # On first use, because importing NumPy for `--help` or `--version` would be most of their time.
    if name in {"convert", "open", "plan", "verify"}:
        from streamconv import api

        return getattr(api, name)
    raise AttributeError(f"module 'streamconv' has no attribute '{name}'")
