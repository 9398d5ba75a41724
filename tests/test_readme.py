"""What the documents say is what the program does."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
AUTHORS = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ADAPTERS = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training-checkpoints.md").read_text(encoding="utf-8")

QUANTISED = (ROOT / "docs" / "quantised.md").read_text(encoding="utf-8")

GALLERY = re.findall(r"^\| [^|]* \| `(streamconv [^`]*)` \|$", README + TRAINING, re.MULTILINE)


def test_the_table_of_formats_is_generated() -> None:
    spec = importlib.util.spec_from_file_location("formats", ROOT / "docs" / "formats.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for document in (README, AUTHORS, QUANTISED, ADAPTERS):
        assert module.written(document) == document, "run python docs/formats.py"


def test_every_file_the_readme_names_is_there() -> None:
    for name in re.findall(
        r"`((?:tests|bench|docs|\.ci)/[\w./]+)`", README + CONTRIBUTING + SECURITY + QUANTISED
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(("document", "promises"), [(DESIGN, 6), (SECURITY, 10)], ids=["design", "security"])
def test_every_promise_has_tests_that_hold_it(document: str, promises: int) -> None:
    """In the tables of promises: a file of tests, and a function in it."""
    table = document.split("## The promises\n")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == promises
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert len(named) > 1, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_page_on_security_names_what_is_needed_at_run_time() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [re.split(r"[^\w.-]", need)[0] for need in project["dependencies"]]
    assert f"needed at run time: {', '.join(needs)}." in SECURITY.replace("\n", " ")


@pytest.mark.parametrize("command", GALLERY)
def test_gallery_commands_are_understood(command: str) -> None:
    from streamconv.cli import parse

    assert len(GALLERY) > 12
    program, *arguments = shlex.split(command)
    assert program == "streamconv"
    assert parse(arguments) is not None


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.save({"model.embed_tokens.weight": torch.randn(2000, 8)}, tmp_path / "model")
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "model-bf16" / "model.safetensors").is_file()


EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
QUOTED = [
    part for block in EXAMPLES for part in re.split(r"^(?=# \S+\.py$)", block, flags=re.MULTILINE) if part
]


@pytest.mark.parametrize("part", QUOTED, ids=lambda part: part.partition("\n")[0])
def test_what_contributing_shows_is_code_of_the_files_that_it_names(part: str) -> None:
    assert len(EXAMPLES) == 7 and len(QUOTED) > 10
    name, _, text = part.partition("\n")
    there = iter((ROOT / name.removeprefix("# ")).read_text(encoding="utf-8").splitlines())
    for line in map(str.strip, text.splitlines()):
        shown = line.removesuffix("...").strip()  # the rest is a gap
        whole = shown == line
        assert not shown or any(
            each.strip() == shown if whole else each.strip().startswith(shown) for each in there
        ), line


def test_the_recipe_of_contributing_runs(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", CONTRIBUTING, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(recipe)
    state = {
        "module.layers.0.mlp.weight": torch.randn(3, 4),
        "module.layers.0.norm.weight": torch.randn(4),
        "module.layers.0.rotary_emb.inv_freq": torch.randn(2),
    }
    torch.save({"state_dict": state}, tmp_path / "last.pt")

    streamconv.convert(tmp_path / "last.pt", tmp_path / "out", recipe=tmp_path / "recipe.toml")

    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        "layers.0.mlp.weight": torch.bfloat16,
        "layers.0.norm.weight": torch.float32,
    }


def test_the_recipe_of_the_page_for_authors_runs(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", AUTHORS, re.DOTALL)
    (tmp_path / "mine.toml").write_text(recipe)
    config = {"model_type": "mine", "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_layer": 2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes(orjson.dumps(config))
    state = {"wte.weight": torch.randn(10, 8)}
    for layer in range(2):
        state[f"h.{layer}.attn.qkv.weight"] = torch.randn(24, 8)
        state[f"h.{layer}.attn.inv_freq"] = torch.randn(2)
    save_file(state, tmp_path / "mine" / "model.safetensors")

    streamconv.convert(tmp_path / "mine", tmp_path / "out", recipe=tmp_path / "mine.toml")

    written = load_file(tmp_path / "out" / "model.safetensors")
    assert orjson.loads((tmp_path / "out" / "config.json").read_bytes()) == {
        "model_type": "llama",
        "num_attention_heads": 2,
    }
    assert written.keys() == {"model.embed_tokens.weight"} | {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkv"
    }
    fused = torch.cat([written[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(fused, state["h.1.attn.qkv.weight"])
