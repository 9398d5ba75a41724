"""What the libraries that own models keep in F32 where a model is loaded in a narrower dtype.

A checkpoint with these rounded loads without a word, and differs from what the original gives in that dtype.

Sources: huggingface/transformers 5.24.0 (`_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` of the classes in
models/*/modeling_*.py; modeling_utils.py `_get_dtype_plan`: the first holds for F16 alone; core_model_loading.py: each
is searched for in the names of parameters, as a regular expression, and a model has those of its parts;
conversion_mapping.py: what files call them). huggingface/diffusers 0.42.1 (`_keep_in_fp32_modules`;
models/model_loading_utils.py: each is a whole part of a dotted name, and holds for every dtype).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from streamconv.dtypes import DType
from streamconv.plans.architecture import Config

# Model types: what is searched for in names. Below the first blank line, what files call it where they differ; below the
# second, what models make in F32 by themselves, and are loaded in (core_model_loading.py: the dtype of the empty parameter).
_STRICT = r"""
    afmoe: expert_bias;
    apertus1p5: audio_tokenizer vision_tokenizer;
    axk1 axk2 deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text dots3_note_vision_encoder
        ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision exaone_moe glm4_moe
        glm4_moe_lite glm4v_moe glm4v_moe_text glm4v_moe_vision glm_moe_dsa hy_v3 kimi_k2 nemotron_h
        solar_open: e_score_correction_bias gate.weight;
    bailing_hybrid: A_log conv1d dt_bias e_score_correction_bias gate.weight;
    beam mimo_v2_flash: e_score_correction_bias mlp.gate.weight;
    deepseek_ocr2 deepseek_ocr2_text deepseek_v2 unlimited_ocr unlimited_ocr_text: gate.weight;
    deepseek_v4: attn_hc e_score_correction_bias ffn_hc hc_head input_layernorm kv_norm norm position_bias
        post_attention_layernorm q_a_norm sinks;
    esmfold2: boundaries distogram_head fourier norm.bias norm.weight norm_mix norm_single norm_start;
    flint: gate.weight sinks;
    glm5_next glm5_next_text glm5_next_vision: A_log attn_hc.base attn_hc.scale conv1d dt_bias
        e_score_correction_bias ffn_hc.base ffn_hc.scale gate.weight;
    gradium_phonon_tts pocket_tts: freqs latent_mean latent_std;
    granite_speech5_ctc granite_speech5_encoder: conv.norm;
    hy_v4 hy_v4_vl: (?<!linear_)gate.weight base e_score_correction_bias fn hc_base hc_fn hc_scale k_norm
        lm_head scale sinks weights_proj;
    hy_v4_vl_text hy_v4_vl_vision: (?<!linear_)gate.weight base e_score_correction_bias fn hc_base hc_fn
        hc_scale k_norm scale sinks weights_proj;
    inkling2 inkling2_text inkling2_vision: attention_input e_score_correction_bias final_input
        mlp.gate.weight mlp_input post_attention_convolution post_mlp_convolution sconv.conv1d;
    inkling2_loop inkling2_loop_text: attention_input e_score_correction_bias final_input forget_gate_proj
        message_gate_proj message_input mlp.gate.weight mlp_input post_attention_convolution
        post_mlp_convolution sconv.conv1d;
    inkling_audio inkling_mm_model inkling_text inkling_vision: attn_sconv e_score_correction_bias
        gate.global_scale k_sconv mlp_sconv v_sconv;
    kimi_linear: dt_bias e_score_correction_bias gate.weight;
    kolibri1: e_score_correction_bias;
    kyutai_speech_to_text: codec_model;
    mistral_large4 mistral_large4_text: mlp.gate.weight rotary_emb;
    muse_spark muse_spark_audio muse_spark_text muse_spark_vision: e_score_correction_bias mlp.gate.weight
        post_attention_residual_gate post_feedforward_residual_gate;
    nemo_speechlm: audio_tower multi_modal_projector;
    openai_privacy_filter: sinks;
    slanext slanext_vision: structure_attention_cell structure_generator;
    voxtral: embed_positions;

    bailing_hybrid hy_v3 kolibri1: expert_bias;
    deepseek_v4: attn_sink compressor.ape gate.bias hc_attn_ hc_ffn_;
    flint: softmax_offset;
    glm5_next glm5_next_text: hc_(attn|ffn)_(base|scale);
    gradium_phonon_tts: emb_mean emb_std;
    hy_v4 hy_v4_vl hy_v4_vl_text: learnable_sink_param;
    inkling_mm_model: mlp.gate.bias;
    inkling2 inkling2_text inkling2_loop inkling2_loop_text: attn_res (attn|mlp|k|v)_sconv.weight mlp.gate.bias
        middle_cycle_cross_pass;
    mistral_large4 mistral_large4_text: \d\.gate\.weight lerope.alpha;

    clvp clvp_encoder: rotary_pos_emb.inv_freq;
    d_fine deimv2 rt_detr_v2: encoder_attn.(num|n)_points_scale;
    deberta: attention.self.[qv]_bias;
    esmfold2: parcae.log_delta;
    evolla: rotary_embeddings.inv_freq;
    mimi: codebook.initialized;
    olmo_hybrid zamba: A_log;
    qwen2_5_omni: token2wav;
    reformer: position_embeddings.weights;
    slanet: structure_attention_cell structure_generator;
    videoprism videoprism_text_model: embeddings.position_embedding$;
    voxtral_encoder: embed_positions;
    xlnet: rel_attn.[koqrv]$ rel_attn.r_ seg_embed mask_emb;
    zaya: balancing_biases
