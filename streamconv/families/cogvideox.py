"""CogVideoX: its transformer, and a LoRA of it, in SAT's naming and in that of diffusers, and from one to the other.

SAT's files hold no config; the reader makes one from names and shapes, with the keys that `sizes` reads here.

Source: THUDM/CogVideo (sat/dit_video_concat.py, sat/configs, head and tag v1.0; tools/convert_weight_sat2hf.py);
huggingface/diffusers (models/transformers/cogvideox_transformer_3d.py, scripts/convert_cogvideox_to_diffusers.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from streamconv.families.cogvideox_vae import SAT_VAE
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import named
from streamconv.plans.recipe import LEAVES, Files, Recipe, Rule, Surroundings, drop, linear, rename
from streamconv.plans.table import table
from streamconv.writers.layout import Wrapping

SAT_COGVIDEOX = Architecture(
    name="sat",
    title="CogVideoX transformer of SAT",
    model_types=("sat-cogvideox",),
    sizes={
        "hidden": "hidden_size",
        "layers": "num_layers",
        "channels": "in_channels",
        "out_channels": "out_channels",
        "patch": "patch_size",
        "patch_t": "patch_size_t or 0",
        "text": "text_embed_dim",
        "time": "time_embed_dim",
        "head_dim": "attention_head_dim",
        "learned": "bool(learned_positions)",
        "positions": "positions or 0",
        "ofs": "ofs_embed_dim or 0",
        "volume": "patch_size * patch_size * (patch_size_t or 1)",
        "lora_rank": "lora_rank or 0",
        "lora_scale": "lora_scale or 1 / max(lora_rank or 1, 1)",
    },
    lines=table("""
        time_embed.0.{weight,bias} [time, hidden] [time]
        time_embed.2.{weight,bias} [time, time] [time]
        ofs_embed.{0,2}.{weight,bias} [ofs, ofs] [ofs] if ofs
        mixins.patch_embed.proj.weight [hidden, channels, patch, patch] if not patch_t
        mixins.patch_embed.proj.weight [hidden, channels * volume] if patch_t
        mixins.patch_embed.proj.bias [hidden]
        mixins.patch_embed.text_proj.{weight,bias} [hidden, text] [hidden]
        mixins.pos_embed.pos_embedding [1, positions, hidden] if learned
        transformer.layers.{i}.{input,post_attention}_layernorm.{weight,bias} [hidden]
        transformer.layers.{i}.attention.query_key_value.{weight,bias} [3 * hidden, hidden] [3 * hidden]
        transformer.layers.{i}.attention.dense.{weight,bias} [hidden, hidden] [hidden]
        transformer.layers.{i}.mlp.dense_h_to_4h.{weight,bias} [4 * hidden, hidden] [4 * hidden]
        transformer.layers.{i}.mlp.dense_4h_to_h.{weight,bias} [hidden, 4 * hidden] [hidden]
        mixins.adaln_layer.adaLN_modulations.{i}.1.{weight,bias} [12 * hidden, time] [12 * hidden]
        mixins.adaln_layer.{query,key}_layernorm_list.{i}.{weight,bias} [head_dim]
        transformer.final_layernorm.{weight,bias} [hidden]
        mixins.final_layer.norm_final.{weight,bias} [hidden]
        mixins.final_layer.adaLN_modulation.1.{weight,bias} [2 * hidden, time] [2 * hidden]
        mixins.final_layer.linear.{weight,bias} [out_channels * volume, hidden] [out_channels * volume]
    """),
    vocabulary=None,
)

_SAT, _BLOCK = "transformer.layers.{i}.", "transformer_blocks.{i}."
_POSITIONS = "mixins.pos_embed.pos_embedding"
_MODULES = named("""
    {time,ofs}_embed.{0,2}. -> {time,ofs}_embedding.linear_{1,2}.
    mixins.patch_embed.{proj,text_proj}. -> patch_embed.{proj,text_proj}.
    transformer.layers.{i}.{input,post_attention}_layernorm. -> transformer_blocks.{i}.{norm1,norm2}.norm.
    transformer.layers.{i}.attention.dense. -> transformer_blocks.{i}.attn1.to_out.0.
    transformer.layers.{i}.mlp.{dense_h_to_4h,dense_4h_to_h}. -> transformer_blocks.{i}.ff.net.{0.proj,2}.
    mixins.adaln_layer.{query,key}_layernorm_list.{i}. -> transformer_blocks.{i}.attn1.norm_{q,k}.
    transformer.final_layernorm. -> norm_final.
    mixins.final_layer.{norm_final,adaLN_modulation.1}. -> norm_out.{norm,linear}.
    mixins.final_layer.linear. -> proj_out.
