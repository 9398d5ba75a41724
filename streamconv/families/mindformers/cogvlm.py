"""CogVLM2, for images and, without experts for what it sees, for videos: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/cogvlm2/convert_weight.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.cogvlm import COGVLM
from streamconv.families.mindformers.names import LAYER, NORMS, layer_norm
from streamconv.families.mindformers.net import Names, Net
from streamconv.plans.recipe import Rule
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


_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_FREQUENCIES_LINE = table("?model.freqs_mgr.freqs [head_dim // 2]")


def _video(key: str, title: str, prefix: str, layout: str = "") -> Net:
    """The net for videos, its language part under a prefix."""
    ours = prefix + LAYER
    return Net(
        key=key,
        title=title,
        called="CogVLM2-Video of MindFormers",
        layout=layout,
        target=COGVLM2_VIDEO,
        names=_SEEING
        | _language(prefix)
        | {name: prefix + norm for name, norm in NORMS.items()}
        | {LAYER + "self_attn.language_expert_dense.": ours + "attention.wo."}
        | {f"{LAYER}mlp.language_mlp.{part}.": f"{ours}feed_forward.{w}." for part, w in _PARTS.items()},
        own=_SEEING_LINES
        + table("""
            wq.weight [heads * head_dim, hidden]
            {wk,wv}.weight [kv_heads * head_dim, hidden]
        """).under(ours + "attention.")
        + _FREQUENCIES_LINE.under(prefix),
        rules=(
            *_SEEING_RULES,
            Rule(
                ours + "attention.w{q,k,v}.weight",
                LAYER + "self_attn.language_expert_query_key_value.weight",
                "x = concat([q, k, v])",
            ),
            _frequencies(prefix),
        ),
        found_by=("vision_encoder.cls_token", f"{ours}attention.wq.weight"),
    )


_PREFIX = "llm_model."
NETS = (
    _video("cogvlm2-video", "CogVLM2-Video", _PREFIX),
    _video(
        "cogvlm2-video-lora",
        "CogVLM2-Video as the base of a LoRA",
        _PREFIX + "pet_model.lora_model.",
        "lora",
    ),
    Net(
        key="cogvlm2-image",
        title="CogVLM2",
        target=COGVLM2_IMAGE,
        names=_SEEING
        | _language(_PREFIX)
        | {
            LAYER + part: _PREFIX + LAYER + part
            for part in (
                "input_layernorm.",
                "post_attention_layernorm.",
                "self_attn.language_expert_query_key_value.",
                "self_attn.language_expert_dense.",
                "self_attn.vision_expert_query_key_value.",
                "self_attn.vision_expert_dense.",
            )
        }
        | {
            f"{LAYER}mlp.{mlp}.{part}.": f"{_PREFIX}{LAYER}mlp.{mlp}.{w}."
            for mlp in ("language_mlp", "vision_mlp")
            for part, w in _PARTS.items()
        },
        own=_SEEING_LINES + _FREQUENCIES_LINE.under(_PREFIX),
        rules=(*_SEEING_RULES, _frequencies(_PREFIX)),
        found_by=("vision_encoder.cls_token", _PREFIX + LAYER + "mlp.vision_mlp.w1.weight"),
    ),
)
