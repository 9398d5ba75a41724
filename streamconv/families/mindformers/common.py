"""What MindFormers calls tensors, in the nets that are like Llama's; tables and rules that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamconv.families import llama_like
from streamconv.families.mindformers.net import Names
from streamconv.plans import formula
from streamconv.plans.patterns import Pattern, named
from streamconv.plans.recipe import LEAVES, Rule, linear
from streamconv.plans.table import table
from streamconv.tensor import Shape

LAYER = "model.layers.{i}."
"""What layers are called on both sides."""

OUTSIDE: Names = named("""
    model.embed_tokens.weight -> model.tok_embeddings.embedding_weight
    model.norm.weight -> model.norm_out.weight
    lm_head.weight
""")
NORMS = named("{input,post_attention}_layernorm. -> {attention,ffn}_norm.", LAYER, LAYER)
QKV = named("self_attn.{q,k,v}_proj. -> attention.{wq,wk,wv}.", LAYER, LAYER)
OUTPUT = named("self_attn.o_proj. -> attention.wo.", LAYER, LAYER)
GATE_AND_UP = named("mlp.{gate,up}_proj. -> feed_forward.{w1,w3}.", LAYER, LAYER)
DOWN = named("mlp.down_proj. -> feed_forward.w2.", LAYER, LAYER)
LLAMA_NAMES: Names = OUTSIDE | NORMS | QKV | OUTPUT | GATE_AND_UP | DOWN
"""What Llama's tensors are called, and those of every family that is like it."""


THREE = table("""
    model.layers.{i}.attention.wq.weight [heads * head_dim, hidden]
    model.layers.{i}.attention.{wk,wv}.weight [kv_heads * head_dim, hidden]
""")
THREE_BIASES = table("""
    model.layers.{i}.attention.wq.bias [heads * head_dim] if bias
    model.layers.{i}.attention.{wk,wv}.bias [kv_heads * head_dim] if bias
""")

QWEN_LAYER = "transformer.layers.{i}."
QWEN_NAMES = named("""
    transformer.wte.weight -> transformer.wte.embedding_weight
    transformer.ln_f.
    lm_head.weight
    transformer.h.{i}.attn.c_proj. -> transformer.layers.{i}.attention.wo.
    transformer.h.{i}.{ln_1,ln_2}. -> transformer.layers.{i}.{attention,ffn}_norm.
    transformer.h.{i}.mlp.{w1,w2,c_proj}. -> transformer.layers.{i}.feed_forward.{w1,w3,w2}.
""")
"""Of the matrices of its feed-forward part, the second is the one under the activation."""
QWEN_THREE = (THREE + THREE_BIASES).given(kv_heads="heads", bias="True").renamed({LAYER: QWEN_LAYER})

# ------------------------------------------------------------------------------------------- rules

_KEPT = replace(llama_like.FREQUENCIES, source=None, target=llama_like.FREQUENCIES.source)
FREQUENCIES = replace(_KEPT, equals="", tolerance=0.0)
"""What files of old versions have besides, and MindFormers does not."""


def kept_frequencies(when: str) -> Rule:
    """The same for models whose files do have them, which is where `when` holds."""
    return replace(_KEPT, when=when)


