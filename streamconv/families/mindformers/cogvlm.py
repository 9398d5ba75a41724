"""CogVLM2 of MindFormers: for images and, without experts for what it sees, for videos.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/cogvlm2/convert_weight.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.cogvlm import COGVLM
from streamconv.families.mindformers.rules import recipe, renames
from streamconv.families.mindformers.tables import LAYER, NORMS, Family, Names, family, layer_norm
from streamconv.plans.recipe import Recipe, Rule
from streamconv.plans.table import table

_VIDEO_CLASS = "architectures and architectures[0] == 'CogVLMVideoForCausalLM'"

COGVLM2_VIDEO = replace(
    COGVLM,
    title="CogVLM2-Video",
    only_if=_VIDEO_CLASS,
    lines=COGVLM.lines.without("vision_expert", "vision_mlp"),
)
"""It has no experts for what it sees."""
COGVLM2_IMAGE = replace(COGVLM, title="CogVLM2", only_if=f"not ({_VIDEO_CLASS})")

_TOWER, _BLOCK = "model.vision.transformer.layers.{j}.", "vision_encoder.blocks.{j}."
_SEEING: Names = {
    "model.vision.patch_embedding.proj.": "vision_encoder.patch_embed.proj.",
    _TOWER + "attention.query_key_value.": _BLOCK + "attn.qkv.",
    _TOWER + "attention.dense.": _BLOCK + "attn.proj.",
    _TOWER + "mlp.": _BLOCK + "mlp.",
    **layer_norm(_TOWER + "input_layernorm", _BLOCK + "norm1"),
    **layer_norm(_TOWER + "post_attention_layernorm", _BLOCK + "norm2"),
    **layer_norm("model.vision.linear_proj.norm1", "mlp_adapter.linear_proj.norm1"),
    **{
        f"model.vision.{part}": f"mlp_adapter.{part}"
        for part in ("boi", "eoi", "conv.", "linear_proj.linear_proj.", "linear_proj.dense_h_to_4h.",
                     "linear_proj.gate_proj.", "linear_proj.dense_4h_to_h.")
    },
}  # fmt: skip
_SEEING_LINES = table("""
    vision_encoder.cls_token [1, 1, vision_hidden]
    vision_encoder.pos_embed [1, positions, vision_hidden]
""")


def _language(prefix: str) -> Names:
    """What both nets call alike."""
    return {
        "model.embed_tokens.weight": prefix + "model.tok_embeddings.embedding_weight",
        "model.norm.weight": prefix + "model.norm_out.weight",
        "lm_head.weight": prefix + "lm_head.weight",
    }


def cogvlm2_video(prefix: str, name: str) -> Family:
    """The net for videos, its language part under a prefix."""
    theirs, ours = LAYER, prefix + LAYER
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return family(
        COGVLM2_VIDEO,
        "CogVLM2-Video",
        _SEEING
        | _language(prefix)
        | {name: prefix + norm for name, norm in NORMS.items()}
        | {theirs + "self_attn.language_expert_dense.": ours + "attention.wo."}
        | {f"{theirs}mlp.language_mlp.{part}.": f"{ours}feed_forward.{w}." for part, w in parts.items()},
        _SEEING_LINES
        + table(f"""
        {ours}attention.wq.weight [heads * head_dim, hidden]
        {ours}attention.wk.weight [kv_heads * head_dim, hidden]
        {ours}attention.wv.weight [kv_heads * head_dim, hidden]
        ?{prefix}model.freqs_mgr.freqs [head_dim // 2]
        """),
        name=name,
    )


COGVLM2_PREFIX = "llm_model."
MF_COGVLM2_IMAGE = family(
    COGVLM2_IMAGE,
    "CogVLM2",
    _SEEING
    | _language(COGVLM2_PREFIX)
    | {
        LAYER + part: COGVLM2_PREFIX + LAYER + part
        for part in (
            "input_layernorm.", "post_attention_layernorm.", "self_attn.language_expert_query_key_value.",
            "self_attn.language_expert_dense.", "self_attn.vision_expert_query_key_value.",
            "self_attn.vision_expert_dense.",
        )
    }
    | {
        f"{LAYER}mlp.{mlp}.{part}.": f"{COGVLM2_PREFIX}{LAYER}mlp.{mlp}.{w}."
        for mlp in ("language_mlp", "vision_mlp")
        for part, w in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    },
    _SEEING_LINES + table(f"?{COGVLM2_PREFIX}model.freqs_mgr.freqs [head_dim // 2]"),
)  # fmt: skip

# ------------------------------------------------------------------------------------------- rules

_PATCHES = "model.vision.patch_embedding."
_SEEING_RULES = (
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
            *_SEEING_RULES,
            Rule(
                {part: f"{prefix}{LAYER}attention.w{part}.weight" for part in "qkv"},
                LAYER + "self_attn.language_expert_query_key_value.weight",
                "x = concat([q, k, v])",
            ),
            _frequencies(prefix),
        ),
        ("vision_encoder.cls_token", f"{prefix}{LAYER}attention.wq.weight"),
    )


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
        (*renames(MF_COGVLM2_IMAGE), *_SEEING_RULES, _frequencies(COGVLM2_PREFIX)),
        ("vision_encoder.cls_token", COGVLM2_PREFIX + LAYER + "mlp.vision_mlp.w1.weight"),
    ),
)
