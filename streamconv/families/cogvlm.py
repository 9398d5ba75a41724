"""CogVLM and CogVLM2, from SAT to their Hugging Face form and back.

Renames but for one buffer, which SAT keeps once and the Hugging Face code once a layer: without the copies,
users read of weights that are "newly initialized".

Sizes of both namings are read from configs that differ: `model_config.json`, to which `identified` adds a
`model_type`, and `config.json`.

Source: THUDM/CogVLM (main, cogvlm2_dev: utils/models), THUDM/SwissArmyTransformer
(sat/model/official/llama_model.py); huggingface/transformers PR 28196 (modeling_cogvlm.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import named
from streamconv.plans.recipe import LEAVES, Recipe, Refusal, Remark, Rule, rename
from streamconv.plans.table import table
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.sat import CONFIG
from streamconv.readers.sat import FORMAT as SAT
from streamconv.writers.layout import Wrapping

_COUNTS = {"i": "layers", "j": "vision_layers"}


def identified(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of SAT with a config that says which model it is; others as they are."""
    (first, *_) = checkpoint.components
    if checkpoint.format != SAT.name or first.config is None:
        return checkpoint
    config = {"model_type": "sat-cogvlm", **first.config}
    if config["model_type"] != "sat-cogvlm":
        return checkpoint
    heads, groups = config.get("num_attention_heads"), config.get("num_multi_query_heads")
    note = (
        f"by {CONFIG} it has {config.get('num_layers')} layers, {heads} heads, {groups or heads} of them for "
        "keys and values"
    )
    return replace(checkpoint, components=(replace(first, config=config),), notes=(*checkpoint.notes, note))


SAT_COGVLM = Architecture(
    name="sat",
    title="CogVLM of SAT",
    model_types=("sat-cogvlm",),
    sizes={
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "ffn": "inner_hidden_size or 4 * hidden_size",
        "layers": "num_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_multi_query_heads or num_attention_heads",
        "head_dim": "hidden_size_per_attention_head or hidden_size // num_attention_heads",
        "second": "bool(num_multi_query_heads)",
        "vision_layers": "eva_args['num_layers']",
        "vision_hidden": "eva_args['hidden_size']",
        "vision_ffn": "eva_args['inner_hidden_size'] or 4 * eva_args['hidden_size']",
        "channels": "eva_args['in_channels']",
        "patch": "eva_args['patch_size']",
        "positions": "eva_args['max_sequence_length']",
        "vision_inner": "(eva_args['hidden_size_per_attention_head'] * eva_args['num_attention_heads'])"
        " if eva_args['hidden_size_per_attention_head'] else eva_args['hidden_size']",
    },
    counts=_COUNTS,
    lines=table("""
        transformer.word_embeddings.weight [vocab, hidden]
        transformer.layers.{i}.{input,post_attention}_layernorm.weight [hidden]
        transformer.layers.{i}.attention.query_key_value.weight [(heads + 2 * kv_heads) * head_dim, hidden]
        transformer.layers.{i}.attention.dense.weight [hidden, heads * head_dim]
        mixins.rotary.vision_query_key_value_list.{i}.{weight,bias} [(heads + 2 * kv_heads) * head_dim, hidden] [(heads + 2 * kv_heads) * head_dim if second]
        mixins.rotary.vision_dense_list.{i}.weight [hidden, heads * head_dim]
        ?mixins.rotary.rotary_emb.inv_freq [head_dim // 2]
        mixins.mlp.gate_proj.{i}.weight [ffn, hidden]
        transformer.layers.{i}.mlp.{dense_h_to_4h,dense_4h_to_h}.weight [ffn, hidden] [hidden, ffn]
        mixins.mlp.vision_gate_proj.{i}.weight [ffn, hidden]
        mixins.mlp.vision_{dense_h_to_4h,dense_4h_to_h}_list.{i}.weight [ffn, hidden] [hidden, ffn]
        transformer.final_layernorm.weight [hidden]
        mixins.lm.lm_head.weight [vocab, hidden]
        mixins.eva.{boi,eoi} [1, 1, hidden]
        mixins.eva.conv.{weight,bias} [vision_hidden, vision_hidden, 2, 2] [vision_hidden] if second
        mixins.eva.linear_proj.linear_proj.weight [hidden, vision_hidden]
        mixins.eva.linear_proj.norm1.{weight,bias} [hidden]
        mixins.eva.linear_proj.{dense_h_to_4h,gate_proj}.weight [ffn, hidden]
        mixins.eva.linear_proj.dense_4h_to_h.weight [hidden, ffn]
        mixins.eva.vit_model.mixins.patch_embedding.proj.{weight,bias} [vision_hidden, channels, patch, patch] [vision_hidden]
        mixins.eva.vit_model.transformer.word_embeddings.weight [1, vision_hidden]
        mixins.eva.vit_model.transformer.position_embeddings.weight [positions, vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.{input,post_attention}_layernorm.{weight,bias} [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.attention.query_key_value.{weight,bias} [3 * vision_inner, vision_hidden] [3 * vision_inner]
        mixins.eva.vit_model.transformer.layers.{j}.attention.dense.{weight,bias} [vision_hidden, vision_inner] [vision_hidden]
        mixins.eva.vit_model.transformer.layers.{j}.mlp.dense_h_to_4h.{weight,bias} [vision_ffn, vision_hidden] [vision_ffn]
        mixins.eva.vit_model.transformer.layers.{j}.mlp.dense_4h_to_h.{weight,bias} [vision_hidden, vision_ffn] [vision_hidden]
    """),
)

