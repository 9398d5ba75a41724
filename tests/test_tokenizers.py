"""Tokenizers that are written as tokenizer.json, against the libraries that the originals need."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as schema
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamconv.errors import CheckpointError
from streamconv.families.tokenizers import chatglm
from streamconv.families.tokenizers import sentencepiece as ours
from streamconv.families.tokenizers import tiktoken as ranks

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "你好，世界。今天天气很好。", "def main():\n    return 42\n",
    "numbers 1 22 333 4444 and (brackets) [too] {yes}", "Ünïcödé and naïve café", "hello hello hello world world",
    "ｆｕｌｌ ｗｉｄｔｈ and ① ② ligature ﬁ", "tabs\tand  spaces", "it's we're they'll I'd", "The THE the",
] * 6  # fmt: skip

TRICKY = [
    "", " ", "a", " leading", "trailing ", "  two  spaces  ", "line\nbreak", "\n", "\n\n  \n", "tab\there", "日本語 テキスト",
    "emoji 🎉🎈 done", "mixed 你好 world", "1234567890", "it's I'll", "ﬁ ① ｆ", "\u200bzero", "a\u0301", "quick brown fox!?",
    "hello hello", "</s> is not special here", "▁ block", "\x00\x01", "ÀÉÎõü", "don't\r\nstop",
    "\n\t x \t\n", "\u3000wide\u3000", "▁", "a ▁ ", "<0x41>", "x<0x41>y", "<ud>", "a<ud>b c<ud> d", "<ud><0x41>", "a  b   c",
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
    "bpe squeezing": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "bpe squeezing without a prefix": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                                       "add_dummy_prefix": False},
    "bpe without bytes": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                          "vocab_size": 200},
    "bpe with own pieces": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                            "remove_extra_whitespaces": False, "user_defined_symbols": ["<ud>", "<u", "▁▁"]},
    "unigram with own pieces": {"model_type": "unigram", "hard_vocab_limit": False, "byte_fallback": True,
                                "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                                "user_defined_symbols": ["<ud>", "▁▁"]},
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


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_is_encoded_alike(kind: str) -> None:
    data = trained(**KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    made = tokenizers.Tokenizer.from_str(json.dumps(ours.document(ours.read(data, "m"), {})))
    # With squeezing or rules something is lost, as is what a vocabulary without bytes does not know.
    lossless = kind not in ("bpe without bytes",) and "nfkc" not in kind and "squeezing" not in kind
    parts = st.sampled_from(
        ["a", "b", "the", " ", "  ", "\n", "▁", "<ud>", "<u", "<0x41>", "你", "好", "1", "é", "ﬁ", "🎉"]
    )

    @settings(max_examples=60, deadline=None)
    @given(text=st.lists(parts, max_size=9).map("".join))
    def check(text: str) -> None:
        ids, found = theirs.encode(text), made.encode(text).ids
        if found != ids:
            # Two ways to cut a text may have the same score, and each library adds with its own precision.
            assert kind.startswith("unigram")
            assert math.isclose(
                *(math.fsum(map(theirs.get_score, way)) for way in (ids, found)), rel_tol=1e-6
            )
            assert theirs.decode(found) == theirs.decode(ids)
        if lossless:
            assert made.decode(ids) == text.replace("▁", " ")

    check()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "glm"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_encodes_alike(kind: str, architecture: str, tmp_path: Path) -> None:
    data = trained(**KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    made = chatglm.convert(data, "m", theirs.get_piece_size() + 20, 8192, 2)
    tokenizer = write(tmp_path / "t", made, architecture)
    for text in TRICKY:
        if "</s>" not in text:
            assert tokenizer.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\xff", "beyond its message's end"),
        (b"\x0a\x02\x0a\x05", "beyond its message's end"),
        (b"\xff" * 11, "does not end"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x12\x02\x18\x04\x0a\x03\x0a\x01a", "neither BPE nor unigram"),
        (b"\x0d\x00", "beyond its message's end"),
        (b"\x02\x00", "the number 0"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a sentencepiece model"),
    ],
)
def test_what_is_no_sentencepiece_model(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours.read(data, "tokenizer.model")
    assert said in str(caught.value)
    assert "tokenizer.model" in str(caught.value)


def changed(**options: Any) -> bytes:
    """A small valid model with other fields, by sentencepiece's own schema."""
    model = schema.ModelProto.FromString(trained(**KINDS["bpe"]))
    for path, value in options.items():
        *parents, last = path.split("__")
        message: Any = model
        for parent in parents:
            message = message.pieces[int(parent)] if parent.isdigit() else getattr(message, parent)
        setattr(message, last, value)
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("fields", "said", "refused"),
    [
        ({"300__piece": "<0x00>"}, "pieces 3 and 300 are both '<0x00>'", True),
        ({"300__piece": ""}, "piece 300 is empty", True),
        ({"0__type": 1}, "0 unknown tokens", False),
        ({"1__type": 2}, "2 unknown tokens", True),
        ({"13__piece": "<0xZZ>"}, "has no piece <0x0A>", True),
        ({"300__score": float("nan")}, "piece 300 has the score nan", False),
        ({"300__piece": "x" * 2000}, "piece 300 has 2000 characters", False),
        ({"trainer_spec__model_type": 3}, "neither BPE nor unigram", False),
        ({"trainer_spec__treat_whitespace_as_suffix": True}, "spaces after words", False),
        ({"normalizer_spec__escape_whitespaces": False}, "leaves spaces as they are", False),
        ({"denormalizer_spec__precompiled_charsmap": b"x"}, "rules for decoded text", False),
    ],
)
def test_models_that_are_not_converted(fields: dict[str, Any], said: str, refused: bool) -> None:
    data = changed(**fields)
    with pytest.raises(CheckpointError, match=said) as caught:
        ours.read(data, "tokenizer.model")
    assert caught.value.headline.file == "tokenizer.model"
    assert caught.value.headline.hint
    if refused:  # by sentencepiece too
        with pytest.raises(RuntimeError):
            sentencepiece.SentencePieceProcessor(model_proto=data)


