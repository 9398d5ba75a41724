"""ChatGLM2, ChatGLM3 and GLM-4 (`model_type` chatglm) to Llama, Qwen2 and native Glm, and back.

ChatGLM rotates neighbouring pairs in the first half of each head. Llama rotates half-split pairs of the whole
head, so the pairs are moved there and the still channels are spread over the other pairs, to which the
config's `longrope` factors give a frequency that rotates nothing in floating point. Attention scores do not
change when queries and keys are permuted alike.

Source: zai-org/ChatGLM3 (modeling_chatglm.py, configuration_chatglm.py of the published models),
huggingface/transformers 5.23.0 (modeling_rope_utils.py, models/glm), ggml-org/llama.cpp (conversion/chatglm.py, for the
keys it reads).
"""

from __future__ import annotations

import json
import math
from typing import Any

from streamconv.families.glm import GLM
from streamconv.families.llama import LLAMA
from streamconv.families.qwen import QWEN2
from streamconv.families.tokenizers.chatglm import BESIDE, convert
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.patterns import named
from streamconv.plans.recipe import (
    ConfigMap,
    Files,
    Recipe,
    Refusal,
    Remark,
    Rule,
    Surroundings,
    drop,
    keep_files,
    linear,
    rename,
)
from streamconv.plans.table import table

CHATGLM = Architecture(
    name="chatglm",
    title="ChatGLM",
    model_types=("chatglm",),
    classes=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    sizes={
        "hidden": "hidden_size",
        "vocab": "padded_vocab_size or vocab_size",
        "ffn": "ffn_hidden_size",
        "layers": "num_layers",
        "heads": "num_attention_heads",
        "head_dim": "kv_channels or hidden_size // num_attention_heads",
        "grouped": "bool(multi_query_attention)",
        "kv_heads": "(multi_query_group_num or 1) if grouped else heads",
        "qkv_bias": "bool(add_qkv_bias or add_bias_linear)",
        "linear_bias": "bool(add_bias_linear)",
        "pairs": "original_rope != False",
    },
    lines=table("""
        transformer.embedding.word_embeddings.weight [vocab, hidden]
        ?transformer.rotary_pos_emb.inv_freq [head_dim // 4]
        transformer.encoder.layers.{i}.input_layernorm.weight [hidden]
        transformer.encoder.layers.{i}.self_attention.query_key_value.{weight,bias} [(heads + 2 * kv_heads) * head_dim, hidden] [(heads + 2 * kv_heads) * head_dim if qkv_bias]
        transformer.encoder.layers.{i}.self_attention.dense.{weight,bias} [hidden, heads * head_dim] [hidden if linear_bias]
        transformer.encoder.layers.{i}.post_attention_layernorm.weight [hidden]
        transformer.encoder.layers.{i}.mlp.dense_h_to_4h.{weight,bias} [2 * ffn, hidden] [2 * ffn if linear_bias]
        transformer.encoder.layers.{i}.mlp.dense_4h_to_h.{weight,bias} [hidden, ffn] [hidden if linear_bias]
        transformer.encoder.final_layernorm.weight [hidden]
        transformer.output_layer.weight [vocab, hidden]
    """),
    vocabulary="padded_vocab_size",
)

# ------------------------------------------------------------------------------------------- rules

_BASE = 10000
# Slows the pairs that hold still channels down to nothing: cos is exactly 1 and sin vanishes in every dtype.
# Not infinity, which JSON does not have.
_STILL = 1e30

_SOURCE = "transformer.encoder.layers.{i}."
_TARGET = "model.layers.{i}."

_REFUSES = (
    Refusal("rmsnorm == False", "it has LayerNorm, the target RMSNorm"),
    Refusal("post_layer_norm == False", "it has no final norm, the target has one"),
    Refusal(
        "apply_residual_connection_post_layernorm",
        "its residuals branch off after the norm, those of the target before it",
    ),
    Refusal(
        "quantization_bit",
        "its weights are quantised to whole numbers",
        "make them plain first, with --recipe dequantise",
    ),
    Refusal(
        "pre_seq_len",
        "P-tuning prefixes are no part of the target",
        "without them: remove pre_seq_len from the config (--config FILE) and --drop 'transformer.prefix_encoder.*'",
    ),
)
_REMARKS = (
    Remark(
        "(rope_ratio or 1) != 1 and not rope_divides_positions",
        "rope_ratio multiplies the base of the rotation, as in ChatGLM3 and GLM-4; ChatGLM2-6B-32k divides positions "
        'by it: there, put "rope_divides_positions": true into the config (--config FILE)',
    ),
)