_SAT_CROSS = table("""
    mixins.eva.pos_embed [positions - 1, vision_hidden]
    mixins.encoder.pos_embed [cross_positions, cross_hidden]
    transformer.layers.{i}.post_cross_attention_layernorm.weight [hidden]
    transformer.layers.{i}.cross_attention.query.weight [cross_inner, hidden]
    transformer.layers.{i}.cross_attention.key_value.weight [2 * cross_inner, cross_hidden]
    transformer.layers.{i}.cross_attention.dense.weight [hidden, cross_inner]
""")
SAT_COGAGENT = replace(
    SAT_COGVLM,
    title="CogAgent of SAT",
    sizes={
        **SAT_COGVLM.sizes,
        "cross_hidden": "cross_attn_hidden_size",
        "cross_inner": "(cross_hidden_size_per_attention_head or cross_attn_hidden_size // num_attention_heads)"
        " * num_attention_heads",
        "cross_positions": "((cross_image_pix or 1120) // 14) ** 2",
    },
    lines=SAT_COGVLM.lines + _SAT_CROSS,
    beyond=("mixins.encoder.vit.*",),
    only_if="cross_attn_hidden_size",
)

_TENSORS = named("""
    transformer.word_embeddings.weight -> model.embed_tokens.weight
    transformer.layers.{i}.{input,post_attention}_layernorm.weight -> model.layers.{i}.{input,post_attention}_layernorm.weight
    transformer.layers.{i}.attention.{query_key_value,dense}.weight -> model.layers.{i}.self_attn.language_expert_{query_key_value,dense}.weight
    mixins.rotary.vision_query_key_value_list.{i}.{weight,bias} -> model.layers.{i}.self_attn.vision_expert_query_key_value.{weight,bias}
    mixins.rotary.vision_dense_list.{i}.weight -> model.layers.{i}.self_attn.vision_expert_dense.weight
    transformer.layers.{i}.mlp.dense_h_to_4h.weight -> model.layers.{i}.mlp.language_mlp.up_proj.weight
    mixins.mlp.gate_proj.{i}.weight -> model.layers.{i}.mlp.language_mlp.gate_proj.weight
    transformer.layers.{i}.mlp.dense_4h_to_h.weight -> model.layers.{i}.mlp.language_mlp.down_proj.weight
    mixins.mlp.vision_{dense_h_to_4h_list,gate_proj,dense_4h_to_h_list}.{i}.weight -> model.layers.{i}.mlp.vision_mlp.{up,gate,down}_proj.weight
    transformer.final_layernorm.weight -> model.norm.weight
    mixins.lm.lm_head.weight -> lm_head.weight
    mixins.eva.{boi,eoi,linear_proj.*} -> model.vision.{boi,eoi,linear_proj.*}
    mixins.eva.vit_model.transformer.word_embeddings.weight -> model.vision.patch_embedding.cls_embedding
    mixins.eva.vit_model.transformer.position_embeddings.weight -> model.vision.patch_embedding.position_embedding.weight
""")
_MODULES = named("""
    mixins.eva.conv. -> model.vision.conv.
    mixins.eva.vit_model.mixins.patch_embedding.proj. -> model.vision.patch_embedding.proj.
    mixins.eva.vit_model.transformer.layers.{j}.{input,post_attention}_layernorm. -> model.vision.transformer.layers.{j}.{input,post_attention}_layernorm.
    mixins.eva.vit_model.transformer.layers.{j}.attention.{query_key_value,dense}. -> model.vision.transformer.layers.{j}.attention.{query_key_value,dense}.
    mixins.eva.vit_model.transformer.layers.{j}.mlp.{dense_h_to_4h,dense_4h_to_h}. -> model.vision.transformer.layers.{j}.mlp.{fc1,fc2}.
""")
_CROSS = named("""
    mixins.eva.pos_embed -> model.vision.pos_embed
    mixins.encoder.{pos_embed,vit.*} -> model.cross_vision.{pos_embed,vit.*}
    transformer.layers.{i}.post_cross_attention_layernorm.weight -> model.layers.{i}.post_cross_attention_layernorm.weight
    transformer.layers.{i}.cross_attention.{query,key_value,dense}.weight -> model.layers.{i}.cross_attn.{query,key_value,dense}.weight
""")
"""Names of SAT -> of Hugging Face."""

