"""The reference models: their tensors, their arithmetic against transformers, the files that they write.

Where transformers has no class for a model, its weights are moved by hand, slice by slice, into a class that it
has. Nothing of streamconv takes part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from comparing import assert_alike, terms_of
from reference_models import Cache, baichuan, chatglm, internlm, internlm2, qwen, whisper_openai, yi
from reference_models.configuration import ModelConfig
from reference_models.files import randomise
from reference_models.layers import causal_attention, rotate_halves, rotate_neighbours
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

State = Mapping[str, Tensor]

# Sizes that are all different, so that no shape is right by chance. Heads of 8 channels (ChatGLM: 16).
SIZES: dict[str, Any] = {
    "vocab_size": 130,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
CHATGLM = chatglm.Config(
    padded_vocab_size=130,
    hidden_size=48,
    ffn_hidden_size=100,
    num_layers=3,
    num_attention_heads=6,
    multi_query_group_num=2,
    kv_channels=16,
)
QWEN = qwen.Config(**SIZES | {"intermediate_size": 200, "kv_channels": 8})
BAICHUAN = baichuan.Config(**SIZES)
BAICHUAN2 = baichuan.Config(**SIZES, norm_head=True)
INTERNLM = internlm.Config(**SIZES)
DYNAMIC_INTERNLM = internlm.Config(**SIZES, rotary={"base": 10000, "type": "dynamic"})
INTERNLM2 = internlm2.Config(**SIZES, num_key_value_heads=2)
YI = yi.Config(**SIZES, num_key_value_heads=2)

TOKEN_MODELS: dict[str, tuple[ModuleType, ModelConfig]] = {
    "chatglm": (chatglm, CHATGLM),
    "chatglm-per-head": (chatglm, replace(CHATGLM, multi_query_attention=False)),
    "chatglm-biases": (chatglm, replace(CHATGLM, add_bias_linear=True, rope_ratio=500)),
    "chatglm-halves": (chatglm, replace(CHATGLM, original_rope=False)),
    "baichuan": (baichuan, BAICHUAN),
    "baichuan2": (baichuan, BAICHUAN2),
    "qwen": (qwen, QWEN),
    "internlm": (internlm, INTERNLM),
    "internlm-dynamic": (internlm, DYNAMIC_INTERNLM),
    "internlm2": (internlm2, INTERNLM2),
    "internlm2-linear": (internlm2, replace(INTERNLM2, rope_scaling={"type": "linear", "factor": 3.0})),
    "yi": (yi, YI),
}
EVERY_TOKEN_MODEL = pytest.mark.parametrize(("module", "config"), TOKEN_MODELS.values(), ids=TOKEN_MODELS)


def some_ids(config: ModelConfig, time: int, batch: int = 2) -> Tensor:
    contents = config.to_json()
    vocabulary = contents.get("padded_vocab_size") or contents["vocab_size"]
    return torch.randint(0, vocabulary, (batch, time), generator=torch.Generator().manual_seed(time))


# ----------------------------------------------------------------------------- keys and shapes

LLAMA_LAYER = """
    model.layers.{i}.self_attn.o_proj.weight                48 48
    model.layers.{i}.mlp.gate_proj.weight                   100 48
    model.layers.{i}.mlp.up_proj.weight                     100 48
    model.layers.{i}.mlp.down_proj.weight                   48 100
    model.embed_tokens.weight                               130 48
    model.norm.weight                                       48
    lm_head.weight                                          130 48
"""
LLAMA_NORMS = """
    model.layers.{i}.input_layernorm.weight                 48
    model.layers.{i}.post_attention_layernorm.weight        48
"""
CHATGLM_TABLE = """
    transformer.embedding.word_embeddings.weight                            130 48
    transformer.rotary_pos_emb.inv_freq                                     4
    transformer.encoder.layers.{i}.input_layernorm.weight                   48
    transformer.encoder.layers.{i}.self_attention.query_key_value.weight    160 48
    transformer.encoder.layers.{i}.self_attention.query_key_value.bias      160
    transformer.encoder.layers.{i}.self_attention.dense.weight              48 96
    transformer.encoder.layers.{i}.post_attention_layernorm.weight          48
    transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight                 200 48
    transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight                 48 100
    transformer.encoder.final_layernorm.weight                              48
    transformer.output_layer.weight                                         130 48
