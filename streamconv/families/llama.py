"""Llama, and the families of transformers that share its tensors: Qwen2, Mistral.

Source: huggingface/transformers 5.23.0: models/llama/modeling_llama.py, models/qwen2/modeling_qwen2.py.
"""

from __future__ import annotations

from streamconv.plans.architecture import Architecture
from streamconv.plans.table import Table, table

SIZES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads or num_attention_heads",
    "head_dim": "head_dim or hidden_size // num_attention_heads",
    "tied": "bool(tie_word_embeddings)",
}


# Parts of the tables of families that are like it.
QKV = table("""
    model.layers.{i}.self_attn.q_proj.weight [heads * head_dim, hidden]
    model.layers.{i}.self_attn.{k,v}_proj.weight [kv_heads * head_dim, hidden]
""")
QKV_BIAS = table("""
    model.layers.{i}.self_attn.q_proj.bias [heads * head_dim] if attention_bias
    model.layers.{i}.self_attn.{k,v}_proj.bias [kv_heads * head_dim] if attention_bias
""")
OUTPUT = table("model.layers.{i}.self_attn.o_proj.weight [hidden, heads * head_dim]")
OUTPUT_BIAS = table("model.layers.{i}.self_attn.o_proj.bias [hidden] if attention_bias")
FEED_FORWARD = table("""
    model.layers.{i}.mlp.{gate,up}_proj.weight [ffn, hidden]
    model.layers.{i}.mlp.down_proj.weight [hidden, ffn]
""")
FEED_FORWARD_BIAS = table("""
    model.layers.{i}.mlp.{gate,up}_proj.bias [ffn] if mlp_bias
    model.layers.{i}.mlp.down_proj.bias [hidden] if mlp_bias
""")
FIRST = table("""
    model.embed_tokens.weight [vocab, hidden]
    model.layers.{i}.input_layernorm.weight [hidden]
""")
BETWEEN = table("model.layers.{i}.post_attention_layernorm.weight [hidden]")
NORM = table("model.norm.weight [hidden]")
HEAD = table("lm_head.weight [vocab, hidden]")
MAYBE_TIED_HEAD = HEAD.where("not tied") + HEAD.where("tied").optional()


def decoder(
    name: str,
    title: str,
    class_name: str,
    attention: Table,
    feed_forward: Table = FEED_FORWARD,
    head: Table = MAYBE_TIED_HEAD,
    **sizes: str,
) -> Architecture:
    """A family that differs from Llama by a part of its layers.

    Args:
        name: of the architecture, and the `model_type` of its config.
        title: as people write it.
        class_name: without `ForCausalLM`.
        attention: lines of this part of a layer.
        feed_forward: lines of the other.
        head: lines of the output layer.
        sizes: beside Llama's, or instead of them.
    """
    return Architecture(
        name=name,
        title=title,
        model_types=(name,),
        classes=(class_name + "ForCausalLM",),
        sizes={**SIZES, **sizes},
        lines=FIRST + attention + BETWEEN + feed_forward + NORM + head,
    )


LLAMA = decoder(
    "llama",
    "Llama",
    "Llama",
    QKV + OUTPUT + QKV_BIAS + OUTPUT_BIAS,
    FEED_FORWARD + FEED_FORWARD_BIAS,
    attention_bias="bool(attention_bias)",
    mlp_bias="bool(mlp_bias)",
)
