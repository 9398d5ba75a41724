"""The tokenizer of Qwen's first generation as files that need no code of it.

Source: Qwen/Qwen-7B: tokenization_qwen.py (pattern, special tokens, NFC), qwen_generation_utils.py (prompts).
"""

from __future__ import annotations

from streamconv.families.tokenizers import tiktoken
from streamconv.families.tokenizers.fast import files

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_SPECIAL = (_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def convert(data: bytes, file: str, max_length: int) -> dict[str, str]:
    """File name -> content, from `qwen.tiktoken`.

    Raises:
        CheckpointError: it is not a list of ranks.
    """
    ranks = tiktoken.read(data, file)
    special = {token: len(ranks) + place for place, token in enumerate(_SPECIAL)}
    document = tiktoken.document(ranks, _WORDS, special) | {"normalizer": {"type": "NFC"}}
    config = {
        "bos_token": None,
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": _END,
        "model_max_length": max_length,
        "pad_token": _END,
    }
    return files(document, config)
