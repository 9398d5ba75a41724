"""Fused projections of queries, keys and values taken apart, and fused again: what GPT-2, BLOOM, GPT-NeoX and Falcon share.

BLOOM's, GPT-NeoX's and Falcon's own order is by head or by group of heads, as Megatron has it. GPT-2's is not, and
its matrices are `[in, out]`; it has a recipe for that order too.

Facts: huggingface/transformers 5.23.0: GPT2Attention, BloomAttention._reshape, GPTNeoXAttention,
FalconAttention._split_heads; see also the families' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streamconv.families.llama import MAYBE_TIED_HEAD
from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Recipe, Remark, Rule, same
from streamconv.plans.table import Table, table

HEAD = MAYBE_TIED_HEAD
"""The output layer of GPT-2, BLOOM and Falcon."""

_TITLES = {
    "split": "one fused projection -> queries, keys and values apart",
    "per-head": "one fused projection -> the same in the order of heads, as Megatron has it",
}
BY_HEAD = "q, k, v = split_heads(x, heads, [1, 1, 1], head_dim)"
_THREE = table("""
    q_proj.{weight,bias} [hidden, hidden] [hidden if biased]
    k_proj.{weight,bias} [few, hidden] [few if biased]
    v_proj.{weight,bias} [few, hidden] [few if biased]
""")


def three(attention: str, few: str = "hidden", biased: str = "True") -> Table:
    """The lines of three projections in the place of a fused one.

    Args:
        attention: what stands before their names.
        few: formula of how many rows the matrices of keys and of values have.
        biased: formula of whether they have biases.
    """
    return _THREE.under(attention).given(few=few, biased=biased)


def laid_out(fused: Architecture, layout: str, title: str, lines: Table) -> Architecture:
    """The same model in another layout, which its config names."""
    return replace(
        fused,
        name=layout,
        title=f"{fused.title} with {title}",
        only_if=f"qkv_layout == '{layout}'",
        lines=lines,
    )


def recipe(
    name: str, source: Architecture, target: Architecture, rules: Sequence[Rule], differ: Sequence[str] = ()
) -> Recipe:
    """A recipe from one layout to another.

    Args:
        name: of the recipe.
        source: the layout that transformers has.
        target: the other.
        rules: for what they have differently, first of all the fused projection.
        differ: names in both tables that these rules are about.
    """
    unchanged = [name for name in source.lines.names if name in target.lines.names and name not in differ]
    return Recipe(
        name=name,
        title=f"{source.title}: {_TITLES[target.name]}",
        source=source,
        target=target,
        rules=(*rules, *same(*unchanged)),
        config=lambda config: {**config, "qkv_layout": target.name},
        config_back=lambda config: {key: value for key, value in config.items() if key != "qkv_layout"},
        remarks=(
            Remark("True", "no class of transformers reads this form; qkv_layout in the config names it"),
        ),
        found_by=(rules[0].sources["x"].text,),
    )
