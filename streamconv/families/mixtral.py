"""Mixtral, with its experts apart and packed.

Source: huggingface/transformers 5.23.0: models/mixtral/modeling_mixtral.py.
"""

from __future__ import annotations

from streamconv.families.experts import ATTENTION, ENDS, mixture, packing
from streamconv.families.llama import SIZES

MIXTRAL = mixture(
    "mixtral",
    "Mixtral",
    "mixtral",
    "MixtralForCausalLM",
    {**SIZES, "experts": "num_local_experts", "expert_ffn": "intermediate_size"},
    ENDS + ATTENTION,
    "True",
    block="block_sparse_moe",
    parts=("w1", "w3", "w2"),
)

RECIPES = (packing(MIXTRAL),)
