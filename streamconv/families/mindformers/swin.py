"""Swin: MindFormers to Microsoft's form and back.

Source: microsoft/Swin-Transformer: models/{swin_transformer,simmim}.py; mindspore-lab/mindformers r1.3.0:
mindformers/models/swin/convert_weight.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.families.mindformers.net import Names, Net
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import Pattern, named
from streamconv.plans.recipe import Rule, linear
from streamconv.plans.table import table
from streamconv.tensor import Shape
from streamconv.writers.layout import Wrapping

_SIZES = {
    "width": "embed_dim",
    "depths": "depths",
    "heads": "num_heads",
    "stages": "len(depths)",
    "deepest": "max(depths)",
    "window": "window_size",
    "patch": "patch_size",
    "channels": "in_chans",
    "side": "img_size // patch_size",
    "classes": "num_classes or 0",
    "last": "embed_dim * 2 ** (len(depths) - 1)",
    "pixels": "encoder_stride ** 2 * in_chans if encoder_stride else 0",
}
_AT = "layers.{s}.blocks.{b}."
_BLOCK = table("""
    norm1.{weight,bias} [wide]
    attn.relative_position_bias_table [(2 * window - 1) ** 2, heads[s]]
    ?attn.relative_position_index [window ** 2, window ** 2]
    attn.qkv.weight [3 * wide, wide]
    ?attn.qkv.bias [3 * wide]
    attn.proj.{weight,bias} [wide, wide] [wide]
    ?attn_mask [(side // 2 ** s // window) ** 2, window ** 2, window ** 2]
    norm2.{weight,bias} [wide]
    mlp.fc1.{weight,bias} [4 * wide, wide] [4 * wide]
    mlp.fc2.{weight,bias} [wide, 4 * wide] [wide]
""")
_ENCODER = (
    table("""
        patch_embed.proj.{weight,bias} [width, channels, patch, patch] [width]
        ?patch_embed.norm.{weight,bias} [width]
        ?absolute_pos_embed [1, side ** 2, width]
    """)
    + _BLOCK.under(_AT).where("b < depths[s]")
    + table("""
        layers.{s}.downsample.reduction.weight [2 * wide, 4 * wide] if s < stages - 1
        layers.{s}.downsample.norm.{weight,bias} [4 * wide] if s < stages - 1
        norm.{weight,bias} [last]
    """)
).given(wide="width * 2 ** s")

SWIN = Architecture(
    name="swin",
    title="Swin of Microsoft",
    model_types=("swin-microsoft",),
    sizes=_SIZES,
    counts={"s": "stages", "b": "deepest"},
    only_if="not encoder_stride",
    lines=_ENCODER
    + table("""
        head.{weight,bias} [classes, last] [classes] if classes
    """),
    vocabulary=None,
)
SWIN_PRETRAINED = replace(
    SWIN,
    name="swin-pretrained",
    title="Swin of Microsoft, before finetuning (SimMIM)",
    only_if="encoder_stride",
    lines=_ENCODER.under("encoder.")
    + table("""
        encoder.mask_token [1, 1, width]
        decoder.0.{weight,bias} [pixels, last, 1, 1] [pixels]
    """),
)


_NAMES = named("""
    patch_embed.proj. -> patch_embed.projection.
    absolute_pos_embed
    layers.{s}.blocks.{b}.attn.relative_position_{bias_table,index} -> layers.{s}.blocks.{b}.attn.relative_position_bias.relative_position_{bias_table,index}
    layers.{s}.blocks.{b}.{attn.proj.,attn_mask}
    layers.{s}.blocks.{b}.mlp.{fc1,fc2}.bias -> layers.{s}.blocks.{b}.mlp.{mapping,projection}.bias
    layers.{s}.downsample.reduction.
    patch_embed.norm.{weight,bias} -> patch_embed.norm.{gamma,beta}
    layers.{s}.blocks.{b}.norm{1,2}.{weight,bias} -> layers.{s}.blocks.{b}.norm{1,2}.{gamma,beta}
    layers.{s}.downsample.norm.{weight,bias} -> layers.{s}.downsample.norm.{gamma,beta}
    norm.{weight,bias} -> norm.{gamma,beta}
""")
"""All but fused and transposed matrices, within the encoder; a norm has the names of MindSpore's."""
_OWN = (
    table("""
        attn.q.weight [wide, wide]
        ?attn.q.bias [wide]
        attn.k.weight [wide, wide]
        ?attn.k.bias [wide]
        attn.v.weight [wide, wide]
        ?attn.v.bias [wide]
        mlp.mapping.weight [wide, 4 * wide]
        mlp.projection.weight [4 * wide, wide]
    """)
    .under("encoder." + _AT)
    .where("b < depths[s]")
    .given(wide="width * 2 ** s")
)


def _names(theirs: str) -> Names:
    """The names where the encoder has a prefix in Microsoft's naming."""
    return {theirs + name: "encoder." + ours for name, ours in _NAMES.items()}


_BIAS_TABLES = (
    Pattern("*layers.{s}.blocks.{b}.attn.relative_position_bias_table"),
    Pattern("*layers.{s}.blocks.{b}.attn.relative_position_bias.relative_position_bias_table"),
)


def _swin_of(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """A Swin's config: files have none, and shapes say all of it, but for the size of images of some."""
    tables: dict[int, list[Shape]] = {}
    for name, shape in shapes.items():
        found = next((found for each in _BIAS_TABLES if (found := each.match(name)) is not None), None)
        if found is not None and len(shape) == 2:
            tables.setdefault(int(found["s"]), []).append(shape)
    patches = next(
        (shape for name, shape in shapes.items() if "patch_embed.proj" in name and len(shape) == 4), None
    )
    if not tables or patches is None or sorted(tables) != list(range(len(tables))):
        return {}
    window = (math.isqrt(tables[0][0][0]) + 1) // 2
    masks = next(
        (shape for name, shape in shapes.items() if name.endswith("layers.0.blocks.1.attn_mask")), (1,)
    )
    made: dict[str, Any] = {
        "model_type": "swin-microsoft",
        "embed_dim": patches[0],
        "in_chans": patches[1],
        "patch_size": patches[2],
        "window_size": window,
        "depths": [len(tables[stage]) for stage in range(len(tables))],
        "num_heads": [tables[stage][0][1] for stage in range(len(tables))],
        "img_size": math.isqrt(masks[0]) * window * patches[2],
        "num_classes": shapes.get("head.weight", (0,))[0],
    }
    decoder = shapes.get("decoder.weight", shapes.get("decoder.0.weight"))
    if decoder is not None:
        made["encoder_stride"] = math.isqrt(decoder[0] // max(patches[1], 1))
    return made


def _fused(theirs: str) -> tuple[Rule, ...]:
    """Rules for fused and transposed matrices where the encoder has a prefix in Microsoft's naming."""
    ours, theirs = "encoder." + _AT, theirs + _AT
    return (
        *linear(ours + "attn.{q,k,v}", theirs + "attn.qkv", "x = concat([q, k, v])"),
        Rule(ours + "mlp.mapping.weight", theirs + "mlp.fc1.weight", "x = transpose(x)"),
        Rule(ours + "mlp.projection.weight", theirs + "mlp.fc2.weight", "x = transpose(x)"),
    )


_MORE = {"config_of": _swin_of, "wrap": lambda _: Wrapping("swin.pth", "model")}
_FOUND = "encoder." + _AT + "attn.q.weight"
NETS = (
    Net(
        key="swin",
        title="Swin",
        to="Microsoft",
        target=SWIN,
        names=_names("") | {"head.": "head."},
        own=_OWN,
        rules=_fused(""),
        found_by=(_FOUND, "encoder.norm.gamma"),
        more=_MORE,
    ),
    Net(
        key="swin-pretrained",
        title="Swin before finetuning (SimMIM)",
        called="Swin before finetuning of MindFormers",
        to="Microsoft",
        target=SWIN_PRETRAINED,
        names=_names("encoder.") | {"encoder.mask_token": "encoder.mask_token", "decoder.0.": "decoder."},
        own=_OWN,
        rules=_fused("encoder."),
        found_by=(_FOUND, "encoder.mask_token", "decoder.weight"),
        more=_MORE,
    ),
)
