"""Llama as torchtitan trains it to transformers and back.

It rotates neighbouring channels, as Meta's code does: rows of queries and keys are reordered. A checkpoint has no
config beside it: that of the Hugging Face model serves both sides (`--like` or `--config`).

Source: pytorch/torchtitan: torchtitan/models/llama3/model (names), state_dict_adapter.py (the mapping).
"""

from __future__ import annotations

from streamconv.families.llama import LLAMA, SIZES
from streamconv.families.meta_llama import META, NAMES, turned
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import pairs
from streamconv.plans.recipe import Recipe, Refusal, Rule, drop, rename
from streamconv.plans.table import table

_BIASES = Refusal(
    "attention_bias or mlp_bias", "torchtitan's Llama has no biases, and this config wants some"
)


def _recipe(name: str, title: str, attention: str, head: str) -> Recipe:
    """A recipe for one generation of names.

    Args:
        name: of the recipe.
        title: of the names.
        attention: what stands before `wq`, `wk` and `wv`.
        head: the output layer.
    """
    before = f"layers.{{i}}.attention.{attention}"
    # Meta's names, but for what stands before three of them.
    names = {
        **{name: name for name in META.lines.names},
        **{f"layers.{{i}}.attention.w{part}.weight": f"{before}w{part}.weight" for part in "qkv"},
    }
    source = Architecture(
        name=name.removesuffix("-llama"),
        title=title,
        model_types=("llama",),
        classes=(),
        sizes=SIZES,
        lines=META.lines.without("output.", "rope.").renamed(names)
        + table(f"""
            {head} [vocab, hidden] if not tied
            ?{head} [vocab, hidden] if tied
        """),
    )
    return Recipe(
        name=name,
        title=f"{title} -> transformers",
        source=source,
        target=LLAMA,
        rules=(
            *rename({names[ours]: theirs for ours, theirs in pairs(NAMES).items()}),
            *turned(before),
            Rule(head, "lm_head.weight", optional=True),
            drop("freqs_cis", "a buffer that models compute", optional=True),
        ),
        refuses=(_BIASES,),
        refuses_back=(_BIASES,),
        found_by=("tok_embeddings.weight", f"{before}wq.weight", head),
    )


TORCHTITAN = _recipe("torchtitan-llama", "Llama of torchtitan", "qkv_linear.", "lm_head.weight")
TORCHTITAN_2025 = _recipe("torchtitan2025-llama", "Llama of torchtitan until 2025", "", "output.weight")

RECIPES = (TORCHTITAN, TORCHTITAN_2025)
