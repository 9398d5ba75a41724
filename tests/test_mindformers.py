"""MindFormers' own flags, and the documents about it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import mindspore
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_mindspore import as_torch

import streamconv
from streamconv import api
from streamconv.mindformers.__main__ import MODELS, main
from streamconv.plans import all_recipes

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "mindformers.md").read_text(encoding="utf-8")


def llama(directory: Path, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model.state_dict()


def call(model: str, source: Path, out: Path, *more: str) -> list[str]:
    return ["--model", model, "--input_path", str(source), "--output_path", str(out), *more]


def same(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_every_model_has_its_recipes() -> None:
    known = all_recipes()
    for names in MODELS.values():
        assert all(f"mindformers-{name}" in known for name in names)


def test_the_documented_command_and_its_way_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = llama(tmp_path / "torch_weights")
    out = tmp_path / "ms_weights" / "llama.ckpt"
    words = call("llama", tmp_path / "torch_weights", out)
    assert main(words) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("streamconv "))
    assert shlex.split(printed)[:3] == [
        "streamconv",
        str(tmp_path / "torch_weights"),
        str(out.with_suffix("")),
    ]
    loaded = mindspore.load_checkpoint(str(out))
    assert torch.equal(
        as_torch(loaded["model.layers.1.attention.wq.weight"]),
        state["model.layers.1.self_attn.q_proj.weight"],
    )
    back = tmp_path / "back"
    like = ["--like", str(tmp_path / "torch_weights")]
    assert main(call("llama", out, back, "--reversed", *like)) == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize("inside", ["config.json", "model.safetensors", "nothing"])
def test_a_file_in_the_directory_stands_for_it(tmp_path: Path, inside: str) -> None:
    llama(tmp_path / "hf")
    words = call("llama", tmp_path / "hf" / inside, tmp_path / "a.ckpt")
    if inside == "model.safetensors":
        words[3] = str(tmp_path / "hf")
    assert main(words) == 0
    assert (tmp_path / "a.ckpt").is_file()


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_dtypes_as_mindformers_spells_them(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state = llama(tmp_path / "hf")
    words = [
        "--model=llama",
        f"--input_path={tmp_path / 'hf'}",
        f"--output_path={tmp_path / 'a.ckpt'}",
        "--dtype",
        name,
    ]
    assert main(words) == 0
    found = as_torch(mindspore.load_checkpoint(str(tmp_path / "a.ckpt"))["lm_head.weight"])
    assert torch.equal(found, state["lm_head.weight"].to(dtype))


def test_the_file_that_is_asked_for_is_what_was_written_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = llama(tmp_path / "hf")
    words = ["--model=llama", f"--input_path={tmp_path / 'hf'}", f"--output_path={tmp_path / 'a.ckpt'}"]
    assert main(words) == 0
    assert main([*words, "--overwrite", "--dtype", "fp16"]) == 0
    assert (tmp_path / "a.ckpt").samefile(tmp_path / "a" / "model.ckpt")
    found = as_torch(mindspore.load_checkpoint(str(tmp_path / "a.ckpt"))["lm_head.weight"])
    assert torch.equal(found, state["lm_head.weight"].to(torch.float16))
    (tmp_path / "a.ckpt").unlink()
    (tmp_path / "a.ckpt").write_text("another's")
    assert main([*words, "--overwrite"]) == 2
    assert "there is another file of this name" in capsys.readouterr().err
    assert (tmp_path / "a.ckpt").read_text() == "another's"


def test_a_torch_file_back_where_one_is_asked_for(tmp_path: Path) -> None:
    state = llama(tmp_path / "hf")
    assert main(call("llama", tmp_path / "hf", tmp_path / "a.ckpt")) == 0
    words = [
        "--model",
        "llama",
        "--reversed",
        "--input_path",
        str(tmp_path / "a.ckpt"),
        "--like",
        str(tmp_path / "hf"),
    ]
    assert main([*words, "--output_path", str(tmp_path / "out.bin")]) == 0
    found = torch.load(tmp_path / "out.bin", weights_only=True)
    assert same(found, state)
    assert main([*words, "--output_path", str(tmp_path / "made" / "model.safetensors")]) == 0
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert same(found, state)


def bloom(directory: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    )
    model.save_pretrained(directory)
    return model.state_dict()


def test_sizes_are_needed_where_no_config_says_them(tmp_path: Path) -> None:
    state = bloom(tmp_path / "hf")
    out = tmp_path / "bloom.ckpt"
    assert main(call("bloom", tmp_path / "hf", out)) == 0
    os.rename(out, tmp_path / "alone.ckpt")
    words = ["--model", "bloom", "--reversed", "--input_path", str(tmp_path / "alone.ckpt")]
    words += ["--output_path", str(tmp_path / "back")]
    assert main(words) == 2
    assert main([*words, "--n_head", "4", "--hidden_size", "32"]) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in found)


def test_a_wrong_size_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bloom(tmp_path / "hf")
    words = call("bloom", tmp_path / "hf", tmp_path / "a.ckpt")
    assert main([*words, "--n_head", "8"]) == 2
    assert "n_head is 4 in the config, and 8 is given" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_fused_projections_are_asked_for(tmp_path: Path) -> None:
    llama(tmp_path / "hf")
    words = call("llama", tmp_path / "hf", tmp_path / "a.ckpt")
    assert main([*words, "--qkv_concat", "True"]) == 0
    names = mindspore.load_checkpoint(str(tmp_path / "a.ckpt")).keys()
    assert "model.layers.0.attention.w_qkv.weight" in names


def test_the_recipe_is_chosen_by_what_the_source_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.Qwen2Config(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert main(call("qwen", tmp_path / "hf", tmp_path / "a.ckpt")) == 0
    assert "--recipe mindformers-qwen2 " in capsys.readouterr().out


def test_it_is_planned_once_for_each_recipe_with_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path / "hf")
    plan, given = api.plan, []

    def planned(source, destination, **options):
        given.append(options)
        return plan(source, destination, **options)

    monkeypatch.setattr(api, "plan", planned)
    words = call("telechat", tmp_path / "hf", tmp_path / "a.ckpt")
    assert (
        main([*words, "--dtype", "bf16", f"--config={tmp_path / 'hf' / 'config.json'}", "--drop", "x.*"]) == 2
    )
    assert [Path(options.pop("recipe")).name for options in given] == [
        "mindformers-telechat", "mindformers-telechat-moe"
    ]  # fmt: skip
    config = str(tmp_path / "hf" / "config.json")
    told = {"reverse": True, "to": "mindspore", "dtype": ["bf16"], "config": config, "drop": ["x.*"]}
    assert given == [told, told]
    given.clear()
    words[1] = "llama"
    assert main(words) == 0
    assert len(given) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--model", "llama", "--use_gmm", "True"], "--use_gmm is not for --model llama"),
        (["--model", "llama", "--no_such_flag", "1"], "--no_such_flag has no meaning here"),
    ],
)
def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    llama(tmp_path / "hf")
    assert (
        main([*words, "--input_path", str(tmp_path / "hf"), "--output_path", str(tmp_path / "a.ckpt")]) == 2
    )
    assert said in capsys.readouterr().err


def test_it_runs_as_a_module_without_torch_or_mindspore(tmp_path: Path) -> None:
    llama(tmp_path / "hf")
    program = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--model', 'llama', '--input_path', sys.argv[1], '--output_path', sys.argv[2]]\n"
        "try:\n    runpy.run_module('streamconv.mindformers', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'mindspore'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "hf"), str(tmp_path / "a.ckpt")]
    subprocess.run(command, check=True, cwd=ROOT)


# ------------------------------------------------------------------------------------------- the document


def test_the_recipe_of_the_document_is_llama_both_ways(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len([line for line in recipe.splitlines() if " = " in line]) == 14
    (tmp_path / "my-llama.toml").write_text(recipe)
    state = llama(tmp_path / "hf")
    mine = {"recipe": tmp_path / "my-llama.toml", "reverse": True, "to": "mindspore"}
    streamconv.convert(tmp_path / "hf", tmp_path / "mine", **mine)
    streamconv.convert(tmp_path / "hf", tmp_path / "ours", recipe="auto", to="mindspore")
    loaded = [mindspore.load_checkpoint(str(tmp_path / place / "model.ckpt")) for place in ("mine", "ours")]
    assert loaded[0].keys() == loaded[1].keys()
    assert all(torch.equal(as_torch(loaded[0][name]), as_torch(loaded[1][name])) for name in loaded[0])
    shutil.rmtree(tmp_path / "ours")
    streamconv.convert(
        tmp_path / "mine" / "model.ckpt", tmp_path / "back", recipe=mine["recipe"], like=tmp_path / "hf"
    )
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert same(found, state)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("command", re.findall(r"`(streamconv [^`]*)`", DOCUMENT))
def test_the_documents_commands_are_understood(command: str) -> None:
    from streamconv.cli import parse

    words = shlex.split(command)[1:]
    assert parse(words) is not None
    named = [after for before, after in pairwise(words) if before == "--recipe"]
    assert all(name == "auto" or name.endswith(".toml") or name in all_recipes() for name in named)


# --------------------------------------------------------------------------------- back from its own output


@pytest.mark.parametrize("reversed_", [["--reversed"], ["--reversed", "True"]])
def test_the_way_back_needs_nothing_besides_what_was_written(reversed_: list[str], tmp_path: Path) -> None:
    """As the guide has it: the command, and the same with `reversed` set to True."""
    state = llama(tmp_path / "hf")
    out = tmp_path / "ms" / "llama.ckpt"
    assert main(call("llama", tmp_path / "hf", out)) == 0
    back = ["--model", "llama", *reversed_, "--input_path", str(out), "--output_path", str(tmp_path / "back")]
    assert main(back) == 0
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)

    # MindFormers goes on training, and writes another file of that name: the config is still that of the model.
    data = out.read_bytes()
    out.unlink()
    out.write_bytes(data)
    assert main([*back[:-1], str(tmp_path / "trained")]) == 0
    assert (tmp_path / "trained" / "config.json").is_file()


def test_what_only_renames_needs_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As MindFormers' own script, which looks at names alone."""
    state = llama(tmp_path / "hf")
    out = tmp_path / "llama.ckpt"
    assert main(call("llama", tmp_path / "hf", out)) == 0
    (tmp_path / "elsewhere").mkdir()
    alone = out.rename(tmp_path / "elsewhere" / "alone.ckpt")
    words = ["--model", "llama", "--reversed", "--input_path", str(alone)]
    assert main([*words, "--output_path", str(tmp_path / "back.bin")]) == 0
    found = torch.load(tmp_path / "back.bin", weights_only=True)
    assert same(found, state)
    assert "does not know what is missing; --config FILE or --like DIR tells" in capsys.readouterr().err


def test_what_does_more_says_how_to_give_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = llama(tmp_path / "hf")
    out = tmp_path / "llama.ckpt"
    forward = ["--model", "llama", "--qkv_concat", "True", "--input_path", str(tmp_path / "hf")]
    assert main([*forward, "--output_path", str(out)]) == 0
    (tmp_path / "elsewhere").mkdir()
    alone = out.rename(tmp_path / "elsewhere" / "alone.ckpt")
    words = ["--model", "llama", "--qkv_concat", "True", "--reversed", "True", "--input_path", str(alone)]
    words += ["--output_path", str(tmp_path / "back")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--config FILE" in said and "--like DIR" in said
    assert not (tmp_path / "back").exists()
    assert main([*words, "--like", str(tmp_path / "hf")]) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert same(found, state)


def test_false_is_false(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "hf")
    words = call("llama", tmp_path / "hf", tmp_path / "a.ckpt")
    assert main([*words, "--reversed", "False", "--qkv_concat", "False"]) == 0
    assert "--reverse" in capsys.readouterr().out
    assert main([*words, "--reversed", "maybe"]) == 2
    assert "'maybe' is neither True nor False" in capsys.readouterr().err
