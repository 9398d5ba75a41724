"""Whisper, in OpenAI's naming and in that of transformers.

Source: openai/whisper: whisper/model.py; huggingface/transformers 5.23.0: models/whisper/modeling_whisper.py.
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture, table


def _blocks(block: str, width: str, names: dict[str, str], *, cross: bool) -> str:
    """The lines of one stack's layers; `names` has what each part is called."""
    lines = []
    for attention, norm in (("self", "self_norm"), *([("cross", "cross_norm")] if cross else [])):
        for part in ("query", "key", "value", "out"):
            name = f"{block}.{names[attention]}.{names[part]}"
            lines.append(f"{name}.weight [{width}, {width}]")
            if part != "key":  # a bias of the keys would change no attention
                lines.append(f"{name}.bias [{width}]")
        lines += [f"{block}.{names[norm]}.{leaf} [{width}]" for leaf in ("weight", "bias")]
    lines += [
        f"{block}.{names['up']}.weight [4 * {width}, {width}]",
        f"{block}.{names['up']}.bias [4 * {width}]",
        f"{block}.{names['down']}.weight [{width}, 4 * {width}]",
        f"{block}.{names['down']}.bias [{width}]",
        f"{block}.{names['norm']}.weight [{width}]",
        f"{block}.{names['norm']}.bias [{width}]",
    ]
    return "\n".join(lines) + "\n"


OPENAI_NAMES = {
    "self": "attn", "cross": "cross_attn", "query": "query", "key": "key", "value": "value", "out": "out",
    "self_norm": "attn_ln", "cross_norm": "cross_attn_ln", "up": "mlp.0", "down": "mlp.2", "norm": "mlp_ln",
}  # fmt: skip
HF_NAMES = {
    "self": "self_attn", "cross": "encoder_attn", "query": "q_proj", "key": "k_proj", "value": "v_proj",
    "out": "out_proj", "self_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm", "up": "fc1",
    "down": "fc2", "norm": "final_layer_norm",
}  # fmt: skip

_COUNTS = {"i": "audio_layers", "j": "text_layers"}

OPENAI_WHISPER = Architecture(
    name="openai-whisper",
    title="Whisper of OpenAI",
    model_types=("openai-whisper",),
    classes=(),
    sizes={
        "mels": "n_mels",
        "audio_positions": "n_audio_ctx",
        "audio": "n_audio_state",
        "audio_layers": "n_audio_layer",
        "vocab": "n_vocab",
        "text_positions": "n_text_ctx",
        "text": "n_text_state",
        "text_layers": "n_text_layer",
    },
    counts=_COUNTS,
    lines=table(
        """
        encoder.conv1.weight [audio, mels, 3]
        encoder.conv1.bias [audio]
        encoder.conv2.weight [audio, audio, 3]
        encoder.conv2.bias [audio]
        encoder.positional_embedding [audio_positions, audio]
        encoder.ln_post.weight [audio]
        encoder.ln_post.bias [audio]
        decoder.token_embedding.weight [vocab, text]
        decoder.positional_embedding [text_positions, text]
        decoder.ln.weight [text]
        decoder.ln.bias [text]
        """
        + _blocks("encoder.blocks.{i}", "audio", OPENAI_NAMES, cross=False)
        + _blocks("decoder.blocks.{j}", "text", OPENAI_NAMES, cross=True)
    ),
    vocabulary="n_vocab",
)
WHISPER = Architecture(
    name="whisper",
    title="Whisper",
    model_types=("whisper",),
    classes=("WhisperForConditionalGeneration",),
    sizes={
        "mels": "num_mel_bins",
        "audio_positions": "max_source_positions",
        "audio": "d_model",
        "audio_layers": "encoder_layers",
        "vocab": "vocab_size",
        "text_positions": "max_target_positions",
        "text": "d_model",
        "text_layers": "decoder_layers",
    },
    counts=_COUNTS,
    lines=table(
        """
        model.encoder.conv1.weight [audio, mels, 3]
        model.encoder.conv1.bias [audio]
        model.encoder.conv2.weight [audio, audio, 3]
        model.encoder.conv2.bias [audio]
        model.encoder.embed_positions.weight [audio_positions, audio]
        model.encoder.layer_norm.weight [audio]
        model.encoder.layer_norm.bias [audio]
        model.decoder.embed_tokens.weight [vocab, text]
        model.decoder.embed_positions.weight [text_positions, text]
        model.decoder.layer_norm.weight [text]
        model.decoder.layer_norm.bias [text]
        ?proj_out.weight [vocab, text]
        """
        + _blocks("model.encoder.layers.{i}", "audio", HF_NAMES, cross=False)
        + _blocks("model.decoder.layers.{j}", "text", HF_NAMES, cross=True)
    ),
)
