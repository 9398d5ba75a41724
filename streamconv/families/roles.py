"""What the models of all families call the parts that checks ask for; see `plans.roles`.

Sources: huggingface/transformers 5.24.0 (models/*/modeling_*.py and configuration_*.py); meta-llama/llama
(llama/model.py: `dim`, `n_layers`); OpenAI's and NVIDIA's names, which have stayed in files (`wte`, `word_embeddings`).
"""

from __future__ import annotations

from streamconv.plans.roles import Names, Role

ROLES: Names = {
    Role.HEAD: (r"(lm_head|output_layer|embed_out)\.weight",),
    Role.EMBEDDING: (r"(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight",),
    # T5's kind scales what goes into a head that is the embedding.
    Role.SCALED: (r"shared\.weight",),
    Role.BUFFER: ("inv_freq", "position_ids", "masked_bias", "cos_cached", "sin_cached", r"attn\.bias"),
    Role.LAYERS: ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    # DeepSeek's and Qwen's layers that predict further tokens.
    Role.FURTHER_LAYERS: ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
    Role.WIDTH: ("hidden_size", "n_embd", "d_model", "dim"),
    # ALBERT's kind, OPT's, and the embeddings for each layer of Gemma 3n.
    Role.OTHER_WIDTH: ("embedding_size", "word_embed_proj_dim", "hidden_size_per_layer_input"),
}
