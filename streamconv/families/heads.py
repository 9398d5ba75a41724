"""What a head is called that files leave out because it is the embedding.

Source: huggingface/transformers 5.24.0 (`_tied_weights_keys` in models/*/modeling_*.py): `lm_head.weight` in all classes but
those of encoders, and of decoders beside one; within a part of a model of several in files of transformers 4.
"""

from __future__ import annotations

import re

from streamconv.plans.architecture import Config
from streamconv.plans.roles import Role, having

_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_PLACE = re.compile(r"(?P<part>(?!model\.)[^.]+\.(?=model\.))?.*\.[^.]+\.weight")
_OTHERS = re.compile(r"(^|\.)(embeddings|encoder|decoder)\.")
_HEAD = "lm_head.weight"


def has_head(config: Config) -> bool:
    """Whether the class that a config names is that of a language model with a head."""
    return any(str(each).endswith(_ENDINGS) for each in _classes(config))


def head_of(embedding: str, config: Config) -> str | None:
    """What the head is called that is this embedding; None where that is not known."""
    place = _PLACE.fullmatch(embedding)
    if place is None or having(Role.SCALED, [embedding]):
        return None
    other = _OTHERS.search(embedding)
    if other and (
        other[2] != "decoder" or not any(str(each).endswith(_ENDINGS[0]) for each in _classes(config))
    ):
        return None
    return f"{place['part'] or ''}{_HEAD}"


def _classes(config: Config) -> list[object]:
    classes = config.get("architectures")
    return classes if isinstance(classes, list) else []
