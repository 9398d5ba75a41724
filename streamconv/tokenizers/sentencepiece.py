"""A sentencepiece `tokenizer.model` as the `tokenizer.json` of Hugging Face's tokenizers.

Source: google/sentencepiece: src/sentencepiece_model.proto (the file), src/bpe_model.cc (which pieces merge),
src/normalizer.cc; huggingface/tokenizers: tokenizers/src/models/{bpe,unigram} (the target).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.protobuf import BYTES, FIXED32, VARINT, fields, float32, signed, text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"  # what stands for a space

# Well above any vocabulary there is.
_MAX_PIECES = 1 << 22


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    piece: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a model file says.

    Attributes:
        pieces: by id.
        unigram: whether it is a unigram model; else BPE.
        byte_fallback: whether unknown characters are spelled in bytes.
        charsmap: the compiled normalisation rules; empty where text stays as it is.
        dummy_prefix: whether a space is put before the text.
        squeezes_spaces: whether spaces at the ends go, and several become one.
    """

    pieces: tuple[Piece, ...]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    squeezes_spaces: bool

    @property
    def unknown(self) -> int:
        """The id of the unknown token."""
        return next((index for index, piece in enumerate(self.pieces) if piece.kind == UNKNOWN), 0)


def read(data: bytes, file: str) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Args:
        data: the file's bytes.
        file: named in errors.

    Raises:
        CheckpointError: it is no sentencepiece model, or of a kind that is not converted.
    """
    try:
        model = _model(memoryview(data))
    except CheckpointError as error:
        raise CheckpointError(
            f"it is no sentencepiece model: {error.headline.message}", file=file, hint="download it again"
        ) from None
    if not model.pieces:
        raise CheckpointError("it is no sentencepiece model: it has no pieces", file=file)
    return model


def _model(buffer: memoryview) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    charsmap = b""
    for part in fields(buffer):
        if part.wire_type != BYTES:
            continue
        if part.number == 1:
            if len(pieces) >= _MAX_PIECES:
                raise CheckpointError(f"it has more than {_MAX_PIECES} pieces")
            pieces.append(_piece(buffer, part.start, part.stop))
        elif part.number in (2, 3):
            for field in fields(buffer, part.start, part.stop):
                if field.wire_type == VARINT:
                    (trainer if part.number == 2 else normalizer)[field.number] = field.value
                elif part.number == 3 and field.number == 2 and field.wire_type == BYTES:
                    charsmap = bytes(buffer[field.start : field.stop])
    kind = signed(trainer.get(3, _UNIGRAM))
    if kind not in (_UNIGRAM, _BPE):
        raise CheckpointError("its model is neither BPE nor unigram")
    return SentencePieceModel(
        tuple(pieces),
        unigram=kind == _UNIGRAM,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=charsmap,
        # These are on unless they are said to be off.
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeezes_spaces=bool(normalizer.get(4, 1)),
    )


def _piece(buffer: memoryview, start: int, stop: int) -> Piece:
    piece, score, kind = "", 0.0, NORMAL
    for field in fields(buffer, start, stop):
        if field.number == 1 and field.wire_type == BYTES:
            piece = text(buffer, field)
        elif field.number == 2 and field.wire_type == FIXED32:
            score = float32(buffer, field)
        elif field.number == 3 and field.wire_type == VARINT:
            kind = field.value
    return Piece(piece, score, kind)


# ------------------------------------------------------------------------------------- writing


def document(model: SentencePieceModel, special: Mapping[str, int]) -> dict[str, Any]:
    """The `tokenizer.json` that encodes as the model does.

    Args:
        model: what was read.
        special: tokens that are not in the model, by their ids; they are found in text as they are.
    """
    added = {
        index: (piece.piece, True)
        for index, piece in enumerate(model.pieces)
        if piece.kind in (UNKNOWN, CONTROL)
    }
    added |= {
        index: (piece.piece, False) for index, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED
    }
    added |= {index: (token, True) for token, index in special.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(index, *added[index]) for index in sorted(added)],
        "normalizer": _normalizer(model),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(model),
        "model": _unigram(model) if model.unigram else _bpe(model),
    }


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """A token that is found in text before anything else is done to it."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _normalizer(model: SentencePieceModel) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.squeezes_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unknown,
        "vocab": [[piece.piece, piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unknown].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best piece first.

    sentencepiece has no list of merges: of all neighbours whose union is a piece, it joins those with the
    best score. So each way to cut a piece in two is a merge, and its rank is the piece's.
    """
    whole = {
        piece.piece: index
        for index, piece in enumerate(model.pieces)
        if piece.kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    found: list[tuple[float, int, int, int, int, str, str]] = []
    for piece, index in whole.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in whole and right in whole:
                score = model.pieces[index].score
                found.append((-score, -len(left), -len(right), whole[left], whole[right], left, right))
    found.sort()
    return [[left, right] for *_, left, right in found]
