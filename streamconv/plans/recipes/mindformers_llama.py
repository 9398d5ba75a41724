"""Llama and the families that are Llama under other names: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/llama, research/{yi,deepseek,qwen1_5,qwen2,internlm,
baichuan2}; r1.5.0: mindformers/utils/convert_utils.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.plans.architectures.llama import LLAMA, QWEN2
from streamconv.plans.architectures.mindformers import FOUND_LLAMA, LAYER, LLAMA_NAMES, net
from streamconv.plans.recipe import Recipe
from streamconv.plans.recipes.mindformers_rules import FREQUENCIES, measured, recipe, renames, tied

_ENDS = ("model.embed_tokens.weight", "lm_head.weight")
_SIZES = {
    "vocab_size": ("model.tok_embeddings.embedding_weight", 0),
    "hidden_size": ("model.norm_out.weight", 0),
    "intermediate_size": ("model.layers.0.feed_forward.w1.weight", 0),
}
_COUNTS = {"num_hidden_layers": LAYER + "attention_norm.weight"}

MF_LLAMA = net(LLAMA, "Llama", LLAMA_NAMES)
MF_QWEN2 = net(QWEN2, "Qwen2", LLAMA_NAMES)

MINDFORMERS_LLAMA = recipe(
    "llama",
    "Llama 2, 3, 3.1 and CodeLlama",
    MF_LLAMA,
    LLAMA,
    (*tied(), *renames(LLAMA, LLAMA_NAMES, {"lm_head.weight"}), FREQUENCIES),
    FOUND_LLAMA,
    config_of=measured("llama", "LlamaForCausalLM", _SIZES, _COUNTS),
)


def _same_as_llama(family: str, title: str) -> Recipe:
    """A family whose Hugging Face form is Llama, under the name that MindFormers has for it."""
    return replace(
        MINDFORMERS_LLAMA,
        name=f"mindformers-{family}",
        title=f"{title}, which is a Llama: MindFormers -> Hugging Face",
        source=replace(MF_LLAMA, name=f"mindformers-{family}", title=f"{title} of MindFormers"),
        named_only=True,
    )


MINDFORMERS_QWEN2 = recipe(
    "qwen2",
    "Qwen 1.5, 2 and 2.5",
    MF_QWEN2,
    QWEN2,
    (*tied(), *renames(QWEN2, LLAMA_NAMES, {"lm_head.weight"})),
    (*FOUND_LLAMA, LAYER + "attention.wq.bias"),
    config_of=measured("qwen2", "Qwen2ForCausalLM", _SIZES, _COUNTS),
)

RECIPES = (
    MINDFORMERS_LLAMA,
    MINDFORMERS_QWEN2,
    _same_as_llama("yi", "Yi"),
    _same_as_llama("deepseek", "DeepSeek Coder, Coder 1.5 and LLM"),
)