"""
CHATGLM_BIASES = """
    transformer.encoder.layers.{i}.self_attention.dense.bias                48
    transformer.encoder.layers.{i}.mlp.dense_h_to_4h.bias                   200
    transformer.encoder.layers.{i}.mlp.dense_4h_to_h.bias                   48
"""
INTERNLM_TABLE = (
    LLAMA_LAYER
    + LLAMA_NORMS
    + """
    model.layers.{i}.self_attn.q_proj.weight                48 48
    model.layers.{i}.self_attn.k_proj.weight                48 48
    model.layers.{i}.self_attn.v_proj.weight                48 48
    model.layers.{i}.self_attn.q_proj.bias                  48
    model.layers.{i}.self_attn.k_proj.bias                  48
    model.layers.{i}.self_attn.v_proj.bias                  48
    model.layers.{i}.self_attn.o_proj.bias                  48
"""
)
BAICHUAN_TABLE = LLAMA_LAYER + LLAMA_NORMS + "model.layers.{i}.self_attn.W_pack.weight 144 48"
LAYER_FREQUENCIES = "\nmodel.layers.{i}.self_attn.rotary_emb.inv_freq 4"
TABLES: dict[str, str] = {
    "chatglm": CHATGLM_TABLE,
    "chatglm-per-head": CHATGLM_TABLE.replace("160", "288"),
    "chatglm-biases": CHATGLM_TABLE + CHATGLM_BIASES,
    "chatglm-halves": CHATGLM_TABLE,
    "baichuan": BAICHUAN_TABLE + LAYER_FREQUENCIES,
    "baichuan2": BAICHUAN_TABLE,
    "qwen": """
        transformer.wte.weight                      130 48
        transformer.h.{i}.ln_1.weight               48
        transformer.h.{i}.attn.c_attn.weight        144 48
        transformer.h.{i}.attn.c_attn.bias          144
        transformer.h.{i}.attn.c_proj.weight        48 48
        transformer.h.{i}.ln_2.weight               48
        transformer.h.{i}.mlp.w1.weight             100 48
        transformer.h.{i}.mlp.w2.weight             100 48
        transformer.h.{i}.mlp.c_proj.weight         48 100
        transformer.ln_f.weight                     48
        lm_head.weight                              130 48
    """,
    "internlm": INTERNLM_TABLE + LAYER_FREQUENCIES,
    "internlm-dynamic": INTERNLM_TABLE,
    "internlm2": """
        model.tok_embeddings.weight                     130 48
        model.layers.{i}.attention_norm.weight          48
        model.layers.{i}.attention.wqkv.weight          80 48
        model.layers.{i}.attention.wo.weight            48 48
        model.layers.{i}.ffn_norm.weight                48
        model.layers.{i}.feed_forward.w1.weight         100 48
        model.layers.{i}.feed_forward.w2.weight         48 100
        model.layers.{i}.feed_forward.w3.weight         100 48
        model.norm.weight                               48
        output.weight                                   130 48
    """,
    "yi": LLAMA_LAYER
    + """
        model.layers.{i}.ln1.weight                     48
        model.layers.{i}.ln2.weight                     48
        model.layers.{i}.self_attn.q_proj.weight        48 48
        model.layers.{i}.self_attn.k_proj.weight        16 48
        model.layers.{i}.self_attn.v_proj.weight        16 48
    """,
}
TABLES["internlm2-linear"] = TABLES["internlm2"]


def expanded(table: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes, `{i}` counted out."""
    rows = (line.split() for line in table.splitlines() if line.strip())
    return {
        name.format(i=i): tuple(int(size) for size in shape) for name, *shape in rows for i in range(layers)
    }


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_keys_and_shapes(name: str) -> None:
    module, config = TOKEN_MODELS[name]
    assert shapes(module.Model(config)) == expanded(TABLES[name], 3)


WHISPER_ATTENTION = """
    {part}.query.weight 64 64
    {part}.query.bias 64
    {part}.key.weight 64 64
    {part}.value.weight 64 64
    {part}.value.bias 64
    {part}.out.weight 64 64
    {part}.out.bias 64
    {part}_ln.weight 64
    {part}_ln.bias 64
"""
WHISPER_MLP = """
    mlp.0.weight 256 64
    mlp.0.bias 256
    mlp.2.weight 64 256
    mlp.2.bias 64
    mlp_ln.weight 64
    mlp_ln.bias 64
"""


