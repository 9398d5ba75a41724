"""CogVideoX: transformer and 3D autoencoder, in SAT's naming and in that of diffusers.

SAT's files hold no config; the reader makes one from names and shapes, with the keys that `sizes` reads here.

Source: THUDM/CogVideo (sat/dit_video_concat.py, sat/vae_modules, head and tag v1.0); huggingface/diffusers
(models/transformers/cogvideox_transformer_3d.py, models/autoencoders/autoencoder_kl_cogvideox.py).
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture, table

SAT_COGVIDEOX = Architecture(
    name="sat",
    title="CogVideoX transformer of SAT",
    model_types=("sat-cogvideox",),
    classes=(),
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
    counts={"i": "layers"},
    lines=table("""
        time_embed.0.weight [time, hidden]
        time_embed.0.bias [time]
        time_embed.2.weight [time, time]
        time_embed.2.bias [time]
        ofs_embed.0.weight [ofs, ofs] if ofs
        ofs_embed.0.bias [ofs] if ofs
        ofs_embed.2.weight [ofs, ofs] if ofs
        ofs_embed.2.bias [ofs] if ofs
        mixins.patch_embed.proj.weight [hidden, channels, patch, patch] if not patch_t
        mixins.patch_embed.proj.weight [hidden, channels * volume] if patch_t
        mixins.patch_embed.proj.bias [hidden]
        mixins.patch_embed.text_proj.weight [hidden, text]
        mixins.patch_embed.text_proj.bias [hidden]
        mixins.pos_embed.pos_embedding [1, positions, hidden] if learned
        transformer.layers.{i}.input_layernorm.weight [hidden]
        transformer.layers.{i}.input_layernorm.bias [hidden]
        transformer.layers.{i}.post_attention_layernorm.weight [hidden]
        transformer.layers.{i}.post_attention_layernorm.bias [hidden]
        transformer.layers.{i}.attention.query_key_value.weight [3 * hidden, hidden]
        transformer.layers.{i}.attention.query_key_value.bias [3 * hidden]
        transformer.layers.{i}.attention.dense.weight [hidden, hidden]
        transformer.layers.{i}.attention.dense.bias [hidden]
        transformer.layers.{i}.mlp.dense_h_to_4h.weight [4 * hidden, hidden]
        transformer.layers.{i}.mlp.dense_h_to_4h.bias [4 * hidden]
        transformer.layers.{i}.mlp.dense_4h_to_h.weight [hidden, 4 * hidden]
        transformer.layers.{i}.mlp.dense_4h_to_h.bias [hidden]
        mixins.adaln_layer.adaLN_modulations.{i}.1.weight [12 * hidden, time]
        mixins.adaln_layer.adaLN_modulations.{i}.1.bias [12 * hidden]
        mixins.adaln_layer.query_layernorm_list.{i}.weight [head_dim]
        mixins.adaln_layer.query_layernorm_list.{i}.bias [head_dim]
        mixins.adaln_layer.key_layernorm_list.{i}.weight [head_dim]
        mixins.adaln_layer.key_layernorm_list.{i}.bias [head_dim]
        transformer.final_layernorm.weight [hidden]
        transformer.final_layernorm.bias [hidden]
        mixins.final_layer.norm_final.weight [hidden]
        mixins.final_layer.norm_final.bias [hidden]
        mixins.final_layer.adaLN_modulation.1.weight [2 * hidden, time]
        mixins.final_layer.adaLN_modulation.1.bias [2 * hidden]
        mixins.final_layer.linear.weight [out_channels * volume, hidden]
        mixins.final_layer.linear.bias [out_channels * volume]
    """),
    vocabulary=None,
)

COGVIDEOX = Architecture(
    name="diffusers",
    title="CogVideoXTransformer3DModel",
    model_types=(),
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
    counts={"i": "layers"},
    lines=table("""
        time_embedding.linear_1.weight [time, hidden]
        time_embedding.linear_1.bias [time]
        time_embedding.linear_2.weight [time, time]
        time_embedding.linear_2.bias [time]
        ofs_embedding.linear_1.weight [ofs, ofs] if ofs
        ofs_embedding.linear_1.bias [ofs] if ofs
        ofs_embedding.linear_2.weight [ofs, ofs] if ofs
        ofs_embedding.linear_2.bias [ofs] if ofs
        patch_embed.proj.weight [hidden, channels, patch, patch] if not patch_t
        patch_embed.proj.weight [hidden, channels * volume] if patch_t
        patch_embed.proj.bias [hidden]
        patch_embed.text_proj.weight [hidden, text]
        patch_embed.text_proj.bias [hidden]
        patch_embed.pos_embedding [1, positions, hidden] if learned
        transformer_blocks.{i}.norm1.norm.weight [hidden]
        transformer_blocks.{i}.norm1.norm.bias [hidden]
        transformer_blocks.{i}.norm1.linear.weight [6 * hidden, time]
        transformer_blocks.{i}.norm1.linear.bias [6 * hidden]
        transformer_blocks.{i}.norm2.norm.weight [hidden]
        transformer_blocks.{i}.norm2.norm.bias [hidden]
        transformer_blocks.{i}.norm2.linear.weight [6 * hidden, time]
        transformer_blocks.{i}.norm2.linear.bias [6 * hidden]
        transformer_blocks.{i}.attn1.to_q.weight [hidden, hidden]
        transformer_blocks.{i}.attn1.to_q.bias [hidden]
        transformer_blocks.{i}.attn1.to_k.weight [hidden, hidden]
        transformer_blocks.{i}.attn1.to_k.bias [hidden]
        transformer_blocks.{i}.attn1.to_v.weight [hidden, hidden]
        transformer_blocks.{i}.attn1.to_v.bias [hidden]
        transformer_blocks.{i}.attn1.to_out.0.weight [hidden, hidden]
        transformer_blocks.{i}.attn1.to_out.0.bias [hidden]
        transformer_blocks.{i}.attn1.norm_q.weight [head_dim]
        transformer_blocks.{i}.attn1.norm_q.bias [head_dim]
        transformer_blocks.{i}.attn1.norm_k.weight [head_dim]
        transformer_blocks.{i}.attn1.norm_k.bias [head_dim]
        transformer_blocks.{i}.ff.net.0.proj.weight [4 * hidden, hidden]
        transformer_blocks.{i}.ff.net.0.proj.bias [4 * hidden]
        transformer_blocks.{i}.ff.net.2.weight [hidden, 4 * hidden]
        transformer_blocks.{i}.ff.net.2.bias [hidden]
        norm_final.weight [hidden]
        norm_final.bias [hidden]
        norm_out.norm.weight [hidden]
        norm_out.norm.bias [hidden]
        norm_out.linear.weight [2 * hidden, time]
        norm_out.linear.bias [2 * hidden]
        proj_out.weight [out_channels * volume, hidden]
        proj_out.bias [out_channels * volume]
    """),
    vocabulary=None,
)

_VAE_COUNTS = {"k": "levels", "b": "blocks", "c": "blocks + 1"}

SAT_COGVIDEOX_VAE = Architecture(
    name="sat",
    title="CogVideoX autoencoder of SAT",
    model_types=("sat-cogvideox-vae",),
    classes=(),
    sizes={
        "widths": "block_out_channels",
        "levels": "len(block_out_channels)",
        "blocks": "layers_per_block",
        "latent": "latent_channels",
        "channels": "in_channels",
    },
    counts=_VAE_COUNTS,
    lines=table("""
        encoder.conv_in.conv.weight [widths[0], channels, 3, 3, 3]
        encoder.conv_in.conv.bias [widths[0]]
        encoder.down.{k}.block.{b}.norm1.weight [widths[k - 1] if k > 0 and b == 0 else widths[k]]
        encoder.down.{k}.block.{b}.norm1.bias [widths[k - 1] if k > 0 and b == 0 else widths[k]]
        encoder.down.{k}.block.{b}.conv1.conv.weight [widths[k], widths[k - 1] if k > 0 and b == 0 else widths[k], 3, 3, 3]
        encoder.down.{k}.block.{b}.conv1.conv.bias [widths[k]]
        encoder.down.{k}.block.{b}.norm2.weight [widths[k]]
        encoder.down.{k}.block.{b}.norm2.bias [widths[k]]
        encoder.down.{k}.block.{b}.conv2.conv.weight [widths[k], widths[k], 3, 3, 3]
        encoder.down.{k}.block.{b}.conv2.conv.bias [widths[k]]
        encoder.down.{k}.block.{b}.nin_shortcut.weight [widths[k], widths[k - 1], 1, 1, 1] if k > 0 and b == 0 and widths[k - 1] != widths[k]
        encoder.down.{k}.block.{b}.nin_shortcut.bias [widths[k]] if k > 0 and b == 0 and widths[k - 1] != widths[k]
        encoder.down.{k}.downsample.conv.weight [widths[k], widths[k], 3, 3] if k < levels - 1
        encoder.down.{k}.downsample.conv.bias [widths[k]] if k < levels - 1
        encoder.mid.block_1.norm1.weight [widths[levels - 1]]
        encoder.mid.block_1.norm1.bias [widths[levels - 1]]
        encoder.mid.block_1.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid.block_1.conv1.conv.bias [widths[levels - 1]]
        encoder.mid.block_1.norm2.weight [widths[levels - 1]]
        encoder.mid.block_1.norm2.bias [widths[levels - 1]]
        encoder.mid.block_1.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid.block_1.conv2.conv.bias [widths[levels - 1]]
        encoder.mid.block_2.norm1.weight [widths[levels - 1]]
        encoder.mid.block_2.norm1.bias [widths[levels - 1]]
        encoder.mid.block_2.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid.block_2.conv1.conv.bias [widths[levels - 1]]
        encoder.mid.block_2.norm2.weight [widths[levels - 1]]
        encoder.mid.block_2.norm2.bias [widths[levels - 1]]
        encoder.mid.block_2.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid.block_2.conv2.conv.bias [widths[levels - 1]]
        encoder.norm_out.weight [widths[levels - 1]]
        encoder.norm_out.bias [widths[levels - 1]]
        encoder.conv_out.conv.weight [2 * latent, widths[levels - 1], 3, 3, 3]
        encoder.conv_out.conv.bias [2 * latent]
        decoder.conv_in.conv.weight [widths[levels - 1], latent, 3, 3, 3]
        decoder.conv_in.conv.bias [widths[levels - 1]]
        decoder.mid.block_1.norm1.norm_layer.weight [widths[levels - 1]]
        decoder.mid.block_1.norm1.norm_layer.bias [widths[levels - 1]]
        decoder.mid.block_1.norm1.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_1.norm1.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid.block_1.norm1.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_1.norm1.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid.block_1.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid.block_1.conv1.conv.bias [widths[levels - 1]]
        decoder.mid.block_1.norm2.norm_layer.weight [widths[levels - 1]]
        decoder.mid.block_1.norm2.norm_layer.bias [widths[levels - 1]]
        decoder.mid.block_1.norm2.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_1.norm2.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid.block_1.norm2.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_1.norm2.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid.block_1.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid.block_1.conv2.conv.bias [widths[levels - 1]]
        decoder.mid.block_2.norm1.norm_layer.weight [widths[levels - 1]]
        decoder.mid.block_2.norm1.norm_layer.bias [widths[levels - 1]]
        decoder.mid.block_2.norm1.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_2.norm1.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid.block_2.norm1.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_2.norm1.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid.block_2.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid.block_2.conv1.conv.bias [widths[levels - 1]]
        decoder.mid.block_2.norm2.norm_layer.weight [widths[levels - 1]]
        decoder.mid.block_2.norm2.norm_layer.bias [widths[levels - 1]]
        decoder.mid.block_2.norm2.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_2.norm2.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid.block_2.norm2.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid.block_2.norm2.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid.block_2.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid.block_2.conv2.conv.bias [widths[levels - 1]]
        decoder.up.{k}.block.{c}.norm1.norm_layer.weight [widths[k + 1] if k < levels - 1 and c == 0 else widths[k]]
        decoder.up.{k}.block.{c}.norm1.norm_layer.bias [widths[k + 1] if k < levels - 1 and c == 0 else widths[k]]
        decoder.up.{k}.block.{c}.norm1.conv_y.conv.weight [widths[k + 1] if k < levels - 1 and c == 0 else widths[k], latent, 1, 1, 1]
        decoder.up.{k}.block.{c}.norm1.conv_y.conv.bias [widths[k + 1] if k < levels - 1 and c == 0 else widths[k]]
        decoder.up.{k}.block.{c}.norm1.conv_b.conv.weight [widths[k + 1] if k < levels - 1 and c == 0 else widths[k], latent, 1, 1, 1]
        decoder.up.{k}.block.{c}.norm1.conv_b.conv.bias [widths[k + 1] if k < levels - 1 and c == 0 else widths[k]]
        decoder.up.{k}.block.{c}.conv1.conv.weight [widths[k], widths[k + 1] if k < levels - 1 and c == 0 else widths[k], 3, 3, 3]
        decoder.up.{k}.block.{c}.conv1.conv.bias [widths[k]]
        decoder.up.{k}.block.{c}.norm2.norm_layer.weight [widths[k]]
        decoder.up.{k}.block.{c}.norm2.norm_layer.bias [widths[k]]
        decoder.up.{k}.block.{c}.norm2.conv_y.conv.weight [widths[k], latent, 1, 1, 1]
        decoder.up.{k}.block.{c}.norm2.conv_y.conv.bias [widths[k]]
        decoder.up.{k}.block.{c}.norm2.conv_b.conv.weight [widths[k], latent, 1, 1, 1]
        decoder.up.{k}.block.{c}.norm2.conv_b.conv.bias [widths[k]]
        decoder.up.{k}.block.{c}.conv2.conv.weight [widths[k], widths[k], 3, 3, 3]
        decoder.up.{k}.block.{c}.conv2.conv.bias [widths[k]]
        decoder.up.{k}.block.{c}.nin_shortcut.weight [widths[k], widths[k + 1], 1, 1, 1] if k < levels - 1 and c == 0 and widths[k + 1] != widths[k]
        decoder.up.{k}.block.{c}.nin_shortcut.bias [widths[k]] if k < levels - 1 and c == 0 and widths[k + 1] != widths[k]
        decoder.up.{k}.upsample.conv.weight [widths[k], widths[k], 3, 3] if k > 0
        decoder.up.{k}.upsample.conv.bias [widths[k]] if k > 0
        decoder.norm_out.norm_layer.weight [widths[0]]
        decoder.norm_out.norm_layer.bias [widths[0]]
        decoder.norm_out.conv_y.conv.weight [widths[0], latent, 1, 1, 1]
        decoder.norm_out.conv_y.conv.bias [widths[0]]
        decoder.norm_out.conv_b.conv.weight [widths[0], latent, 1, 1, 1]
        decoder.norm_out.conv_b.conv.bias [widths[0]]
        decoder.conv_out.conv.weight [channels, widths[0], 3, 3, 3]
        decoder.conv_out.conv.bias [channels]
    """),
    vocabulary=None,
)

COGVIDEOX_VAE = Architecture(
    name="diffusers",
    title="AutoencoderKLCogVideoX",
    model_types=(),
    classes=("AutoencoderKLCogVideoX",),
    sizes=SAT_COGVIDEOX_VAE.sizes,
    counts=_VAE_COUNTS,
    lines=table("""
        encoder.conv_in.conv.weight [widths[0], channels, 3, 3, 3]
        encoder.conv_in.conv.bias [widths[0]]
        encoder.down_blocks.{k}.resnets.{b}.norm1.weight [widths[k - 1] if k > 0 and b == 0 else widths[k]]
        encoder.down_blocks.{k}.resnets.{b}.norm1.bias [widths[k - 1] if k > 0 and b == 0 else widths[k]]
        encoder.down_blocks.{k}.resnets.{b}.conv1.conv.weight [widths[k], widths[k - 1] if k > 0 and b == 0 else widths[k], 3, 3, 3]
        encoder.down_blocks.{k}.resnets.{b}.conv1.conv.bias [widths[k]]
        encoder.down_blocks.{k}.resnets.{b}.norm2.weight [widths[k]]
        encoder.down_blocks.{k}.resnets.{b}.norm2.bias [widths[k]]
        encoder.down_blocks.{k}.resnets.{b}.conv2.conv.weight [widths[k], widths[k], 3, 3, 3]
        encoder.down_blocks.{k}.resnets.{b}.conv2.conv.bias [widths[k]]
        encoder.down_blocks.{k}.resnets.{b}.conv_shortcut.weight [widths[k], widths[k - 1], 1, 1, 1] if k > 0 and b == 0 and widths[k - 1] != widths[k]
        encoder.down_blocks.{k}.resnets.{b}.conv_shortcut.bias [widths[k]] if k > 0 and b == 0 and widths[k - 1] != widths[k]
        encoder.down_blocks.{k}.downsamplers.0.conv.weight [widths[k], widths[k], 3, 3] if k < levels - 1
        encoder.down_blocks.{k}.downsamplers.0.conv.bias [widths[k]] if k < levels - 1
        encoder.mid_block.resnets.0.norm1.weight [widths[levels - 1]]
        encoder.mid_block.resnets.0.norm1.bias [widths[levels - 1]]
        encoder.mid_block.resnets.0.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid_block.resnets.0.conv1.conv.bias [widths[levels - 1]]
        encoder.mid_block.resnets.0.norm2.weight [widths[levels - 1]]
        encoder.mid_block.resnets.0.norm2.bias [widths[levels - 1]]
        encoder.mid_block.resnets.0.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid_block.resnets.0.conv2.conv.bias [widths[levels - 1]]
        encoder.mid_block.resnets.1.norm1.weight [widths[levels - 1]]
        encoder.mid_block.resnets.1.norm1.bias [widths[levels - 1]]
        encoder.mid_block.resnets.1.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid_block.resnets.1.conv1.conv.bias [widths[levels - 1]]
        encoder.mid_block.resnets.1.norm2.weight [widths[levels - 1]]
        encoder.mid_block.resnets.1.norm2.bias [widths[levels - 1]]
        encoder.mid_block.resnets.1.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        encoder.mid_block.resnets.1.conv2.conv.bias [widths[levels - 1]]
        encoder.norm_out.weight [widths[levels - 1]]
        encoder.norm_out.bias [widths[levels - 1]]
        encoder.conv_out.conv.weight [2 * latent, widths[levels - 1], 3, 3, 3]
        encoder.conv_out.conv.bias [2 * latent]
        decoder.conv_in.conv.weight [widths[levels - 1], latent, 3, 3, 3]
        decoder.conv_in.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm1.norm_layer.weight [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm1.norm_layer.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm1.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.0.norm1.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm1.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.0.norm1.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid_block.resnets.0.conv1.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm2.norm_layer.weight [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm2.norm_layer.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm2.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.0.norm2.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.norm2.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.0.norm2.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.0.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid_block.resnets.0.conv2.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm1.norm_layer.weight [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm1.norm_layer.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm1.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.1.norm1.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm1.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.1.norm1.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.conv1.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid_block.resnets.1.conv1.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm2.norm_layer.weight [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm2.norm_layer.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm2.conv_y.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.1.norm2.conv_y.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.norm2.conv_b.conv.weight [widths[levels - 1], latent, 1, 1, 1]
        decoder.mid_block.resnets.1.norm2.conv_b.conv.bias [widths[levels - 1]]
        decoder.mid_block.resnets.1.conv2.conv.weight [widths[levels - 1], widths[levels - 1], 3, 3, 3]
        decoder.mid_block.resnets.1.conv2.conv.bias [widths[levels - 1]]
        decoder.up_blocks.{k}.resnets.{c}.norm1.norm_layer.weight [widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm1.norm_layer.bias [widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm1.conv_y.conv.weight [widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k], latent, 1, 1, 1]
        decoder.up_blocks.{k}.resnets.{c}.norm1.conv_y.conv.bias [widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm1.conv_b.conv.weight [widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k], latent, 1, 1, 1]
        decoder.up_blocks.{k}.resnets.{c}.norm1.conv_b.conv.bias [widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.conv1.conv.weight [widths[levels - 1 - k], widths[levels - k] if k > 0 and c == 0 else widths[levels - 1 - k], 3, 3, 3]
        decoder.up_blocks.{k}.resnets.{c}.conv1.conv.bias [widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm2.norm_layer.weight [widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm2.norm_layer.bias [widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm2.conv_y.conv.weight [widths[levels - 1 - k], latent, 1, 1, 1]
        decoder.up_blocks.{k}.resnets.{c}.norm2.conv_y.conv.bias [widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.norm2.conv_b.conv.weight [widths[levels - 1 - k], latent, 1, 1, 1]
        decoder.up_blocks.{k}.resnets.{c}.norm2.conv_b.conv.bias [widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.conv2.conv.weight [widths[levels - 1 - k], widths[levels - 1 - k], 3, 3, 3]
        decoder.up_blocks.{k}.resnets.{c}.conv2.conv.bias [widths[levels - 1 - k]]
        decoder.up_blocks.{k}.resnets.{c}.conv_shortcut.weight [widths[levels - 1 - k], widths[levels - k], 1, 1, 1] if k > 0 and c == 0 and widths[levels - k] != widths[levels - 1 - k]
        decoder.up_blocks.{k}.resnets.{c}.conv_shortcut.bias [widths[levels - 1 - k]] if k > 0 and c == 0 and widths[levels - k] != widths[levels - 1 - k]
        decoder.up_blocks.{k}.upsamplers.0.conv.weight [widths[levels - 1 - k], widths[levels - 1 - k], 3, 3] if k < levels - 1
        decoder.up_blocks.{k}.upsamplers.0.conv.bias [widths[levels - 1 - k]] if k < levels - 1
        decoder.norm_out.norm_layer.weight [widths[0]]
        decoder.norm_out.norm_layer.bias [widths[0]]
        decoder.norm_out.conv_y.conv.weight [widths[0], latent, 1, 1, 1]
        decoder.norm_out.conv_y.conv.bias [widths[0]]
        decoder.norm_out.conv_b.conv.weight [widths[0], latent, 1, 1, 1]
        decoder.norm_out.conv_b.conv.bias [widths[0]]
        decoder.conv_out.conv.weight [channels, widths[0], 3, 3, 3]
        decoder.conv_out.conv.bias [channels]
    """),
    vocabulary=None,
)

LORA_LINES = table("\n".join(
    f"transformer.layers.{{i}}.attention.{module}.matrix_{side}.{part} {shape}"
    for module, parts in (("query_key_value", 3), ("dense", 1))
    for part in range(parts)
    for side, shape in (("A", "[lora_rank, hidden]"), ("B", "[hidden, lora_rank]"))
))  # fmt: skip
"""An unmerged LoRA of SAT: factors for queries, keys, values and the output of each layer."""

COGVIDEOX_LORA = Architecture(
    name="diffusers-lora",
    title="LoRA of CogVideoX",
    model_types=(),
    classes=(),
    sizes={name: SAT_COGVIDEOX.sizes[name] for name in ("hidden", "layers", "lora_rank")},
    counts={"i": "layers"},
    lines=table("\n".join(
        f"transformer.transformer_blocks.{{i}}.attn1.{name}.lora_{side}.weight {shape}"
        for name in ("to_q", "to_k", "to_v", "to_out.0")
        for side, shape in (("A", "[lora_rank, hidden]"), ("B", "[hidden, lora_rank]"))
    )),
    vocabulary=None,
)  # fmt: skip
