"""Experts packed into one tensor a layer, and taken apart again: the layouts of transformers 4 and 5.

Facts: huggingface/transformers 5.23.0: conversion_mapping.py (`mixtral`, `qwen2_moe`): all experts' gate and up
matrices are stacked, and the two stacks concatenated along the rows. See also the architectures' modules.
"""

from __future__ import annotations

from streamconv.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from streamconv.families.mixtral import MIXTRAL, Mixture
from streamconv.families.qwen_moe import OLMOE, QWEN2_MOE, QWEN3_MOE
from streamconv.plans.recipe import Recipe, Refusal, Remark, Rule, drop

_QUANTISED = (
    Refusal(
        "quantization_config",
        "its weights are quantised, and their scales have no place in the other layout",
        "take a checkpoint that is not; block-scaled FP8 becomes BF16 with --recipe fp8-bf16",
    ),
)
_REMARKS = (
    Remark(
        "True",
        "transformers 5 reads packed experts; what looks for a tensor of each expert, as transformers 4 does, "
        "needs them apart",
    ),
)


def _recipe(mixture: Mixture) -> Recipe:
    layer = "model.layers.{i}."
    names = zip(("gate", "up", "down"), mixture.parts, strict=True)
    apart = {key: f"{layer}{mixture.block}.experts.{{e}}.{part}.weight" for key, part in names}
    packed = {line.name.text for line in mixture.packed.lines}
    alike = (line.name.text for line in mixture.apart.lines if line.name.text in packed)
    rules = [
        # The first rule, for the names in such a layer are those of any other.
        drop(
            layer + "*",
            "a layer that predicts further tokens, for which transformers has no place",
            when="i >= layers",
            optional=True,
        ),
        Rule(
            apart,
            {"gate_up": layer + "mlp.experts.gate_up_proj", "down": layer + "mlp.experts.down_proj"},
            """
            gate_up = concat([stack(gate), stack(up)], 1)
            down = stack(down)
            """,
        ),
        *(Rule(name, name) for name in dict.fromkeys(alike)),
    ]
    if mixture.block != "mlp":
        rules.append(Rule(f"{layer}{mixture.block}.gate.weight", layer + "mlp.gate.weight"))
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


RECIPES = tuple(
    _recipe(mixture) for mixture in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3)
)
