"""Llama and the families that are like it: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/llama, research/{yi,deepseek,qwen,qwen1_5,qwen2,baichuan2,
internlm,internlm2}: convert_weight.py, convert_reversed.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.mindformers.rules import (
    FOUND_LLAMA,
    FREQUENCIES,
    LEAVES,
    kept_frequencies,
    measured,
    recipe,
    renames,
    tied,
    united,
)
from streamconv.families.mindformers.tables import (
    LAYER,
    MF_BAICHUAN2,
    MF_INTERNLM,
    MF_INTERNLM2,
    MF_INTERNLM2_SPLIT,
    MF_LLAMA,
    MF_QWEN,
    MF_QWEN2,
    Family,
    llama_concat,
    qwen2_concat,
)
from streamconv.plans.recipe import Recipe, Rule

_SIZES = {
    "vocab_size": ("model.tok_embeddings.embedding_weight", 0),
    "hidden_size": ("model.norm_out.weight", 0),
    "intermediate_size": ("model.layers.0.feed_forward.w1.weight", 0),
}
_COUNTS = {"num_hidden_layers": LAYER + "attention_norm.weight"}
_BIASED = (*FOUND_LLAMA, LAYER + "attention.wq.bias")

MINDFORMERS_LLAMA = recipe(
    "llama",
    "Llama 2, 3, 3.1 and CodeLlama",
    MF_LLAMA,
    (*tied(), *renames(MF_LLAMA, {"lm_head.weight"}), FREQUENCIES),
    FOUND_LLAMA,
    config_of=measured("llama", "LlamaForCausalLM", _SIZES, _COUNTS),
)


def _same_as_llama(key: str, title: str) -> Recipe:
    """A family whose Hugging Face form is Llama, under the name that MindFormers has for it."""
    return replace(
        MINDFORMERS_LLAMA,
        name=f"mindformers-{key}",
        title=f"{title}, which is a Llama: MindFormers -> Hugging Face",
        source=replace(MF_LLAMA.net, name=f"mindformers-{key}", title=f"{title} of MindFormers"),
        named_only=True,
    )


def _concat(key: str, title: str, family: Family, order: str, found_by: tuple[str, ...]) -> Recipe:
    """With fused projections; nothing in a checkpoint tells in which of two orders their rows lie."""
    groups, pairs = ("kv_heads", "ffn") if order == "interleaved" else ("1", "1")
    parts = f"[heads // {groups}, kv_heads // {groups}, kv_heads // {groups}]"
    since = "r1.5 and later" if order == "interleaved" else "up to r1.3"
    return recipe(
        f"{key}-{order}",
        f"{title} with fused projections, {order} ({since})",
        family,
        (
            *tied(),
            *renames(family, {"lm_head.weight"}),
            *(
                Rule(
                    LAYER + f"attention.w_qkv.{leaf}",
                    {part: LAYER + f"self_attn.{part}_proj.{leaf}" for part in "qkv"},
                    f"q, k, v = split_heads(x, {groups}, {parts}, head_dim)",
                )
                for leaf in LEAVES
            ),
            *(
                Rule(
                    LAYER + f"feed_forward.w_gate_hidden.{leaf}",
                    {part: LAYER + f"mlp.{part}_proj.{leaf}" for part in ("gate", "up")},
                    f"gate, up = split_heads(x, {pairs}, [1, 1], ffn // {pairs})",
                )
                for leaf in LEAVES
            ),
            FREQUENCIES,
        ),
        found_by,
    )


_FOUND_CONCAT = (
    FOUND_LLAMA[0],
    LAYER + "attention.w_qkv.weight",
    LAYER + "feed_forward.w_gate_hidden.weight",
)

RECIPES = (
    MINDFORMERS_LLAMA,
    _same_as_llama("yi", "Yi"),
    _same_as_llama("deepseek", "DeepSeek Coder, Coder 1.5 and LLM"),
    recipe(
        "qwen2",
        "Qwen 1.5, 2 and 2.5",
        MF_QWEN2,
        (*tied(), *renames(MF_QWEN2, {"lm_head.weight"})),
        _BIASED,
        config_of=measured("qwen2", "Qwen2ForCausalLM", _SIZES, _COUNTS),
    ),
    recipe(
        "baichuan2",
        "Baichuan2 (7B, 13B)",
        MF_BAICHUAN2,
        (
            *renames(MF_BAICHUAN2),
            united(LAYER + "attention.w{}.weight", "qkv", LAYER + "self_attn.W_pack.weight"),
            kept_frequencies("keeps_frequencies"),
        ),
        FOUND_LLAMA,
    ),
    recipe(
        "qwen",
        "Qwen (first generation)",
        MF_QWEN,
        (
            *renames(MF_QWEN),
            *(
                united(
                    f"transformer.layers.{{i}}.attention.w{{}}.{leaf}",
                    "qkv",
                    f"transformer.h.{{i}}.attn.c_attn.{leaf}",
                )
                for leaf in LEAVES
            ),
        ),
        ("transformer.wte.embedding_weight", "transformer.layers.{i}.attention.wq.weight"),
    ),
    recipe(
        "internlm",
        "InternLM (first generation)",
        MF_INTERNLM,
        (*renames(MF_INTERNLM), kept_frequencies("keeps_frequencies")),
        (*_BIASED, LAYER + "attention.wo.bias"),
    ),
    recipe(
        "internlm2",
        "InternLM2 with one fused projection",
        MF_INTERNLM2,
        renames(MF_INTERNLM2),
        ("model.tok_embeddings.embedding_weight", LAYER + "attention.w.weight"),
    ),
    recipe(
        "internlm2-split",
        "InternLM2 with split projections",
        MF_INTERNLM2_SPLIT,
        (
            *renames(MF_INTERNLM2_SPLIT),
            *(
                united(
                    LAYER + f"attention.w{{}}.{leaf}",
                    "qkv",
                    LAYER + f"attention.wqkv.{leaf}",
                    groups="kv_heads",
                )
                for leaf in LEAVES
            ),
        ),
        FOUND_LLAMA,
    ),
    *(
        made
        for order in ("interleaved", "contiguous")
        for made in (
            _concat("llama", "Llama", llama_concat(order), order, _FOUND_CONCAT),
            _concat(
                "qwen2",
                "Qwen2",
                qwen2_concat(order),
                order,
                (*_FOUND_CONCAT, LAYER + "attention.w_qkv.bias"),
            ),
        )
    ),
)
