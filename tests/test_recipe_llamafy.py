"""Baichuan, Qwen, InternLM, InternLM2 and Yi as Llama: against their own arithmetic, and back to their bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
import torch
from comparing import assert_alike, terms_of
from recipe_contract import RecipeContract, contents, load, shapes_of
from reference_models import baichuan, internlm, internlm2, qwen, yi
from test_tokenizers import KINDS, TRICKY, trained, trained_ranks
from transformers import AutoTokenizer

import streamconv
from streamconv.errors import PlanError, StreamconvError
from streamconv.families.baichuan import BAICHUAN
from streamconv.families.internlm import INTERNLM, INTERNLM2
from streamconv.families.qwen import QWEN
from streamconv.families.yi import YI
from streamconv.plans import named

DYNAMIC = {"type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Family:
    """A recipe, and how its source is made; `exact` where the arithmetic of both sides is the same."""

    recipe: str
    module: ModuleType
    config: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "Baichuan": Family("baichuan-llama", baichuan),
    "Baichuan2": Family("baichuan-llama", baichuan, {"norm_head": True}),
    "Qwen as Llama": Family("qwen-llama", qwen),
    "Qwen as Qwen2": Family("qwen-qwen2", qwen),
    "InternLM": Family("internlm-llama", internlm),
    "InternLM without biases": Family("internlm-llama", internlm, {"bias": False}),
    "InternLM later": Family("internlm-llama", internlm, {"rotary": {"base": 10000, "type": "origin"}}),
    "InternLM2": Family("internlm2-llama", internlm2),
    "InternLM2 with biases": Family("internlm2-llama", internlm2, {"bias": True}),
    "InternLM2 without groups": Family("internlm2-llama", internlm2, {"num_key_value_heads": 4}),
    "InternLM2 dynamic": Family("internlm2-llama", internlm2, {"rope_scaling": DYNAMIC}),
    "Yi": Family("yi-llama", yi),
}
BACK = [name for name in FAMILIES if name != "Baichuan2"]


def written(family: Family, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return family.module.write(directory, family.module.Config(**family.config), dtype=dtype, shards=2)


def converted(source: Path, recipe: str, tmp_path: Path) -> Path:
    streamconv.convert(source, tmp_path / "out", recipe=recipe, engine="inline")
    return tmp_path / "out"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    original = written(family, tmp_path / "source")
    model = load(converted(tmp_path / "source", family.recipe, tmp_path))
    ids = torch.randint(0, 128, (1, 63), generator=torch.Generator().manual_seed(1))
    expected = original(ids)
    found = model(ids).logits
    assert_alike(found, expected, terms_of(model))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACK)
def test_forward_and_back_is_the_source(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = tmp_path / "source"
    written(family, source, dtype)
    out = converted(source, family.recipe, tmp_path)
    streamconv.convert(
        out, tmp_path / "back", recipe=family.recipe, reverse=True, like=source, engine="inline"
    )
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("name", [name for name in BACK if "InternLM2 dynamic" not in name])
def test_the_config_comes_back_too(name: str, tmp_path: Path) -> None:
    """Without the original at hand: a model of the family that computes the same."""
    family = FAMILIES[name]
    original = written(family, tmp_path / "source")
    out = converted(tmp_path / "source", family.recipe, tmp_path)
    streamconv.convert(
        out, tmp_path / "back", recipe=family.recipe, reverse=True, to="torch", engine="inline"
    )
    state = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    same = {key for key in config if config[key] == original.config.to_json().get(key)}
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"} <= same
    again = family.module.Model(family.module.Config.from_json({**original.config.to_json(), **config}))
    again.load_state_dict(state, strict="inv_freq" not in str(sorted(original.state_dict())))
    ids = torch.arange(40)[None]
    assert_alike(again(ids), original(ids), terms_of(original))


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_what_the_real_class_has(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    written(family, tmp_path / "source")
    out = converted(tmp_path / "source", family.recipe, tmp_path)
    target = named(family.recipe).target
    assert target is not None
    table = target.tensors(target.sizes_of(json.loads((out / "config.json").read_text())))
    assert {key: each.shape for key, each in table.items() if not each.optional} == shapes_of(out)


@pytest.mark.parametrize(
    ("architecture", "module", "config"),
    [
        (BAICHUAN, baichuan, baichuan.BAICHUAN_7B), (BAICHUAN, baichuan, baichuan.BAICHUAN2_7B),
        (QWEN, qwen, qwen.QWEN_7B), (INTERNLM, internlm, internlm.INTERNLM_7B),
        (INTERNLM, internlm, internlm.INTERNLM_20B), (INTERNLM2, internlm2, internlm2.INTERNLM2_7B),
        (YI, yi, yi.YI_6B),
    ],
)  # fmt: skip
def test_the_table_is_the_model(architecture: Any, module: Any, config: Any) -> None:
    with torch.device("meta"):
        model = module.Model(config)
    table = architecture.tensors(architecture.sizes_of(config.to_json()))
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: table[name].shape for name in found} == found
    assert {name for name, each in table.items() if not each.optional} <= set(found)


class TestBaichuan(RecipeContract):
    recipe = "baichuan-llama"
    back_needs = "config"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        baichuan.write(tmp_path / "source")
        return tmp_path / "source"


class TestQwen(RecipeContract):
    recipe = "qwen-llama"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        qwen.write(tmp_path / "source")
        return tmp_path / "source"


class TestQwen2(TestQwen):
    recipe = "qwen-qwen2"


class TestInternlm(RecipeContract):
    recipe = "internlm-llama"
    back_needs = "config"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        internlm.write(tmp_path / "source")
        return tmp_path / "source"


class TestInternlm2(RecipeContract):
    recipe = "internlm2-llama"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        internlm2.write(tmp_path / "source")
        return tmp_path / "source"


class TestYi(RecipeContract):
    recipe = "yi-llama"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        yi.write(tmp_path / "source")
        return tmp_path / "source"


# -------------------------------------------------------------------------------------- special


def changed(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    config |= changes
    (source / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )


def test_a_folded_head_does_not_unfold(tmp_path: Path) -> None:
    written(FAMILIES["Baichuan2"], tmp_path / "source")
    out = converted(tmp_path / "source", "baichuan-llama", tmp_path)
    with pytest.raises(PlanError, match="row_normalize cannot be undone"):
        streamconv.plan(out, recipe="baichuan-llama", reverse=True, like=tmp_path / "source")


def test_what_normalises_its_head_says_so(tmp_path: Path) -> None:
    written(FAMILIES["Baichuan2"], tmp_path / "source")
    plan = streamconv.plan(tmp_path / "source", to_arch="llama")
    assert any("normalised once and for all" in note for note in plan.notes)
    labels = {tensor.spec.name: tensor.exactness.label for tensor in plan.tensors}
    assert labels.pop("lm_head.weight") == "lossy"
    assert set(labels.values()) == {"bit-exact"}


def test_a_model_without_rotation_is_refused(tmp_path: Path) -> None:
    written(FAMILIES["Baichuan2"], tmp_path / "source")
    changed(tmp_path / "source", max_position_embeddings=..., model_max_length=4096)
    with pytest.raises(PlanError, match="ALiBi"):
        streamconv.plan(tmp_path / "source", to_arch="llama")


def test_qwens_context_is_what_it_was_trained_for(tmp_path: Path) -> None:
    qwen.write(tmp_path / "source", replace(qwen.TINY, rotary_emb_base=20000))
    out = converted(tmp_path / "source", "qwen-llama", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (64, 20000.0)
    assert any(
        "beyond seq_length" in note for note in streamconv.plan(tmp_path / "source", to_arch="llama").notes
    )


@pytest.mark.parametrize("recipe", ["qwen-llama", "yi-llama"])
def test_what_is_llama_already_is_told_so(recipe: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(PlanError) as caught:
        streamconv.plan(tmp_path / "llama", recipe=recipe)
    assert "the source is a Llama already" in str(caught.value)


# ------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("bos", [False, True])
def test_a_sentencepiece_model_becomes_a_tokenizer_without_code(bos: bool, tmp_path: Path) -> None:
    written(FAMILIES["InternLM2"], tmp_path / "source")
    data = trained(**KINDS["bpe"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = theirs.get_piece_size()
    settings = {
        "add_bos_token": bos, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_internlm2.X", None]},
        "added_tokens_decoder": {str(count): {"content": "<|im_start|>", "special": True}},
        "chat_template": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
    }  # fmt: skip
    (tmp_path / "source" / "tokenizer.model").write_bytes(data)
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "source" / "tokenization_internlm2.py").write_text("raise SystemExit")
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "source", "internlm2-llama", tmp_path))
    for text in TRICKY:
        if "</s>" not in text:
            assert tokenizer.encode(text) == [1] * bos + theirs.encode(text), text
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [count]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "<s><|im_start|>hi"
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_of_a_tokenizer_that_are_damaged_are_named(name: str, tmp_path: Path) -> None:
    written(FAMILIES["InternLM2"], tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(trained(**KINDS["bpe"]))
    (tmp_path / "source" / name).write_text('{"bos_token": ')
    with pytest.raises(StreamconvError, match=f"{name}: cannot be read as JSON"):
        streamconv.plan(tmp_path / "source", to_arch="llama")


def test_qwens_ranks_become_a_tokenizer_without_code(tmp_path: Path) -> None:
    import tiktoken

    rank_file = trained_ranks()
    from streamconv.families.tokenizers import qwen as files
    from streamconv.families.tokenizers import tiktoken as ranks

    qwen.write(tmp_path / "source")
    (tmp_path / "source" / "qwen.tiktoken").write_bytes(rank_file)
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "source", "qwen-llama", tmp_path))
    found = ranks.read(rank_file, "m")
    special = {token: len(found) + place for place, token in enumerate(files._SPECIAL)}
    theirs = tiktoken.Encoding("x", pat_str=files._WORDS, mergeable_ranks=found, special_tokens=special)
    import unicodedata

    for text in TRICKY:
        assert tokenizer.encode(text) == theirs.encode(unicodedata.normalize("NFC", text)), text
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
