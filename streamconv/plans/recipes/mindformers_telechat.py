"""TeleChat and TeleChat2: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.1.0: research/telechat; r1.8.0: research/telechat2.
"""

from __future__ import annotations

from streamconv.plans.architectures.mindformers import LAYER
from streamconv.plans.architectures.mindformers_telechat import (
    HF_LAYER,
    MF_TELECHAT,
    MF_TELECHAT_CONCAT,
    MF_TELECHAT_MOE,
)
from streamconv.plans.recipe import Recipe, Rule
from streamconv.plans.recipes.mindformers_rules import recipe, renames

_EMBEDDING = "model.tok_embeddings.embedding_weight"
_ATTENTION, _FEED = LAYER + "attention.", LAYER + "feed_forward."
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

RECIPES: tuple[Recipe, ...] = (
    recipe(
        "telechat",
        "TeleChat (7B, 12B), TeleChat2",
        MF_TELECHAT,
        renames(MF_TELECHAT),
        (_EMBEDDING, _ATTENTION + "wk_v.weight"),
    ),
    recipe(
        "telechat-contiguous",
        "TeleChat, TeleChat2 with fused projections (qkv_concat)",
        MF_TELECHAT_CONCAT,
        (
            *renames(MF_TELECHAT_CONCAT),
            Rule(
                _ATTENTION + "w_qkv.weight",
                {
                    "query": HF_LAYER + "self_attention.query.weight",
                    "key_value": HF_LAYER + "self_attention.key_value.weight",
                },
                """
                query, key, value = split(x, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
                key_value = weave([key, value], kv_heads)
                """,
            ),
            Rule(
                _FEED + "w_gate_hidden.weight",
                {"gate": HF_LAYER + "mlp.gate_proj.weight", "up": HF_LAYER + "mlp.up_proj.weight"},
                "gate, up = split(x, 0, [ffn, ffn])",
            ),
        ),
        (_EMBEDDING, _ATTENTION + "w_qkv.weight", _FEED + "w_gate_hidden.weight"),
        # Llama's net with fused projections has the same names.
        named_only=True,
    ),
    recipe(
        "telechat-moe",
        "TeleChat2 with experts (39B-A12B)",
        MF_TELECHAT_MOE,
        (
            *renames(MF_TELECHAT_MOE),
            *(
                Rule(
                    f"{_FEED}ffn.{part}.weight",
                    f"{HF_LAYER}mlp.local_experts.{{e}}.{theirs}.weight",
                    "x = unstack(x)",
                )
                for part, theirs in _PARTS.items()
            ),
            *(
                Rule(
                    f"{_FEED}ffn.{part}.bias",
                    f"{HF_LAYER}mlp.local_experts.{{e}}.{theirs}.bias",
                    "x = unstack(reshape(x, [experts, -1]))",
                )
                for part, theirs in _PARTS.items()
            ),
        ),
        (_EMBEDDING, _ATTENTION + "wk_v.weight", _FEED + "router.dense.weight"),
    ),
)
