"""Whisper: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/whisper/{convert_weight,convert_reversed}.py.
"""

from __future__ import annotations

from streamconv.families.mindformers.names import layer_norm
from streamconv.families.mindformers.net import Names, Net
from streamconv.families.whisper import WHISPER
from streamconv.plans.recipe import Refusal, Rule
from streamconv.plans.table import table

_ENCODER, _DECODER = "model.encoder.", "model.decoder."
_NORMS = (
    _ENCODER + "layer_norm",
    _ENCODER + "layers.{i}.self_attn_layer_norm",
    _ENCODER + "layers.{i}.final_layer_norm",
    _DECODER + "layer_norm",
    _DECODER + "layers.{j}.self_attn_layer_norm",
    _DECODER + "layers.{j}.encoder_attn_layer_norm",
    _DECODER + "layers.{j}.final_layer_norm",
)
_EMBEDDINGS = (_ENCODER + "embed_positions", _DECODER + "embed_tokens", _DECODER + "embed_positions")
_ALIKE = (
    _ENCODER + "layers.",
    _DECODER + "layers.",
    _ENCODER + "conv1.bias",
    _ENCODER + "conv2.bias",
)
_NAMES: Names = {
    **{name: name for name in _ALIKE},
    **{name: ours for norm in _NORMS for name, ours in layer_norm(norm, norm).items()},
    **{f"{module}.weight": f"{module}.embedding_weight" for module in _EMBEDDINGS},
}
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
