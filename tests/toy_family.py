"""A family from outside the package: a Llama of few parts, whose projections are one tensor and whose head is tied."""

from __future__ import annotations

from streamconv.families.llama import LLAMA
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, Rule, drop, rename
from streamconv.plans.table import table

TOY = Architecture(
    name="toy",
    title="Toy",
    model_types=("toy",),
    classes=("ToyForCausalLM",),
    sizes={
        "hidden": "n_embd",
        "heads": "n_head",
        "ffn": "n_inner or 4 * n_embd",
        "layers": "n_layer",
        "vocab": "vocab_size",
    },
    lines=table("""
        wte.weight [vocab, hidden]
        h.{i}.norm1.weight [hidden]
        h.{i}.attn.qkv.weight [3 * hidden, hidden]
        ?h.{i}.attn.inv_freq [hidden // heads // 2]
        h.{i}.attn.out.weight [hidden, hidden]
        h.{i}.norm2.weight [hidden]
        h.{i}.mlp.gate_up.weight [2 * ffn, hidden]
        h.{i}.mlp.down.weight [hidden, ffn]
        norm.weight [hidden]
    """),
)

LLAMA_CONFIG = {
    "model_type": "'llama'",
    "architectures": "['LlamaForCausalLM']",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner or 4 * n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "True",
}
TOY_CONFIG = {
    "model_type": "'toy'",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
}


def evaluated(formulas):
    return lambda config: {key: formula.evaluate(text, config) for key, text in formulas.items()}


LAYER = "model.layers.{i}."
RECIPE = Recipe(
    name="toy-llama",
    title="Toy -> Llama",
    source=TOY,
    target=LLAMA,
    rules=(
        *rename(
            {
                "wte.weight": "model.embed_tokens.weight",
                "h.{i}.norm1.weight": LAYER + "input_layernorm.weight",
                "h.{i}.attn.out.weight": LAYER + "self_attn.o_proj.weight",
                "h.{i}.norm2.weight": LAYER + "post_attention_layernorm.weight",
                "h.{i}.mlp.down.weight": LAYER + "mlp.down_proj.weight",
                "norm.weight": "model.norm.weight",
            }
        ),
        Rule(
            "h.{i}.attn.qkv.weight",
            LAYER + "self_attn.{q,k,v}_proj.weight",
            "q, k, v = chunk(x, 0, 3)",
        ),
        Rule(
            "h.{i}.mlp.gate_up.weight",
            {part: LAYER + f"mlp.{part}_proj.weight" for part in ("gate", "up")},
            "gate, up = chunk(x, 0, 2)",
        ),
        drop("h.{i}.attn.inv_freq", "a buffer that models compute", optional=True),
    ),
    config=evaluated(LLAMA_CONFIG),
    config_back=evaluated(TOY_CONFIG),
)
