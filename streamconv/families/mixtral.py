"""Mixtral, with its experts apart and packed.

Source: huggingface/transformers 5.23.0: models/mixtral/modeling_mixtral.py.
"""

from __future__ import annotations

from streamconv.families.experts import ATTENTION, ENDS, Mixture, packing
from streamconv.families.llama import SIZES

MIXTRAL = Mixture(
    name="mixtral",
    title="Mixtral",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    sizes={**SIZES, "experts": "num_local_experts", "expert_ffn": "intermediate_size"},
    lines=ENDS + ATTENTION,
    block="block_sparse_moe",
    parts=("w1", "w3", "w2"),
)

RECIPES = (packing(MIXTRAL),)
