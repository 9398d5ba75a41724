"""The tokenizers of ChatGLM2, ChatGLM3 and GLM-4 as files that need no code of theirs.

Their special tokens are in no file: the models' Python classes number them after the vocabulary. Prompts begin
with `[gMASK]` and `sop`; a message is its role's token, a line break, and the text, which is encoded apart.

Source: zai-org/ChatGLM2-6B, zai-org/ChatGLM3 and the published GLM-4: tokenization_chatglm.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.tokenizers import sentencepiece, tiktoken

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

# A blank after the line break stands for the prefix that sentencepiece gives each text it encodes.
_TEMPLATE = (
    "{start}{{% for message in messages %}}"
    "<|{{{{ message['role'] }}}}|>{{{{ message.get('metadata', '') }}}}\n{blank}{{{{ message['content'] }}}}"
    "{{% if message['role'] == 'system' and message.get('tools') %}}\n{{{{ message['tools'] | tojson(indent=4) }}}}"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
_TEMPLATE_2 = (
    "{%- for message in messages %}{%- if message['role'] == 'user' -%}"
    "[Round {{ loop.index0 // 2 + 1 }}]\n\n问：{{ message['content'] }}\n\n答："
    "{%- else -%}{{ message['content'] }}\n\n{%- endif -%}{%- endfor -%}"
)


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
    data: bytes, file: str, vocabulary: int, max_length: int, eos: int | list[int] | None
) -> ChatTokenizer:
    """The tokenizer of any of the three, told apart by its content.

    Args:
        data: of `tokenizer.model`, which is a sentencepiece model or a list of ranks.
        file: named in errors.
        vocabulary: rows of the model's embedding.
        max_length: tokens that the model takes.
        eos: what the model's config says; a list or a GLM-4's own tokens come first.

    Raises:
        CheckpointError: it cannot be read, or has more tokens than the model has rows.
    """
    made = _glm4(data, file, max_length) if _is_ranks(data) else _chatglm(data, file, vocabulary, max_length)
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


def _chatglm(data: bytes, file: str, vocabulary: int, max_length: int) -> ChatTokenizer:
    model = sentencepiece.read(data, file)
    count = len(model.pieces)
    known = {piece.piece for piece in model.pieces}
    # ChatGLM2 has no tokens for roles. Both have room for them; what its config cannot tell, its rows can.
    names = [name for name in _CHATGLM3 if name not in known][: max(vocabulary - count, 0)]
    special = {name: count + place for place, name in enumerate(names)}
    document = sentencepiece.document(model, special)
    pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
    end, unknown = pieces.get("</s>", 2), model.pieces[model.unknown].piece
    has_roles = all(role in special for role in _ROLES)
    template = _TEMPLATE.format(start="[gMASK]sop", blank=" " if model.dummy_prefix else "")
    texts = _files(
        document, eos="</s>", pad=unknown, unknown=unknown, max_length=max_length,
        template=template if has_roles else _TEMPLATE_2,
    )  # fmt: skip
    stops = (end, special["<|user|>"], special["<|observation|>"]) if has_roles else (end,)
    return ChatTokenizer(texts, stops, model.unknown, count + len(special))


def _glm4(data: bytes, file: str, max_length: int) -> ChatTokenizer:
    ranks = tiktoken.read(data, file)
    special = {name: len(ranks) + place for place, name in enumerate(_GLM4)}
    document = tiktoken.document(ranks, _GLM4_WORDS, special)
    end = "<|endoftext|>"
    texts = _files(
        document, eos=end, pad=end, unknown=None, max_length=max_length,
        template=_TEMPLATE.format(start="[gMASK]<sop>", blank=""),
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
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(tokens, ensure_ascii=False, indent=2) + "\n",
    }
