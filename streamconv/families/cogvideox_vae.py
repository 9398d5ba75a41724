"""The 3D autoencoder of CogVideoX: in SAT's naming and in that of diffusers, and from one to the other.

SAT's files hold no config; the reader makes one from names and shapes, with the keys that `sizes` reads here.

Source: THUDM/CogVideo (sat/vae_modules, head and tag v1.0; tools/convert_weight_sat2hf.py, sat/configs);
huggingface/diffusers (models/autoencoders/autoencoder_kl_cogvideox.py, scripts/convert_cogvideox_to_diffusers.py).
"""

from __future__ import annotations

from streamconv.families.cogvideox_files import autoencoder_config
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import pairs
from streamconv.plans.recipe import Recipe, Refusal, drop, rename, same
from streamconv.plans.table import Names, Table, table
from streamconv.writers.layout import Wrapping

_CONVOLUTION = table("""
    conv.{weight,bias} [after, before, 3, 3, 3] [after]
""")
_SHORTCUT = table("""
    weight [after, before, 1, 1, 1]
    bias [after]
""")
# In the encoder.
_NORM = table("""
    weight [width]
    bias [width]
""")
# In the decoder, where the latent modulates it.
_SPATIAL_NORM = (
    _NORM.under("norm_layer.")
    + _SHORTCUT.under("conv_y.conv.").given(before="latent", after="width")
    + _SHORTCUT.under("conv_b.conv.").given(before="latent", after="width")
)


def _block(name: str, norm: Table, before: str, after: str) -> Table:
    """The lines of one residual block but for its shortcut, from one width to another (formulas)."""
    made = (
        norm.under("norm1.").given(width="before")
        + _CONVOLUTION.under("conv1.")
        + norm.under("norm2.").given(width="after")
        + _CONVOLUTION.under("conv2.").given(before="after")
    )
    return made.under(name).given(before=before, after=after)


def _shortcut(name: str, before: str) -> Table:
    """The lines of a block's shortcut, which only those have that change the width."""
    made = _SHORTCUT.under(name + "nin_shortcut.").given(before=before, after="widths[k]")
    return made.where(f"{before} != widths[k]")


_RESAMPLED = table("""
    conv.{weight,bias} [widths[k], widths[k], 3, 3] [widths[k]]
""")
_WIDEST = "widths[levels - 1]"
_FINER, _COARSER = "k > 0 and b == 0", "k < levels - 1 and c == 0"
_DOWN, _UP = "encoder.down.{k}.", "decoder.up.{k}."
_ENCODER = (
    _CONVOLUTION.under("encoder.conv_in.").given(before="channels", after="widths[0]")
    + _block(_DOWN + "block.{b}.", _NORM, f"widths[k - 1] if {_FINER} else widths[k]", "widths[k]")
    + _shortcut(_DOWN + "block.{b}.", "widths[k - 1]").where(_FINER)
    + _RESAMPLED.under(_DOWN + "downsample.").where("k < levels - 1")
    + _block("encoder.mid.block_1.", _NORM, _WIDEST, _WIDEST)
    + _block("encoder.mid.block_2.", _NORM, _WIDEST, _WIDEST)
    + _NORM.under("encoder.norm_out.").given(width=_WIDEST)
    + _CONVOLUTION.under("encoder.conv_out.").given(before=_WIDEST, after="2 * latent")
)
_LATENT = (
    _CONVOLUTION.under("decoder.conv_in.").given(before="latent", after=_WIDEST)
    + _block("decoder.mid.block_1.", _SPATIAL_NORM, _WIDEST, _WIDEST)
    + _block("decoder.mid.block_2.", _SPATIAL_NORM, _WIDEST, _WIDEST)
)
_LEVELS = (
    _block(_UP + "block.{c}.", _SPATIAL_NORM, f"widths[k + 1] if {_COARSER} else widths[k]", "widths[k]")
    + _shortcut(_UP + "block.{c}.", "widths[k + 1]").where(_COARSER)
    + _RESAMPLED.under(_UP + "upsample.").where("k > 0")
)
_OUTPUT = _SPATIAL_NORM.under("decoder.norm_out.").given(width="widths[0]") + _CONVOLUTION.under(
    "decoder.conv_out."
).given(before="widths[0]", after="channels")

