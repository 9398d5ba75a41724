"""What families have in common that become Llama: rules, configs, and tokenizer files that need no code.

Facts: the modeling code published with the models; hiyouga/LLaMA-Factory (scripts/convert_ckpt/llamafy_*.py),
InternLM/InternLM (tools/convert2llama.py), for what they forget too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streamconv.families.llama import LLAMA
from streamconv.families.tokenizers import plain
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.recipe import (
    ConfigMap,
    Files,
    Recipe,
    Refusal,
    Rule,
    Surroundings,
    drop,
    keep_files,
    same,
)
from streamconv.plans.table import table

LAYER = "model.layers.{i}."
QKV = LAYER + "self_attn.{q,k,v}_proj"

# What a config of Llama says and these say too.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "torch_dtype", "dtype",
)  # fmt: skip


def llama_config(config: Config, **changes: Any) -> dict[str, Any]:
    """A config of Llama from another family's, where both call things alike."""
    shared = {key: config[key] for key in _SHARED if key in config}
    return {
        **LLAMA.label,
        **shared,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **changes,
    }


FREQUENCIES = drop(
    LAYER + "self_attn.rotary_emb.inv_freq",
    "a buffer that models compute",
    equals="frequencies(10000, head_dim, dtype)",
    optional=True,
    # One step of BF16.
    tolerance=1e-2,
)
FREQUENCY_LINE = table("?model.layers.{i}.self_attn.rotary_emb.inv_freq [head_dim // 2]")
COMMON = same("model.{embed_tokens,norm}.weight", LAYER + "mlp.{gate,up,down}_proj.weight")
NORMS = LAYER + "{input,post_attention}_layernorm.weight"
NOT_TIED = Refusal(
    "tie_word_embeddings", "its output layer is not tied to its embedding, and this model's is"
)
NO_BIAS = Refusal("attention_bias or mlp_bias", "it has no biases, and this model has")
NO_GROUPS = Refusal(
    "num_key_value_heads and num_key_value_heads != num_attention_heads",
    "it has as many heads of keys as of queries, and this model has fewer",
)


def _own_config(config: Config, source: Architecture) -> dict[str, Any]:
    """A config of another family from Llama's, with what loads its code."""
    model_type, class_name = source.model_types[0], source.classes[0]
    shared = {key: config[key] for key in _SHARED if key in config and key != "rope_parameters"}
    # transformers 5 keeps the base of the rotation in here.
    rotation = config.get("rope_parameters") or {}
    shared.setdefault("rope_theta", rotation.get("rope_theta", 10000.0))
    stem = class_name.removesuffix("ForCausalLM")
    return {
        **source.label,
        "auto_map": {
            "AutoConfig": f"configuration_{model_type.lower()}.{stem}Config",
            "AutoModelForCausalLM": f"modeling_{model_type.lower()}.{class_name}",
        },
        **shared,
        "tie_word_embeddings": False,
    }


def llamafied(
    source: Architecture,
    title: str,
    rules: Iterable[Rule],
    *,
    own: ConfigMap = lambda _: {},
    refuses_back: tuple[Refusal, ...] = (),
    **more: Any,
) -> Recipe:
    """The recipe from a family to Llama.

    Args:
        source: the family.
        title: of the recipe.
        rules: its rules.
        own: what the family's config says that Llama's does not, from Llama's.
        refuses_back: beside a tied output layer.
        more: what else the recipe has.
    """
    return Recipe(
        **{
            "name": f"{source.name}-llama",
            "title": title,
            "source": source,
            "target": LLAMA,
            "rules": tuple(rules),
            "config": llama_config,
            "config_back": lambda config: {**_own_config(config, source), **own(config)},
            "refuses_back": (NOT_TIED, *refuses_back),
            "files": sentencepiece_files,
            **more,
        }
    )


# ------------------------------------------------------------------------------------- tokenizers

_MODEL = "tokenizer.model"


def sentencepiece_files(around: Surroundings) -> Files:
    """A `tokenizer.json` from `tokenizer.model`, with the tokens and the template that the config beside it names."""
    kept = keep_files(around)
    data = around.read(_MODEL)
    if data is None or "tokenizer.json" in around.names:
        return Files(left_out=kept.left_out, notes=no_tokenizer(around, _MODEL))
    settings = around.settings("tokenizer_config.json")
    texts = plain.convert(
        data, str(around.directory / _MODEL), settings, around.settings("special_tokens_map.json")
    )
    return Files(texts, kept.left_out)


def no_tokenizer(around: Surroundings, name: str) -> tuple[str, ...]:
    """What is said where the file that a tokenizer is made of is not there, and no other tokenizer is."""
    has = "tokenizer.json" in around.names
    return () if has else (f"there is no {name}, so the output has no tokenizer",)
