"""Whisper, from OpenAI's `.pt` to transformers and back.

Facts: openai/whisper (whisper/__init__.py: the file; tokenizer.py: special tokens; audio.py);
huggingface/transformers (models/whisper/convert_openai_to_hf.py).

Whisper, in OpenAI's naming and in that of transformers.

Source: openai/whisper: whisper/model.py; huggingface/transformers 5.23.0: models/whisper/modeling_whisper.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from streamconv.plans.architecture import Architecture, Config, table
from streamconv.plans.recipe import Files, Recipe, Refusal, Rule, Surroundings, rename
from streamconv.writers.layout import Wrapping


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

# ------------------------------------------------------------------------------------------------- rules

_DIMS = (
    "n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer", "n_vocab", "n_text_ctx", "n_text_state",
    "n_text_head", "n_text_layer",
)  # fmt: skip
_LEAVES = ("weight", "bias")
_ENGLISH, _MULTILINGUAL = 51864, 51865


def _block_rules(ours: str, theirs: str, *, cross: bool) -> tuple[Rule, ...]:
    pairs: dict[str, str] = {}
    for attention in ("self", "cross") if cross else ("self",):
        pairs |= {
            f"{ours}.{OPENAI_NAMES[attention]}.{OPENAI_NAMES[part]}.": f"{theirs}.{HF_NAMES[attention]}.{HF_NAMES[part]}."
            for part in ("query", "key", "value", "out")
        }
        norm = f"{attention}_norm"
        pairs[f"{ours}.{OPENAI_NAMES[norm]}."] = f"{theirs}.{HF_NAMES[norm]}."
    pairs |= {
        f"{ours}.{OPENAI_NAMES[part]}.": f"{theirs}.{HF_NAMES[part]}." for part in ("up", "down", "norm")
    }
    return rename(pairs, _LEAVES)


def _from_file(metadata: Mapping[str, Any]) -> Config | None:
    """The config that OpenAI's files call `dims`."""
    dims = metadata.get("dims")
    if not isinstance(dims, Mapping) or not all(isinstance(dims.get(name), int) for name in _DIMS):
        return None
    return {"model_type": "openai-whisper", **{name: dims[name] for name in _DIMS}}


def _tokens(vocabulary: int) -> dict[str, Any]:
    """Ids of the tokens that begin and end a text; they depend on which languages the model knows."""
    if vocabulary >= _MULTILINGUAL:
        end, begin = 50257, 50258
    elif vocabulary == _ENGLISH:
        end, begin = 50256, 50257
    else:
        end, begin = 0, 1
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": begin}


def _config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "d_model": config["n_audio_state"],
        "decoder_attention_heads": config["n_text_head"],
        "decoder_ffn_dim": 4 * config["n_text_state"],
        "decoder_layerdrop": 0.0,
        "decoder_layers": config["n_text_layer"],
        "dropout": 0.0,
        "encoder_attention_heads": config["n_audio_head"],
        "encoder_ffn_dim": 4 * config["n_audio_state"],
        "encoder_layerdrop": 0.0,
        "encoder_layers": config["n_audio_layer"],
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_source_positions": config["n_audio_ctx"],
        "max_target_positions": config["n_text_ctx"],
        "num_hidden_layers": config["n_audio_layer"],
        "num_mel_bins": config["n_mels"],
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": config["n_vocab"],
        **_tokens(config["n_vocab"]),
    }


def _dims(config: Config) -> dict[str, Any]:
    return {
        "model_type": "openai-whisper",
        "n_mels": config["num_mel_bins"],
        "n_audio_ctx": config["max_source_positions"],
        "n_audio_state": config["d_model"],
        "n_audio_head": config["encoder_attention_heads"],
        "n_audio_layer": config["encoder_layers"],
        "n_vocab": config["vocab_size"],
        "n_text_ctx": config["max_target_positions"],
        "n_text_state": config["d_model"],
        "n_text_head": config["decoder_attention_heads"],
        "n_text_layer": config["decoder_layers"],
    }


def _files(around: Surroundings) -> Files:
    config = around.target_config
    preprocessor = {
        "chunk_length": 30,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config["num_mel_bins"],
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "sampling_rate": 16000,
    }
    generation = {**_tokens(config["vocab_size"]), "max_length": config["max_target_positions"]}
    return Files(
        texts={
            "preprocessor_config.json": json.dumps(preprocessor, indent=2) + "\n",
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
        },
        notes=(
            "OpenAI's file has no tokenizer, and not which tokens mean languages and tasks: take tokenizer and "
            "generation_config.json of the model of the same size along",
        ),
    )


def _wrapped(config: Config) -> Wrapping:
    return Wrapping("model.pt", "model_state_dict", before={"dims": {name: config[name] for name in _DIMS}})


WHISPER_HF = Recipe(
    name="whisper-hf",
    title="Whisper of OpenAI (.pt) -> transformers",
    source=OPENAI_WHISPER,
    target=WHISPER,
    rules=(
        *rename(
            {
                "encoder.conv1.": "model.encoder.conv1.",
                "encoder.conv2.": "model.encoder.conv2.",
                "encoder.ln_post.": "model.encoder.layer_norm.",
                "decoder.ln.": "model.decoder.layer_norm.",
            },
            _LEAVES,
        ),
        *rename(
            {
                "encoder.positional_embedding": "model.encoder.embed_positions.weight",
                "decoder.positional_embedding": "model.decoder.embed_positions.weight",
                "decoder.token_embedding.weight": "model.decoder.embed_tokens.weight",
            }
        ),
        *_block_rules("encoder.blocks.{i}", "model.encoder.layers.{i}", cross=False),
        *_block_rules("decoder.blocks.{j}", "model.decoder.layers.{j}", cross=True),
        Rule(None, "proj_out.weight", optional=True, reason="tied to the embedding of tokens"),
    ),
    config=_config,
    config_back=_dims,
    config_from=_from_file,
    refuses=(Refusal("n_audio_state != n_text_state", "encoder and decoder are of different widths"),),
    refuses_back=(
        Refusal(
            "encoder_ffn_dim != 4 * d_model or decoder_ffn_dim != 4 * d_model",
            "its feed-forward layers are not four times as wide as the model",
        ),
        Refusal("tie_word_embeddings == False", "its output layer is not tied to its embedding"),
    ),
    files=_files,
    wrap_back=_wrapped,
)

RECIPES = (WHISPER_HF,)
