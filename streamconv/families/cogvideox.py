"""CogVideoX, from SAT to diffusers and back: the transformer and the 3D autoencoder.

Facts: see `families.cogvideox_tables`; THUDM/CogVideo (tools/convert_weight_sat2hf.py, sat/configs) and
huggingface/diffusers (scripts/convert_cogvideox_to_diffusers.py) for the configs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from streamconv.families.cogvideox_tables import (
    COGVIDEOX,
    COGVIDEOX_LORA,
    COGVIDEOX_VAE,
    LORA_LINES,
    SAT_COGVIDEOX,
    SAT_COGVIDEOX_VAE,
)
from streamconv.plans.architecture import Config
from streamconv.plans.recipe import Files, Recipe, Refusal, Rule, Surroundings, drop, rename
from streamconv.writers.layout import Wrapping

_BOTH = ("weight", "bias")
_SAT = "transformer.layers.{i}."
_BLOCK = "transformer_blocks.{i}."

_TRANSFORMER = (
    *rename(
        {
            "time_embed.0.": "time_embedding.linear_1.",
            "time_embed.2.": "time_embedding.linear_2.",
            "ofs_embed.0.": "ofs_embedding.linear_1.",
            "ofs_embed.2.": "ofs_embedding.linear_2.",
            "mixins.patch_embed.proj.": "patch_embed.proj.",
            "mixins.patch_embed.text_proj.": "patch_embed.text_proj.",
            _SAT + "input_layernorm.": _BLOCK + "norm1.norm.",
            _SAT + "post_attention_layernorm.": _BLOCK + "norm2.norm.",
            _SAT + "attention.dense.": _BLOCK + "attn1.to_out.0.",
            _SAT + "mlp.dense_h_to_4h.": _BLOCK + "ff.net.0.proj.",
            _SAT + "mlp.dense_4h_to_h.": _BLOCK + "ff.net.2.",
            "mixins.adaln_layer.query_layernorm_list.{i}.": _BLOCK + "attn1.norm_q.",
            "mixins.adaln_layer.key_layernorm_list.{i}.": _BLOCK + "attn1.norm_k.",
            "transformer.final_layernorm.": "norm_final.",
            "mixins.final_layer.norm_final.": "norm_out.norm.",
            "mixins.final_layer.adaLN_modulation.1.": "norm_out.linear.",
            "mixins.final_layer.linear.": "proj_out.",
        },
        _BOTH,
    ),
    *(
        Rule(
            _SAT + f"attention.query_key_value.{leaf}",
            {part: _BLOCK + f"attn1.to_{part}.{leaf}" for part in "qkv"},
            "q, k, v = chunk(x, 0, 3)",
        )
        for leaf in _BOTH
    ),
    # SAT: shift, scale, gate of the image for attention and for the MLP, then the same of the text.
    # diffusers: what is for attention, image and text, then what is for the MLP.
    *(
        Rule(
            f"mixins.adaln_layer.adaLN_modulations.{{i}}.1.{leaf}",
            {"first": _BLOCK + f"norm1.linear.{leaf}", "second": _BLOCK + f"norm2.linear.{leaf}"},
            """
            image_first, image_second, text_first, text_second = chunk(x, 0, 4)
            first = concat([image_first, text_first], 0)
            second = concat([image_second, text_second], 0)
            """,
        )
        for leaf in _BOTH
    ),
    Rule("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding", when="learned"),
    drop(
        "mixins.pos_embed.pos_embedding",
        "a table of sines that diffusers computes",
        when="not learned",
        optional=True,
    ),
    drop("mixins.pos_embed.freqs_sin", "a table of sines that diffusers computes", optional=True),
    drop("mixins.pos_embed.freqs_cos", "a table of cosines that diffusers computes", optional=True),
    drop("transformer.position_embeddings.weight", "left by SAT's base class; never used", optional=True),
    drop("transformer.word_embeddings.weight", "left by SAT's base class; never used", optional=True),
)

_VARIANTS: dict[str, dict[str, Any]] = {
    "1.0": {"sample_width": 90, "sample_height": 60, "sample_frames": 49, "patch_bias": True},
    "1.5": {"sample_width": 170, "sample_height": 96, "sample_frames": 81, "patch_bias": False},
}
"""Generation -> what of the config no shape tells."""


def _generation(config: Config) -> str:
    return "1.5" if config.get("patch_size_t") else "1.0"


def _is_2b(config: Config) -> bool:
    """The only one without rotation: its positions are a table of sines."""
    return bool(config.get("sines"))


def _transformer(config: Config) -> dict[str, Any]:
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": "0.32.0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config["attention_head_dim"],
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config["in_channels"],
        "max_text_seq_length": 226,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "num_attention_heads": config["hidden_size"] // config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "ofs_embed_dim": config.get("ofs_embed_dim"),
        "out_channels": config["out_channels"],
        "patch_size": config["patch_size"],
        "patch_size_t": config.get("patch_size_t"),
        "spatial_interpolation_scale": 1.875,
        "temporal_compression_ratio": 4,
        "temporal_interpolation_scale": 1.0,
        "text_embed_dim": config["text_embed_dim"],
        "time_embed_dim": config["time_embed_dim"],
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": bool(config.get("learned_positions")),
        "use_rotary_positional_embeddings": not _is_2b(config),
        **_VARIANTS[_generation(config)],
        **config.get("sample", {}),
    }


def _transformer_back(config: Config) -> dict[str, Any]:
    return {
        "model_type": "sat-cogvideox",
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "attention_head_dim": config["attention_head_dim"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "patch_size": config["patch_size"],
        "patch_size_t": config.get("patch_size_t"),
        "text_embed_dim": config["text_embed_dim"],
        "time_embed_dim": config["time_embed_dim"],
        "learned_positions": bool(config.get("use_learned_positional_embeddings")),
        "positions": COGVIDEOX.sizes_of(config)["positions"],
        "sines": not config.get("use_rotary_positional_embeddings"),
        "ofs_embed_dim": config.get("ofs_embed_dim"),
    }


def _pipeline(around: Surroundings) -> Files:
    """What makes a directory of components a pipeline: its index, and the scheduler, which has no weights."""
    from_image = around.source_config["in_channels"] > around.source_config["out_channels"]
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if from_image else "CogVideoXPipeline",
        "_diffusers_version": "0.32.0",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    scheduler = {
        "_class_name": "CogVideoXDDIMScheduler",
        "_diffusers_version": "0.32.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0 if _is_2b(around.source_config) else 1.0,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }
    return Files(
        texts={
            "/model_index.json": json.dumps(index, indent=2) + "\n",
            "/scheduler/scheduler_config.json": json.dumps(scheduler, indent=2) + "\n",
        },
        notes=(
            "model_index.json names text encoder, tokenizer and autoencoder too: what of them SRC does not have is taken "
            "along with --like PIPELINE",
        ),
    )


def _wrapped(config: Config) -> Wrapping:
    """A release of SAT, as its training and its inference load it."""
    del config
    return Wrapping("1/mp_rank_00_model_states.pt", "module", "model.diffusion_model.", texts={"latest": "1"})


def _wrapped_autoencoder(config: Config) -> Wrapping:
    del config
    return Wrapping("3d-vae.pt", "state_dict")


SAT_VAE = Recipe(
    name="sat-cogvideox-vae",
    title="the 3D autoencoder of CogVideoX of SAT -> diffusers",
    source=SAT_COGVIDEOX_VAE,
    target=COGVIDEOX_VAE,
    rules=(
        *rename(
            {
                "encoder.down.{k}.block.{b}.nin_shortcut.*": "encoder.down_blocks.{k}.resnets.{b}.conv_shortcut.*",
                "encoder.down.{k}.block.{b}.*": "encoder.down_blocks.{k}.resnets.{b}.*",
                "encoder.down.{k}.downsample.*": "encoder.down_blocks.{k}.downsamplers.0.*",
                "encoder.mid.block_{m+1}.*": "encoder.mid_block.resnets.{m}.*",
                "decoder.mid.block_{m+1}.*": "decoder.mid_block.resnets.{m}.*",
                "decoder.up.{k}.block.{c}.nin_shortcut.*": "decoder.up_blocks.{3-k}.resnets.{c}.conv_shortcut.*",
                "decoder.up.{k}.block.{c}.*": "decoder.up_blocks.{3-k}.resnets.{c}.*",
                "decoder.up.{k}.upsample.*": "decoder.up_blocks.{3-k}.upsamplers.0.*",
                "encoder.conv_in.*": "encoder.conv_in.*",
                "encoder.conv_out.*": "encoder.conv_out.*",
                "encoder.norm_out.*": "encoder.norm_out.*",
                "decoder.conv_in.*": "decoder.conv_in.*",
                "decoder.conv_out.*": "decoder.conv_out.*",
                "decoder.norm_out.*": "decoder.norm_out.*",
            }
        ),
        drop("loss.*", "the discriminator that the autoencoder was trained with", optional=True),
        drop("model_ema.*", "an averaged copy of the model", optional=True),
    ),
    config=lambda config: {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": "0.32.0",
        "act_fn": "silu",
        "block_out_channels": config["block_out_channels"],
        "down_block_types": ["CogVideoXDownBlock3D"] * len(config["block_out_channels"]),
        "force_upcast": True,
        "in_channels": config["in_channels"],
        "invert_scale_latents": config["generation"] == "1.5",
        "latent_channels": config["latent_channels"],
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config["layers_per_block"],
        "norm_eps": 1e-06,
        "norm_num_groups": config.get("norm_num_groups", 32),
        "out_channels": config["in_channels"],
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": config["scaling_factor"],
        "shift_factor": None,
        "temporal_compression_ratio": 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * len(config["block_out_channels"]),
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    config_back=lambda config: {
        "model_type": "sat-cogvideox-vae",
        "block_out_channels": config["block_out_channels"],
        "layers_per_block": config["layers_per_block"],
        "latent_channels": config["latent_channels"],
        "in_channels": config["in_channels"],
        "norm_num_groups": config.get("norm_num_groups", 32),
        "scaling_factor": config["scaling_factor"],
        "generation": "1.5" if config.get("invert_scale_latents") else "1.0",
    },
    wrap_back=_wrapped_autoencoder,
    refuses=(
        Refusal(
            "not scaling_factor",
            "which CogVideoX the autoencoder belongs to is not known, and decides its scaling factor",
            'convert it together with the transformer, or give a config with "scaling_factor" (2B: 1.15258426, all '
            'others: 0.7) and "generation" ("1.0" or "1.5") by --config',
        ),
        Refusal("len(block_out_channels) != 4", "it has another number of levels than 4"),
    ),
)
SAT_COGVIDEOX_DIFFUSERS = Recipe(
    name="sat-cogvideox",
    title="CogVideoX (2B, 5B, 5B-I2V, 1.5) of SAT -> diffusers pipeline",
    source=SAT_COGVIDEOX,
    target=COGVIDEOX,
    rules=_TRANSFORMER,
    config=_transformer,
    config_back=_transformer_back,
    files=_pipeline,
    wrap_back=_wrapped,
    parts=(SAT_VAE,),
)

_LORA_OF = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}
SAT_COGVIDEOX_LORA = Recipe(
    name="sat-cogvideox-lora",
    title="a LoRA in a CogVideoX of SAT -> a LoRA file of diffusers, its scale in the factors",
    source=replace(SAT_COGVIDEOX, title="CogVideoX with a LoRA", lines=LORA_LINES),
    target=COGVIDEOX_LORA,
    rules=(
        *(
            Rule(
                f"{_SAT}attention.{module}.matrix_{side}.{part}",
                f"transformer.{_BLOCK}attn1.{name}.lora_{side}.weight",
                # Loaders take alpha to be the rank; what SAT multiplies with goes into one of the factors.
                "x = affine(x, lora_scale, 0)" if side == "B" else "",
            )
            for module, names in _LORA_OF.items()
            for part, name in enumerate(names)
            for side in "AB"
        ),
        drop("*", "no part of the LoRA", optional=True),
    ),
    one_way="the base weights stay behind",
    stem="pytorch_lora_weights",
    alone=True,
    keeps_lora=True,
    found_by=(_SAT + "attention.query_key_value.matrix_A.0",),
)

RECIPES = (SAT_COGVIDEOX_DIFFUSERS, SAT_VAE, SAT_COGVIDEOX_LORA)
