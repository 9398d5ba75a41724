"""InternLM, whose first generation is a Llama with biases, and InternLM2, whose attention is one fused projection.

Source: the modeling code published with internlm/internlm-7b and internlm2-7b.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamconv.families import llama
from streamconv.families.llama import LLAMA, SIZES
from streamconv.families.llama_like import (
    COMMON,
    FREQUENCIES,
    LAYER,
    NORMS,
    NOT_TIED,
    QKV,
    llama_config,
    own_config,
    sentencepiece_files,
)
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.recipe import Recipe, Refusal, linear, rename, same
from streamconv.plans.table import table

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
    lines=llama.FIRST
    + llama.QKV
    + llama.OUTPUT
    + (llama.QKV_BIAS + llama.OUTPUT_BIAS).given(attention_bias="bias")
    + table("?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]")
    + llama.BETWEEN
    + llama.FEED_FORWARD
    + llama.NORM
    + llama.HEAD,
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
        model.layers.{i}.attention.wqkv.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        model.layers.{i}.attention.wqkv.bias [(heads + 2 * kv_heads) * head_dim] if bias
        model.layers.{i}.attention.wo.weight [hidden, heads * head_dim]
        model.layers.{i}.attention.wo.bias [hidden] if bias
        model.layers.{i}.ffn_norm.weight [hidden]
        model.layers.{i}.feed_forward.{w1,w3}.weight [ffn, hidden]
        model.layers.{i}.feed_forward.w2.weight [hidden, ffn]
        model.norm.weight [hidden]
        output.weight [vocab, hidden]
    """),
)


def _internlm(config: Config) -> dict[str, Any]:
    rotary = config.get("rotary") or {}
    made = llama_config(config, attention_bias=config.get("bias", True))
    made["rope_theta"] = float(rotary.get("base", 10000))
    if rotary.get("type") == "dynamic":
        made["rope_scaling"] = {
            "type": "dynamic",
            "rope_type": "dynamic",
            "factor": float(rotary.get("scaling_factor", 1.0)),
        }
    return made


INTERNLM_LLAMA = Recipe(
    name="internlm-llama",
    title="InternLM (first generation) -> Llama, exact",
    source=INTERNLM,
    target=LLAMA,
    rules=(
        *COMMON,
        *same(NORMS, "lm_head.weight", LAYER + "self_attn.{q,k,v,o}_proj.{weight,bias}"),
        replace(FREQUENCIES, when="keeps_frequencies"),
    ),
    config=_internlm,
    config_back=lambda config: own_config(
        config,
        "internlm",
        "InternLMForCausalLM",
        bias=bool(config.get("attention_bias")),
        rotary={
            "base": int((config.get("rope_parameters") or config).get("rope_theta", 10000)),
            "type": "origin",
        },
    ),
    refuses_back=(
        NOT_TIED,
        Refusal("mlp_bias", "it has no biases there, and this model has"),
        Refusal(
            "rope_scaling and rope_scaling['rope_type'] != 'default'",
            "its stretched rotation is said in another way",
            "take the original config with --like DIR",
        ),
    ),
    files=sentencepiece_files,
)

INTERNLM2_LLAMA = Recipe(
    name="internlm2-llama",
    title="InternLM2 -> Llama, exact",
    source=INTERNLM2,
    target=LLAMA,
    rules=(
        *rename(
            {
                "model.tok_embeddings.weight": "model.embed_tokens.weight",
                LAYER + "{attention,ffn}_norm.weight": NORMS,
                LAYER + "attention.wo.{weight,bias}": LAYER + "self_attn.o_proj.{weight,bias}",
                LAYER + "feed_forward.{w1,w3,w2}.weight": LAYER + "mlp.{gate,up,down}_proj.weight",
                "model.norm.weight": "model.norm.weight",
                "output.weight": "lm_head.weight",
            }
        ),
        *linear(
            LAYER + "attention.wqkv",
            QKV,
            "q, k, v = split_heads(x, kv_heads, [heads // kv_heads, 1, 1], head_dim)",
        ),
    ),
    config=lambda config: llama_config(config, attention_bias=bool(config.get("bias"))),
    config_back=lambda config: own_config(
        config, "internlm2", "InternLM2ForCausalLM", bias=bool(config.get("attention_bias"))
    ),
    refuses_back=(NOT_TIED, Refusal("mlp_bias", "it has no biases there, and this model has")),
    files=sentencepiece_files,
)

RECIPES = (
    INTERNLM_LLAMA,
    INTERNLM2_LLAMA,
)
