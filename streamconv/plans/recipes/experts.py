"""Experts packed into one tensor a layer, and taken apart again: the layouts of transformers 4 and 5.

Facts: see `plans.architectures.experts`.
"""

from __future__ import annotations

from streamconv.plans.architectures.experts import MIXTURES, Mixture, shared_lines
from streamconv.plans.recipe import Recipe, Rule, drop


def _recipe(mixture: Mixture) -> Recipe:
    layer = "model.layers.{i}."
    names = zip(("gate", "up", "down"), mixture.parts, strict=True)
    apart = {key: f"{layer}{mixture.block}.experts.{{e}}.{part}.weight" for key, part in names}
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
        *(Rule(line.name.text, line.name.text) for line in shared_lines(mixture)),
    ]
    if mixture.block != "mlp":
        rules.append(Rule(f"{layer}{mixture.block}.gate.weight", layer + "mlp.gate.weight"))
    return Recipe(
        name=f"{mixture.name}-packed",
        title=f"{mixture.packed.title.split(',')[0]}: experts apart (transformers 4) -> packed (transformers 5)",
        source=mixture.apart,
        target=mixture.packed,
        rules=tuple(rules),
        found_by=(apart["gate"],),
    )


RECIPES = tuple(_recipe(mixture) for mixture in MIXTURES)
