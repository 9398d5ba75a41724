"""Llama as Meta publishes it (`consolidated.00.pth` with `params.json`) to transformers and back.

Meta rotates neighbouring channels, transformers the halves of a head: rows of queries and keys are reordered.

Its config is `params.json`, and what that leaves to the shapes.

Source: meta-llama/llama: llama/model.py, llama/generation.py (the files); huggingface/transformers: models/llama/convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from streamconv.families.llama import LLAMA
from streamconv.families.llama_like import NO_BIAS, NOT_TIED
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.recipe import Recipe, Rule, drop, rename
from streamconv.plans.table import table
from streamconv.readers import small
from streamconv.readers.checkpoint import Checkpoint
from streamconv.writers.layout import Wrapping

_LAYER = "model.layers.{i}."

_PARAMS = "params.json"
_EMBEDDING, _UP = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{i}.attention.{wv,wo}.weight": _LAYER + "self_attn.{v,o}_proj.weight",
    "layers.{i}.{attention,ffn}_norm.weight": _LAYER + "{input,post_attention}_layernorm.weight",
    "layers.{i}.feed_forward.{w1,w3,w2}.weight": _LAYER + "mlp.{gate,up,down}_proj.weight",
    "norm.weight": "model.norm.weight",
}
"""What transformers calls otherwise, and has alike: all but queries, keys and the output layer."""

META = Architecture(
    name="meta",
    title="Llama of Meta",
    model_types=("meta-llama",),
    sizes={
        "hidden": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "kv_heads": "n_kv_heads or n_heads",
        "head_dim": "dim // n_heads",
        "ffn": "ffn_dim",
        "vocab": "vocab_size",
    },
    lines=table("""
        tok_embeddings.weight [vocab, hidden]
        layers.{i}.attention.wq.weight [heads * head_dim, hidden]
        layers.{i}.attention.{wk,wv}.weight [kv_heads * head_dim, hidden]
        layers.{i}.attention.wo.weight [hidden, heads * head_dim]
        layers.{i}.{attention,ffn}_norm.weight [hidden]
        layers.{i}.feed_forward.{w1,w3}.weight [ffn, hidden]
        layers.{i}.feed_forward.w2.weight [hidden, ffn]
        norm.weight [hidden]
        output.weight [vocab, hidden]
        ?rope.freqs [head_dim // 2]
    """),
)


def identified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a config from `params.json`, where that and Meta's names are there, and no config is."""
    (component, *more) = checkpoint.components
    path = checkpoint.directory / _PARAMS
    if (
        more
        or component.config is not None
        or not {_EMBEDDING, _UP} <= set(component.tensors)
        or not path.is_file()
    ):
        return checkpoint
    params = small.read_config(path)
    if params is None:
        return checkpoint
    # The file says -1, or nothing, where the tokenizer or a formula decides.
    sizes = {
        "vocab_size": component.tensors[_EMBEDDING].spec.shape[0],
        "ffn_dim": component.tensors[_UP].spec.shape[0],
    }
    config = {"model_type": "meta-llama", **params, **sizes}
    return replace(checkpoint, components=(replace(component, config=config),))


def _config(config: Config) -> dict[str, Any]:
    made = {
        **LLAMA.label,
        "attention_bias": False,
        "bos_token_id": config.get("bos_token_id", 1),
        "eos_token_id": config.get("eos_token_id", 2),
        "hidden_act": "silu",
        "hidden_size": config["dim"],
        "intermediate_size": config["ffn_dim"],
        "max_position_embeddings": config.get("max_seq_len", 4096),
        "mlp_bias": False,
        "num_attention_heads": config["n_heads"],
        "num_hidden_layers": config["n_layers"],
        "num_key_value_heads": config.get("n_kv_heads") or config["n_heads"],
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "rope_theta": float(config.get("rope_theta", 10000.0)),
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config["vocab_size"],
    }
    if config.get("use_scaled_rope"):
        made["max_position_embeddings"] = config.get("max_seq_len", 131072)
        made["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(config.get("rope_scale_factor", 8)),
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        }
    return made


def _back(config: Config) -> dict[str, Any]:
    rotation = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rotation
    made = {
        "model_type": "meta-llama",
        **META.stated(LLAMA.sizes_of(config)),
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config.get("rope_theta") or rotation.get("rope_theta", 10000.0),
        "max_seq_len": config["max_position_embeddings"],
    }
    if scaling.get("rope_type") == "llama3":
        made |= {"use_scaled_rope": True, "rope_scale_factor": scaling["factor"]}
    return made


def _wrapped(config: Config) -> Wrapping:
    """Meta's file is a bare dictionary; the config lies beside it."""
    shown = {key: value for key, value in config.items() if key not in ("model_type", "max_seq_len")}
    return Wrapping("consolidated.00.pth", "", texts={_PARAMS: json.dumps(shown) + "\n"})


def turned(attention: str) -> tuple[Rule, ...]:
    """Rules for the projections whose rows are reordered; `attention` stands before their names."""
    return tuple(
        Rule(
            f"{attention}w{part}.weight",
            f"{_LAYER}self_attn.{part}_proj.weight",
            f"x = rotary_halves(x, {heads})",
        )
        for part, heads in (("q", "heads"), ("k", "kv_heads"))
    )


META_LLAMA = Recipe(
    name="meta-llama",
    title="Llama of Meta (consolidated.00.pth) -> transformers",
    source=META,
    target=LLAMA,
    rules=(
        *rename({**NAMES, "output.weight": "lm_head.weight"}),
        *turned("layers.{i}.attention."),
        drop("rope.freqs", "a buffer that models compute", optional=True),
    ),
    config=_config,
    config_back=_back,
    refuses_back=(NO_BIAS, NOT_TIED),
    wrap_back=_wrapped,
    found_by=("layers.{i}.attention.wq.weight", "tok_embeddings.weight"),
)

RECIPES = (META_LLAMA,)
