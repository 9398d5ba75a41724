"""Architectures whose attention and multilayer perceptron are Llama's, under other names or fused.

Sources: the modeling code published with baichuan-inc/Baichuan-7B and Baichuan2-7B, Qwen/Qwen-7B,
internlm/internlm-7b and internlm2-7b, 01-ai/Yi-6B.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.llama import SIZES
from streamconv.plans.architecture import Architecture, table

_COUNTS = {"i": "layers"}

BAICHUAN = Architecture(
    name="baichuan",
    title="Baichuan",
    model_types=("baichuan",),
    classes=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
    sizes={
        **SIZES,
        # Of the config, only the spelling of the class tells that the second generation normalises its head.
        "norm_head": "bool(architectures and architectures[0] == 'BaichuanForCausalLM')",
    },
    counts=_COUNTS,
    lines=table("""
        model.embed_tokens.weight [vocab, hidden]
        model.layers.{i}.input_layernorm.weight [hidden]
        model.layers.{i}.self_attn.W_pack.weight [3 * hidden, hidden]
        model.layers.{i}.self_attn.o_proj.weight [hidden, hidden]
        ?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]
        model.layers.{i}.post_attention_layernorm.weight [hidden]
        model.layers.{i}.mlp.gate_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.up_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
        model.norm.weight [hidden]
        lm_head.weight [vocab, hidden]
    """),
)

QWEN = Architecture(
    name="qwen",
    title="Qwen (first generation)",
    model_types=("qwen",),
    classes=("QWenLMHeadModel",),
    sizes={
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "ffn": "intermediate_size // 2",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "head_dim": "kv_channels or hidden_size // num_attention_heads",
    },
    counts=_COUNTS,
    only_if="not visual",
    lines=table("""
        transformer.wte.weight [vocab, hidden]
        transformer.h.{i}.ln_1.weight [hidden]
        transformer.h.{i}.attn.c_attn.weight [3 * heads * head_dim, hidden]
        transformer.h.{i}.attn.c_attn.bias [3 * heads * head_dim]
        transformer.h.{i}.attn.c_proj.weight [hidden, heads * head_dim]
        transformer.h.{i}.ln_2.weight [hidden]
        transformer.h.{i}.mlp.w1.weight [ffn, hidden]
        transformer.h.{i}.mlp.w2.weight [ffn, hidden]
        transformer.h.{i}.mlp.c_proj.weight [hidden, ffn]
        transformer.ln_f.weight [hidden]
        lm_head.weight [vocab, hidden]
    """),
)

QWEN_VL = replace(QWEN, title="Qwen-VL", only_if="visual")

INTERNLM = Architecture(
    name="internlm",
    title="InternLM (first generation)",
    model_types=("internlm",),
    classes=("InternLMForCausalLM",),
    sizes={
        **SIZES,
        "bias": "bias != False",
        # The first release kept its frequencies in the file; later ones say `rotary` in the config.
        "keeps_frequencies": "not rotary",
    },
    counts=_COUNTS,
    lines=table("""
        model.embed_tokens.weight [vocab, hidden]
        model.layers.{i}.input_layernorm.weight [hidden]
        model.layers.{i}.self_attn.q_proj.weight [heads * head_dim, hidden]
        model.layers.{i}.self_attn.k_proj.weight [kv_heads * head_dim, hidden]
        model.layers.{i}.self_attn.v_proj.weight [kv_heads * head_dim, hidden]
        model.layers.{i}.self_attn.o_proj.weight [hidden, heads * head_dim]
        model.layers.{i}.self_attn.q_proj.bias [heads * head_dim] if bias
        model.layers.{i}.self_attn.k_proj.bias [kv_heads * head_dim] if bias
        model.layers.{i}.self_attn.v_proj.bias [kv_heads * head_dim] if bias
        model.layers.{i}.self_attn.o_proj.bias [hidden] if bias
        ?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]
        model.layers.{i}.post_attention_layernorm.weight [hidden]
        model.layers.{i}.mlp.gate_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.up_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
        model.norm.weight [hidden]
        lm_head.weight [vocab, hidden]
    """),
)

INTERNLM2 = Architecture(
    name="internlm2",
    title="InternLM2",
    model_types=("internlm2",),
    classes=("InternLM2ForCausalLM",),
    sizes={**SIZES, "bias": "bool(bias)"},
    counts=_COUNTS,
    lines=table("""
        model.tok_embeddings.weight [vocab, hidden]
        model.layers.{i}.attention_norm.weight [hidden]
        model.layers.{i}.attention.wqkv.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        model.layers.{i}.attention.wqkv.bias [(heads + 2 * kv_heads) * head_dim] if bias
        model.layers.{i}.attention.wo.weight [hidden, heads * head_dim]
        model.layers.{i}.attention.wo.bias [hidden] if bias
        model.layers.{i}.ffn_norm.weight [hidden]
        model.layers.{i}.feed_forward.w1.weight [ffn, hidden]
        model.layers.{i}.feed_forward.w3.weight [ffn, hidden]
        model.layers.{i}.feed_forward.w2.weight [hidden, ffn]
        model.norm.weight [hidden]
        output.weight [vocab, hidden]
    """),
)

YI = Architecture(
    name="yi",
    title="Yi (first releases)",
    model_types=("Yi", "yi"),
    classes=("YiForCausalLM",),
    sizes=SIZES,
    counts=_COUNTS,
    lines=table("""
        model.embed_tokens.weight [vocab, hidden]
        model.layers.{i}.ln1.weight [hidden]
        model.layers.{i}.self_attn.q_proj.weight [heads * head_dim, hidden]
        model.layers.{i}.self_attn.k_proj.weight [kv_heads * head_dim, hidden]
        model.layers.{i}.self_attn.v_proj.weight [kv_heads * head_dim, hidden]
        model.layers.{i}.self_attn.o_proj.weight [hidden, heads * head_dim]
        model.layers.{i}.ln2.weight [hidden]
        model.layers.{i}.mlp.gate_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.up_proj.weight [ffn, hidden]
        model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
        model.norm.weight [hidden]
        lm_head.weight [vocab, hidden]
    """),
)