def test_a_piece_of_an_unknown_kind() -> None:
    with pytest.raises(CheckpointError, match="piece 1 is of the unknown kind 9"):
        ours.read(b"\x0a\x09\x0a\x05<unk>\x18\x02\x0a\x05\x0a\x01a\x18\x09\x12\x02\x18\x02", "m")


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


def test_any_vocabulary_merges_alike() -> None:
    chance = random.Random(7)
    for _ in range(20):
        found = {bytes([byte]): byte for byte in range(256)}
        parts = [b"a", b"b", b"c"]
        while len(found) < 280:
            token = chance.choice(parts) + chance.choice(parts)
            if token not in found:
                found[token] = len(found)
                parts.append(token)
        theirs = tiktoken.Encoding("x", pat_str=chatglm._GLM4_WORDS, mergeable_ranks=found, special_tokens={})
        made = tokenizers.Tokenizer.from_str(json.dumps(ranks.document(found, chatglm._GLM4_WORDS, {})))
        for _ in range(100):
            text = "".join(chance.choices("abc", k=chance.randint(1, 14)))
            assert made.encode(text).ids == theirs.encode(text), text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 tokens"),
        (b"YQ== 0\nYg== 2\n", "the ranks from 0 on"),
        (b"YQ== 0\nYg== 1\n", "is not a token"),
        (b"YQ== 0\nYQ== 1\n", "lines 1 and 2 have the same token, b'a'"),
        (base64.b64encode(b"a" * 2000) + b" 0\n", "line 1 has a token of 2000 bytes"),
        (b"YQ==\n", "line 1 is not"),
        (b"YQ== x\n", "line 1 is not"),
        (b"!!! 0\n", "line 1 is not"),
    ],
)
def test_what_is_no_rank_file(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ranks.read(data, "tokenizer.model")


# ------------------------------------------------------------------------------------- ChatGLM

NAMES = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
TOOLS = [{"name": "get_weather", "description": "天气", "parameters": {"city": {"type": "string"}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "你好 there"},
        {"role": "assistant", "content": " Hello!\nHow are you?"},
        {"role": "user", "content": "fine"},
    ],
    "tools": [
        {"role": "system", "content": "Answer as best you can.", "tools": TOOLS},
        {"role": "user", "content": "weather in 北京?"},
        {"role": "assistant", "metadata": "get_weather", "content": "{'city': 'x'}"},
        {"role": "observation", "content": '{"t": 22}'},
    ],
    "wrapped tools": [
        {"role": "system", "content": "", "tools": [{"type": "function", "function": TOOLS[0]}] * 2},
        {"role": "user", "content": "x"},
    ],
    "odd spaces": [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "  two  "},
        {"role": "user", "content": " "},
    ],
}  # fmt: skip


