"""Qwen-VL taken apart into language and vision; Qwen2-VL under the names of transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_alike, terms_of
from recipe_contract import contents, load
from reference_models import qwen
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

import streamconv


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Qwen with a vision part beside it."""
    qwen.write(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    vision = {
        "transformer.visual.proj": torch.randn(8, 16),
        "transformer.visual.transformer.resblocks.0.attn.in_proj.weight": torch.randn(24, 8),
        "transformer.visual.transformer.resblocks.0.ln_1.weight": torch.randn(8),
    }
    save_file(state | vision, file, {"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(
        json.dumps(config | {"visual": {"width": 8, "layers": 1}})
    )
    return tmp_path / "source"


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_language_part_is_a_model_of_its_own(source: Path, arch: str, tmp_path: Path) -> None:
    plan = streamconv.plan(source, to_arch=arch)
    assert any(note.startswith(f"recipe qwenvl-{arch}:") for note in plan.notes)
    assert len([dropped for dropped in plan.dropped if "vision part" in dropped.reason]) == 3
    streamconv.convert(plan, tmp_path / "out", engine="inline")
    state = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if "visual" not in name
    }
    original = qwen.Model(qwen.TINY)
    original.load_state_dict(state)
    ids = torch.arange(50)[None]
    model = load(tmp_path / "out")
    assert_alike(model(ids).logits, original(ids), terms_of(model))


def test_the_vision_part_alone(source: Path, tmp_path: Path) -> None:
    streamconv.convert(source, tmp_path / "out", recipe="qwenvl-vision", engine="inline")
    assert set(contents(tmp_path / "out")) == {
        "proj", "transformer.resblocks.0.attn.in_proj.weight", "transformer.resblocks.0.ln_1.weight",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["width"] == 8


def test_a_qwen_with_eyes_is_not_taken_for_one_without(source: Path) -> None:
    plan = streamconv.plan(source, to_arch="llama")
    assert not any(note.startswith("recipe qwen-llama:") for note in plan.notes)


def test_qwen2_vl_under_both_namings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "four")
    model.save_pretrained(tmp_path / "five", save_original_format=False)
    assert any(name.startswith("visual.") for name in contents(tmp_path / "four"))
    streamconv.convert(tmp_path / "four", tmp_path / "to-five", recipe="qwen2vl-v5", engine="inline")
    assert contents(tmp_path / "to-five") == contents(tmp_path / "five")
    streamconv.convert(
        tmp_path / "five", tmp_path / "to-four", recipe="qwen2vl-v5", reverse=True, engine="inline"
    )
    assert contents(tmp_path / "to-four") == contents(tmp_path / "four")
    for made in ("to-five", "to-four"):
        load(tmp_path / made, AutoModelForImageTextToText)
