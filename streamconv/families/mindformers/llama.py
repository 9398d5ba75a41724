"""Llama and the families that are like it: MindFormers to Hugging Face and back.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/llama, research/{yi,deepseek,qwen,qwen1_5,qwen2,baichuan2,
internlm,internlm2}: convert_weight.py, convert_reversed.py.
"""

from __future__ import annotations

from dataclasses import replace

from streamconv.families.baichuan import BAICHUAN
from streamconv.families.internlm import INTERNLM, INTERNLM2
from streamconv.families.llama import LLAMA
from streamconv.families.mindformers import common
from streamconv.families.mindformers.common import CONTIGUOUS, INTERLEAVED, Layout
from streamconv.families.mindformers.net import Net
from streamconv.families.qwen import QWEN, QWEN2
from streamconv.plans.architecture import Architecture
from streamconv.plans.patterns import named
from streamconv.plans.recipe import LEAVES
from streamconv.plans.table import Table, table

_EMBEDDING = common.FOUND_LLAMA[0]
_SIZES = {
    "vocab_size": (_EMBEDDING, 0),
    "hidden_size": ("model.norm_out.weight", 0),
    "intermediate_size": ("model.layers.0.feed_forward.w1.weight", 0),
}
_COUNTS = {"num_hidden_layers": common.LAYER + "attention_norm.weight"}
_BIASED = (*common.FOUND_LLAMA, common.LAYER + "attention.wq.bias")

MF_LLAMA = Net(
    key="llama",
    title="Llama 2, 3, 3.1 and CodeLlama",
    called="Llama of MindFormers",
    target=LLAMA,
    names=common.LLAMA_NAMES,
    before=common.tied(),
    rules=(common.FREQUENCIES,),
    found_by=common.FOUND_LLAMA,
    more={"config_of": common.measured("llama", "LlamaForCausalLM", _SIZES, _COUNTS)},
)


def _same_as_llama(key: str, title: str) -> Net:
    """A family whose Hugging Face form is Llama, under the name that MindFormers has for it."""
    return replace(
        MF_LLAMA,
        key=key,
        layout=key,
        title=f"{title}, which is a Llama",
        called=f"{title} of MindFormers",
        more={**MF_LLAMA.more, "named_only": True},
    )


_CONCAT = table("""
    model.layers.{i}.attention.w_qkv.{weight,bias} [(heads + 2 * kv_heads) * head_dim, hidden] [(heads + 2 * kv_heads) * head_dim if attention_bias]
    model.layers.{i}.feed_forward.w_gate_hidden.weight [2 * ffn, hidden]
""")
_CONCAT_BIAS = table("""
    model.layers.{i}.feed_forward.w_gate_hidden.bias [2 * ffn] if mlp_bias
""")
_FOUND_CONCAT = (
    _EMBEDDING,
    common.LAYER + "attention.w_qkv.weight",
    common.LAYER + "feed_forward.w_gate_hidden.weight",
)


def _concat(target: Architecture, own: Table, found_by: tuple[str, ...], layout: Layout) -> Net:
    """With fused projections, their rows in one of two orders."""
    since = "r1.5 and later" if layout is INTERLEAVED else "up to r1.3"
    return Net(
        key=f"{target.name}-{layout.name}",
        title=f"{target.title} with fused projections, {layout.name} ({since})",
        called=f"{target.title}, {layout.name} of MindFormers",
        layout=layout.name,
        target=target,
        names=common.OUTSIDE | common.NORMS | common.OUTPUT | common.DOWN,
        own=own,
        before=common.tied(),
        rules=(
            *common.attention(layout, common.LAYER + "attention.w_qkv"),
            *common.gate_and_up(layout, common.LAYER + "feed_forward.w_gate_hidden", leaves=LEAVES),
            common.FREQUENCIES,
        ),
        found_by=found_by,
    )


_INTERNLM2_NAMES = named("""
    model.tok_embeddings.weight -> model.tok_embeddings.embedding_weight
    model.norm.weight -> model.norm_out.weight
    output.weight -> lm_head.weight
    model.layers.{i}.{attention.wo,feed_forward,attention_norm,ffn_norm}.
""")
MF_QWEN = Net(
    key="qwen",
    title="Qwen (first generation)",
    target=QWEN,
    names=common.QWEN_NAMES,
    own=common.QWEN_THREE,
    rules=common.united(common.QWEN_LAYER + "attention.{wq,wk,wv}", "transformer.h.{i}.attn.c_attn"),
    found_by=("transformer.wte.embedding_weight", common.QWEN_LAYER + "attention.wq.weight"),
)
MF_INTERNLM2 = Net(
    key="internlm2",
    title="InternLM2 with one fused projection",
    called="InternLM2 of MindFormers",
    target=INTERNLM2,
    names={**_INTERNLM2_NAMES, common.LAYER + "attention.wqkv.": common.LAYER + "attention.w."},
    found_by=(_EMBEDDING, common.LAYER + "attention.w.weight"),
)
NETS = (
    MF_LLAMA,
    _same_as_llama("yi", "Yi"),
    _same_as_llama("deepseek", "DeepSeek Coder, Coder 1.5 and LLM"),
    Net(
        key="qwen2",
        title="Qwen 1.5, 2 and 2.5",
        called="Qwen2 of MindFormers",
        target=QWEN2,
        names=common.LLAMA_NAMES,
        before=common.tied(),
        found_by=_BIASED,
        more={"config_of": common.measured("qwen2", "Qwen2ForCausalLM", _SIZES, _COUNTS)},
    ),
    Net(
        key="baichuan2",
        title="Baichuan2 (7B, 13B)",
        called="Baichuan2 of MindFormers",
        target=BAICHUAN,
        names=common.LLAMA_NAMES,
        own=common.THREE.given(kv_heads="heads"),
        # Only the first generation's 7B has them in its files; 13B does not rotate, and has no such key.
        sizes={**BAICHUAN.sizes, "keeps_frequencies": "not norm_head and bool(max_position_embeddings)"},
        rules=(
            *common.united(
                common.LAYER + "attention.{wq,wk,wv}", common.LAYER + "self_attn.W_pack", leaves=("weight",)
            ),
            common.kept_frequencies("keeps_frequencies"),
        ),
        found_by=common.FOUND_LLAMA,
    ),
    MF_QWEN,
    Net(
        key="internlm",
        title="InternLM (first generation)",
        called="InternLM of MindFormers",
        target=INTERNLM,
        names=common.LLAMA_NAMES,
        rules=(common.kept_frequencies("keeps_frequencies"),),
        found_by=(*_BIASED, common.LAYER + "attention.wo.bias"),
    ),
    MF_INTERNLM2,
    Net(
        key="internlm2-split",
        title="InternLM2 with split projections",
        layout="split",
        target=INTERNLM2,
        names=_INTERNLM2_NAMES,
        own=common.THREE + common.THREE_BIASES,
        rules=common.united(
            common.LAYER + "attention.{wq,wk,wv}", common.LAYER + "attention.wqkv", "kv_heads"
        ),
        found_by=common.FOUND_LLAMA,
    ),
    *(
        net
        for layout in (INTERLEAVED, CONTIGUOUS)
        for net in (
            _concat(LLAMA, _CONCAT + _CONCAT_BIAS, _FOUND_CONCAT, layout),
            _concat(
                QWEN2,
                _CONCAT.given(attention_bias="True"),
                (*_FOUND_CONCAT, common.LAYER + "attention.w_qkv.bias"),
                layout,
            ),
        )
    ),
)