_NAMES = (
    *rename(
        named("""
            transformer.embedding.word_embeddings.weight -> model.embed_tokens.weight
            transformer.encoder.layers.{i}.{input,post_attention}_layernorm.weight -> model.layers.{i}.{input,post_attention}_layernorm.weight
            transformer.encoder.layers.{i}.self_attention.dense.weight -> model.layers.{i}.self_attn.o_proj.weight
            transformer.encoder.layers.{i}.mlp.dense_4h_to_h.{weight,bias} -> model.layers.{i}.mlp.down_proj.{weight,bias}
            transformer.encoder.final_layernorm.weight -> model.norm.weight
            transformer.output_layer.weight -> lm_head.weight
        """)
    ),
    *rename({_SOURCE + "self_attention.dense.bias": _TARGET + "self_attn.o_proj.bias"}, when="linear_bias"),
    drop(
        "transformer.rotary_pos_emb.inv_freq",
        "a buffer that models compute",
        equals="frequencies(10000, head_dim // 2, dtype, dtype)",
        optional=True,
        # Powers in F32 differ by a step between versions of torch, and between processors.
        tolerance=1e-6,
    ),
)
_GATE_AND_UP = linear(
    _SOURCE + "mlp.dense_h_to_4h", _TARGET + "mlp.{gate,up}_proj", "gate, up = split(x, 0, [ffn, ffn])"
)
_FUSED_GATE_AND_UP = linear(_SOURCE + "mlp.dense_h_to_4h", _TARGET + "mlp.gate_up_proj")
_ZERO_BIAS = Rule(
    None,
    _TARGET + "self_attn.o_proj.bias",
    equals="filled([hidden], 0, dtype)",
    when="qkv_bias and not linear_bias",
)
_SPREAD = """
    q = spread_half_rotary(q, heads, pairs)
    k = spread_half_rotary(k, kv_heads, pairs)
"""


def _qkv(permute: str) -> tuple[Rule, ...]:
    """Both layouts of the fused projection, taken apart; then `permute`."""
    layouts = {
        "grouped": "q, k, v = split(x, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])",
        "not grouped": "q, k, v = split_heads(x, heads, [1, 1, 1], head_dim)",
    }
    fused, apart = _SOURCE + "self_attention.query_key_value", _TARGET + "self_attn.{q,k,v}_proj"
    return tuple(
        rule for when, program in layouts.items() for rule in linear(fused, apart, program + permute, when)
    )


# ------------------------------------------------------------------------------------- configs


def _shared(config: Config) -> dict[str, Any]:
    sizes = CHATGLM.sizes_of(config)
    made = {
        **LLAMA.stated(sizes),
        "hidden_act": "silu",
        "max_position_embeddings": config.get("seq_length", 2048),
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"):
        if key in config:
            made[key] = config[key]
    # No `<s>` begins a prompt of ChatGLM; the tokenizer's template writes what does.
    made.setdefault("bos_token_id", None)
    return made


def _spread_rotation(config: Config) -> dict[str, Any]:
    """Rotation of the whole head that leaves the still channels still."""
    quarter = CHATGLM.sizes_of(config)["head_dim"] // 4
    ratio = config.get("rope_ratio") or 1
    divides = bool(config.get("rope_divides_positions"))
    factors = [float(ratio) if divides else 1.0] * quarter + [_STILL] * quarter
    length = config.get("seq_length", 2048)
    return {
        "rope_theta": float((_BASE * (1 if divides else ratio)) ** 2),
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            # Equal to the context's length, so that engines that derive a scale from the two get 1.
            "original_max_position_embeddings": length,
        },
    }


def _qwen2(config: Config) -> dict[str, Any]:
    return {"use_sliding_window": False, **_spread_rotation(config)}


def _llama(config: Config) -> dict[str, Any]:
    sizes = CHATGLM.sizes_of(config)
    biases = {"attention_bias": sizes["qkv_bias"], "mlp_bias": sizes["linear_bias"]}
    return {**biases, **_spread_rotation(config)}


def _glm(config: Config) -> dict[str, Any]:
    return {
        "attention_bias": CHATGLM.sizes_of(config)["qkv_bias"],
        "rope_theta": float(_BASE * (config.get("rope_ratio") or 1)),
        "partial_rotary_factor": 0.5,
        # transformers ignores these four; llama.cpp reads them under the names of the older config.
        "layernorm_epsilon": config.get("layernorm_epsilon", 1e-5),
        "seq_length": config.get("seq_length", 2048),
        "rope_ratio": config.get("rope_ratio") or 1,
        "padded_vocab_size": CHATGLM.sizes_of(config)["vocab"],
    }


def _rotation(config: Config) -> dict[str, Any]:
    """The rope fields of a config of transformers 4 or 5, in one."""
    parameters = config.get("rope_parameters") or {}
    return {
        "rope_theta": config.get("rope_theta", _BASE),
        **(config.get("rope_scaling") or {}),
        **parameters,
    }


def _back(config: Config, theta: float, interpolated: float = 1.0) -> dict[str, Any]:
    made = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "add_bias_linear": bool(config.get("mlp_bias")),
        "add_qkv_bias": bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config["intermediate_size"],
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config["hidden_size"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": config.get("num_key_value_heads") or config["num_attention_heads"],
        "num_attention_heads": config["num_attention_heads"],
        "num_layers": config["num_hidden_layers"],
        "original_rope": True,
        "padded_vocab_size": config["vocab_size"],
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": config["max_position_embeddings"],
        "use_cache": True,
        "tie_word_embeddings": False,
    }
    ratio = theta / _BASE if interpolated == 1.0 else interpolated
    if ratio != 1:
        made["rope_ratio"] = int(ratio) if ratio == int(ratio) else ratio
    if interpolated != 1.0:
        made["rope_divides_positions"] = True
    for key in ("eos_token_id", "pad_token_id", "torch_dtype", "dtype"):
        if config.get(key) is not None:
            made[key] = config[key]
    return made