SAT_COGVIDEOX_VAE = Architecture(
    name="sat",
    title="CogVideoX autoencoder of SAT",
    model_types=("sat-cogvideox-vae",),
    sizes={
        "widths": "block_out_channels",
        "levels": "len(block_out_channels)",
        "blocks": "layers_per_block",
        "latent": "latent_channels",
        "channels": "in_channels",
    },
    counts={"k": "levels", "b": "blocks", "c": "blocks + 1"},
    lines=_ENCODER + _LATENT + _LEVELS + _OUTPUT,
    vocabulary=None,
)

_NAMES: Names = {
    "{encoder,decoder}.": "{encoder,decoder}.",
    "{encoder,decoder}.mid.block_{1,2}.": "{encoder,decoder}.mid_block.resnets.{0,1}.",
    _DOWN + "block.{b}.": "encoder.down_blocks.{k}.resnets.{b}.",
    _DOWN + "block.{b}.nin_shortcut.": "encoder.down_blocks.{k}.resnets.{b}.conv_shortcut.",
    _DOWN + "downsample.": "encoder.down_blocks.{k}.downsamplers.0.",
    _UP + "block.{c}.": "decoder.up_blocks.{k}.resnets.{c}.",
    _UP + "block.{c}.nin_shortcut.": "decoder.up_blocks.{k}.resnets.{c}.conv_shortcut.",
    _UP + "upsample.": "decoder.up_blocks.{k}.upsamplers.0.",
}
COGVIDEOX_VAE = Architecture(
    name="diffusers",
    title="AutoencoderKLCogVideoX",
    classes=("AutoencoderKLCogVideoX",),
    sizes=SAT_COGVIDEOX_VAE.sizes,
    counts=SAT_COGVIDEOX_VAE.counts,
    # It counts the decoder's levels from the coarsest on.
    lines=(_ENCODER + _LATENT + _LEVELS.given(k="levels - 1 - k") + _OUTPUT).renamed(pairs(_NAMES)),
    vocabulary=None,
)


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
                "{encoder,decoder}.mid.block_{m+1}.*": "{encoder,decoder}.mid_block.resnets.{m}.*",
                "decoder.up.{k}.block.{c}.nin_shortcut.*": "decoder.up_blocks.{3-k}.resnets.{c}.conv_shortcut.*",
                "decoder.up.{k}.block.{c}.*": "decoder.up_blocks.{3-k}.resnets.{c}.*",
                "decoder.up.{k}.upsample.*": "decoder.up_blocks.{3-k}.upsamplers.0.*",
            }
        ),
        *same("{encoder,decoder}.{conv_in,conv_out,norm_out}.*"),
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
        **SAT_COGVIDEOX_VAE.stated(COGVIDEOX_VAE.sizes_of(config)),
        "norm_num_groups": config.get("norm_num_groups", 32),
        "scaling_factor": config["scaling_factor"],
        "generation": "1.5" if config.get("invert_scale_latents") else "1.0",
    },
    wrap_back=lambda _: Wrapping("3d-vae.pt", "state_dict"),
    config_of=autoencoder_config,
    refuses=(
        Refusal(
            "not scaling_factor or not generation",
            "which CogVideoX the autoencoder belongs to is not known, and decides its scaling factor",
            'convert it together with the transformer, give a config with "scaling_factor" (2B: 1.15258426, all '
            'others: 0.7) and "generation" ("1.0" or "1.5") by --config, or a converted autoencoder by --like DIR',
        ),
        Refusal("len(block_out_channels) != 4", "it has another number of levels than 4"),
    ),
)
