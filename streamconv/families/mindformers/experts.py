"""Mixtral and Qwen2-MoE: MindFormers to Hugging Face and back; what nets with experts have in common.

All experts of a layer are stacked, however many there are. Whether they are transposed for grouped products (`use_gmm`)
need not show in their shapes: that is chosen with the recipe.

Source: mindspore-lab/mindformers r1.3.0: research/{mixtral,qwen2}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from streamconv.families.experts import Mixture
from streamconv.families.mindformers import common
from streamconv.families.mindformers.net import Names, Net
from streamconv.families.mixtral import MIXTRAL
from streamconv.families.qwen_moe import QWEN2_MOE
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, Remark, Rule
from streamconv.plans.table import table

MOE, FEED = common.LAYER + "mlp.", common.LAYER + "feed_forward."
ROUTED = FEED + "routed_experts.ffn"
ROUTED_GATE = FEED + "routed_experts.router.dense."
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""The matrices of an expert: MindFormers' names -> Hugging Face's."""


def shared_experts(theirs: str) -> Names:
    """The names of the experts that every token goes through."""
    return {f"{MOE}{theirs}.{part}.": f"{FEED}shared_experts.{ours}." for ours, part in PARTS.items()}


STACKED = table("""
    w1.weight [experts, expert_ffn, hidden]
    w2.weight [experts, hidden, expert_ffn]
    w3.weight [experts, expert_ffn, hidden]
""")
"""All experts of a layer."""

_GROUPED = STACKED.given(hidden="expert_ffn", expert_ffn="hidden")
"""The same, each as the factor on the right of a product (`use_gmm`)."""

_TAKEN_AS_THEY_ARE = Remark(
    "True",
    "experts are taken as [out, in]; where the settings say use_gmm, use the recipe that ends in -gmm",
)


def unstacked(ours: str, theirs: str, parts: Mapping[str, str], *, grouped: bool = False) -> tuple[Rule, ...]:
    """Rules for the three stacks of a layer's experts."""
    return tuple(
        Rule(
            f"{ours}.{part}.weight",
            f"{theirs}.experts.{{e}}.{their_part}.weight",
            "x = unstack(transpose(x))" if grouped else "x = unstack(x)",
        )
        for part, their_part in parts.items()
    )


def both(
    key: str,
    mixture: Mixture,
    names: Names,
    blocks: tuple[str, str],
    found_by: tuple[str, ...],
    parts: Mapping[str, str] = PARTS,
    refuses: tuple[Refusal, ...] = (),
) -> tuple[Net, Net]:
    """A family with its experts as they are, and for grouped products.

    Args:
        key: what MindFormers calls it.
        mixture: as Hugging Face has it.
        names: of tensors that only change their name.
        blocks: what MindFormers and Hugging Face call the mixture of a layer.
        found_by: as in `Recipe`.
        parts: of an expert, MindFormers' names -> Hugging Face's.
        refuses: what neither direction can do.
    """
    plain = Net(
        key=key,
        title=mixture.title,
        target=mixture.apart,
        names=names,
        own=STACKED.under(blocks[0] + ".").where(mixture.sparse),
        before=common.tied(),
        rules=unstacked(*blocks, parts),
        found_by=found_by,
        refuses=refuses,
        more={"remarks": (_TAKEN_AS_THEY_ARE,)},
    )
    grouped = replace(
        plain,
        key=f"{key}-gmm",
        title=f"{mixture.title} for grouped products (use_gmm)",
        called=f"{plain.architecture.title}, for grouped products",
        layout="gmm",
        own=_GROUPED.under(blocks[0] + ".").where(mixture.sparse),
        rules=unstacked(*blocks, parts, grouped=True),
        more={"named_only": True},
    )
    return plain, grouped


_LIKE_LLAMA = common.OUTSIDE | common.NORMS | common.QKV | common.OUTPUT
_MIXTRAL_NAMES = _LIKE_LLAMA | named(
    "block_sparse_moe.gate. -> feed_forward.router.dense.", common.LAYER, common.LAYER
)
_QWEN2_MOE_NAMES: Names = (
    _LIKE_LLAMA
    | common.GATE_AND_UP
    | common.DOWN
    | shared_experts("shared_expert")
    | {MOE + "gate.": ROUTED_GATE, MOE + "shared_expert_gate.": FEED + "shared_experts_gate."}
)

NETS = (
    *both(
        "mixtral",
        MIXTRAL,
        _MIXTRAL_NAMES,
        (FEED + "ffn", common.LAYER + "block_sparse_moe"),
        (*common.FOUND_LLAMA, FEED + "router.dense.weight"),
        {part: part for part in PARTS},
    ),
    *both(
        "qwen2-moe",
        QWEN2_MOE,
        _QWEN2_MOE_NAMES,
        (ROUTED, common.LAYER + "mlp"),
        (*common.FOUND_LLAMA, common.LAYER + "attention.wq.bias", ROUTED_GATE + "weight"),
    ),
)
