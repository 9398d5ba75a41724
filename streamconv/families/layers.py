"""What the layers of models that no table here describes are called, for the commonest of them.

A config of one of these over weights of another model may agree in layers, widths and vocabulary; its library then loads
nothing, and says so in a warning. Types whose layers are called as those of most others (`model.layers.0.mlp`) are not told.

Source: huggingface/transformers 5.24.0 (models/*/modeling_*.py).
"""

from __future__ import annotations

from collections.abc import Mapping

# Part of a name in every layer, where `#` is a number: the model types that have one of them in their names.
_LAYERS = """
    decoder.layers.#.fc1: opt
    encoder.layers.#.self_attn decoder.layers.#.self_attn: bart marian mbart pegasus
    layers.#.fc1: biogpt xglm
    block.#.layer.#: mt5 t5
    h.#.attn.q_proj: gptj
    h.#.attn.qkv_proj: codegen
    h.#.attn.attention: gpt_neo
    h.#.attn.c_attn: gpt_bigcode
    blocks.#.attn.Wqkv: mpt
    blocks.#.attention: rwkv
    layers.#.mixer: falcon_mamba mamba
    layers.#.mlp.fc1: phi
    layers.#.self_attn.query_key_value: persimmon
    layers.#.self_attn.qkv_proj: phi3
    layers.#.attn.Wqkv: modernbert
    layer.#.attention.self: bert camembert deberta-v2 electra layoutlm longformer roberta xlm-roberta
    layer.#.attention.q_lin: distilbert
    layer.#.rel_attn: xlnet
    albert_layer_groups.#: albert
    layers.#.post_feedforward_layernorm: exaone4 gemma2 gemma3_text olmo2 olmo3
    layers.#.post_self_attn_layernorm: glm4
    layers.#.input_layernorm.bias: nemotron stablelm
    layers.#.mlp.c_fc: starcoder2
    layers.#.mlp.ffn_sub_norm: bitnet
    layers.#.mlp.act_fn: apertus
    layers.#.self_attn.query_layernorm: hunyuan_v1_dense
    !layers.#.input_layernorm: exaone4 olmo olmo2 olmo3
    !layers.#.post_attention_layernorm: cohere cohere2
    !layers.#.mlp.gate_proj: arcee nemotron
"""


def _by_type(lines: str) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for marks, _, types in (line.strip().partition(": ") for line in lines.strip().splitlines()):
        for model_type in types.split():
            found[model_type] = (*found.get(model_type, ()), *marks.split())
    return found


LAYERS: Mapping[str, tuple[str, ...]] = _by_type(_LAYERS)
"""What stands in the names of every model of a type, one of them at least: whole words, with `#` for a number. After
`!`, what stands in none."""
