"""What the models of all families call the parts that checks ask for; see `plans.roles`.

Sources: huggingface/transformers 5.24.0 (models/*/modeling_*.py and configuration_*.py); meta-llama/llama
(llama/model.py: `dim`, `n_layers`); OpenAI's and NVIDIA's names, which have stayed in files (`wte`, `word_embeddings`).
"""

from __future__ import annotations

from streamconv.plans.roles import Names, Role

ROLES: Names = {
    Role.HEAD: (r"(lm_head|output_layer|embed_out)\.weight",),
    Role.EMBEDDING: (r"(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight",),
    Role.ROUTER: (r"(gate|router|shared_expert_gate|wg)\.weight", r"router\.\w+\.weight"),
    # Positions, kinds of tokens, T5's distances; layers among them that project embeddings lose little by it.
    Role.LOOKED_UP: (
        r"(\w*_)?(emb|embd|embed|embeddings?|embedder)(_\w+)?\.weight",
        r"(wpe|relative_attention_bias)\.weight",
    ),
    # Also BERT's and RoBERTa's, whose dense layers before it are named so too.
    Role.LEFT_OUT: (r"lm_head", r"lm_head\.decoder", r"predictions\.decoder", "vocab_projector"),
    Role.TURNED: (r"(c_attn|c_fc)\.weight",),
    # T5's kind scales what goes into a head that is the embedding.
    Role.SCALED: (r"shared\.weight",),
    Role.BUFFER: ("inv_freq", "position_ids", "masked_bias", "cos_cached", "sin_cached", r"attn\.bias"),
    Role.LAYERS: ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    # DeepSeek's and Qwen's layers that predict further tokens.
    Role.FURTHER_LAYERS: ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
    Role.WIDTH: ("hidden_size", "n_embd", "d_model", "dim"),
    # ALBERT's kind, OPT's, and the embeddings for each layer of Gemma 3n.
    Role.FURTHER: (r"mtp(_\w+)?\..*",),
    Role.HEIGHT: (r"(n|num)_(?!conv|feat|adapter)(\w+_)?(layers?|blocks?)", r"(en|de)coder_layers", "depth"),
    # DeepSeek's, GLM's, LFM2's; Qwen2's, whose sliding windows begin above.
    Role.FIRST_LAYERS: ("first_k_dense_replace", "(num|n)_dense_layers", "max_window_layers"),
    Role.LAST_LAYERS: ("num_kv_shared_layers",),
    Role.LAYER_NUMBERS: (
        r"(mlp_only|moe|cross_attention|dual_attention|vace|dense|deepstack|injected)_layers",
        r"\w*layers?_(ids?|idxs?|indices|indexes)",
        "full_attn_idxs",
        "attn_layer_offsets",
    ),
    Role.NOT_PER_LAYER: (
        "architectures",
        r"\w*(tokens?(_ids?)?|languages?|labels?|channels|section|mean|std|betas?|grid\w*)",
        r"axes_\w+|\w*(dims?|resolutions?|patch_size|image_size|kernel_size|sample_size|stride|padding|factors?)",
    ),
    Role.LETTERS: ("hybrid_override_pattern",),
    # Jamba's, Qwen's mixtures, Llama 4's.
    Role.PERIOD: (
        "decoder_sparse_step",
        r"expert_layer_period|interleave_moe_layer_step|moe_layer_(freq|interval)",
    ),
    Role.PERIOD_OF_KINDS: (
        r"attn_layer_period|_?sliding_window_pattern|full_attention_interval|no_rope_layer_interval"
        r"|dense_attention_every_n_layers|global_attn_every_n_layers",
    ),
    Role.KINDS: ("layers_block_type", "layer_types", "hybrid_override_pattern"),
    Role.CYCLE: ("block_types",),  # RecurrentGemma's
    Role.OUTPUTS: ("stage_names", "_?out_features", "_?out_indices"),  # of backbones
    Role.FRONT: (r"\w*conv\w*",),
    Role.STAGES: ("depths", "hidden_sizes", "block_out_channels", "down_block_types"),
    Role.TOWER: (
        r"\w*(vision|visual|image|video|vit|eva|audio|speech|qformer|resampler|perceiver|tok2wav|vae)\w*",
    ),
    Role.WITH_LAYERS: ("hidden_size_per_layer_input",),
    Role.OTHER_WIDTH: ("embedding_size", "word_embed_proj_dim", "hidden_size_per_layer_input"),
}
