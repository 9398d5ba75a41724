"""Which CogVideoX a checkpoint of SAT is, by names and shapes, and the components that it is split into.

A training run saves its whole engine in one file: transformer, text encoder and autoencoder, each under a prefix. There
is no config; everything that the conversion needs is in names and shapes. As SAT distributes it, the autoencoder lies
beside it, in `3d-vae.pt`.

Source: THUDM/CogVideo: sat/diffusion_video.py (prefixes), sat/configs (variants).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.ops import Expression, renamed
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.readers.files import open_file
from streamconv.readers.sat import FORMAT as SAT
from streamconv.shard import STEMS
from streamconv.storage.location import Location, locate
from streamconv.tensor import Shape

_TRANSFORMER = "model.diffusion_model."
_AUTOENCODER = "first_stage_model."
_TEXT_ENCODER = "conditioner.embedders.0.transformer."

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
_LEVEL = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.norm2\.weight")
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")
_HEAD_DIM = 64  # of every CogVideoX; where there are query norms, their length

_SCALING = {"2B": 1.15258426}
_OTHER_SCALING = 0.7


def identified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a component for each part of a CogVideoX that SAT has saved in it; others as they are.

    Raises:
        CheckpointError: a tensor that identifies the variant is missing, or cannot be read.
    """
    (first, *more) = checkpoint.components
    if not more and first.config is None and _is_autoencoder(first.tensors) and checkpoint.path.is_file():
        checkpoint.require_readable()
        return replace(checkpoint, components=(_autoencoder(first.tensors, None),))
    names = first.tensors
    if checkpoint.format != SAT.name or not (
        "mixins.patch_embed.proj.weight" in names or any(name.startswith(_TRANSFORMER) for name in names)
    ):
        return checkpoint
    checkpoint.require_readable()  # names and shapes of all of them say which model it is
    parts = _components(names, checkpoint.files[0])
    files, notes = list(checkpoint.files), list(checkpoint.notes)
    beside = _autoencoder_beside(checkpoint)
    if beside is not None:
        file = open_file(beside)
        notes += (*file.notes, f"the autoencoder is taken from {beside.name}")
        files.append(file.path)
        autoencoder = _autoencoder(file.tensors, parts["transformer"].config, "vae")
        parts["vae"] = replace(autoencoder, unreadable=file.unreadable)
    notes.append(
        "by its shapes it is a CogVideoX {variant}: {num_layers} layers of width {hidden_size}, "
        "{in_channels} channels in, {out_channels} out".format_map(parts["transformer"].config or {})
    )
    ordered = tuple(parts[part] for part in ("transformer", "vae", "text_encoder") if part in parts)
    return replace(checkpoint, components=ordered, files=tuple(files), notes=tuple(notes))


def _autoencoder_beside(checkpoint: Checkpoint) -> Location | None:
    """The file with the autoencoder, as CogVideoX is distributed."""
    if checkpoint.path.is_file():
        return None
    root = locate(checkpoint.files[0]).parent.parent
    places = (checkpoint.path / "vae", checkpoint.path, root)
    return next((file for place in places if (file := place / "3d-vae.pt").is_file()), None)


def _components(tensors: Mapping[str, Expression], path: str) -> dict[str, Component]:
    """What a training run saved, by the directory of each part in a pipeline."""
    groups = _groups(tensors)
    config = _cogvideox(groups.pop(_TRANSFORMER), path)
    transformer = groups.pop("transformer")
    found = {"transformer": Component("transformer", STEMS[0], transformer, config=config)}
    if _AUTOENCODER in groups:
        found["vae"] = _autoencoder(groups[_AUTOENCODER], config, "vae")
    if _TEXT_ENCODER in groups:
        found["text_encoder"] = _text_encoder(groups[_TEXT_ENCODER])
    return found


def _is_autoencoder(tensors: Mapping[str, Expression]) -> bool:
    """Whether these are the 3D autoencoder's, by SAT's names for them."""
    return "encoder.down.0.block.0.norm1.weight" in tensors and "decoder.conv_in.conv.weight" in tensors


def _groups(tensors: Mapping[str, Expression]) -> dict[str, dict[str, Expression]]:
    """Tensors by their prefix, which is taken off; the transformer's twice: alone, and with what belongs nowhere."""
    prefixes = (_TRANSFORMER, _AUTOENCODER, _TEXT_ENCODER)
    bare = not any(name.startswith(_TRANSFORMER) for name in tensors)
    groups: dict[str, dict[str, Expression]] = {"transformer": {}, _TRANSFORMER: {}}
    for name, tensor in tensors.items():
        prefix = next((each for each in prefixes if name.startswith(each)), _TRANSFORMER if bare else None)
        if prefix is None:  # its full name shows what it is where it is refused
            groups["transformer"][name] = tensor
            continue
        short = name.removeprefix(prefix)
        group = groups.setdefault(prefix, {})
        group[short] = renamed(tensor, name)
        if prefix == _TRANSFORMER:
            groups["transformer"][short] = tensor
    return groups