COGVLM = Architecture(
    name="cogvlm",
    title="CogVLM",
    model_types=("cogvlm",),
    classes=("CogVLMForCausalLM", "CogVLMVideoForCausalLM"),
    sizes={
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "ffn": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_multi_query_heads or num_attention_heads",
        "head_dim": "hidden_size // num_attention_heads",
        "second": "bool(num_multi_query_heads)",
        "vision_layers": "vision_config['num_hidden_layers']",
        "vision_hidden": "vision_config['hidden_size']",
        "vision_ffn": "vision_config['intermediate_size']",
        "channels": "vision_config['in_channels']",
        "patch": "vision_config['patch_size']",
        "positions": "vision_config['num_positions']",
        "vision_inner": "vision_config['hidden_size']",
    },
    counts=_COUNTS,
    lines=SAT_COGVLM.lines.renamed(_TENSORS | _MODULES)
    + table("?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]"),
)

COGAGENT = replace(
    COGVLM,
    name="cogagent",
    title="CogAgent",
    model_types=("cogagent",),
    classes=("CogAgentForCausalLM",),
    sizes={
        **COGVLM.sizes,
        "cross_hidden": "cross_hidden_size",
        "cross_inner": "cross_compute_hidden_size",
        "cross_positions": "(cross_image_size // 14) ** 2",
    },
    lines=COGVLM.lines + _SAT_CROSS.renamed(_CROSS),
    beyond=("model.cross_vision.vit.*",),
)

# ------------------------------------------------------------------------------------------- rules

RULES = (
    *rename(_TENSORS),
    *rename(_MODULES, LEAVES),
    Rule(
        "mixins.rotary.rotary_emb.inv_freq",
        "model.layers.{i}.self_attn.rotary_emb.inv_freq",
        "x = copies(x, layers)",
        optional=True,
    ),
)

# Settings that SAT's own config does not hold.
_SECOND = {
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128002,
}
_FIRST = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _named(title: str) -> dict[str, Any]:
    return {
        "architectures": [f"{title}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{title.lower()}.{title}Config",
            "AutoModelForCausalLM": f"modeling_{title.lower()}.{title}ForCausalLM",
        },
        "model_type": title.lower(),
    }


def _to_hf(config: Config) -> dict[str, Any]:
    sizes = SAT_COGVLM.sizes_of(config)
    eva = config["eva_args"]
    second = sizes["second"]
    image = eva.get("image_size") or [224, 224]
    made: dict[str, Any] = {
        **_named("CogVLM"),
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "template_version": config.get("text_processor_version") or "chat",
        "tie_word_embeddings": False,
        "use_cache": True,
        **(_SECOND if second else _FIRST),
        "torch_dtype": config.get("torch_dtype", "bfloat16"),
        "vision_config": {
            "dropout_prob": 0.0,
            "hidden_act": "gelu",
            "hidden_size": sizes["vision_hidden"],
            "image_size": image[0] if isinstance(image, list) else image,
            "in_channels": sizes["channels"],
            "intermediate_size": sizes["vision_ffn"],
            "layer_norm_eps": eva.get("layernorm_epsilon", 1e-6),
            "num_heads": eva["num_attention_heads"],
            "num_hidden_layers": sizes["vision_layers"],
            "num_positions": sizes["positions"],
            "patch_size": sizes["patch"],
        },
    }
    if second:
        made["num_multi_query_heads"] = sizes["kv_heads"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key) is not None:
            made[key] = config[key]
    return made