def test_keys_and_shapes_of_whisper() -> None:
    own = expanded(WHISPER_ATTENTION.replace("{part}", "attn") + WHISPER_MLP, 1)
    crossed = expanded(WHISPER_ATTENTION.replace("{part}", "cross_attn"), 1)
    blocks = {f"encoder.blocks.{i}.{name}": shape for i in range(2) for name, shape in own.items()} | {
        f"decoder.blocks.{i}.{name}": shape for i in range(2) for name, shape in (own | crossed).items()
    }
    around = {
        "encoder.conv1.weight": (64, 16, 3),
        "encoder.conv1.bias": (64,),
        "encoder.conv2.weight": (64, 64, 3),
        "encoder.conv2.bias": (64,),
        "encoder.positional_embedding": (24, 64),
        "encoder.ln_post.weight": (64,),
        "encoder.ln_post.bias": (64,),
        "decoder.token_embedding.weight": (128, 64),
        "decoder.positional_embedding": (32, 64),
        "decoder.ln.weight": (64,),
        "decoder.ln.bias": (64,),
    }
    assert shapes(whisper_openai.Model(whisper_openai.TINY)) == blocks | around


# Of the published checkpoints: from `total_size` in their indexes (in elements of two bytes), or the count that
# their pages state; those have no buffers, which are added.
PUBLISHED: dict[str, tuple[ModuleType, Any, int, int]] = {
    "chatglm3-6b": (chatglm, chatglm.CHATGLM3_6B, 200, 12_487_168_064 // 2),
    "glm-4-9b-chat": (chatglm, chatglm.GLM4_9B_CHAT, 284, 9_399_951_392),
    "glm-4-9b-chat-1m": (chatglm, chatglm.GLM4_9B_CHAT_1M, 284, 9_483_857_952),
    "Baichuan-7B": (baichuan, baichuan.BAICHUAN_7B, 259, 7_000_559_616 + 32 * 64),
    "Baichuan2-7B": (baichuan, baichuan.BAICHUAN2_7B, 227, 7_505_973_248),
    "Qwen-7B": (qwen, qwen.QWEN_7B, 259, 15_442_649_088 // 2),
    "internlm-20b": (internlm, internlm.INTERNLM_20B, 543, 40_177_428_480 // 2),
    "internlm2-7b": (internlm2, internlm2.INTERNLM2_7B, 227, 7_737_708_544),
    "Yi-6B": (yi, yi.YI_6B, 291, 6_061_035_520),
    "whisper-tiny": (whisper_openai, whisper_openai.WHISPER_TINY, 167, 37_184_640 + 1500 * 384),
}


@pytest.mark.parametrize(("module", "config", "keys", "elements"), PUBLISHED.values(), ids=PUBLISHED)
def test_element_counts_of_published_checkpoints(
    module: ModuleType, config: Any, keys: int, elements: int
) -> None:
    with torch.device("meta"):
        state = module.Model(config).state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (keys, elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_frequencies_have_the_dtype_of_the_checkpoint(dtype: torch.dtype) -> None:
    stored = {
        "transformer.rotary_pos_emb.inv_freq": (chatglm.Model(replace(CHATGLM, rope_ratio=500), dtype), 8),
        "model.layers.2.self_attn.rotary_emb.inv_freq": (baichuan.Model(BAICHUAN, dtype), 8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (internlm.Model(INTERNLM, dtype), 8),
    }
    for name, (model, channels) in stored.items():
        values = model.state_dict()[name]
        exact = [10000.0 ** (-2 * j / channels) for j in range(channels // 2)]
        assert values.dtype == dtype
        assert_close(
            values.double(),
            torch.tensor(exact, dtype=torch.float64),
            rtol=2 * torch.finfo(dtype).eps,
            atol=0.0,
        )


# ---------------------------------------------------------------------------------- arithmetic


def filled(module: ModuleType, config: Any, seed: int = 7, **options: Any) -> Any:
    """A model with random weights, in memory only."""
    model = module.Model(config, **options)
    names = dict(model.named_parameters())
    outputs = ("transformer.output_layer.weight", "lm_head.weight", "output.weight")
    randomise(model, seed, output=next(name for name in outputs if name in names))
    return model


@EVERY_TOKEN_MODEL
def test_a_cache_changes_nothing(module: ModuleType, config: ModelConfig) -> None:
    model = filled(module, config)
    ids = some_ids(config, 48)
    whole = model(ids)
    for step in (1, 5, 47):
        cache = Cache()
        parts = [model(ids[:, start : start + step], cache) for start in range(0, 48, step)]
        assert cache.length == 48
        assert_alike(torch.cat(parts, dim=1), whole, terms_of(model))


@EVERY_TOKEN_MODEL
def test_tokens_see_what_went_before_and_nothing_else(module: ModuleType, config: ModelConfig) -> None:
    model = filled(module, config)
    ids = some_ids(config, 20, batch=1)
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 130
    before, after = model(ids)[0], model(changed)[0]
    assert_alike(after[:10], before[:10], terms_of(model))
    assert (after - before)[10:].abs().amax(-1).min() > 1e-4


@EVERY_TOKEN_MODEL
def test_every_parameter_shows_in_the_logits(module: ModuleType, config: ModelConfig) -> None:
    model = filled(module, config)
    ids = some_ids(config, 12, batch=1)
    logits = model(ids)
    assert 0.7 < logits.std() < 1.5
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        # A key bias that is the same for all tokens would cancel; one that turns does not. Rolling keeps sizes.
        parameter.copy_(kept.roll(1, 0))
        changed = model(ids)
        parameter.copy_(kept)
        assert (changed - logits).abs().max() > 1e-3, name


@pytest.mark.parametrize("ratio", [None, 50, 500, 10000])
@pytest.mark.parametrize("channels", [16, 128])
def test_pairs_turn_by_the_formula(channels: int, ratio: int | None) -> None:
    config = replace(CHATGLM, kv_channels=channels, rope_ratio=ratio)
    start, stop = 100, 140
    x = torch.randn(1, 6, stop - start, channels, generator=torch.Generator().manual_seed(1))
    half = channels // 2
    positions = torch.arange(start, stop, dtype=torch.float64)
    for original, pairs in (
        (True, [(2 * j, 2 * j + 1) for j in range(half // 2)]),
        (False, [(j, j + half // 2) for j in range(half // 2)]),
    ):
        model = chatglm.Model(replace(config, original_rope=original))
        attention = model.transformer.encoder.layers[0].self_attention
        turned = attention.rotate(x, model.rotation(start, stop, torch.float32)).double()
        for j, (real, imaginary) in enumerate(pairs):
            angle = positions * (10000 * (ratio or 1)) ** (-2 * j / half)
            before = torch.complex(x[..., real].double(), x[..., imaginary].double())
            after = before * torch.polar(torch.ones_like(angle), angle)
            assert_close(turned[..., real], after.real, atol=5e-5, rtol=0.0)
            assert_close(turned[..., imaginary], after.imag, atol=5e-5, rtol=0.0)
        assert torch.equal(turned[..., half:], x[..., half:].double())


def test_rotations_keep_lengths_and_differ() -> None:
    x = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(2))
    turn = chatglm.Model(CHATGLM).rotation(3, 8, torch.float32)
    neighbours, halves = rotate_neighbours(x, turn), rotate_halves(x, turn)
    assert_close(neighbours.norm(dim=-1), x.norm(dim=-1))
    assert_close(halves.norm(dim=-1), x.norm(dim=-1))
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert_close(rotate_neighbours(x[..., order], turn), halves[..., order])
    assert (neighbours - halves).abs().max() > 0.1


def test_positions_can_be_divided() -> None:
    plain = chatglm.Model(CHATGLM)
    divided = chatglm.Model(replace(CHATGLM, rope_ratio=4), divides_positions=True)
    for slow, fast in zip(
        divided.rotation(0, 32, torch.float32), plain.rotation(0, 8, torch.float32), strict=True
    ):
        assert_close(slow[::4], fast)


@pytest.mark.parametrize(("time", "before"), [(1, 0), (1, 5), (3, 5), (4, 0)])
def test_query_heads_use_the_group_of_their_run(time: int, before: int) -> None:
    heads, groups, channels = 6, 2, 4
    random = torch.Generator().manual_seed(3)
    cache = Cache()
    held = [torch.randn(1, groups, before, channels, generator=random) for _ in "kv"]
    marks = torch.arange(groups).float()[:, None, None]
    held[1] = marks.expand(groups, before, channels)[None]
    if before:
        cache[0].extend(*held)
    query, key = (torch.randn(1, count, time, channels, generator=random) for count in (heads, groups))
    value = marks.expand(groups, time, channels)[None]
    mixed = causal_attention(query, key, value, cache[0]).view(1, time, heads, channels)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None].expand(time, heads, channels)
    assert_close(mixed[0], expected)


# -------------------------------------------------------------------------- against transformers


def llama(config: Any, rope: Mapping[str, Any], **changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=130,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", **rope},
        tie_word_embeddings=False,
        **changes,
    )


def renamed(state: State, names: Mapping[str, str], dropped: str = "inv_freq") -> dict[str, Tensor]:
    """Every key with the parts of `names` replaced, in their order, but those that contain `dropped`."""
    result = {}
    for key, tensor in state.items():
        if dropped not in key:
            for old, new in names.items():
                key = key.replace(old, new)
            result[key] = tensor
    return result


def assert_same_logits(mine: Any, theirs: transformers.PreTrainedModel, state: State, time: int = 40) -> None:
    theirs.load_state_dict(state, strict=True)
    theirs.eval()
    ids = some_ids(mine.config, time)
    with torch.no_grad():
        assert_alike(mine(ids), theirs(ids).logits, terms_of(mine))


@pytest.mark.parametrize("ratio", [None, 50, 500])
@pytest.mark.parametrize("channels", [16, 128])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_chatglm_is_glm(ratio: int | None, channels: int, grouped: bool, biased: bool) -> None:
    config = replace(
        CHATGLM,
        rope_ratio=ratio,
        kv_channels=channels,
        multi_query_attention=grouped,
        add_qkv_bias=biased,
        layernorm_epsilon=1.5625e-07,
    )
    model = filled(chatglm, config)
    queries, keys = 6 * channels, (2 if grouped else 6) * channels
    state: dict[str, Tensor] = {}
    for name, tensor in renamed(
        model.state_dict(),
        {
            "transformer.embedding.word_embeddings": "model.embed_tokens",
            "transformer.encoder.final_layernorm": "model.norm",
            "transformer.output_layer": "lm_head",
            "transformer.encoder": "model",
            "self_attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.gate_up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        },
    ).items():
        if "query_key_value" not in name:
            state[name] = tensor
            continue
        if not grouped:
            tensor = torch.cat(
                [tensor[(3 * head + part) * channels :][:channels] for part in range(3) for head in range(6)]
            )
        start = 0
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            new = name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")
            state[new] = tensor[start : start + rows]
            start += rows
    glm = transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=130,
            hidden_size=48,
            intermediate_size=100,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2 if grouped else 6,
            head_dim=channels,
            attention_bias=biased,
            rms_norm_eps=1.5625e-07,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0 * (ratio or 1),
                "partial_rotary_factor": 0.5,
            },
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    )
    # Past seq_length too.
    assert_same_logits(model, glm, state, time=100)


def three_blocks(state: State, name: str, into: str) -> dict[str, Tensor]:
    """Fused rows of 48 queries, 48 keys and 48 values, under three names."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if name in key:
            result |= {
                key.replace(name, into.format(part)): rows
                for part, rows in zip("qkv", (tensor[:48], tensor[48:96], tensor[96:]), strict=True)
            }
        else:
            result[key] = tensor
    return result


@pytest.mark.parametrize("config", [BAICHUAN, BAICHUAN2], ids=["baichuan", "baichuan2"])
def test_baichuan_is_llama(config: baichuan.Config) -> None:
    model = filled(baichuan, config)
    state = three_blocks(renamed(model.state_dict(), {}), "W_pack", "{}_proj")
    if config.norm_head:
        head = state["lm_head.weight"]
        state["lm_head.weight"] = head / head.pow(2).sum(1, keepdim=True).sqrt()
    theirs = transformers.LlamaForCausalLM(llama(config, {"rope_theta": 10000.0}))
    assert_same_logits(model, theirs, state, time=100)


def test_qwen_is_qwen2() -> None:
    model = filled(qwen, QWEN)
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "transformer.h": "model.layers",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_proj": "mlp.down_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
    }
    state = three_blocks(renamed(model.state_dict(), names), "attn.c_attn", "self_attn.{}_proj")
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=130,
            hidden_size=48,
            intermediate_size=100,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            use_sliding_window=False,
            tie_word_embeddings=False,
        )
    )
    assert_same_logits(model, theirs, state, time=64)


@pytest.mark.parametrize(
    ("rotary", "rope"),
    [
        (None, {"rope_theta": 10000.0}),
        ({"base": 30000, "type": "origin"}, {"rope_theta": 30000.0}),
        (
            {"base": 10000, "type": "dynamic"},
            {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 1.0},
        ),
        (
            {"base": 10000, "type": "dynamic", "scaling_factor": 2.0},
            {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0},
        ),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("time", [64, 100])
def test_internlm_is_llama(
    rotary: Mapping[str, Any] | None, rope: Mapping[str, Any], biased: bool, time: int
) -> None:
    config = replace(INTERNLM, rotary=rotary, bias=biased)
    model = filled(internlm, config)
    theirs = transformers.LlamaForCausalLM(llama(config, rope, attention_bias=biased))
    assert_same_logits(model, theirs, renamed(model.state_dict(), {}), time)


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (None, {}),
        ({"type": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        ({"type": "dynamic", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("time", [64, 100])
def test_internlm2_is_llama(
    scaling: Mapping[str, Any] | None, rope: Mapping[str, Any], biased: bool, time: int
) -> None:
    config = replace(INTERNLM2, rope_scaling=scaling, bias=biased)
    model = filled(internlm2, config)
    state: dict[str, Tensor] = {}
    for name, tensor in renamed(
        model.state_dict(),
        {
            "model.tok_embeddings": "model.embed_tokens",
            "output.": "lm_head.",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj",
        },
    ).items():
        if "wqkv" not in name:
            state[name] = tensor
            continue
        # Two groups, each of three queries, one key and one value, heads of eight rows.
        rows = {
            "q": [*range(24), *range(40, 64)],
            "k": [*range(24, 32), *range(64, 72)],
            "v": [*range(32, 40), *range(72, 80)],
        }
        for part, taken in rows.items():
            state[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = tensor[taken]
    theirs = transformers.LlamaForCausalLM(
        llama(config, {"rope_theta": 1000000.0, **rope}, num_key_value_heads=2, attention_bias=biased)
    )
    assert_same_logits(model, theirs, state, time)


def test_yi_is_llama() -> None:
    model = filled(yi, YI)
    names = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    theirs = transformers.LlamaForCausalLM(llama(YI, {"rope_theta": 5000000.0}, num_key_value_heads=2))
    assert_same_logits(model, theirs, renamed(model.state_dict(), names), time=100)


def test_whisper_is_whisper(tmp_path: Path) -> None:
    model = whisper_openai.write(tmp_path / "tiny.pt", seed=7, dtype=torch.float32)
    config = whisper_openai.TINY
    names = {
        "positional_embedding": "embed_positions.weight",
        "token_embedding": "embed_tokens",
        "decoder.ln.": "decoder.layer_norm.",
        "ln_post": "layer_norm",
        "blocks": "layers",
        "mlp_ln": "final_layer_norm",
        "mlp.0": "fc1",
        "mlp.2": "fc2",
        "cross_attn_ln": "encoder_layer_norm",
        "attn_ln": "self_attn_layer_norm",
        "encoder_layer_norm": "encoder_attn_layer_norm",
        ".cross_attn.": ".encoder_attn.",
        ".attn.": ".self_attn.",
        ".query.": ".q_proj.",
        ".key.": ".k_proj.",
        ".value.": ".v_proj.",
        ".out.": ".out_proj.",
    }
    state = {f"model.{key}": tensor for key, tensor in renamed(model.state_dict(), names).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    theirs = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=config.n_vocab,
            num_mel_bins=config.n_mels,
            d_model=config.n_audio_state,
            encoder_layers=config.n_audio_layer,
            encoder_attention_heads=config.n_audio_head,
            encoder_ffn_dim=4 * config.n_audio_state,
            decoder_layers=config.n_text_layer,
            decoder_attention_heads=config.n_text_head,
            decoder_ffn_dim=4 * config.n_text_state,
            max_source_positions=config.n_audio_ctx,
            max_target_positions=config.n_text_ctx,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    positions = theirs.model.encoder.embed_positions.weight.clone()
    theirs.load_state_dict(state, strict=True)
    theirs.eval()
    assert_close(model.encoder.positional_embedding, positions)
    random = torch.Generator().manual_seed(5)
    mel = torch.randn(2, 16, 48, generator=random)
    tokens = torch.randint(0, 128, (2, 32), generator=random)
    with torch.no_grad():
        logits = model(mel, tokens)
        assert_alike(logits, theirs(input_features=mel, decoder_input_ids=tokens).logits, terms_of(model))
        silence = model(torch.zeros_like(mel), tokens)
    assert 0.7 < logits.std() < 1.5
    assert (logits - silence).abs().max() > 0.3


# --------------------------------------------------------------------------------------- files

STEMS = {"bin": "pytorch_model", "safetensors": "model"}


def read(file: Path) -> dict[str, Tensor]:
    """With the libraries that made these formats."""
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return dict(state)


@pytest.mark.parametrize(
    ("form", "shards", "dtype"),
    [
        ("bin", 1, torch.float16),
        ("bin", 4, torch.bfloat16),
        ("safetensors", 1, torch.float32),
        ("safetensors", 4, torch.float16),
    ],
)
@EVERY_TOKEN_MODEL
def test_directories(
    tmp_path: Path, module: ModuleType, config: Any, form: str, shards: int, dtype: torch.dtype
) -> None:
    model = module.write(tmp_path, config, seed=11, dtype=dtype, shards=shards, form=form)
    state = model.state_dict()
    stem = STEMS[form]
    if shards == 1:
        files = [f"{stem}.{form}"]
    else:
        files = [f"{stem}-{number:05}-of-00004.{form}" for number in range(1, 5)]
        index = json.loads((tmp_path / f"{stem}.{form}.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state.values())}
        assert list(index["weight_map"]) == sorted(state)
        assert index["weight_map"] == {name: file for file in files for name in read(tmp_path / file)}
    others = {path.name for path in tmp_path.iterdir()} - set(files)
    assert others - {f"{stem}.{form}.index.json", "generation_config.json"} == {"config.json"}
    stored = {name: tensor for file in files for name, tensor in read(tmp_path / file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)

    loaded = module.load(tmp_path)
    assert type(loaded.config) is type(config)
    ids = some_ids(config, 8)
    assert_alike(loaded.float()(ids), model.float()(ids), terms_of(model))


@EVERY_TOKEN_MODEL
def test_half_precision_is_near(module: ModuleType, config: Any) -> None:
    ids = some_ids(config, 30)
    full = filled(module, config)
    for dtype, near in ((torch.bfloat16, 0.3), (torch.float16, 0.05)):
        half = module.Model(config, dtype)
        half.load_state_dict(full.state_dict())
        assert half(ids).dtype == dtype
        exact = module.Model(config)
        exact.load_state_dict(half.state_dict())
        assert_close(half(ids).float(), exact(ids), atol=near, rtol=0.0)


def test_weights_depend_on_the_seed_and_the_name_alone(tmp_path: Path) -> None:
    first = chatglm.write(tmp_path / "a", CHATGLM, seed=1, shards=3).state_dict()
    again = chatglm.write(tmp_path / "b", replace(CHATGLM, num_layers=1), seed=1, form="safetensors")
    other = chatglm.write(tmp_path / "c", CHATGLM, seed=2).state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.state_dict().items())
    different = {name for name, tensor in other.items() if not torch.equal(tensor, first[name])}
    assert different == first.keys() - {"transformer.rotary_pos_emb.inv_freq"}


def test_norms_lie_around_one_and_no_bias_is_zero() -> None:
    for module, config in TOKEN_MODELS.values():
        for name, parameter in filled(module, config).named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                assert 0.5 <= parameter.min() < 0.8 < 1.2 < parameter.max() <= 1.5
            elif name.endswith("bias"):
                assert parameter.abs().max() > 0.3
                assert (parameter != 0).all()


PUBLISHED_CHATGLM3 = """{
    "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification"
    },
    "add_bias_linear": false, "add_qkv_bias": true, "apply_query_key_layer_scaling": true,
    "apply_residual_connection_post_layernorm": false, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": true, "bias_dropout_fusion": true, "ffn_hidden_size": 13696,
    "fp32_residual_connection": false, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1e-05, "multi_query_attention": true, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_layers": 28, "original_rope": true, "padded_vocab_size": 65024,
    "post_layer_norm": true, "rmsnorm": true, "seq_length": 8192, "use_cache": true, "torch_dtype": "float16",
    "transformers_version": "4.30.2", "tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0
}"""
PUBLISHED_QWEN = """{
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen",
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"
    },
    "attn_dropout_prob": 0.0, "bf16": false, "emb_dropout_prob": 0.0, "fp16": false, "fp32": false,
    "hidden_size": 4096, "intermediate_size": 22016, "initializer_range": 0.02, "kv_channels": 128,
    "layer_norm_epsilon": 1e-06, "max_position_embeddings": 32768, "no_bias": true, "num_attention_heads": 32,
    "num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": true,
    "seq_length": 8192, "tie_word_embeddings": false, "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0", "use_cache": true, "use_dynamic_ntk": true, "use_flash_attn": "auto",
    "use_logn_attn": true, "vocab_size": 151936
}"""


@pytest.mark.parametrize(
    ("config", "published"),
    [(chatglm.CHATGLM3_6B, PUBLISHED_CHATGLM3), (qwen.QWEN_7B, PUBLISHED_QWEN)],
    ids=["chatglm3-6b", "Qwen-7B"],
)
def test_configs_are_the_published_ones(config: ModelConfig, published: str) -> None:
    assert config.to_json() == json.loads(published)


CONFIGS: dict[str, ModelConfig] = {name: config for name, (_, config) in TOKEN_MODELS.items()} | {
    "glm-4": chatglm.GLM4_9B_CHAT,
    "baichuan2-tiny": baichuan.TINY_2,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs_survive_json(config: ModelConfig) -> None:
    contents = json.loads(json.dumps(config.to_json()))
    assert type(config).from_json(contents | {"unknown": 1}) == config


def test_side_files(tmp_path: Path) -> None:
    glm = replace(CHATGLM, eos_token_id=(3, 4), pad_token_id=3)
    chatglm.write(tmp_path / "glm-4", glm)
    generation = json.loads((tmp_path / "glm-4/generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([3, 4], 3)
    chatglm.write(tmp_path / "chatglm3", CHATGLM, dtype=torch.float16)
    assert not (tmp_path / "chatglm3/generation_config.json").exists()
    assert json.loads((tmp_path / "chatglm3/config.json").read_text())["torch_dtype"] == "float16"
    qwen.write(tmp_path / "qwen", QWEN, dtype=torch.bfloat16)
    assert "torch_dtype" not in json.loads((tmp_path / "qwen/config.json").read_text())
    assert (tmp_path / "qwen/generation_config.json").exists()


def test_whisper_files(tmp_path: Path) -> None:
    model = whisper_openai.write(tmp_path / "models/tiny.pt", seed=3)
    contents = torch.load(tmp_path / "models/tiny.pt", weights_only=True)
    assert contents.keys() == {"dims", "model_state_dict"}
    assert contents["dims"] == whisper_openai.TINY.to_json()
    assert contents["model_state_dict"].keys() == model.state_dict().keys()
    assert {tensor.dtype for tensor in contents["model_state_dict"].values()} == {torch.float16}
    loaded = whisper_openai.load(tmp_path / "models/tiny.pt")
    mel, tokens = torch.ones(1, 16, 48, dtype=torch.float16), torch.arange(9)[None]
    assert loaded(mel, tokens).dtype == torch.float32
    assert_alike(loaded(mel, tokens), model(mel, tokens), terms_of(model))


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "call",
    [
        lambda: chatglm.Model(replace(CHATGLM, rmsnorm=False)),
        lambda: chatglm.Model(replace(CHATGLM, apply_residual_connection_post_layernorm=True)),
        lambda: chatglm.Model(replace(CHATGLM, pre_seq_len=8)),
        lambda: qwen.Model(replace(QWEN, rotary_pct=0.5)),
        lambda: filled(qwen, QWEN)(some_ids(QWEN, 65)),
    ],
)
def test_what_is_not_modelled_is_said(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="not modelled"):
        call()


def test_a_cache_past_the_trained_length_is_not_modelled_with_dynamic_scaling() -> None:
    model = filled(internlm, DYNAMIC_INTERNLM)
    cache = Cache()
    model(some_ids(DYNAMIC_INTERNLM, 64), cache)
    with pytest.raises(ValueError, match="not modelled"):
        model(some_ids(DYNAMIC_INTERNLM, 1), cache)


def test_qwen_without_scaling_has_no_wall() -> None:
    config = replace(QWEN, use_dynamic_ntk=False, use_logn_attn=False)
    assert filled(qwen, config)(some_ids(config, 65)).shape == (2, 65, 130)


def test_more_shards_than_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fill"):
        yi.write(tmp_path, YI, shards=99)
