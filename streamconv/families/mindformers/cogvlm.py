"""CogVLM2, for images and, without experts for what it sees, for videos: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/cogvlm2/convert_weight.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.cogvlm import COGVLM
from streamconv.families.mindformers.common import LAYER, NORMS, OUTSIDE
from streamconv.families.mindformers.net import Names, Net
from streamconv.plans.patterns import named
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

_SEEING = named("""
    model.vision.patch_embedding.proj. -> vision_encoder.patch_embed.proj.
    model.vision.transformer.layers.{j}.attention.query_key_value. -> vision_encoder.blocks.{j}.attn.qkv.
    model.vision.transformer.layers.{j}.attention.dense. -> vision_encoder.blocks.{j}.attn.proj.
    model.vision.transformer.layers.{j}.mlp. -> vision_encoder.blocks.{j}.mlp.
    model.vision.transformer.layers.{j}.input_layernorm.{weight,bias} -> vision_encoder.blocks.{j}.norm1.{gamma,beta}
    model.vision.transformer.layers.{j}.post_attention_layernorm.{weight,bias} -> vision_encoder.blocks.{j}.norm2.{gamma,beta}
    model.vision.linear_proj.norm1.{weight,bias} -> mlp_adapter.linear_proj.norm1.{gamma,beta}
    model.vision.{boi,eoi,conv.} -> mlp_adapter.{boi,eoi,conv.}
    model.vision.linear_proj.{linear_proj,dense_h_to_4h,gate_proj,dense_4h_to_h}. -> mlp_adapter.linear_proj.{linear_proj,dense_h_to_4h,gate_proj,dense_4h_to_h}.
""")
_SEEING_LINES = table("""
    vision_encoder.cls_token [1, 1, vision_hidden]
    vision_encoder.pos_embed [1, positions, vision_hidden]
""")


def _under(prefix: str, names: Names) -> Names:
    return {theirs: prefix + ours for theirs, ours in names.items()}


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


_VIDEO = named(
    """
    self_attn.language_expert_dense. -> attention.wo.
    mlp.language_mlp.{gate,up,down}_proj. -> feed_forward.{w1,w3,w2}.
    """,
    LAYER,
    LAYER,
)
_IMAGE = named(
    """
    {input,post_attention}_layernorm.
    self_attn.{language,vision}_expert_{query_key_value,dense}.
    mlp.{language,vision}_mlp.{gate,up,down}_proj. -> mlp.{language,vision}_mlp.{w1,w3,w2}.
    """,
    LAYER,
    LAYER,
)
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
        names=_SEEING | _under(prefix, OUTSIDE | NORMS | _VIDEO),
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
        names=_SEEING | _under(_PREFIX, OUTSIDE | _IMAGE),
        own=_SEEING_LINES + _FREQUENCIES_LINE.under(_PREFIX),
        rules=(*_SEEING_RULES, _frequencies(_PREFIX)),
        found_by=("vision_encoder.cls_token", _PREFIX + LAYER + "mlp.vision_mlp.w1.weight"),
    ),
)
