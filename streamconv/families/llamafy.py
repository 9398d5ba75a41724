"""Baichuan, Qwen, InternLM, InternLM2 and Yi as Llama (and Qwen as Qwen2), and back.

Facts: the modeling code published with the models; hiyouga/LLaMA-Factory (scripts/convert_ckpt/llamafy_*.py),
InternLM/InternLM (tools/convert2llama.py), for what they forget too.
"""

from __future__ import annotations

from typing import Any

from streamconv.families.llama import LLAMA, QWEN2
from streamconv.families.llama_files import qwen_files, sentencepiece_files
from streamconv.families.llama_like import BAICHUAN, INTERNLM, INTERNLM2, QWEN, YI
from streamconv.plans.architecture import Config
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule, drop, rename

_LAYER = "model.layers.{i}."
_LEAVES = ("weight", "bias")
_QKV = {part: _LAYER + f"self_attn.{part}_proj." for part in "qkv"}

# What a config of Llama says and these say too.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "torch_dtype", "dtype",
)  # fmt: skip


def _llama(config: Config, **changes: Any) -> dict[str, Any]:
    shared = {key: config[key] for key in _SHARED if key in config}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shared,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **changes,
    }


def _named(config: Config, model_type: str, class_name: str, **changes: Any) -> dict[str, Any]:
    """A config of another family from Llama's, with what loads its code."""
    shared = {key: config[key] for key in _SHARED if key in config and key != "rope_parameters"}
    # transformers 5 keeps the base of the rotation in here.
    rotation = config.get("rope_parameters") or {}
    shared.setdefault("rope_theta", rotation.get("rope_theta", 10000.0))
    stem = class_name.removesuffix("ForCausalLM")
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "auto_map": {
            "AutoConfig": f"configuration_{model_type.lower()}.{stem}Config",
            "AutoModelForCausalLM": f"modeling_{model_type.lower()}.{class_name}",
        },
        **shared,
        "tie_word_embeddings": False,
        **changes,
    }


def _same(*names: str) -> tuple[Rule, ...]:
    return rename({name: name for name in names})


