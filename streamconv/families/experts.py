"""What mixtures of experts have in common: two namings of the experts, and recipes from one to the other.

Apart, each expert's matrices are tensors by themselves, as checkpoints (and transformers 4) have them. Packed, they are
one tensor a layer, as transformers 5 has them in memory (and in files with `save_original_format=False`).

Facts: huggingface/transformers 5.23.0: conversion_mapping.py (`mixtral`, `qwen2_moe`): all experts' gate and up
matrices are stacked, and the two stacks concatenated along the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from streamconv.families import llama
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule, drop
from streamconv.plans.table import Table, table

LAYER = "model.layers.{i}."

ENDS = llama.FIRST + llama.BETWEEN + llama.NORM + llama.MAYBE_TIED_HEAD
"""What is neither attention nor mixture."""

ATTENTION = llama.QKV + llama.OUTPUT
QKV_BIAS = llama.QKV_BIAS.given(attention_bias="qkv_bias")
OUTPUT_BIAS = llama.OUTPUT_BIAS.given(attention_bias="qkv_bias")
DENSE = llama.FEED_FORWARD.where("not sparse")
"""The layers without experts; for `sparse` see `Mixture`."""


def shared_expert(name: str) -> Table:
    """The lines of an expert that every token goes through; for `sparse` see `Mixture`."""
    made = llama.FEED_FORWARD.renamed({LAYER + "mlp.": f"{LAYER}mlp.{name}."}).given(ffn="shared_ffn")
    return made.where("sparse").where("shared_ffn")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One family.

    Attributes:
        name: of its recipe's family.
        title: as people write it.
        model_type, class_name: of its config.
        sizes: as in `Architecture`, with `experts` and `expert_ffn`.
        lines: all but experts and router, where `sparse` stands for that formula.
        sparse: formula over `i`: whether a layer has experts.
        block: what a layer's mixture is called where experts are apart.
        parts: what the gate, up and down matrices of an expert are called there.
    """

    name: str
    title: str
    model_type: str
    class_name: str
    sizes: Mapping[str, str]
    lines: Table
    sparse: str = "True"
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    @cached_property
    def apart(self) -> Architecture:
        """The naming in which each expert has its own tensors."""
        gate, up, down = self.parts
        experts = table(f"""
            experts.{{e}}.{{{gate},{up}}}.weight [expert_ffn, hidden]
            experts.{{e}}.{down}.weight [hidden, expert_ffn]
            gate.weight [experts, hidden]
        """)
        return self._naming("experts-apart", "experts apart", experts.under(f"{LAYER}{self.block}."))

    @cached_property
    def packed(self) -> Architecture:
        """The naming in which all experts of a layer are one tensor."""
        experts = table("""
            experts.gate_up_proj [experts, 2 * expert_ffn, hidden]
            experts.down_proj [experts, hidden, expert_ffn]
            gate.weight [experts, hidden]
        """)
        return self._naming("packed", "packed experts", experts.under(LAYER + "mlp."))

    def _naming(self, name: str, words: str, experts: Table) -> Architecture:
        return Architecture(
            name=name,
            title=f"{self.title}, {words}",
            model_types=(self.model_type,),
            classes=(self.class_name,),
            sizes=self.sizes,
            counts={"i": "layers", "e": "experts"},
            lines=(self.lines + experts.where("sparse")).given(sparse=self.sparse),
        )


_QUANTISED = (
    Refusal(
        "quantization_config",
        "its weights are quantised, and their scales have no place in the other layout",
        "make them plain first, with --recipe dequantise",
    ),
)
_REMARKS = (
    Remark(
        "True",
        "transformers 5 reads packed experts; what looks for a tensor of each expert, as transformers 4 does, "
        "needs them apart",
    ),
)


def packing(mixture: Mixture) -> Recipe:
    """The recipe that packs the experts of a family."""
    names = zip(("gate", "up", "down"), mixture.parts, strict=True)
    apart = {key: f"{LAYER}{mixture.block}.experts.{{e}}.{part}.weight" for key, part in names}
    packed = mixture.packed.lines.names
    rules = [
        # The first rule, for the names in such a layer are those of any other.
        drop(
            LAYER + "*",
            "a layer that predicts further tokens, for which transformers has no place",
            when="i >= layers",
            optional=True,
        ),
        Rule(
            apart,
            {"gate_up": LAYER + "mlp.experts.gate_up_proj", "down": LAYER + "mlp.experts.down_proj"},
            """
            gate_up = concat([stack(gate), stack(up)], 1)
            down = stack(down)
            """,
        ),
        *(Rule(name, name) for name in mixture.apart.lines.names if name in packed),
    ]
    if mixture.block != "mlp":
        rules.append(Rule(f"{LAYER}{mixture.block}.gate.weight", LAYER + "mlp.gate.weight"))
    return Recipe(
        name=f"{mixture.name}-packed",
        title=f"{mixture.title}: experts apart (transformers 4) -> packed (transformers 5)",
        source=mixture.apart,
        target=mixture.packed,
        rules=tuple(rules),
        refuses=_QUANTISED,
        refuses_back=_QUANTISED,
        remarks=_REMARKS,
        found_by=(apart["gate"],),
    )