""")
"""Layers of SAT -> of diffusers."""

COGVIDEOX = Architecture(
    name="diffusers",
    title="CogVideoXTransformer3DModel",
    classes=("CogVideoXTransformer3DModel",),
    sizes={
        "head_dim": "attention_head_dim",
        "hidden": "num_attention_heads * attention_head_dim",
        "layers": "num_layers",
        "channels": "in_channels",
        "out_channels": "out_channels",
        "patch": "patch_size",
        "patch_t": "patch_size_t or 0",
        "text": "text_embed_dim",
        "time": "time_embed_dim",
        "learned": "bool(use_learned_positional_embeddings)",
        "positions": "max_text_seq_length + ((sample_frames - 1) // temporal_compression_ratio + 1)"
        " * (sample_height // patch_size) * (sample_width // patch_size)",
        "ofs": "ofs_embed_dim or 0",
        "volume": "patch_size * patch_size * (patch_size_t or 1)",
    },
    lines=SAT_COGVIDEOX.lines.renamed({**_MODULES, _POSITIONS: "patch_embed.pos_embedding"})
    + table("""
        norm{1,2}.linear.{weight,bias} [6 * hidden, time] [6 * hidden]
        attn1.to_{q,k,v}.{weight,bias} [hidden, hidden] [hidden]
    """).under(_BLOCK),
    vocabulary=None,
)

_LORA_LINES = table("""
    attention.query_key_value.matrix_A.{0,1,2} [lora_rank, hidden]
    attention.query_key_value.matrix_B.{0,1,2} [hidden, lora_rank]
    attention.dense.matrix_A.0 [lora_rank, hidden]
    attention.dense.matrix_B.0 [hidden, lora_rank]
""").under(_SAT)
"""An unmerged LoRA of SAT: factors for queries, keys, values and the output of each layer."""

COGVIDEOX_LORA = Architecture(
    name="diffusers-lora",
    title="LoRA of CogVideoX",
    sizes={name: SAT_COGVIDEOX.sizes[name] for name in ("hidden", "layers", "lora_rank")},
    lines=table("""
        transformer.transformer_blocks.{i}.attn1.{to_q,to_k,to_v,to_out.0}.lora_A.weight [lora_rank, hidden]
        transformer.transformer_blocks.{i}.attn1.{to_q,to_k,to_v,to_out.0}.lora_B.weight [hidden, lora_rank]
    """),
    vocabulary=None,
)

# ------------------------------------------------------------------------------------------- rules

_TRANSFORMER = (
    *rename(_MODULES, LEAVES),
    *linear(_SAT + "attention.query_key_value", _BLOCK + "attn1.to_{q,k,v}", "q, k, v = chunk(x, 0, 3)"),
    # SAT: shift, scale, gate of the image for attention and for the MLP, then the same of the text.
    # diffusers: what is for attention, image and text, then what is for the MLP.
    *linear(
        "mixins.adaln_layer.adaLN_modulations.{i}.1",
        _BLOCK + "{norm1,norm2}.linear",
        """
        image_first, image_second, text_first, text_second = chunk(x, 0, 4)
        norm1 = concat([image_first, text_first], 0)
        norm2 = concat([image_second, text_second], 0)
        """,
    ),
    Rule(_POSITIONS, "patch_embed.pos_embedding", when="learned"),
    drop(
        _POSITIONS,
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
"""Generation -> what shapes do not show of the config."""


_ALIKE = (
    "num_layers", "attention_head_dim", "in_channels", "out_channels", "patch_size", "patch_size_t", "text_embed_dim",
    "time_embed_dim",
)  # fmt: skip
"""Keys of both configs."""


def _generation(config: Config) -> str:
    return "1.5" if config.get("patch_size_t") else "1.0"


def _is_2b(config: Config) -> bool:
    """The only one without rotation: its positions are a table of sines."""
    return bool(config.get("sines"))


def _transformer(config: Config) -> dict[str, Any]:
    made = {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": "0.32.0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "max_text_seq_length": 226,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "num_attention_heads": config["hidden_size"] // config["attention_head_dim"],
        "spatial_interpolation_scale": 1.875,
        "temporal_compression_ratio": 4,
        "temporal_interpolation_scale": 1.0,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": bool(config.get("learned_positions")),
        "use_rotary_positional_embeddings": not _is_2b(config),
        "ofs_embed_dim": config.get("ofs_embed_dim"),
        **{key: config.get(key) for key in _ALIKE},
    }
    return {**dict(sorted(made.items())), **_VARIANTS[_generation(config)], **config.get("sample", {})}


def _transformer_back(config: Config) -> dict[str, Any]:
    return {
        "model_type": "sat-cogvideox",
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        **{key: config.get(key) for key in _ALIKE},
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
    )


# A release of SAT, as its training and its inference load it.
_RELEASE = Wrapping("1/mp_rank_00_model_states.pt", "module", "model.diffusion_model.", texts={"latest": "1"})


SAT_COGVIDEOX_DIFFUSERS = Recipe(
    name="sat-cogvideox",
    title="CogVideoX (2B, 5B, 5B-I2V, 1.5) of SAT -> diffusers pipeline",
    source=SAT_COGVIDEOX,
    target=COGVIDEOX,
    rules=_TRANSFORMER,
    config=_transformer,
    config_back=_transformer_back,
    files=_pipeline,
    wrap_back=lambda _: _RELEASE,
    parts=(SAT_VAE,),
)

_LORA_OF = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}
SAT_COGVIDEOX_LORA = Recipe(
    name="sat-cogvideox-lora",
    title="a LoRA in a CogVideoX of SAT -> a LoRA file of diffusers, its scale in the factors",
    source=replace(SAT_COGVIDEOX, title="CogVideoX with a LoRA", lines=_LORA_LINES),
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
