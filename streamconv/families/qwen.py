"""Qwen, Qwen2 and Qwen3; the first generation as Llama and as Qwen2, and back.

Source: the modeling code published with Qwen/Qwen-7B; huggingface/transformers 5.23.0: models/qwen2/modeling_qwen2.py,
models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamconv.families import llama
from streamconv.families.llama import LLAMA
from streamconv.families.llama_like import LAYER, NO_GROUPS, NORMS, NOT_TIED, QKV, no_tokenizer
from streamconv.families.tokenizers import qwen as tokenizer
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.recipe import (
    Files,
    Recipe,
    Refusal,
    Remark,
    Rule,
    Surroundings,
    keep_files,
    linear,
    rename,
)
from streamconv.plans.table import table

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
    only_if="not visual",
    lines=table("""
        transformer.wte.weight [vocab, hidden]
        transformer.h.{i}.ln_1.weight [hidden]
        transformer.h.{i}.attn.c_attn.{weight,bias} [3 * heads * head_dim, hidden] [3 * heads * head_dim]
        transformer.h.{i}.attn.c_proj.weight [hidden, heads * head_dim]
        transformer.h.{i}.ln_2.weight [hidden]
        transformer.h.{i}.mlp.{w1,w2}.weight [ffn, hidden]
        transformer.h.{i}.mlp.c_proj.weight [hidden, ffn]
        transformer.ln_f.weight [hidden]
        lm_head.weight [vocab, hidden]
    """),
)

QWEN2 = llama.decoder(
    "qwen2", "Qwen2", "Qwen2", llama.QKV + llama.QKV_BIAS.given(attention_bias="True") + llama.OUTPUT
)

QWEN3 = Architecture(
    name="qwen3",
    title="Qwen3",
    model_types=("qwen3",),
    classes=("Qwen3ForCausalLM",),
    sizes=LLAMA.sizes,
    lines=LLAMA.lines.without("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
    + table("""
        model.layers.{i}.self_attn.{q,k}_norm.weight [head_dim]
    """),
)

_RULES = (
    *rename(
        {
            "transformer.wte.weight": "model.embed_tokens.weight",
            "transformer.h.{i}.ln_{1,2}.weight": NORMS,
            "transformer.h.{i}.attn.c_proj.weight": LAYER + "self_attn.o_proj.weight",
            # The second matrix is the one under the activation.
            "transformer.h.{i}.mlp.{w1,w2,c_proj}.weight": LAYER + "mlp.{up,gate,down}_proj.weight",
            "transformer.ln_f.weight": "model.norm.weight",
            "lm_head.weight": "lm_head.weight",
        }
    ),
    *linear("transformer.h.{i}.attn.c_attn", QKV, "q, k, v = chunk(x, 0, 3)"),
)
_ZERO_OUTPUT_BIAS = Rule(None, LAYER + "self_attn.o_proj.bias", equals="filled([hidden], 0, dtype)")
_REMARKS = (
    Remark(
        "use_dynamic_ntk or use_logn_attn",
        "beyond seq_length the original stretches its rotation and scales its queries with the length; the target "
        "does not, so its context is set to seq_length",
    ),
)
_END_OF_TEXT = 151643


def _shared(config: Config) -> dict[str, Any]:
    """What Llama's and Qwen2's config have in common of a Qwen's."""
    sizes = QWEN.sizes_of(config)
    made = {
        **LLAMA.stated({"kv_heads": sizes["heads"], **sizes}),
        "hidden_act": "silu",
        "max_position_embeddings": config.get("seq_length", 2048),
        "initializer_range": config.get("initializer_range", 0.02),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(config.get("rotary_emb_base", 10000)),
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": config.get("bos_token_id"),
    }
    if sizes["vocab"] > _END_OF_TEXT:
        made |= {"eos_token_id": _END_OF_TEXT, "pad_token_id": _END_OF_TEXT}
    made |= {key: config[key] for key in ("eos_token_id", "pad_token_id") if config.get(key) is not None}
    dtype = next((name for key, name in _DTYPES.items() if config.get(key)), None)
    dtype = config.get("torch_dtype") or config.get("dtype") or dtype
    return made | ({"torch_dtype": dtype} if dtype else {})


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _back(config: Config) -> dict[str, Any]:
    rotation = config.get("rope_parameters") or {}
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {
        **QWEN.label,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "hidden_size": config["hidden_size"],
        "initializer_range": config.get("initializer_range", 0.02),
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "max_position_embeddings": config["max_position_embeddings"],
        "no_bias": True,
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "rotary_emb_base": config.get("rope_theta") or rotation.get("rope_theta", 10000),
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": config["vocab_size"],
        **{key: True for key, name in _DTYPES.items() if name == dtype},
        **({"torch_dtype": dtype} if dtype else {}),
    }


_BIASES = Refusal("no_bias == False", "its output projections have biases, which no released model has")

_RANKS = "qwen.tiktoken"


def _files(around: Surroundings) -> Files:
    """A `tokenizer.json` from Qwen's list of ranks."""
    kept = keep_files(around)
    data = around.read(_RANKS)
    if data is None:
        return Files(left_out=kept.left_out, notes=no_tokenizer(around, _RANKS))
    length = around.target_config["max_position_embeddings"]
    return Files(tokenizer.convert(data, str(around.directory / _RANKS), length), kept.left_out)


QWEN_LLAMA = Recipe(
    name="qwen-llama",
    title="Qwen (first generation) -> Llama, exact within seq_length",
    source=QWEN,
    target=LLAMA,
    rules=(*_RULES, _ZERO_OUTPUT_BIAS),
    config=lambda config: {**LLAMA.label, **_shared(config), "attention_bias": True, "mlp_bias": False},
    config_back=_back,
    refuses=(_BIASES,),
    refuses_back=(
        NOT_TIED,
        NO_GROUPS,
        Refusal("not attention_bias", "it has biases, and this model has none"),
    ),
    remarks=_REMARKS,
    files=_files,
)
QWEN_QWEN2 = replace(
    QWEN_LLAMA,
    name="qwen-qwen2",
    title="Qwen (first generation) -> Qwen2, exact within seq_length",
    target=QWEN2,
    rules=_RULES,
    config=lambda config: {**QWEN2.label, **_shared(config), "use_sliding_window": False},
    refuses_back=(NOT_TIED, NO_GROUPS),
)

RECIPES = (QWEN_LLAMA, QWEN_QWEN2)
