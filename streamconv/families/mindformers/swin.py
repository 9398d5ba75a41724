"""Swin, in the naming of Microsoft's code and in MindFormers'.

Source: microsoft/Swin-Transformer: models/{swin_transformer,simmim}.py; mindspore-lab/mindformers r1.3.0:
mindformers/models/swin/convert_weight.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.mindformers.tables import Names, family
from streamconv.plans.architecture import Architecture, table

_SWIN_SIZES = {
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
SWIN_BLOCK, SWIN_STAGE = "layers.{s}.blocks.{b}.", "layers.{s}."


def _swin(prefix: str) -> str:
    """The lines of the encoder, under a prefix."""
    here, wide = "if b < depths[s]", "width * 2 ** s"
    names = {
        "patch_embed.proj.weight": "[width, channels, patch, patch]",
        "patch_embed.proj.bias": "[width]",
        "?patch_embed.norm.weight": "[width]",
        "?patch_embed.norm.bias": "[width]",
        "?absolute_pos_embed": "[1, side ** 2, width]",
        **{
            f"{optional}{SWIN_BLOCK}{part}": f"[{shape}] {when}"
            for optional, part, shape, when in (
                ("", "norm1.weight", wide, here),
                ("", "norm1.bias", wide, here),
                ("", "attn.relative_position_bias_table", "(2 * window - 1) ** 2, heads[s]", here),
                ("?", "attn.relative_position_index", "window ** 2, window ** 2", here),
                ("", "attn.qkv.weight", f"3 * {wide}, {wide}", here),
                ("?", "attn.qkv.bias", f"3 * {wide}", here),
                ("", "attn.proj.weight", f"{wide}, {wide}", here),
                ("", "attn.proj.bias", wide, here),
                ("?", "attn_mask", "(side // 2 ** s // window) ** 2, window ** 2, window ** 2", here),
                ("", "norm2.weight", wide, here),
                ("", "norm2.bias", wide, here),
                ("", "mlp.fc1.weight", f"4 * {wide}, {wide}", here),
                ("", "mlp.fc1.bias", f"4 * {wide}", here),
                ("", "mlp.fc2.weight", f"{wide}, 4 * {wide}", here),
                ("", "mlp.fc2.bias", wide, here),
            )
        },
        SWIN_STAGE + "downsample.reduction.weight": f"[2 * {wide}, 4 * {wide}] if s < stages - 1",
        SWIN_STAGE + "downsample.norm.weight": f"[4 * {wide}] if s < stages - 1",
        SWIN_STAGE + "downsample.norm.bias": f"[4 * {wide}] if s < stages - 1",
        "norm.weight": "[last]",
        "norm.bias": "[last]",
    }
    return "\n".join(
        f"{'?' if name[0] == '?' else ''}{prefix}{name.removeprefix('?')} {rest}"
        for name, rest in names.items()
    )


SWIN = Architecture(
    name="swin",
    title="Swin of Microsoft",
    model_types=("swin-microsoft",),
    classes=(),
    sizes=_SWIN_SIZES,
    counts={"s": "stages", "b": "deepest"},
    only_if="not encoder_stride",
    lines=table(_swin("") + "\nhead.weight [classes, last] if classes\nhead.bias [classes] if classes"),
    vocabulary=None,
)
SWIN_PRETRAINED = replace(
    SWIN,
    name="swin-pretrained",
    title="Swin of Microsoft, before finetuning (SimMIM)",
    only_if="encoder_stride",
    lines=table(
        _swin("encoder.")
        + """
        encoder.mask_token [1, 1, width]
        decoder.0.weight [pixels, last, 1, 1]
        decoder.0.bias [pixels]
        """
    ),
)


def _swin_names(theirs: str) -> Names:
    """Names of everything but fused and transposed matrices; `theirs` is the prefix of the encoder."""
    names: Names = {}
    turned = ("attn.qkv.", "mlp.fc1.weight", "mlp.fc2.weight")
    for line in table(_swin("")):
        name = line.name.text
        if any(part in name for part in turned):
            continue
        module, _, leaf = name.rpartition(".")
        ours = name.replace("patch_embed.proj.", "patch_embed.projection.")
        ours = ours.replace("relative_position_", "relative_position_bias.relative_position_")
        ours = ours.replace("mlp.fc1.", "mlp.mapping.").replace("mlp.fc2.", "mlp.projection.")
        if "norm" in module:
            ours = f"{module}.{'gamma' if leaf == 'weight' else 'beta'}"
        names[theirs + name] = "encoder." + ours
    return names


_SWIN_OWN = """
    encoder.layers.{s}.blocks.{b}.attn.PART.weight [width * 2 ** s, width * 2 ** s] if b < depths[s]
    ?encoder.layers.{s}.blocks.{b}.attn.PART.bias [width * 2 ** s] if b < depths[s]
"""
_SWIN_OWN = (
    "".join(_SWIN_OWN.replace("PART", part) for part in "qkv")
    + """
    encoder.layers.{s}.blocks.{b}.mlp.mapping.weight [width * 2 ** s, 4 * width * 2 ** s] if b < depths[s]
    encoder.layers.{s}.blocks.{b}.mlp.projection.weight [4 * width * 2 ** s, width * 2 ** s] if b < depths[s]
    """
)

MF_SWIN = family(SWIN, "Swin", _swin_names("") | {"head.": "head."}, _SWIN_OWN)
MF_SWIN_PRETRAINED = family(
    SWIN_PRETRAINED,
    "Swin before finetuning",
    _swin_names("encoder.") | {"encoder.mask_token": "encoder.mask_token", "decoder.0.": "decoder."},
    _SWIN_OWN,
)
