"""What the fast tokenizers of Hugging Face read, which every tokenizer here becomes.

Source: huggingface/tokenizers: tokenizers/src/tokenizer/serialization.rs (the file), tokenizers/src/models/bpe.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, AnyStr


def document(
    added: Sequence[Mapping[str, Any]],
    normalizer: Any,
    pre_tokenizer: Any,
    decoder: Any,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """A `tokenizer.json` of these parts."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def added_token(index: int, content: str) -> dict[str, Any]:
    """A special token, which is found in text before anything else is done to it."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def split(pattern: str, behavior: str) -> dict[str, Any]:
    """A step that cuts text where a regular expression matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def cuts(token: AnyStr, tokens: Container[AnyStr]) -> Iterator[tuple[AnyStr, AnyStr]]:
    """Every way to cut a token into two tokens: each is a merge of the BPE model."""
    for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in tokens and right in tokens:
            yield left, right


def files(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """File name -> content of a tokenizer that needs no code of its model."""
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
