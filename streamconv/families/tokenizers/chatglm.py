"""The tokenizers of ChatGLM2, ChatGLM3 and GLM-4 as files that need no code of theirs.

Their special tokens are in no file: the models' Python classes number them after the vocabulary. Prompts begin
with `[gMASK]` and `sop`; a message is its role's token, a line break, and the text, which is encoded apart.
A template gives one text, so a GLM-4 message that begins with line breaks has them joined to the role's; and
names of special tokens are found in messages too, unless `split_special_tokens` is asked for.

Source: zai-org/ChatGLM2-6B, zai-org/ChatGLM3 and the published GLM-4: tokenization_chatglm.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.families.tokenizers import fast, sentencepiece, tiktoken

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_CHATGLM2 = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM3 = (*_CHATGLM2, *_ROLES)
_GLM4 = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES, "<|begin_of_image|>",
    "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip

_GLM4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Line breaks are written as expressions: transformers drops one that follows a tag. A blank before the content
# stands for the prefix that sentencepiece gives each text it encodes, and an empty text gets none.
_TEMPLATE = (
    "{start}{{% for message in messages %}}{{% set content = message['content'] %}}"
    "{{% if message['role'] == 'system' and message.get('tools') %}}{tools}{{% endif %}}"
    "<|{{{{ message['role'] }}}}|>{{{{ message.get('metadata', '') }}}}{{{{ '\\n' }}}}"
    "{{% if content %}}{blank}{{{{ content }}}}{{% endif %}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
_TOOLS_3 = "{% set content = content ~ '\\n' ~ (message['tools'] | tojson(indent=4)) %}"
_TOOLS_4 = (
    "{% set listed = namespace(text=content) %}{% for tool in message['tools'] %}"
    "{% set function = tool['function'] if 'function' in tool else tool %}"
    "{% set listed.text = listed.text ~ '\\n\\n## ' ~ function['name'] ~ '\\n\\n'"
    " ~ (function | tojson(indent=4)) ~ '\\n在调用上述函数时，请使用 Json 格式表示调用的参数。' %}"
    "{% endfor %}{% set content = listed.text %}"
)
_TEMPLATE_2 = (
    "[gMASK]sop{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}"
    "{% else %}{{ message['content'] ~ '\\n\\n' }}{% endif %}{% endfor %}"
)

_CODE = "tokenization_chatglm.py"
_SETTINGS = "tokenizer_config.json"
BESIDE = (_CODE, _SETTINGS)
"""Files beside `tokenizer.model` that tell ChatGLM2 from ChatGLM3; they are searched for names, never run."""


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer's files and what a model's configs must say to go with it.

    Attributes:
        texts: file name -> content.
        eos_token_ids: what ends an answer.
        pad_token_id: for shorter texts of a batch.
        used: ids go up to this, exclusively.
    """

    texts: dict[str, str]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    used: int


def convert(
    data: bytes,
    file: str,
    vocabulary: int,
    max_length: int,
    eos: int | list[int] | None,
    beside: Mapping[str, bytes] | None = None,
) -> ChatTokenizer:
    """The tokenizer of any of the three, recognised by its content.

    Args:
        data: of `tokenizer.model`, which is a sentencepiece model or a list of ranks.
        file: named in errors.
        vocabulary: rows of the model's embedding.
        max_length: tokens that the model takes.
        eos: what the model's config says; where it is not a list, the tokens that end an answer are those that the
            original's code knows.
        beside: name -> content, of those in `BESIDE` that there are.

    Raises:
        CheckpointError: it cannot be read, or has more tokens than the model has rows.
    """
    made = (
        _glm4(data, file, max_length)
        if _is_ranks(data)
        else _chatglm(data, file, vocabulary, max_length, beside or {})
    )
    if made.used > vocabulary:
        raise CheckpointError(
            f"the tokenizer has ids up to {made.used - 1}, the model's embedding {vocabulary} rows",
            file=file,
            hint="is it this model's tokenizer?",
        )
    stops = tuple(eos) if isinstance(eos, list) else made.eos_token_ids
    return ChatTokenizer(made.texts, stops, made.pad_token_id, made.used)


def _is_ranks(data: bytes) -> bool:
    first = data[:200].split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit()


def _chatglm(
    data: bytes, file: str, vocabulary: int, max_length: int, beside: Mapping[str, bytes]
) -> ChatTokenizer:
    model = sentencepiece.read(data, file)
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    room = vocabulary - len(ids) >= sum(name not in ids for name in _CHATGLM3)
    has_roles = _has_roles(beside, room=room)
    names = _CHATGLM3 if has_roles else _CHATGLM2
    # Some copies have the tokens as pieces already.
    fresh = [name for name in names if name not in ids]
    ids |= {name: len(model.pieces) + place for place, name in enumerate(fresh)}
    unknown = model.pieces[model.unknown].piece
    template = _TEMPLATE.format(start="[gMASK]sop", tools=_TOOLS_3, blank=" " if model.dummy_prefix else "")
    if "</s>" not in ids:
        raise CheckpointError("it has no </s>, which ends ChatGLM's answers", file=file)
    texts = _files(
        sentencepiece.document(model, {name: ids[name] for name in names}),
        eos="</s>", pad=unknown, unknown=unknown, max_length=max_length,
        template=template if has_roles else _TEMPLATE_2,
    )  # fmt: skip
    ends = ("</s>", "<|user|>", "<|observation|>") if has_roles else ("</s>",)
    return ChatTokenizer(texts, tuple(ids[name] for name in ends), model.unknown, len(ids))


def _has_roles(beside: Mapping[str, bytes], *, room: bool) -> bool:
    """Whether it is a ChatGLM3, which has tokens for roles. Both have 65,024 rows, so configs do not show it.

    Args:
        beside: what lies beside the tokenizer.
        room: whether the model has rows for all of ChatGLM3's tokens.
    """
    code = beside.get(_CODE)
    if code is not None:
        return _ROLES[0].encode() in code
    return room and b"chatglm2" not in beside.get(_SETTINGS, b"").lower()


def _glm4(data: bytes, file: str, max_length: int) -> ChatTokenizer:
    ranks = tiktoken.read(data, file)
    special = {name: len(ranks) + place for place, name in enumerate(_GLM4)}
    document = tiktoken.document(ranks, _GLM4_WORDS, special)
    end = "<|endoftext|>"
    texts = _files(
        document, eos=end, pad=end, unknown=None, max_length=max_length,
        template=_TEMPLATE.format(start="[gMASK]<sop>", tools=_TOOLS_4, blank=""),
    )  # fmt: skip
    stops = (special[end], special["<|user|>"], special["<|observation|>"])
    return ChatTokenizer(texts, stops, special[end], len(ranks) + len(special))


def _files(
    document: dict[str, Any], *, eos: str, pad: str, unknown: str | None, max_length: int, template: str
) -> dict[str, str]:
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in document["added_tokens"]
    }
    tokens = {"eos_token": eos, "pad_token": pad, **({"unk_token": unknown} if unknown else {})}
    config = {
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
    }
    special = json.dumps(tokens, ensure_ascii=False, indent=2) + "\n"
    return fast.files(document, config) | {"special_tokens_map.json": special}
