"""Tokenizers that are written as tokenizer.json, against the libraries that the originals need."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from streamconv.errors import CheckpointError
from streamconv.tokenizers import chatglm
from streamconv.tokenizers import sentencepiece as ours
from streamconv.tokenizers import tiktoken as ranks

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "你好，世界。今天天气很好。", "def main():\n    return 42\n",
    "numbers 1 22 333 4444 and (brackets) [too] {yes}", "Ünïcödé and naïve café", "hello hello hello world world",
    "ｆｕｌｌ ｗｉｄｔｈ and ① ② ligature ﬁ", "tabs\tand  spaces", "it's we're they'll I'd", "The THE the",
] * 6  # fmt: skip

TRICKY = [
    "", " ", "a", " leading", "trailing ", "  two  spaces  ", "line\nbreak", "\n", "\n\n  \n", "tab\there", "日本語 テキスト",
    "emoji 🎉🎈 done", "mixed 你好 world", "1234567890", "it's I'll", "ﬁ ① ｆ", "\u200bzero", "a\u0301", "quick brown fox!?",
    "hello hello", "</s> is not special here", "▁ block", "\x00\x01", "ÀÉÎõü", "don't\r\nstop",
]  # fmt: skip


def trained(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2, **{"vocab_size": 420, **options}
    )
    return out.getvalue()


KINDS = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False},
    "bpe nfkc": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "bpe without a prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False,
                             "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram", "hard_vocab_limit": False, "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False},
    "unigram nfkc": {"model_type": "unigram", "hard_vocab_limit": False, "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, tokenizers.Tokenizer]:
    data = trained(**KINDS[request.param])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    document = ours.document(ours.read(data, "tokenizer.model"), {"<|user|>": theirs.get_piece_size()})
    return theirs, tokenizers.Tokenizer.from_str(json.dumps(document))


@pytest.mark.parametrize("text", TRICKY)
def test_sentencepiece_encodes_alike(pair: tuple[Any, tokenizers.Tokenizer], text: str) -> None:
    theirs, made = pair
    if "</s>" in text:  # here it is a token wherever it stands, there it never is
        text = text.replace("</s>", "<s>x")[3:]
    assert made.encode(text).ids == theirs.encode(text)


def test_every_segment_has_its_own_prefix(pair: tuple[Any, tokenizers.Tokenizer]) -> None:
    theirs, made = pair
    found = made.encode("hello<|user|>world").ids
    assert found == [*theirs.encode("hello"), theirs.get_piece_size(), *theirs.encode("world")]


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab cde\n你好1🎉", max_size=24))
def test_any_text_is_encoded_alike(text: str) -> None:
    theirs, made = _identity()
    assert made.encode(text).ids == theirs.encode(text)
    assert made.decode(made.encode(text).ids) == text


_CACHE: list[tuple[Any, tokenizers.Tokenizer]] = []


def _identity() -> tuple[Any, tokenizers.Tokenizer]:
    if not _CACHE:
        data = trained(**KINDS["bpe"])
        document = ours.document(ours.read(data, "m"), {})
        _CACHE.append(
            (
                sentencepiece.SentencePieceProcessor(model_proto=data),
                tokenizers.Tokenizer.from_str(json.dumps(document)),
            )
        )
    return _CACHE[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\xff", "beyond its message's end"),
        (b"\x0a\x02\x0a\x05", "beyond its message's end"),
        (b"\xff" * 11, "does not end"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "no UTF-8"),
        (b"\x12\x02\x18\x04\x0a\x03\x0a\x01a", "neither BPE nor unigram"),
        (b"\x0d\x00", "beyond its message's end"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no sentencepiece model"),
    ],
)
def test_what_is_no_sentencepiece_model(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours.read(data, "tokenizer.model")
    assert said in str(caught.value)
    assert "tokenizer.model" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        ours.read(data, "m")


# ------------------------------------------------------------------------------------ tiktoken


@pytest.fixture(scope="module")
def rank_file() -> bytes:
    return trained_ranks()


def trained_ranks() -> bytes:
    """Ranks as training makes them: the most frequent pair first."""
    found = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in text.encode()] for text in CORPUS]
    while any(len(word) > 1 for word in words) and len(found) < 500:
        count: dict[bytes, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                count[left + right] = count.get(left + right, 0) + 1
        best = max(count, key=lambda pair: (count[pair], pair))
        found.setdefault(best, len(found))
        for word in words:
            at = 0
            while at + 1 < len(word):
                if word[at] + word[at + 1] == best:
                    word[at : at + 2] = [best]
                at += 1
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in found.items())


@pytest.mark.parametrize("text", TRICKY)
def test_tiktoken_encodes_alike(rank_file: bytes, text: str) -> None:
    found = ranks.read(rank_file, "tokenizer.model")
    special = {"<|user|>": len(found)}
    theirs = tiktoken.Encoding(
        "x", pat_str=chatglm._GLM4_WORDS, mergeable_ranks=found, special_tokens=special
    )
    made = tokenizers.Tokenizer.from_str(json.dumps(ranks.document(found, chatglm._GLM4_WORDS, special)))
    assert made.encode(text).ids == theirs.encode(text)
    assert made.decode(made.encode(text).ids) == text
    joined = f"{text}<|user|>{text}"
    assert made.encode(joined).ids == theirs.encode(joined, allowed_special="all")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 tokens"),
        (b"YQ== 0\nYg== 2\n", "the ranks from 0 on"),
        (b"YQ== 0\nYQ== 0\n", "is no token of its own"),
        (b"YQ==\n", "line 1 is not"),
        (b"YQ== x\n", "line 1 is not"),
        (b"!!! 0\n", "line 1 is not"),
    ],
)
def test_what_is_no_rank_file(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ranks.read(data, "tokenizer.model")


# ------------------------------------------------------------------------------------- ChatGLM

CONVERSATION = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "你好 there"},
    {"role": "assistant", "content": " Hello!\nHow are you?"},
    {"role": "user", "content": "fine"},
]


def write(directory: Path, made: chatglm.ChatTokenizer) -> Any:
    directory.mkdir(exist_ok=True)
    for name, text in made.texts.items():
        (directory / name).write_text(text)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(directory)


def test_chatglm3_prompts_are_those_of_the_original(tmp_path: Path) -> None:
    data = trained(**KINDS["bpe"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = theirs.get_piece_size()
    tokenizer = write(tmp_path / "t", chatglm.convert(data, "m", count + 20, 8192, 2))
    roles = {"system": 5, "user": 6, "assistant": 7, "observation": 8}
    expected = [count + 1, count + 3]  # [gMASK] sop
    for message in CONVERSATION:
        expected += [count + roles[message["role"]], *theirs.encode("\n"), *theirs.encode(message["content"])]
    expected.append(count + roles["assistant"])
    found = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert found == expected
    assert tokenizer.encode("plain") == theirs.encode("plain")
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 0, 2)
    assert len(tokenizer) == count + 9


def test_chatglm2_has_no_roles(tmp_path: Path) -> None:
    data = trained(**KINDS["bpe"])
    count = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    made = chatglm.convert(data, "m", count + 5, 8192, 2)
    assert (made.used, made.eos_token_ids) == (count + 5, (2,))
    tokenizer = write(tmp_path / "t", made)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "[Round 1]\n\n问：hi\n\n答："


def test_glm4_prompts_are_those_of_the_original(rank_file: bytes, tmp_path: Path) -> None:
    found = ranks.read(rank_file, "m")
    made = chatglm.convert(rank_file, "m", 600, 8192, None)
    assert [stop - len(found) for stop in made.eos_token_ids] == [0, 7, 9]
    assert chatglm.convert(rank_file, "m", 600, 8192, [1, 2]).eos_token_ids == (1, 2)
    tokenizer = write(tmp_path / "t", made)
    special = {name: len(found) + place for place, name in enumerate(chatglm._GLM4)}
    theirs = tiktoken.Encoding(
        "x", pat_str=chatglm._GLM4_WORDS, mergeable_ranks=found, special_tokens=special
    )
    expected = [special["[gMASK]"], special["<sop>"]]
    for message in CONVERSATION:
        text = message["content"].lstrip()  # a blank after the line break would join it
        expected += [special[f"<|{message['role']}|>"], *theirs.encode("\n"), *theirs.encode(text)]
    expected.append(special["<|assistant|>"])
    conversation = [message | {"content": message["content"].lstrip()} for message in CONVERSATION]
    assert (
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False) == expected
    )


def test_a_tokenizer_of_another_model_is_refused(rank_file: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"ids up to \d+, the model's embedding 300 rows"):
        chatglm.convert(rank_file, "m", 300, 8192, None)
