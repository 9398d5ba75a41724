"""A sentencepiece `tokenizer.model` as the `tokenizer.json` of Hugging Face's tokenizers.

Encodings are equal, except for what the target cannot express: unknown and control tokens are found in text as
they are written, rules for a letter with several marks are applied to one character at a time, and text that
the rules delete to nothing gets no prefix. Of two ways to cut a text that have the same score, a unigram model takes
the one that the rounding of its sums prefers; the target sums in double precision.

Source: google/sentencepiece: src/sentencepiece_model.proto (the file), src/model_interface.cc (what a valid one
holds), src/bpe_model.cc (which pieces merge), src/unigram_model.cc (which pieces are looked for),
src/normalizer.cc; huggingface/tokenizers: tokenizers/src/models/{bpe,unigram} (the target).
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.families.tokenizers import fast
from streamconv.storage.protobuf import BYTES, FIXED32, VARINT, fields, float32, signed, text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"  # what stands for a space

# Well above any vocabulary there is; a piece is cut in two at every place, so its length counts twice.
_MAX_PIECES = 1 << 22
_MAX_LENGTH = 1 << 10


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
        return next(index for index, piece in enumerate(self.pieces) if piece.kind == UNKNOWN)


def read(data: bytes, file: str) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Args:
        data: the file's bytes.
        file: named in errors.

    Raises:
        CheckpointError: it is not a sentencepiece model, or of a kind that is not converted.
    """
    try:
        content = _content(memoryview(data))
    except CheckpointError as error:
        raise CheckpointError(
            f"it is not a sentencepiece model: {error.headline.message}", file=file, hint="download it again"
        ) from None
    for refused, why in (
        (signed(content.trainer.get(3, _UNIGRAM)) not in (_UNIGRAM, _BPE), "it is neither BPE nor unigram"),
        (content.trainer.get(24, 0), "it puts spaces after words"),
        (not content.normalizer.get(5, 1), "it leaves spaces as they are"),
        (content.denormalizes, "it has rules for decoded text"),
    ):
        if refused:
            raise CheckpointError(
                f"a tokenizer of its kind is not converted: {why}",
                file=file,
                hint="move the file away to convert the model without a tokenizer",
            )
    model = SentencePieceModel(
        tuple(content.pieces),
        unigram=signed(content.trainer.get(3, _UNIGRAM)) == _UNIGRAM,
        byte_fallback=bool(content.trainer.get(35, 0)),
        charsmap=content.charsmap,
        # These are on unless they are said to be off.
        dummy_prefix=bool(content.normalizer.get(3, 1)),
        squeezes_spaces=bool(content.normalizer.get(4, 1)),
    )
    fault = _fault(model)
    if fault is not None:
        raise CheckpointError(
            f"it is not a sentencepiece model: {fault}", file=file, hint="download it again"
        )
    return model


@dataclass(slots=True)
class _Content:
    """A file's fields; numbers by the numbers of their fields."""

    pieces: list[Piece]
    trainer: dict[int, int]
    normalizer: dict[int, int]
    charsmap: bytes = b""
    denormalizes: bool = False


def _fault(model: SentencePieceModel) -> str | None:
    """What is wrong with the pieces, of which no tokenizer can be made."""
    if not model.pieces:
        return "it has no pieces"
    ids: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        if not piece.piece:
            return f"piece {index} is empty"
        if len(piece.piece) > _MAX_LENGTH:
            return f"piece {index} has {len(piece.piece)} characters; expected at most {_MAX_LENGTH}"
        if not NORMAL <= piece.kind <= BYTE:
            return f"piece {index} is of the unknown kind {piece.kind}"
        if not math.isfinite(piece.score):
            return f"piece {index} has the score {piece.score}"
        if ids.setdefault(piece.piece, index) != index:
            return f"pieces {ids[piece.piece]} and {index} are both {piece.piece!r}"
    unknown = sum(piece.kind == UNKNOWN for piece in model.pieces)
    if unknown != 1:
        return f"it has {unknown} unknown tokens; expected one"
    spelled = {piece.piece for piece in model.pieces if piece.kind == BYTE}
    missing = [name for name in map("<0x{:02X}>".format, range(256)) if name not in spelled]
    if model.byte_fallback and missing:
        return f"it spells unknown characters in bytes, but has no piece {missing[0]}"
    return None


