"""A tiktoken rank file as the `tokenizer.json` of Hugging Face's tokenizers.

Source: openai/tiktoken: src/lib.rs (how ranks merge), tiktoken/load.py (the file: base64, a space, the rank);
huggingface/tokenizers: byte-level BPE.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.families.tokenizers import fast

# Well above any vocabulary there is; a token is cut in two at every place, so its length counts twice.
_MAX_RANKS = 1 << 22
_MAX_LENGTH = 1 << 10


def read(data: bytes, file: str) -> dict[bytes, int]:
    """Token -> rank, from lines of `base64 rank`.

    Raises:
        CheckpointError: a line is neither, or a token occurs twice; says which.
    """
    ranks: dict[bytes, int] = {}
    lines: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            spelled, digits = line.split()
            token, rank = base64.b64decode(spelled, validate=True), int(digits)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"line {number} is not a base64 token and its rank", file=file, hint="download it again"
            ) from None
        if not 0 < len(token) <= _MAX_LENGTH:
            raise CheckpointError(
                f"line {number} has a token of {len(token)} bytes; expected 1 to {_MAX_LENGTH}", file=file
            )
        if lines.setdefault(token, number) != number:
            raise CheckpointError(
                f"lines {lines[token]} and {number} have the same token, {token!r}", file=file
            )
        ranks[token] = rank
        if len(ranks) > _MAX_RANKS:
            raise CheckpointError(f"it has more than {_MAX_RANKS} tokens", file=file)
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(
            f"its {len(ranks)} tokens do not have the ranks from 0 on, once each", file=file
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"byte {missing[0]} is not a token", file=file)
    return ranks


def document(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> dict[str, Any]:
    """The `tokenizer.json` that encodes as tiktoken does.

    Args:
        ranks: what was read; a rank is the token's id.
        pattern: the regular expression that cuts text into words.
        special: tokens that are not among the ranks, by their ids.
    """
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return fast.document(
        [
            fast.added_token(index, token)
            for token, index in sorted(special.items(), key=lambda item: item[1])
        ],
        None,
        {"type": "Sequence", "pretokenizers": [fast.split(pattern, "Isolated"), byte_level]},
        byte_level,
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            # A word that is a token is taken whole, also where merges would not lead to it.
            "ignore_merges": True,
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in _merges(ranks)],
        },
    )


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order of the tokens' ranks.

    tiktoken joins the neighbours whose union has the lowest rank, however that union can be cut.
    """
    found = sorted(
        (rank, ranks[left], ranks[right], left, right)
        for token, rank in ranks.items()
        for left, right in fast.cuts(token, ranks)
    )
    return [(left, right) for *_, left, right in found]


def _letters() -> list[str]:
    """The printable letter that byte-level vocabularies have for each byte (openai/gpt-2: encoder.py)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