def built(
    conversation: list[dict[str, Any]], encode: Any, special: dict[str, int], start: str, many: bool
) -> list[int]:
    """What the originals' `build_chat_input` makes of it: every part encoded on its own."""
    ids = [special["[gMASK]"], special[start]]
    for message in conversation:
        content = message["content"]
        if message["role"] == "system" and "tools" in message:
            if many:  # GLM-4 describes one after the other
                for tool in message["tools"]:
                    function = tool.get("function", tool)
                    content += (
                        f"\n\n## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}"
                    )
                    content += "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
            else:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        ids += [
            special[f"<|{message['role']}|>"],
            *encode(message.get("metadata", "") + "\n"),
            *encode(content),
        ]
    return [*ids, special["<|assistant|>"]]


def write(directory: Path, made: chatglm.ChatTokenizer, architecture: str = "llama") -> Any:
    directory.mkdir(exist_ok=True)
    for name, text in made.texts.items():
        (directory / name).write_text(text)
    (directory / "config.json").write_text(json.dumps({"model_type": architecture}))
    # For qwen2, transformers 5 takes Qwen2Tokenizer whatever class the files name (tokenization_auto.py).
    loader: Any = PreTrainedTokenizerFast if architecture == "qwen2" else AutoTokenizer
    return loader.from_pretrained(directory)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", ["bpe", "bpe without a prefix", "bpe squeezing", "bpe nfkc"])
def test_chatglm3_prompts_are_those_of_the_original(kind: str, conversation: str, tmp_path: Path) -> None:
    data = trained(**KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = theirs.get_piece_size()
    tokenizer = write(tmp_path / "t", chatglm.convert(data, "m", count + 20, 8192, 2))
    special = {name: count + place for place, name in enumerate(NAMES)}
    messages = CONVERSATIONS[conversation]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == built(messages, theirs.encode, special, "sop", many=False)
    assert tokenizer.encode("plain") == theirs.encode("plain")
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 0, 2)
    assert len(tokenizer) == count + 9


