"""Calls that a type checker accepts, and calls that it has to refuse: `mypy` reports an error that does not come.

Nothing here is run.
"""

from __future__ import annotations

import streamconv


def accepted() -> None:
    """Options of every type."""
    opened = streamconv.open("a", root="model", weights="master", optimizer=True)
    plan = streamconv.plan(
        opened, "b", tp=2, dtype=["BF16"], like="c", tied="drop", rename=["a=b"], lora_scale=2.0
    )
    streamconv.convert(plan, "b", memory_budget="1GB", workers=2, engine="inline", overwrite=True)
    streamconv.convert("a", "b", to="torch", max_shard=10**9, restart=True)
    streamconv.verify("a", "b", to="torch", workers=1)
    streamconv.verify("b", workers=1, headers=True)


def refused() -> None:
    """A misspelt keyword, one of another call, and values of another type."""
    streamconv.open("a", optimiser=True)  # type: ignore[call-arg]
    streamconv.open("a", tp=2)  # type: ignore[call-arg]
    streamconv.plan("a", max_shards="1GB")  # type: ignore[call-arg]
    streamconv.plan("a", tp="2")  # type: ignore[arg-type]
    streamconv.plan("a", weights="masters")  # type: ignore[arg-type]
    streamconv.convert("a", "b", overwite=True)  # type: ignore[call-arg]
    streamconv.verify("a", "b", overwrite=True)  # type: ignore[call-overload]
    streamconv.verify("b", dtype="BF16")  # type: ignore[call-overload]
