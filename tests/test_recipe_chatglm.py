"""ChatGLM to Llama, Qwen2 and Glm: against an implementation of its own arithmetic, and back to its bytes."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from comparing import assert_alike, terms_of
from recipe_contract import RecipeContract, contents, load, shapes_of
from reference_models import chatglm
from reference_models.chatglm import Config
from test_tokenizers import KINDS, trained
from transformers import AutoTokenizer

import streamconv
from streamconv.errors import PlanError, StreamconvError
from streamconv.families.chatglm import CHATGLM
from streamconv.families.glm import GLM
from streamconv.families.llama import LLAMA
from streamconv.families.qwen import QWEN2

TARGETS = {"llama": LLAMA, "qwen2": QWEN2, "glm": GLM}

CONFIGS = {
    "ChatGLM3": Config(),
    "ChatGLM3-32k": Config(rope_ratio=50),
    "GLM-4": Config(
        rope_ratio=500, layernorm_epsilon=1.5625e-07, eos_token_id=(2, 3, 4), torch_dtype="bfloat16", kv_channels=128,
        num_attention_heads=2, multi_query_group_num=1,
    ),
    "GLM-4-1M": Config(rope_ratio=10000, layernorm_epsilon=1.5625e-07, multi_query_group_num=4),
}  # fmt: skip


class _Contract(RecipeContract):
    @pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        chatglm.write(tmp_path / "source", Config(rope_ratio=50), dtype=request.param, shards=2)
        return tmp_path / "source"


class TestLlama(_Contract):
    recipe = "chatglm-llama"


class TestQwen2(_Contract):
    recipe = "chatglm-qwen2"


class TestGlm(_Contract):
    recipe = "chatglm-glm"


def converted(source: Path, arch: str, tmp_path: Path) -> Path:
    streamconv.convert(source, tmp_path / arch, to_arch=arch, engine="inline")
    return tmp_path / arch


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("arch", TARGETS)
def test_logits_are_those_of_the_original(arch: str, config: Config, tmp_path: Path) -> None:
    original = chatglm.write(tmp_path / "source", config)
    model = load(converted(tmp_path / "source", arch, tmp_path))
    ids = torch.randint(0, config.padded_vocab_size, (1, 65), generator=torch.Generator().manual_seed(1))
    for length in (1, 7, 64, 65):
        expected = original(ids[:, :length])
        found = model(ids[:, :length]).logits
        assert_alike(found, expected, terms_of(model))
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [None, 500])
def test_llama_stays_exact_for_4096_tokens_with_a_cache(ratio: int | None, tmp_path: Path) -> None:
    config = Config(
        rope_ratio=ratio, seq_length=8192, num_attention_heads=2, multi_query_group_num=1, kv_channels=128
    )
    original = chatglm.write(tmp_path / "source", config)
    model = load(converted(tmp_path / "source", "llama", tmp_path))
    ids = torch.randint(0, config.padded_vocab_size, (1, 4096), generator=torch.Generator().manual_seed(1))
    expected = original(ids)
    with torch.no_grad():
        first = model(ids[:, :4090], use_cache=True)
        parts = [first.logits]
        cache = first.past_key_values
        for at in range(4090, 4096):
            step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
            cache = step.past_key_values
    assert_alike(torch.cat(parts, 1), expected, terms_of(model))


def test_the_same_tokens_are_generated(tmp_path: Path) -> None:
    original = chatglm.write(tmp_path / "source", Config(seq_length=256))
    model = load(converted(tmp_path / "source", "llama", tmp_path))
    prompt = torch.tensor([[64, 66, 5, 9]])
    ids = prompt
    for _ in range(24):
        ids = torch.cat([ids, original(ids)[:, -1:].argmax(-1)], 1)
    made = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, ids)


@pytest.mark.parametrize(
    "change",
    [
        {"original_rope": False},
        {"multi_query_attention": False},
        {"add_bias_linear": True},
        {"add_qkv_bias": False},
    ],
    ids=str,
)
def test_variants_of_the_layout(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(Config(), **change)
    original = chatglm.write(tmp_path / "source", config)
    model = load(converted(tmp_path / "source", "llama", tmp_path))
    ids = torch.arange(60)[None]
    assert_alike(model(ids).logits, original(ids), terms_of(model))
    streamconv.convert(
        tmp_path / "llama", tmp_path / "back", to_arch="chatglm", like=tmp_path / "source", engine="inline"
    )
    assert contents(tmp_path / "back") == contents(tmp_path / "source")


def test_positions_are_divided_where_the_config_says_so(tmp_path: Path) -> None:
    written = chatglm.write(tmp_path / "source", Config(rope_ratio=4))
    original = chatglm.Model(written.config, divides_positions=True)
    original.load_state_dict(written.state_dict())
    source = tmp_path / "source" / "config.json"
    source.write_text(json.dumps(json.loads(source.read_text()) | {"rope_divides_positions": True}))
    model = load(converted(tmp_path / "source", "llama", tmp_path))
    ids = torch.arange(60)[None]
    assert_alike(model(ids).logits, original(ids), terms_of(model))
    plan = streamconv.plan(tmp_path / "llama", to_arch="chatglm")
    (config,) = [json.loads(text.content) for text in plan.texts if text.path == "config.json"]
    assert (config["rope_ratio"], config["rope_divides_positions"]) == (4, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rmsnorm": False}, "it has LayerNorm"),
        ({"post_layer_norm": False}, "no final norm"),
        ({"apply_residual_connection_post_layernorm": True}, "residuals"),
        ({"quantization_bit": 4}, "quantised"),
        ({"pre_seq_len": 128}, "P-tuning"),
    ],
)
def test_what_llama_cannot_hold_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    chatglm.write(tmp_path / "source", Config())
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(PlanError, match=said):
        streamconv.plan(tmp_path / "source", to_arch="llama")


def test_a_llama_that_was_never_chatglm_does_not_go_back(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(PlanError, match="only half of a ChatGLM's head rotates"):
        streamconv.plan(tmp_path / "llama", to_arch="chatglm")


def test_a_buffer_that_is_not_what_it_should_be_stops_the_run(tmp_path: Path) -> None:
    from streamconv.errors import ConversionError

    model = chatglm.write(tmp_path / "source", Config())
    state = model.state_dict()
    state["transformer.rotary_pos_emb.inv_freq"] = state["transformer.rotary_pos_emb.inv_freq"] * 1.01
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="inv_freq"):
        converted(tmp_path / "source", "llama", tmp_path)
    assert not (tmp_path / "llama" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "config", [chatglm.CHATGLM3_6B, chatglm.GLM4_9B_CHAT, chatglm.GLM4_9B_CHAT_1M], ids=str
)
def test_the_table_is_the_model(config: Config) -> None:
    with torch.device("meta"):
        model = chatglm.Model(config)
    table = CHATGLM.tensors(CHATGLM.sizes_of(config.to_json()))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: declared.shape for name, declared in table.items()
    }


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_targets_are_what_the_real_class_has(arch: str, config: Config, tmp_path: Path) -> None:
    chatglm.write(tmp_path / "source", config)
    target = converted(tmp_path / "source", arch, tmp_path)
    made = json.loads((target / "config.json").read_text())
    table = TARGETS[arch].tensors(TARGETS[arch].sizes_of(made))
    assert {name: each.shape for name, each in table.items() if not each.optional} == shapes_of(target)


# ------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("arch", TARGETS)
def test_the_output_needs_nothing_else(arch: str, tmp_path: Path) -> None:
    """Model and tokenizer by the Auto classes, and the tokens that the original generates."""
    data = trained(**KINDS["bpe"])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = pieces.get_piece_size()
    original = chatglm.write(tmp_path / "source", Config(padded_vocab_size=count + 20, seq_length=256))
    (tmp_path / "source" / "tokenizer.model").write_bytes(data)
    (tmp_path / "source" / "modeling_chatglm.py").write_text("raise SystemExit")
    target = converted(tmp_path / "source", arch, tmp_path)
    assert not list(target.glob("*.py"))

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load(target)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the quick fox"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    stops = {2, count + 6, count + 8}
    assert set(model.generation_config.eos_token_id) == stops
    ids = prompt
    for _ in range(16):
        ids = torch.cat([ids, original(ids)[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) in stops:
            break
    assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), ids)


def test_a_tokenizer_that_cannot_be_read_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    chatglm.write(tmp_path / "source", Config())
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PlanError, match="not a sentencepiece model"):
        streamconv.plan(tmp_path / "source", to_arch="llama")


@pytest.mark.parametrize(
    "key", ["kv_channels", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"]
)
def test_sizes_that_no_tensor_has_make_no_list(key: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    chatglm.write(source, Config(seq_length=32))
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 400_000_000}))
    tracemalloc.start()
    try:
        with pytest.raises(StreamconvError):
            streamconv.plan(source, to_arch="llama")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"a": ' + "[" * 500 + "]" * 500 + "}"])
def test_a_file_of_settings_that_is_damaged_is_named(text: str, tmp_path: Path) -> None:
    chatglm.write(tmp_path / "source", Config(seq_length=32))
    (tmp_path / "source" / "generation_config.json").write_text(text)
    with pytest.raises(StreamconvError, match=r"generation_config.json: (it is|cannot be read)"):
        streamconv.plan(tmp_path / "source", to_arch="llama")
