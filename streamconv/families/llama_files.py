"""Tokenizer files for models that become Llama: built from what lies there, so that no code is needed."""

from __future__ import annotations

import json
from typing import Any

from streamconv.families.tokenizers import plain, qwen
from streamconv.plans.recipe import Files, Surroundings, keep_files

_MODEL = "tokenizer.model"
_RANKS = "qwen.tiktoken"


def sentencepiece_files(around: Surroundings) -> Files:
    """A `tokenizer.json` from `tokenizer.model`, with the tokens and the template that the config beside it names."""
    kept = keep_files(around)
    data = around.read(_MODEL)
    if data is None or "tokenizer.json" in around.names:
        return Files(left_out=kept.left_out, notes=_none(around, _MODEL))
    settings = _json(around, "tokenizer_config.json") | {}
    texts = plain.convert(
        data, str(around.directory / _MODEL), settings, _json(around, "special_tokens_map.json")
    )
    return Files(texts, kept.left_out)


def qwen_files(around: Surroundings) -> Files:
    """A `tokenizer.json` from Qwen's list of ranks."""
    kept = keep_files(around)
    data = around.read(_RANKS)
    if data is None:
        return Files(left_out=kept.left_out, notes=_none(around, _RANKS))
    length = around.target_config["max_position_embeddings"]
    return Files(qwen.convert(data, str(around.directory / _RANKS), length), kept.left_out)


def _none(around: Surroundings, name: str) -> tuple[str, ...]:
    has = "tokenizer.json" in around.names
    return () if has else (f"there is no {name}, so the output has no tokenizer",)


def _json(around: Surroundings, name: str) -> dict[str, Any]:
    data = around.read(name)
    try:
        content = json.loads(data) if data else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