def _back_from_spread(config: Config) -> dict[str, Any]:
    rotation = _rotation(config)
    return _back(config, math.sqrt(rotation["rope_theta"]), (rotation.get("short_factor") or [1.0])[0])


def _back_from_glm(config: Config) -> dict[str, Any]:
    return _back(config, _rotation(config)["rope_theta"])


_TOKENIZER = "tokenizer.model"
_GENERATION = "generation_config.json"


def _files(around: Surroundings) -> Files:
    """A tokenizer without code, and the stop tokens that the original knows by its code alone."""
    kept = keep_files(around)
    data = around.read(_TOKENIZER)
    config = around.target_config
    texts: dict[str, str] = {}
    stops, pad = config.get("eos_token_id"), config.get("pad_token_id")
    notes: tuple[str, ...] = ()
    if data is None:
        notes = (f"there is no {_TOKENIZER}, so the output has no tokenizer",)
    else:
        made = convert(
            data,
            str(around.directory / _TOKENIZER),
            around.sizes["vocab"],
            config["max_position_embeddings"],
            stops,
            {name: content for name in BESIDE if (content := around.read(name)) is not None},
        )
        texts |= made.texts
        stops, pad = list(made.eos_token_ids), made.pad_token_id if pad is None else pad
    generation = around.settings(_GENERATION)
    generation |= {"eos_token_id": stops, "pad_token_id": pad}
    texts[_GENERATION] = json.dumps(generation, indent=2) + "\n"
    return Files(texts, kept.left_out, notes)


_NOT_TIED = Refusal("tie_word_embeddings", "ChatGLM's output layer is not tied to its embedding")
_SPREAD_ONLY = (
    Refusal(
        "(rope_scaling or rope_parameters)['rope_type'] != 'longrope'"
        " or (rope_scaling or rope_parameters)['short_factor'][-1] != 1e30",
        "only half of a ChatGLM's head rotates, and this model rotates the whole",
        "the way back is for models that were made from ChatGLM",
    ),
    _NOT_TIED,
)


def _recipe(
    title: str,
    target: Architecture,
    rules: tuple[Rule, ...],
    own: ConfigMap,
    back: ConfigMap = _back_from_spread,
    refuses: tuple[Refusal, ...] = (),
    refuses_back: tuple[Refusal, ...] = _SPREAD_ONLY,
    remarks: tuple[Remark, ...] = (),
) -> Recipe:
    """A recipe to another family, whose config has its `own` keys besides those that all have."""
    return Recipe(
        name=f"chatglm-{target.name}",
        title=title,
        source=CHATGLM,
        target=target,
        rules=(*_NAMES, *rules),
        config=lambda config: {**target.label, **_shared(config), **own(config)},
        config_back=back,
        files=_files,
        refuses=(*_REFUSES, *refuses),
        refuses_back=refuses_back,
        remarks=(*_REMARKS, *remarks),
    )


CHATGLM_LLAMA = _recipe(
    "ChatGLM2, ChatGLM3, GLM-4 -> Llama, exact",
    LLAMA,
    (*_GATE_AND_UP, *_qkv(_SPREAD), _ZERO_BIAS),
    _llama,
)
CHATGLM_QWEN2 = _recipe(
    "ChatGLM2, ChatGLM3, GLM-4 -> Qwen2, exact",
    QWEN2,
    (*_GATE_AND_UP, *_qkv(_SPREAD)),
    _qwen2,
    refuses=(
        Refusal("add_bias_linear", "it has biases that Qwen2 has no place for", "use --to-arch llama"),
        Refusal("not add_qkv_bias", "it has no biases, and Qwen2 needs them", "use --to-arch llama"),
    ),
    remarks=(
        Remark(
            "True",
            "AutoTokenizer of transformers 5 takes the tokenizer of every qwen2 for Qwen2's own, which this is not: load it "
            "with PreTrainedTokenizerFast, or use --to-arch llama",
        ),
    ),
)
CHATGLM_GLM = _recipe(
    "ChatGLM3, GLM-4 -> Glm of transformers, exact to the bit",
    GLM,
    (*_FUSED_GATE_AND_UP, *_qkv("")),
    _glm,
    _back_from_glm,
    refuses=(
        Refusal("add_bias_linear", "it has biases that Glm has no place for", "use --to-arch llama"),
        Refusal(
            "original_rope == False",
            "it rotates half-split pairs, Glm neighbouring ones",
            "use --to-arch llama",
        ),
        Refusal("rope_divides_positions", "Glm cannot divide positions", "use --to-arch llama"),
    ),
    refuses_back=(_NOT_TIED,),
)

RECIPES = (CHATGLM_LLAMA, CHATGLM_QWEN2, CHATGLM_GLM)
