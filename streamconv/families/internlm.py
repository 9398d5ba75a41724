"""InternLM, whose first generation is a Llama with biases, and InternLM2, whose attention is one fused projection.

Source: the modeling code published with internlm/internlm-7b and internlm2-7b.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamconv.families import llama, llama_like
from streamconv.families.llama import SIZES
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, linear, rename, same
from streamconv.plans.table import table

INTERNLM = llama.decoder(
    "internlm",
    "InternLM (first generation)",
    "InternLM",
    llama.QKV
    + llama.OUTPUT
    + (llama.QKV_BIAS + llama.OUTPUT_BIAS).given(attention_bias="bias")
    + llama_like.FREQUENCY_LINE,
    head=llama.HEAD,
    bias="bias != False",
    # The first release kept its frequencies in the file; later ones say `rotary` in the config.
    keeps_frequencies="not rotary",
)

INTERNLM2 = Architecture(
    name="internlm2",
    title="InternLM2",
    model_types=("internlm2",),
    classes=("InternLM2ForCausalLM",),
    sizes={**SIZES, "bias": "bool(bias)"},
    lines=table("""
        model.tok_embeddings.weight [vocab, hidden]
        model.layers.{i}.attention_norm.weight [hidden]
        model.layers.{i}.attention.wqkv.{weight,bias} [(heads + 2 * kv_heads) * head_dim, hidden] [(heads + 2 * kv_heads) * head_dim if bias]
        model.layers.{i}.attention.wo.{weight,bias} [hidden, heads * head_dim] [hidden if bias]
        model.layers.{i}.ffn_norm.weight [hidden]
        model.layers.{i}.feed_forward.{w1,w3}.weight [ffn, hidden]
        model.layers.{i}.feed_forward.w2.weight [hidden, ffn]
        model.norm.weight [hidden]
        output.weight [vocab, hidden]
    """),
)

_NO_MLP_BIAS = Refusal("mlp_bias", "it has no biases there, and this model has")


def _internlm(config: Config) -> dict[str, Any]:
    rotary = config.get("rotary") or {}
    made = llama_like.llama_config(config, attention_bias=config.get("bias", True))
    made["rope_theta"] = float(rotary.get("base", 10000))
    if rotary.get("type") == "dynamic":
        made["rope_scaling"] = {
            "type": "dynamic",
            "rope_type": "dynamic",
            "factor": float(rotary.get("scaling_factor", 1.0)),
        }
    return made


INTERNLM_LLAMA = llama_like.llamafied(
    INTERNLM,
    "InternLM (first generation) -> Llama, exact",
    (
        *llama_like.COMMON,
        *same(
            llama_like.NORMS, "lm_head.weight", llama_like.LAYER + "self_attn.{q,k,v,o}_proj.{weight,bias}"
        ),
        replace(llama_like.FREQUENCIES, when="keeps_frequencies"),
    ),
    config=_internlm,
    own=lambda config: {
        "bias": bool(config.get("attention_bias")),
        "rotary": {
            "base": int((config.get("rope_parameters") or config).get("rope_theta", 10000)),
            "type": "origin",
        },
    },
    refuses_back=(
        _NO_MLP_BIAS,
        Refusal(
            "rope_scaling and rope_scaling['rope_type'] != 'default'",
            "its stretched rotation is said in another way",
            "take the original config with --like DIR",
        ),
    ),
)

INTERNLM2_LLAMA = llama_like.llamafied(
    INTERNLM2,
    "InternLM2 -> Llama, exact",
    (
        *rename(
            named("""
                model.tok_embeddings.weight -> model.embed_tokens.weight
                model.layers.{i}.{attention,ffn}_norm.weight -> model.layers.{i}.{input,post_attention}_layernorm.weight
                model.layers.{i}.attention.wo.{weight,bias} -> model.layers.{i}.self_attn.o_proj.{weight,bias}
                model.layers.{i}.feed_forward.{w1,w3,w2}.weight -> model.layers.{i}.mlp.{gate,up,down}_proj.weight
                model.norm.weight
                output.weight -> lm_head.weight
            """)
        ),
        *linear(
            llama_like.LAYER + "attention.wqkv",
            llama_like.QKV,
            "q, k, v = split_heads(x, kv_heads, [heads // kv_heads, 1, 1], head_dim)",
        ),
    ),
    config=lambda config: llama_like.llama_config(config, attention_bias=bool(config.get("bias"))),
    own=lambda config: {"bias": bool(config.get("attention_bias"))},
    refuses_back=(_NO_MLP_BIAS,),
)

RECIPES = (INTERNLM_LLAMA, INTERNLM2_LLAMA)
