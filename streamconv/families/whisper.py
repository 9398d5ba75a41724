"""Whisper: from OpenAI's `.pt` to transformers and back.

Source: openai/whisper (whisper/model.py; __init__.py: the file; tokenizer.py: special tokens; audio.py);
huggingface/transformers 5.23.0 (models/whisper/modeling_whisper.py, convert_openai_to_hf.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import named
from streamconv.plans.recipe import LEAVES, Files, Recipe, Refusal, Rule, Surroundings, rename
from streamconv.plans.table import table
from streamconv.readers.checkpoint import Checkpoint
from streamconv.writers.layout import Wrapping

_ATTENTION = table("""
    query.{weight,bias} [width, width] [width]
    key.weight [width, width]
    {value,out}.{weight,bias} [width, width] [width]
""")
"""A bias of the keys would change no attention."""

_NORM = table("""
    weight [width]
    bias [width]
""")
_FEED_FORWARD = table("""
    mlp.0.{weight,bias} [4 * width, width] [4 * width]
    mlp.2.{weight,bias} [width, 4 * width] [width]
""") + _NORM.under("mlp_ln.")
_SELF = _ATTENTION.under("attn.") + _NORM.under("attn_ln.")
_CROSS = _ATTENTION.under("cross_attn.") + _NORM.under("cross_attn_ln.")
_ENCODER, _DECODER = "encoder.blocks.{i}.", "decoder.blocks.{j}."
_BLOCKS = (_SELF + _FEED_FORWARD).under(_ENCODER).given(width="audio") + (
    _SELF + _CROSS + _FEED_FORWARD
).under(_DECODER).given(width="text")
_OUTSIDE = table("""
    encoder.conv1.{weight,bias} [audio, mels, 3] [audio]
    encoder.conv2.{weight,bias} [audio, audio, 3] [audio]
    encoder.positional_embedding [audio_positions, audio]
    encoder.ln_post.{weight,bias} [audio]
    decoder.token_embedding.weight [vocab, text]
    decoder.positional_embedding [text_positions, text]
    decoder.ln.{weight,bias} [text]
""")


_SELF_NAMES = """
    attn.{query,key,value,out}. -> self_attn.{q,k,v,out}_proj.
    attn_ln. -> self_attn_layer_norm.
"""
_CROSS_NAMES = """
    cross_attn.{query,key,value,out}. -> encoder_attn.{q,k,v,out}_proj.
    cross_attn_ln. -> encoder_attn_layer_norm.
"""
_FEED_FORWARD_NAMES = """
    mlp.{0,2}. -> {fc1,fc2}.
    mlp_ln. -> final_layer_norm.
"""
_MODULES = named("""
    encoder.conv{1,2}. -> model.encoder.conv{1,2}.
    {encoder.ln_post,decoder.ln}. -> model.{encoder,decoder}.layer_norm.
""")
_EMBEDDINGS = named("""
    {encoder,decoder}.positional_embedding -> model.{encoder,decoder}.embed_positions.weight
    decoder.token_embedding.weight -> model.decoder.embed_tokens.weight
""")
_BLOCK_NAMES = (
    named(_SELF_NAMES + _FEED_FORWARD_NAMES, _ENCODER, "model.encoder.layers.{i}."),
    named(_SELF_NAMES + _CROSS_NAMES + _FEED_FORWARD_NAMES, _DECODER, "model.decoder.layers.{j}."),
)
"""Of OpenAI -> of transformers."""

OPENAI_WHISPER = Architecture(
    name="openai-whisper",
    title="Whisper of OpenAI",
    model_types=("openai-whisper",),
    sizes={
        "mels": "n_mels",
        "audio_positions": "n_audio_ctx",
        "audio": "n_audio_state",
        "audio_heads": "n_audio_head",
        "audio_layers": "n_audio_layer",
        "vocab": "n_vocab",
        "text_positions": "n_text_ctx",
        "text": "n_text_state",
        "text_heads": "n_text_head",
        "text_layers": "n_text_layer",
    },
    counts={"i": "audio_layers", "j": "text_layers"},
    lines=_OUTSIDE + _BLOCKS,
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
        "audio_heads": "encoder_attention_heads",
        "audio_layers": "encoder_layers",
        "vocab": "vocab_size",
        "text_positions": "max_target_positions",
        "text": "d_model",
        "text_heads": "decoder_attention_heads",
        "text_layers": "decoder_layers",
    },
    counts=OPENAI_WHISPER.counts,
    lines=_OUTSIDE.renamed({**_MODULES, **_EMBEDDINGS})
    + table("?proj_out.weight [vocab, text]")
    + _BLOCKS.renamed({**_BLOCK_NAMES[0], **_BLOCK_NAMES[1]}),
)

# ------------------------------------------------------------------------------------------- rules

_DIMS = tuple(OPENAI_WHISPER.sizes.values())
_ENGLISH, _MULTILINGUAL = 51864, 51865


def identified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the config that OpenAI's files call `dims`; others as they are."""
    (component, *more), dims = checkpoint.components, checkpoint.metadata.get("dims")
    if more or component.config is not None or not isinstance(dims, Mapping):
        return checkpoint
    if not all(isinstance(dims.get(name), int) for name in _DIMS):
        return checkpoint
    config = {"model_type": "openai-whisper", **{name: dims[name] for name in _DIMS}}
    return replace(checkpoint, components=(replace(component, config=config),))


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
    made = {
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "decoder_ffn_dim": 4 * config["n_text_state"],
        "decoder_layerdrop": 0.0,
        "dropout": 0.0,
        "encoder_ffn_dim": 4 * config["n_audio_state"],
        "encoder_layerdrop": 0.0,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "num_hidden_layers": config["n_audio_layer"],
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        **WHISPER.stated(OPENAI_WHISPER.sizes_of(config)),
    }
    return {**WHISPER.label, **dict(sorted(made.items())), **_tokens(config["n_vocab"])}


def _dims(config: Config) -> dict[str, Any]:
    return {"model_type": "openai-whisper", **OPENAI_WHISPER.stated(WHISPER.sizes_of(config))}


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
        *rename(_MODULES, LEAVES),
        *rename(_EMBEDDINGS),
        *(rule for names in _BLOCK_NAMES for rule in rename(names, LEAVES)),
        Rule(None, "proj_out.weight", optional=True, reason="tied to the embedding of tokens"),
    ),
    config=_config,
    config_back=_dims,
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
