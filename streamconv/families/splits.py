"""How ranks share the tensors of each naming: for joining what ranks hold, and for splitting.

A program splits its modules alike in all models, so a row names a module; a model's own modules have rows of their own.
What a row says of a tensor is tested against the tables of the architectures in that naming.
"""

from __future__ import annotations

from streamconv.readers.splits import COLUMNS, PAIR, QKV, ROWS, TRIPLE, WHOLE, Naming, Sharding

SAT = Naming(
    rows={
        # CogVLM's and CogVideoX's plain modules, whose leaves are called as those of split ones.
        r"mixins\.eva\.(linear_proj|conv|boi|eoi|pos_embed)\b.*": WHOLE,
        r"mixins\.(encoder|adaln_layer|final_layer|pos_embed|patch_embed)\..*": WHOLE,
        r"mixins\.eva\..*attention\.query_key_value\.(weight|bias)": TRIPLE,
        r"(.*\.)?attention\.query_key_value\.(weight|bias)": QKV,
        r"(.*\.)?vision_query_key_value_list\.\d+\.(weight|bias)": QKV,
        r"(.*\.)?cross_attention\.key_value\.(weight|bias)": PAIR,
        r"(.*\.)?cross_attention\.query\.(weight|bias)": ROWS,
        r"(.*\.)?mlp\.dense_h_to_4h(_gate)?(_\d+)?\.(weight|bias)": ROWS,
        r"mixins\.mlp\.(vision_)?gate_proj\.\d+\.(weight|bias)": ROWS,
        r"mixins\.mlp\.vision_dense_h_to_4h_list\.\d+\.(weight|bias)": ROWS,
        r"mixins\.(swiglu|mlp)\.w2\.\d+\.(weight|bias)": ROWS,
        r"mixins\.[\w-]+\.lm_head\.weight": ROWS,
        r"(.*\.)?(cross_)?attention\.dense\.weight": COLUMNS,
        r"(.*\.)?mlp\.dense_4h_to_h(_\d+)?\.weight": COLUMNS,
        r"mixins\.rotary\.vision_dense_list\.\d+\.weight": COLUMNS,
        r"mixins\.mlp\.vision_dense_4h_to_h_list\.\d+\.weight": COLUMNS,
        r"(.*\.)?word_embeddings\.weight": Sharding(0, least=1000),
    },
    otherwise=WHOLE,
    without=("model.diffusion_model.", "original."),
    sizes={"heads": "num_attention_heads", "kv_heads": "num_multi_query_heads"},
)
"""Source: THUDM/SwissArmyTransformer: sat/mpu/layers.py, sat/model/transformer.py."""

DEEPSPEED = Naming(
    rows={
        r"(.*\.)?(word_embeddings|embed_tokens|embed_in|lm_head|embed_out|final_linear)\.weight": ROWS,
        r"(.*\.)?(query_key_value|dense_h_to_4h|[qkv]_proj|gate_proj|up_proj|w1|w3)\.(weight|bias)": ROWS,
        r"(.*\.)?(attention\.dense|self_attention\.dense|dense_4h_to_h|o_proj|down_proj|w2)\.weight": COLUMNS,
        r"(.*\.)?(attention\.dense|self_attention\.dense|dense_4h_to_h|o_proj|down_proj|w2)\.bias": WHOLE,
        r"(.*\.)?(\w*norm\w*|ln_\w+|position_embeddings|rotary_emb)(\.\w+)?": WHOLE,
        r"(.*\.)?\w*norm\.\w+": WHOLE,
    },
    otherwise=None,
)
"""Megatron-DeepSpeed, GPT-NeoX, and Hugging Face's models under AutoTP. Source: deepspeedai/DeepSpeed:
deepspeed/module_inject/auto_tp.py."""

MINDFORMERS = Naming(
    rows={
        r".*\.(wq|wk|wv|w1|w3|q_proj|k_proj|v_proj|gate_proj|up_proj|linear_q|linear_k|linear_v|q2l_proj|l2q_proj|lkv2kv)"
        r"\.(weight|bias)": ROWS,
        r".*\.(tok_embeddings|word_embeddings|embedding_table)\.?(embedding_weight|weight|embedding_table)?": ROWS,
        r"(.*\.)?(lm_head|output_layer)\.weight": ROWS,
        r".*\.(wo|w2|o_proj|down_proj|linear_proj|linear_fc2)\.weight": COLUMNS,
    },
    otherwise=WHOLE,
    layer=r"(?:.*\.)?(?:layers|blocks|encoder|h)\.(\d+)\..*",
    first=r"(.*\.)?(tok_embeddings|word_embeddings|embedding\w*|wte|wpe)\b.*",
)

NAMINGS = {"sat": SAT, "deepspeed": DEEPSPEED, "mindformers": MINDFORMERS}
