"""Whisper: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/whisper/{convert_weight,convert_reversed}.py.
"""

from __future__ import annotations

from streamconv.families.mindformers.net import Net
from streamconv.families.whisper import WHISPER
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, Rule
from streamconv.plans.table import table

_ENCODER, _DECODER = "model.encoder.", "model.decoder."
_NAMES = named("""
    model.encoder.layers.
    model.decoder.layers.
    model.encoder.conv{1,2}.bias
    model.{encoder,decoder}.layer_norm.{weight,bias} -> model.{encoder,decoder}.layer_norm.{gamma,beta}
    model.encoder.layers.{i}.{self_attn,final}_layer_norm.{weight,bias} -> model.encoder.layers.{i}.{self_attn,final}_layer_norm.{gamma,beta}
    model.decoder.layers.{j}.{self_attn,encoder_attn,final}_layer_norm.{weight,bias} -> model.decoder.layers.{j}.{self_attn,encoder_attn,final}_layer_norm.{gamma,beta}
    model.{encoder,decoder}.embed_positions.weight -> model.{encoder,decoder}.embed_positions.embedding_weight
    model.decoder.embed_tokens.weight -> model.decoder.embed_tokens.embedding_weight
""")
NETS = (
    Net(
        key="whisper",
        title="Whisper",
        target=WHISPER,
        names=_NAMES,
        # Its convolutions have a window of height 1.
        own=table("""
            model.encoder.conv1.weight [audio, mels, 1, 3]
            model.encoder.conv2.weight [audio, audio, 1, 3]
        """),
        rules=(
            Rule(_ENCODER + "conv1.weight", _ENCODER + "conv1.weight", "x = reshape(x, [audio, mels, 3])"),
            Rule(_ENCODER + "conv2.weight", _ENCODER + "conv2.weight", "x = reshape(x, [audio, audio, 3])"),
            Rule(None, "proj_out.weight", optional=True, reason="tied to the embedding of tokens"),
        ),
        found_by=(_ENCODER + "layer_norm.gamma", _DECODER + "embed_tokens.embedding_weight"),
        refuses=(
            Refusal(
                "tie_word_embeddings == False",
                "the net's output layer is its embedding, and this model has another",
            ),
        ),
    ),
)
