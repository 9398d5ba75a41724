"""Yi (first releases): a Llama with other names of its norms.

Source: the modeling code published with 01-ai/Yi-6B.
"""

from __future__ import annotations

from streamconv.families.llama import LLAMA, SIZES
from streamconv.families.llama_like import (
    HEAD,
    LAYER,
    MLP,
    NO_BIAS,
    NOT_TIED,
    OUTSIDE,
    llama_config,
    own_config,
    same,
    sentencepiece_files,
)
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, rename
from streamconv.plans.table import table

YI = Architecture(
    name="yi",
    title="Yi (first releases)",
    model_types=("Yi", "yi"),
    classes=("YiForCausalLM",),
    sizes=SIZES,
    counts={"i": "layers"},
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

YI_LLAMA = Recipe(
    name="yi-llama",
    title="Yi (first releases) -> Llama, renamed",
    source=YI,
    target=LLAMA,
    rules=(
        *OUTSIDE,
        *MLP,
        *HEAD,
        *same(*(LAYER + f"self_attn.{part}_proj.weight" for part in "qkvo")),
        *rename(
            {
                LAYER + "ln1.weight": LAYER + "input_layernorm.weight",
                LAYER + "ln2.weight": LAYER + "post_attention_layernorm.weight",
            }
        ),
    ),
    config=llama_config,
    config_back=lambda config: own_config(config, "Yi", "YiForCausalLM"),
    refuses_back=(NOT_TIED, NO_BIAS),
    files=sentencepiece_files,
)

RECIPES = (YI_LLAMA,)
