"""Mixtral, and what all mixtures of experts have in common: two namings of the experts.

Apart, each expert's matrices are tensors by themselves, as checkpoints have them. Packed, they are one tensor a
layer, as transformers 5 has them in memory (and in files with `save_original_format=False`).

Source: huggingface/transformers 5.23.0: models/mixtral/modeling_mixtral.py, conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.families.llama import SIZES
from streamconv.plans.architecture import Architecture, table

ENDS = """
    model.embed_tokens.weight [vocab, hidden]
    model.layers.{i}.input_layernorm.weight [hidden]
    model.layers.{i}.post_attention_layernorm.weight [hidden]
    model.norm.weight [hidden]
    lm_head.weight [vocab, hidden] if not tied
    ?lm_head.weight [vocab, hidden] if tied
"""
"""What is neither attention nor mixture."""

ATTENTION = """
    model.layers.{i}.self_attn.q_proj.weight [heads * head_dim, hidden]
    model.layers.{i}.self_attn.k_proj.weight [kv_heads * head_dim, hidden]
    model.layers.{i}.self_attn.v_proj.weight [kv_heads * head_dim, hidden]
    model.layers.{i}.self_attn.o_proj.weight [hidden, heads * head_dim]
"""

DENSE = """
    model.layers.{i}.mlp.gate_proj.weight [ffn, hidden] if DENSE
    model.layers.{i}.mlp.up_proj.weight [ffn, hidden] if DENSE
    model.layers.{i}.mlp.down_proj.weight [hidden, ffn] if DENSE
"""
"""The layers without experts; for DENSE see `mixture`."""


def shared_expert(name: str) -> str:
    """The lines of an expert that every token goes through; for SPARSE see `mixture`."""
    block = f"model.layers.{{i}}.mlp.{name}"
    return f"""
        {block}.gate_proj.weight [shared_ffn, hidden] if SPARSE and shared_ffn
        {block}.up_proj.weight [shared_ffn, hidden] if SPARSE and shared_ffn
        {block}.down_proj.weight [hidden, shared_ffn] if SPARSE and shared_ffn
    """


@dataclass(frozen=True, slots=True)
class Mixture:
    """One family.

    Attributes:
        name: of its recipe's family.
        title: as people write it.
        apart, packed: its two namings.
        block: what the layer's mixture is called in the first naming.
        parts: what its gate, up and down matrices are called there.
    """

    name: str
    title: str
    apart: Architecture
    packed: Architecture
    block: str
    parts: tuple[str, str, str]


def mixture(
    name: str,
    title: str,
    model_type: str,
    class_name: str,
    sizes: Mapping[str, str],
    lines: str,
    sparse: str,
    block: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Mixture:
    """Both namings of a family.

    Args:
        name: of its recipe's family.
        title: as people write it.
        model_type: of its config.
        class_name: what `architectures` of its config holds.
        sizes: as in `Architecture`, with `experts` and `expert_ffn`.
        lines: all but experts and router; SPARSE and DENSE stand for `sparse` and its opposite.
        sparse: formula over `i`: whether a layer has experts.
        block: as in `Mixture`.
        parts: as in `Mixture`.
    """
    lines = lines.replace("SPARSE", sparse).replace("DENSE", f"not ({sparse})")
    gate, up, down = parts
    apart, packed = f"model.layers.{{i}}.{block}", "model.layers.{i}.mlp"

    def architecture(naming: str, words: str, experts: str) -> Architecture:
        return Architecture(
            name=naming,
            title=f"{title}, {words}",
            model_types=(model_type,),
            classes=(class_name,),
            sizes=sizes,
            counts={"i": "layers", "e": "experts"},
            lines=table(lines + experts.replace("SPARSE", sparse)),
        )

    return Mixture(
        name,
        title,
        architecture(
            "experts-apart",
            "experts apart",
            f"""
            {apart}.experts.{{e}}.{gate}.weight [expert_ffn, hidden] if SPARSE
            {apart}.experts.{{e}}.{up}.weight [expert_ffn, hidden] if SPARSE
            {apart}.experts.{{e}}.{down}.weight [hidden, expert_ffn] if SPARSE
            {apart}.gate.weight [experts, hidden] if SPARSE
            """,
        ),
        architecture(
            "packed",
            "packed experts",
            f"""
            {packed}.experts.gate_up_proj [experts, 2 * expert_ffn, hidden] if SPARSE
            {packed}.experts.down_proj [experts, hidden, expert_ffn] if SPARSE
            {packed}.gate.weight [experts, hidden] if SPARSE
            """,
        ),
        block,
        parts,
    )


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
