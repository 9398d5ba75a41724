"""A sentencepiece model with Llama's conventions (beginning and end tokens, added tokens) as files without code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.families.tokenizers import sentencepiece
from streamconv.families.tokenizers.fast import files

_KEPT = ("chat_template", "model_max_length", "padding_side", "clean_up_tokenization_spaces")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def convert(
    data: bytes, file: str, settings: Mapping[str, Any], special_tokens: Mapping[str, Any]
) -> dict[str, str]:
    """File name -> content, from `tokenizer.model` and what its `tokenizer_config.json` says.

    Args:
        data: of the model.
        file: named in errors.
        settings: the parsed `tokenizer_config.json`, or nothing.
        special_tokens: the parsed `special_tokens_map.json`, or nothing.

    Raises:
        CheckpointError: it is not a sentencepiece model.
    """
    model = sentencepiece.read(data, file)
    added = settings.get("added_tokens_decoder")
    extra = {
        _text(token): int(index)
        for index, token in (added.items() if isinstance(added, Mapping) else ())
        if str(index).isdecimal() and _text(token)
    }
    document = sentencepiece.document(model, extra)
    tokens = {
        role: text
        for role in _ROLES
        if (text := _text(settings.get(role)) or _text(special_tokens.get(role)))
    }
    tokens.setdefault("unk_token", model.pieces[model.unknown].piece)
    document["post_processor"] = _frame(model, settings, tokens)
    return files(document, {key: settings[key] for key in _KEPT if key in settings} | tokens)


def _frame(
    model: sentencepiece.SentencePieceModel, settings: Mapping[str, Any], tokens: Mapping[str, str]
) -> dict[str, Any] | None:
    """What puts the beginning and end tokens around a text, where the settings want them."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    first, last = (
        tokens.get(role) if settings.get(wanted) and tokens.get(role) in ids else None
        for role, wanted in (("bos_token", "add_bos_token"), ("eos_token", "add_eos_token"))
    )
    if first is None and last is None:
        return None
    special = [{"SpecialToken": {"id": token, "type_id": 0}} if token else None for token in (first, last)]
    single = [special[0], {"Sequence": {"id": "A", "type_id": 0}}, special[1]]
    pair = [*single, special[0], {"Sequence": {"id": "B", "type_id": 1}}, special[1]]
    return {
        "type": "TemplateProcessing",
        "single": [part for part in single if part],
        "pair": [part for part in pair if part],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (first, last) if token
        },
    }


def _text(token: Any) -> str:
    """A token as configs write it: text, or an object that has it as `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else ""
