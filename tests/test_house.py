"""Who may know what: rules of the rooms that imports alone do not show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import streamconv
from streamconv import families

ROOT = Path(streamconv.__file__).parent
ABOVE = ("families", "cli", "mindformers", "__main__.py", "api.py")
"""Rooms that may name a model."""

# What else is in a model type: whose the model is, of which kind, and in which naming.
NO_MODELS = {"sat", "meta", "openai", "microsoft", "moe", "vae", "bigcode", "v"}
WITHOUT_A_TABLE = {"t5", "mistral", "gemma", "phi"}


@cache
def models() -> re.Pattern[str]:
    """What names a model that there is: the letters of its type; few letters count as a word of their own only."""
    sides = (side for recipe in families.RECIPES for side in (recipe.source, recipe.target) if side)
    types = "-".join(text.lower() for side in sides for text in side.model_types)
    names = {*re.findall("[a-z]+", types), *WITHOUT_A_TABLE} - NO_MODELS
    return re.compile(
        "|".join(name if len(name) > 3 else rf"(?<![a-z]){name}(?![a-z])" for name in names), re.I
    )


def below() -> list[Path]:
    """Every module below the families."""
    return [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in ABOVE]


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Every name and every text of a module but docstrings, with its line. Comments may give sources."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None  # a docstring, which is walked after this
        for field in ("value", "id", "attr", "arg", "name", "asname", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text


def test_models_are_known_by_their_names() -> None:
    for text in ("LlamaForCausalLM", "is_chatglm", "qwen2_moe", "transformer.bloom", "gpt_neox.layers", "T5"):
        assert models().search(text), text
    for text in ("yield", "evaluate", "gptq", "graphics", "sat", "chat"):
        assert not models().search(text), text


def test_nothing_below_the_families_names_a_model() -> None:
    assert len(below()) > 50
    named = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in below()
        for line, text in words(path)
        if models().search(text)
    ]
    assert not named
