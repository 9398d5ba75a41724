"""Whisper of OpenAI to transformers, and back to a file that OpenAI's loader takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_alike, terms_of
from recipe_contract import contents, shapes_of
from reference_models import whisper_openai
from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor, WhisperForConditionalGeneration

import streamconv
from streamconv.errors import PlanError
from streamconv.families.whisper import OPENAI_WHISPER, WHISPER, _config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    config = whisper_openai.TINY
    original = whisper_openai.write(tmp_path / "tiny.pt", config, seed=0, dtype=dtype)
    streamconv.convert(tmp_path / "tiny.pt", tmp_path / "hf", to_arch="whisper", engine="inline")
    model, info = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    original = original.float()
    mel = torch.randn(1, config.n_mels, 2 * config.n_audio_ctx, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(12)[None]
    found = model(input_features=mel, decoder_input_ids=tokens).logits
    assert_alike(found, original(mel, tokens), terms_of(model))

    streamconv.convert(
        tmp_path / "hf", tmp_path / "back", recipe="whisper-hf", reverse=True, to="torch", engine="inline"
    )
    before = torch.load(tmp_path / "tiny.pt", weights_only=True)
    after = torch.load(tmp_path / "back" / "model.pt", weights_only=True, mmap=True)
    assert list(after) == ["dims", "model_state_dict"]
    assert after["dims"] == before["dims"]
    assert after["model_state_dict"].keys() == before["model_state_dict"].keys()
    for name, tensor in before["model_state_dict"].items():
        assert torch.equal(tensor, after["model_state_dict"][name]), name


def test_a_file_with_dimensions_around_its_weights_has_no_shards(tmp_path: Path) -> None:
    whisper_openai.write(tmp_path / "tiny.pt", whisper_openai.TINY, seed=0)
    streamconv.convert(tmp_path / "tiny.pt", tmp_path / "hf", recipe="whisper-hf", engine="inline")
    back = {"recipe": "whisper-hf", "reverse": True, "to": "torch"}
    assert len(streamconv.plan(tmp_path / "hf", **back).outputs) == 1
    with pytest.raises(PlanError, match=r"--max-shard has no effect on model.pt"):
        streamconv.plan(tmp_path / "hf", **back, max_shard="1MB")


def test_what_transformers_ties_is_left_out_on_the_way_back(tmp_path: Path) -> None:
    whisper_openai.write(tmp_path / "tiny.pt", whisper_openai.TINY, seed=0)
    streamconv.convert(tmp_path / "tiny.pt", tmp_path / "hf", recipe="whisper-hf", engine="inline")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    plan = streamconv.plan(tmp_path / "hf", recipe="whisper-hf", reverse=True)
    assert [dropped.name for dropped in plan.dropped] == ["proj_out.weight"]
    opened = streamconv.open(tmp_path / "tiny.pt")
    assert {tensor.spec.name for tensor in plan.tensors} == set(opened)


def test_the_tables_are_the_models(tmp_path: Path) -> None:
    config = {"model_type": "openai-whisper", **whisper_openai.WHISPER_TINY.to_json()}
    with torch.device("meta"):
        model = whisper_openai.Model(whisper_openai.WHISPER_TINY)
    table = OPENAI_WHISPER.tensors(OPENAI_WHISPER.sizes_of(config))
    assert {name: each.shape for name, each in table.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    made = _config(config)
    assert (made["eos_token_id"], made["decoder_start_token_id"]) == (50257, 50258)
    (tmp_path / "config.json").write_text(json.dumps(made))
    real = shapes_of(tmp_path, AutoModelForSpeechSeq2Seq)
    assert {name: each.shape for name, each in WHISPER.tensors(WHISPER.sizes_of(made)).items()} == real


def test_files_around_it(tmp_path: Path) -> None:
    whisper_openai.write(tmp_path / "tiny.pt", whisper_openai.TINY, seed=0)
    streamconv.convert(tmp_path / "tiny.pt", tmp_path / "hf", recipe="auto", engine="inline")
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "hf").feature_size == whisper_openai.TINY.n_mels
    assert any("tokenizer" in note for note in streamconv.plan(tmp_path / "tiny.pt", recipe="auto").notes)
    streamconv.convert(
        tmp_path / "tiny.pt", tmp_path / "small", recipe="auto", memory_budget="16MiB", workers=2
    )
    assert contents(tmp_path / "small") == contents(tmp_path / "hf")


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    whisper_openai.write(tmp_path / "tiny.pt", whisper_openai.TINY, seed=0)
    with pytest.raises(PlanError, match=r"encoder\.ln_post\.weight"):
        streamconv.plan(tmp_path / "tiny.pt", recipe="auto", drop=["encoder.ln_post.weight"])
    state = torch.load(tmp_path / "tiny.pt", weights_only=True)
    state["model_state_dict"]["alignment_heads"] = torch.zeros(3)
    torch.save(state, tmp_path / "tiny.pt")
    with pytest.raises(PlanError, match="alignment_heads"):
        streamconv.plan(tmp_path / "tiny.pt", recipe="auto")