"""
_F16 = r"""
    afmoe: input_layernorm k_norm norm post_attention_layernorm post_mlp_layernorm pre_mlp_layernorm q_norm;
    axk2 deepseek_v32 glm_moe_dsa mistral_large4 mistral_large4_text: indexer.weights_proj;
    blip-2: qformer query_tokens;
    deepseek_v4: self_attn.compressor.gate_proj self_attn.compressor.indexer.gate_proj
        self_attn.compressor.indexer.kv_proj self_attn.compressor.indexer.scorer.weights_proj
        self_attn.compressor.kv_proj;
    gpt_oss: input_layernorm norm post_attention_layernorm;
    instructblip instructblipvideo: query_tokens;
    longcat_flash: classifier.weight;
    mt5 pop2piano t5 udop umt5: wo;
    rwkv: time_decay time_first;

    deepseek_v4: compressor.(wgate|wkv) indexer.weights_proj
"""

# Classes of diffusers: parts of names.
_DIFFUSERS = """
    AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel ChronoEditTransformer3DModel: time_embedder
        scale_shift_table norm1 norm2 norm3;
    AutoencoderKLMiniMaxH3: encoder quant_conv norm1 norm2 norm_out scale1 scale2;
    AutoencoderKLMiniMaxH3Audio: encoder decoder pre_block dec_in_proj mean_proj logs_proj;
    Cosmos3OmniTransformer: time_embedder;
    CosmosControlNetModel CosmosTransformer3DModel: learnable_pos_embed;
    Flux3Transformer2DModel: norm_q norm_k;
    HeliosTransformer3DModel: time_embedder scale_shift_table norm1 norm2 norm3 history_key_scale;
    JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel: time_embedder norm1 norm2 norm_out;
    Kandinsky5Transformer3DModel: time_embeddings modulation visual_modulation text_modulation;
    Kandinsky6SRTransformer3DModel: time_embeddings pooled_bias modulation;
    Kandinsky6Transformer3DModel: time_embeddings modulation;
    Krea2Transformer2DModel: norm norm1 norm2 norm_q norm_k;
    MiniMaxH3Transformer3DModel: proj_in audio_proj_in time_embedder proj_out audio_proj_out rope;
    RFD4ProteinaAutoencoder: latent_decoder_mean_n_log_scale norm;
    RFD4ProteinaTransformer: cond_factory norm ln_out;
    SkyReelsV2Transformer3DModel WanTransformer3DModel WanVACETransformer3DModel: rope time_embedder
        scale_shift_table norm1 norm2 norm3;
    WanAnimate2Transformer3DModel: time_embedding time_projection scale_shift_table norm1 norm2 norm3
        modulation;
    WanAnimateTransformer3DModel: time_embedder scale_shift_table norm1 norm2 norm3 motion_synthesis_weight
        rope
"""


def kept(config: Config, dtype: DType) -> Iterator[str]:
    """Regular expressions of which one is found in the name of each tensor that stays in F32 where a model with this
    config is cast to `dtype`.
    """
    if dtype.bits >= 32:
        return
    tables = (_STRICT,) if dtype.name == "BF16" else (_STRICT, _F16)
    for kind in _model_types(config):
        yield from (pattern for table in tables for pattern in _rows(table).get(kind, ()))
    for part in _rows(_DIFFUSERS).get(str(config.get("_class_name")), ()):
        yield rf"(^|\.){part}(\.|$)"


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The types of a model and of its parts."""
    yield str(config.get("model_type"))
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)


@cache
def _rows(table: str) -> Mapping[str, tuple[str, ...]]:
    """What a table says of each model."""
    found: dict[str, tuple[str, ...]] = {}
    for row in table.split(";"):
        models, _, patterns = row.partition(":")
        for model in models.split():
            found[model] = (*found.get(model, ()), *patterns.split())
    return found