def _to_sat(config: Config) -> dict[str, Any]:
    vision = config["vision_config"]
    second = bool(config.get("num_multi_query_heads"))
    made: dict[str, Any] = {
        "model_type": "sat-cogvlm",
        "model_class": "CogVLM2Model" if second else "CogVLMModel",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "layernorm_order": "pre",
        "model_parallel_size": 1,
        "max_sequence_length": 8192 if second else 4096,
        "is_rotary_emb": True,
        "is_gated_mlp": False,
        "use_bias": False,
        "inner_hidden_size": config["intermediate_size"],
        "image_length": (vision["num_positions"] - 1) // (4 if second else 1),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-5),
        "text_processor_version": config.get("template_version", "chat"),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
        "tokenizer_type": "Meta-Llama-3-8B-Instruct" if second else "vicuna-7b-v1.5",
        "eva_args": {
            "model_class": "EVA2CLIPModel",
            "num_layers": vision["num_hidden_layers"],
            "hidden_size": vision["hidden_size"],
            "num_attention_heads": vision["num_heads"],
            "vocab_size": 1,
            "layernorm_order": "post",
            "model_parallel_size": 1,
            "max_sequence_length": vision["num_positions"],
            "inner_hidden_size": vision["intermediate_size"],
            "use_final_layernorm": False,
            "layernorm_epsilon": vision["layer_norm_eps"],
            "row_parallel_linear_final_bias": False,
            "image_size": [vision["image_size"], vision["image_size"]],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": vision["in_channels"],
            "patch_size": vision["patch_size"],
        },
    }
    if second:
        made["num_multi_query_heads"] = config["num_multi_query_heads"]
    return made


def _wrapped(config: Config) -> Wrapping:
    shown = {key: value for key, value in config.items() if key != "model_type"}
    texts = {"latest": "1", "model_config.json": json.dumps(shown, indent=4) + "\n"}
    return Wrapping("1/mp_rank_00_model_states.pt", "module", texts=texts)


_REFUSES = (
    Refusal(
        "eva_args and eva_args['use_final_layernorm']",
        "its vision tower ends in a norm that the target does not have",
    ),
    Refusal("cross_attn_hidden_size", "it is a CogAgent", "use --recipe sat-cogagent"),
)

_IS_THE_SECOND = Refusal("num_multi_query_heads", "it is a CogVLM2", "use --recipe sat-cogvlm2")
SAT_COGVLM_HF = Recipe(
    name="sat-cogvlm",
    title="CogVLM (chat, base, grounding) of SAT -> Hugging Face",
    source=SAT_COGVLM,
    target=COGVLM,
    rules=RULES,
    config=_to_hf,
    config_back=_to_sat,
    wrap_back=_wrapped,
    refuses=(*_REFUSES, _IS_THE_SECOND),
    refuses_back=(_IS_THE_SECOND,),
)
_IS_THE_FIRST = Refusal(
    "not num_multi_query_heads", "it is a CogVLM of the first generation", "use --recipe sat-cogvlm"
)
SAT_COGVLM2_HF = replace(
    SAT_COGVLM_HF,
    name="sat-cogvlm2",
    title="CogVLM2 (image, video) of SAT -> Hugging Face",
    refuses=(*_REFUSES, _IS_THE_FIRST),
    refuses_back=(_IS_THE_FIRST,),
)


def _agent(config: Config) -> dict[str, Any]:
    sizes = SAT_COGAGENT.sizes_of(config)
    return _to_hf(config) | {
        **_named("CogAgent"),
        "cross_hidden_size": sizes["cross_hidden"],
        "cross_compute_hidden_size": sizes["cross_inner"],
        "cross_image_size": config.get("cross_image_pix", 1120),
    }


def _agent_back(config: Config) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    return _to_sat(config) | {
        "model_class": "CogAgentModel",
        "is_decoder": [True] * layers,
        "cross_attn_hidden_size": config["cross_hidden_size"],
        "cross_hidden_size_per_attention_head": config["cross_compute_hidden_size"] // heads,
        "cross_image_pix": config["cross_image_size"],
    }


SAT_COGAGENT_HF = Recipe(
    name="sat-cogagent",
    title="CogAgent of SAT -> Hugging Face",
    source=SAT_COGAGENT,
    target=COGAGENT,
    rules=(*RULES, *rename(_CROSS)),
    config=_agent,
    config_back=_agent_back,
    wrap_back=_wrapped,
    refuses=(
        _REFUSES[0],
        Refusal(
            "not cross_attn_hidden_size", "it is a CogVLM, without cross attention", "use --recipe sat-cogvlm"
        ),
    ),
    remarks=(
        Remark(
            "True",
            "names of the Hugging Face side were read from ports of its code, and those of the second tower are "
            "taken over as they are: compare with an original by --like",
        ),
    ),
)

RECIPES = (SAT_COGVLM_HF, SAT_COGVLM2_HF, SAT_COGAGENT_HF)