def _content(buffer: memoryview) -> _Content:
    content = _Content([], {}, {})
    for part in fields(buffer):
        if part.wire_type != BYTES:
            continue
        if part.number == 1:
            if len(content.pieces) >= _MAX_PIECES:
                raise CheckpointError(f"it has more than {_MAX_PIECES} pieces")
            content.pieces.append(_piece(buffer, part.start, part.stop))
        elif part.number in (2, 3, 5):
            for field in fields(buffer, part.start, part.stop):
                is_rules = field.number == 2 and field.wire_type == BYTES
                if part.number == 2 and field.wire_type == VARINT:
                    content.trainer[field.number] = field.value
                elif part.number == 3 and field.wire_type == VARINT:
                    content.normalizer[field.number] = field.value
                elif part.number == 3 and is_rules:
                    content.charsmap = bytes(buffer[field.start : field.stop])
                elif part.number == 5 and is_rules:
                    content.denormalizes = field.stop > field.start
    return content


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
        special: special tokens and their ids, most of them not in the model. They are found in text as written; the text
            behind one is encoded as a text of its own.
    """
    added = {
        index: piece.piece for index, piece in enumerate(model.pieces) if piece.kind in (UNKNOWN, CONTROL)
    }
    added |= {index: token for token, index in special.items()}
    apart = [
        piece.piece
        for index, piece in enumerate(model.pieces)
        if piece.kind == USER_DEFINED and index not in added
    ]
    return fast.document(
        [fast.added_token(index, added[index]) for index in sorted(added)],
        _normalizer(model),
        _pre_tokenizer(model, apart),
        _decoder(model),
        _unigram(model) if model.unigram else _bpe(model, takes_whole=bool(apart)),
    )


def _normalizer(model: SentencePieceModel) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.squeezes_spaces:
        # Spaces only: other white space stays. What stands for a space counts as one at the end.
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": rf"[ {_SPACE}]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(model: SentencePieceModel, apart: list[str]) -> dict[str, Any] | None:
    """What cuts normalised text: around user-defined pieces, and where text looks like the name of a byte.

    As added tokens, user-defined pieces would be found before the text gets its prefix, and each text after one
    would get a prefix of its own. A unigram model finds them by their scores.
    """
    steps: list[dict[str, Any]] = []
    if apart and not model.unigram:
        longest_first = sorted(apart, key=lambda piece: (-len(piece), piece))
        steps.append(fast.split("|".join(map(re.escape, longest_first)), "Isolated"))
        steps.append(fast.split(r"\A<(?=0x[0-9A-F]{2}>\z)", "MergedWithPrevious"))
    elif model.unigram and any(piece.kind == BYTE for piece in model.pieces):
        steps.append(fast.split("<(?=0x[0-9A-F]{2}>)", "MergedWithPrevious"))
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


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
        # User-defined pieces have the score 0 and so are always found: no other piece has as much.
        "vocab": [[piece.piece, piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel, *, takes_whole: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unknown].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # A user-defined piece is cut out of the text; no merges lead to it.
        "ignore_merges": takes_whole,
        "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best piece first.

    sentencepiece has no list of merges: of all neighbours whose union is a piece, it joins those with the
    best score. So each way to cut a piece in two is a merge, and its rank is the piece's.
    """
    whole = {piece.piece: index for index, piece in enumerate(model.pieces) if piece.kind in (NORMAL, UNUSED)}
    found = sorted(
        (-model.pieces[index].score, -len(left), -len(right), whole[left], whole[right], left, right)
        for piece, index in whole.items()
        for left, right in fast.cuts(piece, whole)
    )
    return [[left, right] for *_, left, right in found]