_FREQUENCIES = drop(
    _LAYER + "self_attn.rotary_emb.inv_freq",
    "a buffer that models compute",
    equals="frequencies(10000, head_dim, dtype)",
    optional=True,
    # One step of BF16.
    tolerance=1e-2,
)
_OUTSIDE = _same("model.embed_tokens.weight", "model.norm.weight")
_MLP = _same(*(_LAYER + f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")))
_NORMS = _same(_LAYER + "input_layernorm.weight", _LAYER + "post_attention_layernorm.weight")
_HEAD = _same("lm_head.weight")
_NOT_TIED = Refusal(
    "tie_word_embeddings", "its output layer is not tied to its embedding, and this model's is"
)
_NO_BIAS = Refusal("attention_bias or mlp_bias", "it has no biases, and this model has")
_NO_GROUPS = Refusal(
    "num_key_value_heads and num_key_value_heads != num_attention_heads",
    "it has as many heads of keys as of queries, and this model has fewer",
)

BAICHUAN_LLAMA = Recipe(
    name="baichuan-llama",
    title="Baichuan-7B, Baichuan2-7B -> Llama, the normalised head folded",
    source=BAICHUAN,
    target=LLAMA,
    rules=(
        *_OUTSIDE,
        *_MLP,
        *_NORMS,
        *_same(_LAYER + "self_attn.o_proj.weight"),
        Rule(
            _LAYER + "self_attn.W_pack.weight",
            {part: name + "weight" for part, name in _QKV.items()},
            "q, k, v = chunk(x, 0, 3)",
        ),
        _FREQUENCIES,
        Rule("lm_head.weight", "lm_head.weight", "x = row_normalize(x, 1, 1e-12)", when="norm_head"),
        Rule("lm_head.weight", "lm_head.weight", when="not norm_head"),
    ),
    config=_llama,
    # The first generation's form, which normalises nothing: what was folded stays folded.
    config_back=lambda config: _named(config, "baichuan", "BaiChuanForCausalLM"),
    refuses=(
        Refusal(
            "not max_position_embeddings",
            "it has no rotation but ALiBi, as the 13B models do, which Llama does not have",
        ),
    ),
    refuses_back=(_NOT_TIED, _NO_BIAS, _NO_GROUPS),
    remarks=(
        Remark(
            "architectures and architectures[0] == 'BaichuanForCausalLM'",
            "the rows of the output layer are normalised once and for all, as the model does at run time; their "
            "lengths are lost",
        ),
    ),
    files=sentencepiece_files,
)

_QWEN_NAMES = rename(
    {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.h.{i}.ln_1.weight": _LAYER + "input_layernorm.weight",
        "transformer.h.{i}.ln_2.weight": _LAYER + "post_attention_layernorm.weight",
        "transformer.h.{i}.attn.c_proj.weight": _LAYER + "self_attn.o_proj.weight",
        # The second matrix is the one under the activation.
        "transformer.h.{i}.mlp.w1.weight": _LAYER + "mlp.up_proj.weight",
        "transformer.h.{i}.mlp.w2.weight": _LAYER + "mlp.gate_proj.weight",
        "transformer.h.{i}.mlp.c_proj.weight": _LAYER + "mlp.down_proj.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
)
QWEN_RULES = (
    *_QWEN_NAMES,
    *(
        Rule(
            f"transformer.h.{{i}}.attn.c_attn.{leaf}",
            {part: name + leaf for part, name in _QKV.items()},
            "q, k, v = chunk(x, 0, 3)",
        )
        for leaf in _LEAVES
    ),
)
ZERO_OUTPUT_BIAS = Rule(None, _LAYER + "self_attn.o_proj.bias", equals="filled([hidden], 0, dtype)")
QWEN_REMARKS = (
    Remark(
        "use_dynamic_ntk or use_logn_attn",
        "beyond seq_length the original stretches its rotation and scales its queries with the length; the target "
        "does not, so its context is set to seq_length",
    ),
)
_END_OF_TEXT = 151643


def qwen_shared(config: Config) -> dict[str, Any]:
    """What Llama's and Qwen2's config have in common of a Qwen's."""
    sizes = QWEN.sizes_of(config)
    made = {
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["heads"],
        "head_dim": sizes["head_dim"],
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
    dtype = next((name for key, name in _QWEN_DTYPES.items() if config.get(key)), None)
    dtype = config.get("torch_dtype") or config.get("dtype") or dtype
    return made | ({"torch_dtype": dtype} if dtype else {})


_QWEN_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _qwen_back(config: Config) -> dict[str, Any]:
    rotation = config.get("rope_parameters") or {}
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
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
        **{key: True for key, name in _QWEN_DTYPES.items() if name == dtype},
        **({"torch_dtype": dtype} if dtype else {}),
    }


_QWEN_BIASES = Refusal("no_bias == False", "its output projections have biases, which no released model has")

QWEN_LLAMA = Recipe(
    name="qwen-llama",
    title="Qwen (first generation) -> Llama, exact within seq_length",
    source=QWEN,
    target=LLAMA,
    rules=(*QWEN_RULES, ZERO_OUTPUT_BIAS),
    config=lambda config: {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **qwen_shared(config),
        "attention_bias": True,
        "mlp_bias": False,
    },
    config_back=_qwen_back,
    refuses=(_QWEN_BIASES,),
    refuses_back=(
        _NOT_TIED,
        _NO_GROUPS,
        Refusal("not attention_bias", "it has biases, and this model has none"),
    ),
    remarks=QWEN_REMARKS,
    files=qwen_files,
)
QWEN_QWEN2 = Recipe(
    name="qwen-qwen2",
    title="Qwen (first generation) -> Qwen2, exact within seq_length",
    source=QWEN,
    target=QWEN2,
    rules=QWEN_RULES,
    config=lambda config: {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **qwen_shared(config),
        "use_sliding_window": False,
    },
    config_back=_qwen_back,
    refuses=(_QWEN_BIASES,),
    refuses_back=(_NOT_TIED, _NO_GROUPS),
    remarks=QWEN_REMARKS,
    files=qwen_files,
)


def _internlm(config: Config) -> dict[str, Any]:
    rotary = config.get("rotary") or {}
    made = _llama(config, attention_bias=config.get("bias", True))
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
        *_OUTSIDE,
        *_MLP,
        *_NORMS,
        *_HEAD,
        *_same(*(_LAYER + f"self_attn.{part}_proj.{leaf}" for part in "qkvo" for leaf in _LEAVES)),
        drop(
            _LAYER + "self_attn.rotary_emb.inv_freq",
            "a buffer that models compute",
            equals="frequencies(10000, head_dim, dtype)",
            when="keeps_frequencies",
            optional=True,
            tolerance=1e-2,
        ),
    ),
    config=_internlm,
    config_back=lambda config: _named(
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
        _NOT_TIED,
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
                _LAYER + "attention_norm.weight": _LAYER + "input_layernorm.weight",
                _LAYER + "ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
                _LAYER + "attention.wo.weight": _LAYER + "self_attn.o_proj.weight",
                _LAYER + "attention.wo.bias": _LAYER + "self_attn.o_proj.bias",
                _LAYER + "feed_forward.w1.weight": _LAYER + "mlp.gate_proj.weight",
                _LAYER + "feed_forward.w3.weight": _LAYER + "mlp.up_proj.weight",
                _LAYER + "feed_forward.w2.weight": _LAYER + "mlp.down_proj.weight",
                "model.norm.weight": "model.norm.weight",
                "output.weight": "lm_head.weight",
            }
        ),
        *(
            Rule(
                _LAYER + f"attention.wqkv.{leaf}",
                {part: name + leaf for part, name in _QKV.items()},
                "q, k, v = split_heads(x, kv_heads, [heads // kv_heads, 1, 1], head_dim)",
            )
            for leaf in _LEAVES
        ),
    ),
    config=lambda config: _llama(config, attention_bias=bool(config.get("bias"))),
    config_back=lambda config: _named(
        config, "internlm2", "InternLM2ForCausalLM", bias=bool(config.get("attention_bias"))
    ),
    refuses_back=(_NOT_TIED, Refusal("mlp_bias", "it has no biases there, and this model has")),
    files=sentencepiece_files,
)

YI_LLAMA = Recipe(
    name="yi-llama",
    title="Yi (first releases) -> Llama, renamed",
    source=YI,
    target=LLAMA,
    rules=(
        *_OUTSIDE,
        *_MLP,
        *_HEAD,
        *_same(*(_LAYER + f"self_attn.{part}_proj.weight" for part in "qkvo")),
        *rename(
            {
                _LAYER + "ln1.weight": _LAYER + "input_layernorm.weight",
                _LAYER + "ln2.weight": _LAYER + "post_attention_layernorm.weight",
            }
        ),
    ),
    config=_llama,
    config_back=lambda config: _named(config, "Yi", "YiForCausalLM"),
    refuses_back=(_NOT_TIED, _NO_BIAS),
    files=sentencepiece_files,
)

RECIPES = (BAICHUAN_LLAMA, QWEN_LLAMA, QWEN_QWEN2, INTERNLM_LLAMA, INTERNLM2_LLAMA, YI_LLAMA)
