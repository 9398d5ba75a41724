"""Whisper: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/whisper/{convert_weight,convert_reversed}.py.
"""

from __future__ import annotations

from streamconv.plans.architectures.mindformers_whisper import CONVOLUTIONS, MF_WHISPER
from streamconv.plans.recipe import Recipe, Refusal, Rule
from streamconv.plans.recipes.mindformers_rules import recipe, renames

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
