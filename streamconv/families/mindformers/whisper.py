"""Whisper: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/whisper/{convert_weight,convert_reversed}.py.

Whisper of MindFormers.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/whisper/convert_weight.py.
"""

from __future__ import annotations

from streamconv.families.mindformers.rules import recipe, renames
from streamconv.families.mindformers.tables import Names, family
from streamconv.families.whisper import WHISPER
from streamconv.plans.recipe import Recipe, Refusal, Rule
from streamconv.plans.table import table

CONVOLUTIONS = {"model.encoder.conv1.weight": "mels", "model.encoder.conv2.weight": "audio"}
"""Name -> its channels; the net has a window of height 1."""

_NORM = {"weight": "gamma", "bias": "beta"}
_TIED = "proj_out.weight"


def _name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if "layer_norm" in module:
        return f"{module}.{_NORM[leaf]}"
    return f"{module}.embedding_weight" if module.endswith(("embed_tokens", "embed_positions")) else name


_NAMES: Names = {name: _name(name) for name in WHISPER.lines.names if name not in (_TIED, *CONVOLUTIONS)}
MF_WHISPER = family(
    WHISPER,
    "Whisper",
    _NAMES,
    table("""
        model.encoder.conv1.weight [audio, mels, 1, 3]
        model.encoder.conv2.weight [audio, audio, 1, 3]
    """),
)

# ------------------------------------------------------------------------------------------------- rules

_ONLY_TIED = (
    Refusal(
        "tie_word_embeddings == False", "the net's output layer is its embedding, and this model has another"
    ),
)

RECIPES: tuple[Recipe, ...] = (
    recipe(
        "whisper",
        "Whisper",
        MF_WHISPER,
        (
            *renames(MF_WHISPER),
            *(
                Rule(name, name, f"x = reshape(x, [audio, {channels}, 3])")
                for name, channels in CONVOLUTIONS.items()
            ),
            Rule(None, "proj_out.weight", optional=True, reason="tied to the embedding of tokens"),
        ),
        ("model.encoder.layer_norm.gamma", "model.decoder.embed_tokens.embedding_weight"),
        refuses=_ONLY_TIED,
        refuses_back=_ONLY_TIED,
    ),
)
