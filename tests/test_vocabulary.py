"""More or fewer rows of the vocabulary: in the weights, in the config, and checked with the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_alike, terms_of
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_contract import contents, load
from reference_models import chatglm
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import streamconv
from streamconv.errors import PlanError, UsageError
from streamconv.ops import Concat, MeanRows, apply
from streamconv.plans.vocabulary import used_ids

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 90,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=request.param)).save_pretrained(
        tmp_path / "source"
    )
    return tmp_path / "source"


def tokenizer(directory: Path, ids: int) -> None:
    document = {
        "model": {"vocab": {f"t{index}": index for index in range(ids - 1)}},
        "added_tokens": [{"id": ids - 1}],
    }
    (directory / "tokenizer.json").write_text(json.dumps(document))


def test_padding_keeps_what_the_model_says(source: Path, tmp_path: Path) -> None:
    streamconv.convert(source, tmp_path / "out", pad_vocab=64, engine="inline")
    before, after = load(source), load(tmp_path / "out")
    assert after.config.vocab_size == 128
    old, new = (model.get_input_embeddings().weight for model in (before, after))
    assert torch.equal(new[:90], old)
    mean = old.double().mean(0).float()
    assert torch.allclose(new[90:], mean.expand(38, -1), rtol=1e-6, atol=1e-9)
    ids = torch.arange(20)[None]
    assert_alike(after(ids).logits[..., :90], before(ids).logits, terms_of(before))


def test_padding_with_zeros(source: Path, tmp_path: Path) -> None:
    streamconv.convert(source, tmp_path / "out", resize_vocab=97, vocab_fill="zero", engine="inline")
    new = load(tmp_path / "out").get_input_embeddings().weight
    assert new.shape == (97, 64)
    assert not new[90:].any()


def test_cutting_is_checked_with_the_tokenizer(source: Path, tmp_path: Path) -> None:
    tokenizer(source, 80)
    with pytest.raises(PlanError, match="ids up to 79"):
        streamconv.plan(source, resize_vocab=79)
    streamconv.convert(source, tmp_path / "out", resize_vocab=80, engine="inline")
    assert load(tmp_path / "out").config.vocab_size == 80
    assert any("ids up to 79" in note for note in streamconv.plan(source, resize_vocab=80).notes)


def test_without_a_tokenizer_it_says_that_nothing_was_checked(source: Path) -> None:
    assert any("no tokenizer was checked" in note for note in streamconv.plan(source, resize_vocab=40).notes)
    assert any("as many rows as are wanted" in note for note in streamconv.plan(source, pad_vocab=9).notes)


def test_a_recipe_comes_first(tmp_path: Path) -> None:
    chatglm.write(tmp_path / "glm", chatglm.Config(padded_vocab_size=70))
    streamconv.convert(tmp_path / "glm", tmp_path / "llama", to_arch="llama", pad_vocab=64, engine="inline")
    assert load(tmp_path / "llama").get_output_embeddings().weight.shape == (128, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pad_vocab": 64, "resize_vocab": 64}, "give one of them"),
        ({"pad_vocab": -1}, "--pad-vocab -1"),
        ({"pad_vocab": 64, "vocab_fill": "noise"}, "mean or zero"),
    ],
)
def test_wrong_options(source: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        streamconv.plan(source, **options)


def test_an_unknown_architecture_is_said_to_be_so(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(PlanError, match="the architecture is not known"):
        streamconv.plan(source, pad_vocab=64)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (None, None),
        ('{"model": {"vocab": {}}}', 0),
        ('{"model": {"vocab": {"a": 4}}, "added_tokens": [{"id": 9}]}', 10),
        ('{"model": {"vocab": [["a", 0.5], ["b", 0.1]]}}', 2),
    ],
)
def test_ids_of_a_tokenizer(text: str | None, ids: int | None) -> None:
    assert used_ids(text) == ids


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}'])
def test_a_tokenizer_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        used_ids(text)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), width=st.integers(1, 40), more=st.integers(0, 9))
def test_the_mean_does_not_depend_on_blocks(
    rows: int, width: int, more: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from streamconv.api import LazyTensor

    directory = tmp_path_factory.mktemp("mean")
    values = torch.randn(rows, width).to(torch.bfloat16)
    save_file({"x": values}, directory / "model.safetensors")
    leaf = streamconv.open(directory / "model.safetensors").contents["x"]
    (mean,) = apply(MeanRows(more), leaf)
    (grown,) = apply(Concat(0), leaf, mean)
    padded = LazyTensor(grown).numpy().astype(np.float32)
    mean = values.double().mean(0)
    assert np.array_equal(padded[:rows], values.float().numpy())
    np.testing.assert_allclose(
        padded[rows:], np.broadcast_to(mean.numpy(), (more, width)), rtol=2**-8, atol=1e-7
    )


def test_the_mean_of_many_rows_in_little_memory(tmp_path: Path) -> None:
    """Over many chunks, by several workers: the bytes of the whole."""
    torch.manual_seed(0)
    config = TINY | {"vocab_size": 30_001}
    (tmp_path / "source").mkdir()
    state = {"model.embed_tokens.weight": torch.randn(30_001, 64), "model.norm.weight": torch.ones(64)}
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    for name, options in {
        "one": {"engine": "inline"},
        "two": {"memory_budget": "16MiB", "workers": 2},
    }.items():
        streamconv.convert(tmp_path / "source", tmp_path / name, pad_vocab=1024, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    made = load_file(tmp_path / "one" / "model.safetensors")["model.embed_tokens.weight"]
    mean = state["model.embed_tokens.weight"].double().mean(0).float()
    assert torch.equal(made[-1], made[30_001])
    assert torch.allclose(made[-1], mean, rtol=1e-6, atol=1e-9)