def test_chatglm2_prompts_are_those_of_the_original(tmp_path: Path) -> None:
    data = trained(**KINDS["bpe"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = theirs.get_piece_size()
    made = chatglm.convert(data, "m", count + 5, 8192, 2)
    assert (made.used, made.eos_token_ids) == (count + 5, (2,))
    tokenizer = write(tmp_path / "t", made)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    text = "[Round 1]\n\n问：hi\n\n答：hello\n\n[Round 2]\n\n问：bye\n\n答："
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == [count + 1, count + 3, *theirs.encode(text)]


@pytest.mark.parametrize(
    ("beside", "rows", "used"),
    [
        ({}, 20, 9),
        ({}, 5, 5),
        ({"tokenization_chatglm.py": b'["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]'}, 20, 5),
        ({"tokenization_chatglm.py": b'["sop", "eop", "<|system|>", "<|user|>"]'}, 20, 9),
        ({"tokenizer_config.json": b'{"name_or_path": "THUDM/chatglm2-6b"}'}, 20, 5),
        ({"tokenizer_config.json": b'{"tokenizer_class": "ChatGLMTokenizer"}'}, 20, 9),
    ],
)
def test_chatglm2_is_told_from_chatglm3(beside: dict[str, bytes], rows: int, used: int) -> None:
    data = trained(**KINDS["bpe"])
    count = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    made = chatglm.convert(data, "m", count + rows, 8192, 2, beside)
    assert made.used == count + used
    assert ("<|user|>" in made.texts["tokenizer.json"]) == (used == 9)


def test_tokens_that_are_pieces_already_keep_their_ids(tmp_path: Path) -> None:
    data = trained(**KINDS["bpe"], control_symbols=NAMES[:4], user_defined_symbols=NAMES[4:])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = theirs.get_piece_size()
    made = chatglm.convert(data, "m", count, 8192, 2)
    special = {name: theirs.piece_to_id(name) for name in NAMES}
    assert (made.used, made.eos_token_ids) == (count, (2, special["<|user|>"], special["<|observation|>"]))
    messages = CONVERSATIONS["plain"]
    found = write(tmp_path / "t", made).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert found == built(messages, theirs.encode, special, "sop", many=False)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_glm4_prompts_are_those_of_the_original(conversation: str, rank_file: bytes, tmp_path: Path) -> None:
    found = ranks.read(rank_file, "m")
    made = chatglm.convert(rank_file, "m", 600, 8192, None)
    assert [stop - len(found) for stop in made.eos_token_ids] == [0, 7, 9]
    assert chatglm.convert(rank_file, "m", 600, 8192, [1, 2]).eos_token_ids == (1, 2)
    tokenizer = write(tmp_path / "t", made)
    special = {name: len(found) + place for place, name in enumerate(chatglm._GLM4)}
    theirs = tiktoken.Encoding(
        "x", pat_str=chatglm._GLM4_WORDS, mergeable_ranks=found, special_tokens=special
    )
    messages = CONVERSATIONS[conversation]
    if (
        conversation == "wrapped tools"
    ):  # nothing before the first tool would join its line breaks to the role's
        messages = [messages[0] | {"content": "Use them."}, *messages[1:]]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == built(messages, theirs.encode, special, "<sop>", many=True)
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("left", special["<|endoftext|>"])


def test_a_tokenizer_of_another_model_is_refused(rank_file: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"ids up to \d+, the model's embedding 300 rows"):
        chatglm.convert(rank_file, "m", 300, 8192, None)
    with pytest.raises(CheckpointError, match=r"ids up to \d+, the model's embedding 422 rows"):
        chatglm.convert(trained(**KINDS["bpe"]), "m", 422, 8192, 2)


def test_an_end_token_is_needed() -> None:
    with pytest.raises(CheckpointError, match="it has no </s>"):
        chatglm.convert(changed(**{"2__piece": "<end>"}), "m", 440, 8192, 2)


@pytest.mark.slow
def test_ids_at_the_published_sizes() -> None:
    model = schema.ModelProto.FromString(trained(**KINDS["bpe"]))
    for index in range(len(model.pieces), 64789):
        model.pieces.add(piece=f"piece {index}", score=-index)
    three = chatglm.convert(model.SerializeToString(), "m", 65024, 8192, 2)
    assert (three.eos_token_ids, three.pad_token_id, three.used) == ((2, 64795, 64797), 0, 64798)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [index.to_bytes(3, "big") for index in range(151329 - len(tokens))]
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    four = chatglm.convert(data, "m", 151552, 8192, None)
    assert (four.eos_token_ids, four.pad_token_id, four.used) == ((151329, 151336, 151338), 151329, 151343)
