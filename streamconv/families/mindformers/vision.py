"""CogVLM2, Qwen-VL and Swin: MindFormers to Hugging Face (of Swin: to Microsoft's form) and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/{cogvlm2,swin}, research/qwenvl: convert_weight.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.families.mindformers.cogvlm import (
    COGVLM2_PREFIX,
    MF_COGVLM2_IMAGE,
    cogvlm2_video,
)
from streamconv.families.mindformers.qwenvl import (
    ENCODER,
    ENCODER_BLOCK,
    MF_QWENVL,
    MF_QWENVL_CONCAT,
    QWENVL_LAYER,
    RESBLOCK,
    VISUAL,
)
from streamconv.families.mindformers.rules import LEAVES, recipe, renames, united
from streamconv.families.mindformers.swin import MF_SWIN, MF_SWIN_PRETRAINED, SWIN_BLOCK
from streamconv.families.mindformers.tables import LAYER, Family
from streamconv.plans.patterns import Pattern
from streamconv.plans.recipe import Recipe, Rule
from streamconv.tensor import Shape
from streamconv.writers.layout import Wrapping

# ------------------------------------------------------------------------------------- CogVLM2

_PATCHES = "model.vision.patch_embedding."
_SEEING = (
    Rule("vision_encoder.cls_token", _PATCHES + "cls_embedding", "x = reshape(x, [1, vision_hidden])"),
    Rule(
        "vision_encoder.pos_embed",
        _PATCHES + "position_embedding.weight",
        "x = reshape(x, [positions, vision_hidden])",
    ),
)


def _frequencies(prefix: str) -> Rule:
    """A buffer that the net keeps once, and Hugging Face's code once a layer."""
    return Rule(
        f"{prefix}model.freqs_mgr.freqs",
        LAYER + "self_attn.rotary_emb.inv_freq",
        "x = copies(x, layers)",
        optional=True,
    )


def _video(key: str, title: str, prefix: str, name: str) -> Recipe:
    family = cogvlm2_video(prefix, name)
    return recipe(
        key,
        title,
        family,
        (
            *renames(family),
            *_SEEING,
            Rule(
                {part: f"{prefix}{LAYER}attention.w{part}.weight" for part in "qkv"},
                LAYER + "self_attn.language_expert_query_key_value.weight",
                "x = concat([q, k, v])",
            ),
            _frequencies(prefix),
        ),
        ("vision_encoder.cls_token", f"{prefix}{LAYER}attention.wq.weight"),
    )


# ------------------------------------------------------------------------------------- Qwen-VL


def _qwenvl_seeing() -> tuple[Rule, ...]:
    parts = ("dense1", "dense2", "dense3")
    return (
        *(
            united(
                ENCODER_BLOCK + f"attn.dense{{}}.{leaf}",
                "123",
                RESBLOCK + f"attn.in_proj.{leaf}",
                "seen_heads",
            )
            for leaf in LEAVES
        ),
        *(
            Rule(
                {part: f"{ENCODER}attn_pool.attn.{part}.{leaf}" for part in parts},
                f"{VISUAL}attn_pool.attn.in_proj_{leaf}",
                f"x = concat([{', '.join(parts)}])",
            )
            for leaf in LEAVES
        ),
        Rule(ENCODER_BLOCK + "attn.projection.weight", RESBLOCK + "attn.out_proj.weight", "x = transpose(x)"),
        Rule(
            ENCODER + "attn_pool.attn.projection.weight",
            VISUAL + "attn_pool.attn.out_proj.weight",
            "x = transpose(x)",
        ),
    )


def _qwenvl(key: str, title: str, family: Family, *, split: bool) -> Recipe:
    language = tuple(
        united(QWENVL_LAYER + f"attention.w{{}}.{leaf}", "qkv", f"transformer.h.{{i}}.attn.c_attn.{leaf}")
        for leaf in LEAVES
    )
    return recipe(
        key,
        title,
        family,
        (*renames(family), *_qwenvl_seeing(), *(language if split else ())),
        (ENCODER + "proj", QWENVL_LAYER + f"attention.w{'q' if split else ''}.weight"),
    )


# ---------------------------------------------------------------------------------------- Swin


def _swin_rules(family: Family, theirs: str) -> tuple[Rule, ...]:
    """Rules for a table whose encoder has the prefix `theirs`."""
    ours, theirs = "encoder." + SWIN_BLOCK, theirs + SWIN_BLOCK
    return (
        *renames(family),
        *(
            Rule(
                {part: f"{ours}attn.{part}.{leaf}" for part in "qkv"},
                f"{theirs}attn.qkv.{leaf}",
                "x = concat([q, k, v])",
            )
            for leaf in LEAVES
        ),
        Rule(ours + "mlp.mapping.weight", theirs + "mlp.fc1.weight", "x = transpose(x)"),
        Rule(ours + "mlp.projection.weight", theirs + "mlp.fc2.weight", "x = transpose(x)"),
    )


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


def _swin(key: str, title: str, family: Family, theirs: str, *found_by: str) -> Recipe:
    made = recipe(
        key,
        title,
        family,
        _swin_rules(family, theirs),
        ("encoder." + SWIN_BLOCK + "attn.q.weight", *found_by),
        config_of=_swin_of,
        wrap=lambda _: Wrapping("swin.pth", "model"),
    )
    return replace(made, title=f"{title}: MindFormers -> Microsoft")


RECIPES: tuple[Recipe, ...] = (
    _video("cogvlm2-video", "CogVLM2-Video", COGVLM2_PREFIX, "mindformers"),
    _video(
        "cogvlm2-video-lora",
        "CogVLM2-Video as the base of a LoRA",
        COGVLM2_PREFIX + "pet_model.lora_model.",
        "mindformers-lora",
    ),
    recipe(
        "cogvlm2-image",
        "CogVLM2",
        MF_COGVLM2_IMAGE,
        (*renames(MF_COGVLM2_IMAGE), *_SEEING, _frequencies(COGVLM2_PREFIX)),
        ("vision_encoder.cls_token", COGVLM2_PREFIX + LAYER + "mlp.vision_mlp.w1.weight"),
    ),
    _qwenvl("qwenvl", "Qwen-VL", MF_QWENVL, split=True),
    _qwenvl(
        "qwenvl-concat", "Qwen-VL with fused projections (use_qkv_concat)", MF_QWENVL_CONCAT, split=False
    ),
    _swin("swin", "Swin", MF_SWIN, "", "encoder.norm.gamma"),
    _swin(
        "swin-pretrained",
        "Swin before finetuning (SimMIM)",
        MF_SWIN_PRETRAINED,
        "encoder.",
        "encoder.mask_token",
        "decoder.weight",
    ),
)