def _cogvideox(tensors: Mapping[str, Expression], path: str) -> dict[str, Any]:
    """The config of a CogVideoX transformer, in SAT's naming."""
    shapes = {name: tensor.spec.shape for name, tensor in tensors.items()}
    needed = {
        "mixins.patch_embed.proj.weight": (2, 4),
        "mixins.patch_embed.text_proj.weight": (2,),
        "mixins.final_layer.linear.weight": (2,),
        "time_embed.0.weight": (2,),
    }
    odd = [name for name, ranks in needed.items() if len(shapes.get(name, ())) not in ranks]
    if odd:
        raise CheckpointError(
            f"it looks like a CogVideoX, but {', '.join(odd)} does not show which",
            file=path,
            hint="give the whole checkpoint",
        )
    projection = shapes["mixins.patch_embed.proj.weight"]
    hidden, text = shapes["mixins.patch_embed.text_proj.weight"]
    rows = shapes["mixins.final_layer.linear.weight"][0]
    patch = projection[2] if len(projection) == 4 else 2
    # The linear form, of 1.5, takes two frames at a time.
    patch_t = None if len(projection) == 4 else 2
    volume = max(patch, 1) ** 2 * (patch_t or 1)
    positions = shapes.get("mixins.pos_embed.pos_embedding", (1, 0, hidden))
    rotates = any(name.startswith("mixins.pos_embed.freqs_") for name in shapes)
    channels, out_channels = (projection[1] if patch_t is None else projection[1] // volume), rows // volume
    from_image = channels > out_channels
    layers = [int(found[1]) for name in shapes if (found := _LAYER.match(name))]
    # Only the 2B has a table of sines for positions; where the file leaves it out, the hidden size identifies it.
    heads = hidden // _HEAD_DIM
    sines = patch_t is None and not from_image and not rotates and (heads == 30 or positions[1] > 0)
    return {
        "model_type": "sat-cogvideox",
        "variant": _variant(sines, patch_t, from_image),
        "hidden_size": hidden,
        "num_layers": max(layers, default=-1) + 1,
        "attention_head_dim": shapes.get("mixins.adaln_layer.query_layernorm_list.0.weight", (_HEAD_DIM,))[0],
        "in_channels": channels,
        "out_channels": out_channels,
        "patch_size": patch,
        "patch_size_t": patch_t,
        "text_embed_dim": text,
        "time_embed_dim": shapes["time_embed.0.weight"][0],
        "ofs_embed_dim": shapes["ofs_embed.0.weight"][0] if "ofs_embed.0.weight" in shapes else None,
        # The image-to-video model of the first generation learned its positions.
        "learned_positions": from_image and patch_t is None,
        "positions": positions[1],
        "sines": sines,
    }


def _variant(sines: bool, patch_t: int | None, from_image: bool) -> str:
    size = "2B" if sines else ("1.5-5B" if patch_t else "5B")
    return f"{size}-I2V" if from_image else size


def autoencoder_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What names and shapes of SAT's autoencoder say of its config: not which CogVideoX it belongs to."""
    levels: dict[int, tuple[int, ...]] = {}
    blocks = 0
    for name, shape in shapes.items():
        if found := _LEVEL.fullmatch(name):
            levels[int(found[1])] = shape
            blocks = max(blocks, int(found[2]) + 1)
    return {
        "model_type": "sat-cogvideox-vae",
        "block_out_channels": [(*levels[level], 0)[0] for level in sorted(levels)],
        "layers_per_block": blocks,
        "latent_channels": (*shapes.get("decoder.conv_in.conv.weight", ()), 0, 0)[1],
        "in_channels": (*shapes.get("encoder.conv_in.conv.weight", ()), 0, 0)[1],
    }


def _autoencoder(
    tensors: Mapping[str, Expression], transformer: Mapping[str, Any] | None, directory: str = ""
) -> Component:
    config = autoencoder_config({name: tensor.spec.shape for name, tensor in tensors.items()})
    if transformer is not None:
        variant = transformer["variant"]
        config["scaling_factor"] = _SCALING.get(variant, _OTHER_SCALING)
        config["generation"] = "1.5" if variant.startswith("1.5") else "1.0"
    return Component(directory, STEMS[0], tensors, config=config)


def _text_encoder(tensors: Mapping[str, Expression]) -> Component:
    """The text encoder, a T5, whose names are transformers' own; what it lacks is in the way of taking it."""
    missing = _missing(tensors)
    config = None if missing else _t5({name: tensor.spec.shape for name, tensor in tensors.items()})
    return Component("text_encoder", STEMS[0], tensors, config=config, lacking=missing)


def _missing(tensors: Mapping[str, Expression]) -> dict[str, str]:
    """What a T5 v1.1 encoder lacks, by name, and what is to be said of it."""
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.match(name))}
    inner = {"wi_0", "wi_1"} if any(".wi_" in name for name in tensors) else {"wi"}
    layer = (
        *(f"layer.0.SelfAttention.{part}.weight" for part in "qkvo"),
        *(f"layer.1.DenseReluDense.{part}.weight" for part in sorted({*inner, "wo"})),
        *(f"layer.{part}.layer_norm.weight" for part in range(2)),
    )
    whole = [
        "shared.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        *(f"encoder.block.{block}.{name}" for block in range(max(blocks, default=0) + 1) for name in layer),
    ]
    said = "is missing, and without it the text encoder is no whole T5: leave that out with --drop 'text_encoder/*'"
    ranks = {name: len(tensor.spec.shape) for name, tensor in tensors.items()}
    return {name: said for name in whole if ranks.get(name) != (1 if name.endswith("norm.weight") else 2)}


def _t5(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The config of a whole T5 v1.1 encoder."""
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    inner = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0]
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    ffn = shapes[f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": width,
        "d_ff": ffn,
        "d_kv": inner // max(heads, 1),
        "num_heads": heads,
        "num_layers": 1 + max(int(found[1]) for name in shapes if (found := _BLOCK.match(name))),
        "num_decoder_layers": 24,
        "vocab_size": vocabulary,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "initializer_factor": 1.0,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    }