FOUND_LLAMA = ("model.tok_embeddings.embedding_weight", "model.layers.{i}.attention.wq.weight")
"""What identifies a net that is like Llama's."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(embedding: str = _EMBEDDING, head: str = _HEAD, names: Names = OUTSIDE) -> tuple[Rule, ...]:
    """Rules for embedding and output layer: a net has both, also where Hugging Face keeps one for the two.

    They come before others that rename the two, and hold where `tied`; the names are those of Hugging Face.
    """
    ours, their_head = names[embedding], names[head]
    return (
        Rule(
            {"x": ours, "head": their_head},
            embedding,
            "x = same(x, head)",
            when="tied",
            optional=True,
        ),
        Rule(None, head, when="tied", optional=True, reason="tied to the embedding"),
        Rule(their_head, head, when="not tied"),
    )


def united(ours: str, theirs: str, groups: str = "1", leaves: Sequence[str] = LEAVES) -> tuple[Rule, ...]:
    """Rules for a fused projection of Hugging Face that MindFormers has in parts.

    Args:
        ours: the parts, as alternatives in the order of their rows.
        theirs: the fused projection.
        groups: formula of the number of groups, each of which has rows of all parts.
        leaves: of both.
    """
    parts = ", ".join(Rule(ours, theirs).sources)
    return linear(ours, theirs, f"x = weave([{parts}], {groups})", leaves=leaves)


@dataclass(frozen=True, slots=True)
class Layout:
    """In which order rows of fused matrices lie.

    Attributes:
        name: as recipes end in.
        groups: formula of how many groups queries, keys and values lie in.
        pairs: formula of how many groups gate and up lie in, over the `width` of each.
    """

    name: str
    groups: str
    pairs: str


INTERLEAVED = Layout("interleaved", "kv_heads", "width")
CONTIGUOUS = Layout("contiguous", "1", "1")
"""A checkpoint does not show which it is."""


def attention(layout: Layout, ours: str) -> tuple[Rule, ...]:
    """Rules for queries, keys and values of Hugging Face that MindFormers has in one projection."""
    parts = f"[heads // {layout.groups}, kv_heads // {layout.groups}, kv_heads // {layout.groups}]"
    program = f"q, k, v = split_heads(x, {layout.groups}, {parts}, head_dim)"
    return linear(ours, LAYER + "self_attn.{q,k,v}_proj", program)


def gate_and_up(
    layout: Layout,
    ours: str,
    theirs: str = LAYER + "mlp.",
    width: str = "ffn",
    leaves: Sequence[str] = ("weight",),
) -> tuple[Rule, ...]:
    """Rules for gate and up of Hugging Face, each of a `width` (a formula), that MindFormers has in one matrix."""
    pairs = formula.substituted(layout.pairs, {"width": width})
    program = f"gate, up = split_heads(x, {pairs}, [1, 1], {width} // {pairs})"
    return linear(ours, theirs + "{gate,up}_proj", program, leaves=leaves)


LAST = "model.layers.{k+[layers]}."
"""What Hugging Face calls a layer of DeepSeek-V3 that predicts a further token."""

_PREDICTING = {"embedding_norm": "enorm", "norm": "hnorm", "dense": "eh_proj", "last": "shared_head.norm"}
"""The parts of it that no other layer has."""


def prediction(parts: Sequence[str], names: Names) -> tuple[Rule, ...]:
    """Rules for the parts of that layer.

    They come before others for embedding and output layer, which the published layer repeats.

    Args:
        parts: MindFormers' names of them, in the order above.
        names: of embedding and output layer.
    """
    ours = {key: f"{part}.weight" for key, part in zip(_PREDICTING, parts, strict=True)}
    theirs = {key: f"{LAST}{part}.weight" for key, part in _PREDICTING.items()}
    return (
        Rule(
            {**ours, "embedding": names[_EMBEDDING], "head": names[_HEAD]},
            {
                **theirs,
                "embedding": _EMBEDDING,
                "head": _HEAD,
                "again": LAST + "embed_tokens.weight",
                "head_again": LAST + "shared_head.head.weight",
            },
            """
            embedding, again = copies(embedding)
            head, head_again = copies(head)
            """,
            optional=True,
        ),
        Rule(ours, theirs),
    )


def measured(
    model_type: str, class_name: str, sizes: Mapping[str, tuple[str, int]], counts: Mapping[str, str]
) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
    """A `Recipe.config_of`.

    Args:
        model_type: of the config.
        class_name: what its `architectures` holds.
        sizes: key -> the tensor and the axis that show it.
        counts: key -> a pattern with one field; one more than the highest index is the value.
    """

    def measure(shapes: Mapping[str, Shape]) -> dict[str, Any]:
        made: dict[str, Any] = {"model_type": model_type, "architectures": [class_name]}
        for key, (name, axis) in sizes.items():
            shape = shapes.get(name, ())
            if axis < len(shape):
                made[key] = shape[axis]
        for key, text in counts.items():
            pattern = Pattern(text)
            (field,) = pattern.fields
            indices = [int(found[field]) for name in shapes if (found := pattern.match(name)) is not None]
            if indices:
                made[key] = max(indices) + 1
        return made if set(sizes) & set(made) else {}

    return measure
