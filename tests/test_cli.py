"""The command line: what it prints where, what it returns, and what it leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from watched import Failing, watching

import streamconv
from streamconv import api, cli
from streamconv.cli import demo, diff, options, progress, text
from streamconv.errors import PlanError, Problem, UsageError
from streamconv.options.records import PlanOptions
from streamconv.plans import fingerprint
from streamconv.running import items
from streamconv.running.comparison import ComparedTensor, Comparison
from streamconv.running.progress import Progress

Captured = pytest.CaptureFixture[str]


def state(layers: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {f"model.layers.{i}.mlp.{kind}.weight": (8, 6) for i in range(layers) for kind in ("up", "down")}
    return {
        "model.embed_tokens.weight": torch.randn(16, 6, generator=generator),
        **{name: torch.randn(shape, generator=generator) for name, shape in names.items()},
        "step": torch.tensor(7),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    save_file(state(), directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    return directory


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "_BATCH_ITEMS", 1)


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


def process(
    *words: object, prelude: str = "", env: dict[str, str] | None = None, **keywords: Any
) -> subprocess.CompletedProcess[str]:
    """A process of its own; `prelude` is run in it first."""
    # A job in the background of a shell, and all that it starts, has SIGINT ignored.
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"import signal, sys\n{heard}\nfrom streamconv.cli import main\n{prelude}\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        text=True,
        env={**os.environ, **(env or {})},
        timeout=120,
        **({"capture_output": True} | keywords),
    )


def json_lines(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------------------------------ start, help


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_needs_no_heavy_import(words: list[str]) -> None:
    prelude = (
        "import atexit\n"
        "heavy = ('numpy', 'torch', 'ml_dtypes', 'psutil', 'orjson', 'safetensors')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))"
    )
    done = process(*words, prelude=prelude)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == "[]\n"


def test_the_program_is_installed_and_is_a_module() -> None:
    script = Path(sys.executable).parent / "streamconv"
    for command in ([str(script)], [sys.executable, "-m", "streamconv"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, f"streamconv {streamconv.__version__}\n")


def test_help_names_every_command(capsys: Captured) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name}\s", shown, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_ends_with_exit_codes_and_tells_defaults(name: str, capsys: Captured) -> None:
    assert call(name, "--help") == 0
    shown = capsys.readouterr().out
    assert re.search(r"exit codes:(\n  (0|1|2|130) +\S.*)+\n$", shown)
    about = re.split(r"\n(?=  -)", shown.split("exit codes:")[0])[1:]
    assert len(about) > 2
    for option in about:
        assert "default" in option or option.lstrip().startswith("-h"), option


def test_no_words_are_a_wrong_call(capsys: Captured) -> None:
    assert call() == 2
    printed = capsys.readouterr()
    assert "usage: streamconv" in printed.err
    assert not printed.out


# ---------------------------------------------------------------------------------------- parsing


def test_without_a_command_it_is_a_conversion() -> None:
    assert cli.parse(["a", "b", "--quiet"]) == cli.parse(["convert", "a", "b", "--quiet"])
    assert cli.parse(["--quiet", "a", "b"]).command == "convert"


def test_a_path_called_like_a_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source.rename(tmp_path / "plan")
    assert call("./plan", "out", "--quiet") == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == state().keys()


def test_options_may_stand_between_paths() -> None:
    assert cli.parse(["a", "--dtype", "BF16", "b"]).destination == "b"
    assert cli.parse(["plan", "a", "--json", "b"]).destination == "b"
    assert cli.parse(["--", "-a", "-b"]).source == "-a"


def test_options_of_the_plan_are_there_only_when_given() -> None:
    words = ["a", "b", "--dtype", "BF16", "--dtype", "x=F32", "--rename", "a=b", "--drop", "c", "--only", "d"]
    words += ["--tied", "drop", "--root", "m", "--to", "torch", "--max-shard", "1GB", "--no-side-files"]
    words += ["--recipe", "r", "--to-arch", "llama", "--reverse", "--config", "f", "--like", "l"]
    words += ["--allow-unmatched"]
    assert options.given(PlanOptions, cli.parse(words)) == {
        "dtype": ["BF16", "x=F32"], "rename": ["a=b"], "drop": ["c"], "only": ["d"], "tied": "drop",
        "root": "m", "to": "torch", "max_shard": "1GB", "side_files": False, "recipe": "r", "to_arch": "llama",
        "reverse": True, "config": "f", "like": "l", "allow_unmatched": True,
    }  # fmt: skip
    assert options.given(PlanOptions, cli.parse(["a", "b"])) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["a", "b", "--to", "dcp"],
            "'dcp' cannot be written yet; known are safetensors, torch, mindspore, mindspore-safetensors, sat",
        ),
        (
            ["a", "b", "--to", "zip"],
            "'zip' is not a known format; known are safetensors, torch, mindspore, mindspore-safetensors, sat",
        ),
        (["a", "b", "--to", "hf"], "it is --to-arch hf"),
        (["a", "b", "--to", "HuggingFace"], "it is --to-arch hf"),
        (["a", "b", "--to", "diffusers"], "did you mean --to-arch diffusers"),
        (["a", "b", "--to", "llama"], "did you mean --to-arch llama"),
        (["a", "b", "--to", "megatron-core"], "'megatron-core' cannot be written yet"),
        *((["a", "b", "--to", name], "did you mean --to torch?") for name in ("bin", "pytorch", "pt", "PTH")),
        *((["a", "b", "--to", name], "did you mean --to safetensors?") for name in ("st", "safetensor")),
        (["a", "b", "--to", "ckpt"], "did you mean --to mindspore?"),
        (["a", "b", "--to", "bf16"], "did you mean --dtype BF16?"),
        (["a", "b", "--to-arch", "torch"], "did you mean --to torch?"),
        (["a", "b", "--to-arch", "pytorch"], "did you mean --to torch?"),
        (["a", "b", "--to-arch", "transformers"], "did you mean --to-arch hf?"),
        (
            ["a", "b", "--to-arch", "kohyaa"],
            "there is no architecture 'kohyaa' (did you mean --to-arch kohya?)",
        ),
        (
            ["a", "b", "--to-arch", "llame"],
            "there is no architecture 'llame' (did you mean --to-arch llama?)",
        ),
        (["a", "s3://bucket/b"], "s3:// is read, and cannot be written to"),
        (["a", "S3:/bucket/b"], "there is no storage for S3:/"),
        (["a", "hf:owner/name"], "there is no storage for hf:"),
        (["a", "C:\\models\\b"], "a local path that begins so is written ./C:"),
        (["hdfs://host/a", "b"], "hdfs://host/a: there is no storage for hdfs://"),
        (["a", "host:/b"], "there is no storage for host:/"),
        (["a", "file://host/b"], "write file:///PATH"),
        (["inspect", "hf://owner"], "write hf://OWNER/REPO"),
        (["a", "b", "--engine", "ray"], "'ray' cannot be used yet; known are local, inline"),
        (["a", "b", "--workers", "many"], "--workers"),
        (["a", "b", "--tied", "maybe"], "--tied"),
        (["a"], "the following arguments are required: DST"),
        (["a", "b", "--max-sh", "1GB"], "unrecognized arguments"),
        (["inspct", "x"], "did you mean 'inspect'?"),
        (["nothing"], "neither a command nor a file or directory"),
        (["a", "b"], "a: there is no such file or directory"),
        (
            ["a", "b", "--recipe", "chatglm-lama"],
            "there is no recipe 'chatglm-lama' (did you mean 'chatglm-llama'?)",
        ),
        (["a", "b", "--recipe", "mine.toml"], "mine.toml: cannot read the recipe"),
        (["a", "b", "--recipe", "mine.py"], "mine.py: there is no such recipe"),
        (["a", "b", "--reverse"], "--reverse needs a recipe by name"),
        (["recipes", "nonsense"], "there is no recipe 'nonsense'"),
        (["a", "b", "--max-shard", "large"], "'large' is not a size"),
        (["a", "b", "--dtype", "float7"], "unknown dtype 'float7'"),
    ],
)
def test_wrong_calls(
    words: list[str], said: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if words == ["a"]:
        (tmp_path / "a").touch()
    assert call(*words) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out
    assert not (tmp_path / "b").exists()


def test_a_refused_destination_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("s3://bucket/b", "s3:/bucket/b", "C:\\b", "hf:b"):
        assert call(source, place) == 2
        with pytest.raises(UsageError):
            streamconv.convert(source, Path(place))
    for place in ("b\0c", "b\0.safetensors", Path("b\0c"), "\0", f"file://{tmp_path}/b%00c"):
        with pytest.raises(UsageError, match="no path holds a NUL"):
            streamconv.convert(source, place)
        with pytest.raises(UsageError, match="there is no such file"):
            streamconv.plan(place)
    assert os.listdir(tmp_path) == ["source"]
    assert call(source, "./s3:/b", "--quiet") == 0
    assert (tmp_path / "s3:" / "b" / "model.safetensors").is_file()


def test_file_urls_are_local_paths(source: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "a b"
    assert call(source.as_uri(), spaced.as_uri(), "--quiet") == 0
    assert call("verify", f"file://localhost{source}", f"file:{tmp_path}/a%20b") == 0
    assert (spaced / "model.safetensors").is_file()


def test_paths_that_are_not_utf_8_work_or_are_refused_plainly(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"odd\xff")
    shutil.copytree(source, odd)
    shutil.copytree(source, "named")
    Path("named", "model.safetensors").rename(Path("named", f"{odd}.safetensors"))
    shutil.copytree(source, "beside")
    Path("beside", f"tokenizer{odd}.json").write_text("{}")
    Path(f"{odd}.toml").write_text('[rename]\n"model.*" = "*"\n')
    for words in (
        ("inspect", odd), ("inspect", odd, "--json"), ("diff", odd, source), ("diff", odd, source, "--json"),
        ("recipes", f"{odd}.toml"), ("plan", source, f"{odd}-out", "--json"), (source, f"{odd}-out"),
        ("verify", source, f"{odd}-out"), ("verify", source, f"{odd}-out", "--json"), (source, f"{odd}-log", "--log-json"),
        ("inspect", "named"), ("inspect", "beside"), ("beside", "beside-out"),
    ):  # fmt: skip
        assert call(*words) == 0, words
    capsys.readouterr()
    for words in (
        (odd, "out"), ("plan", odd), ("named", "out"), (source, f"{odd}.safetensors"),
        (source, "out", "--recipe", f"{odd}.toml"), (source, "out", "--like", odd),
        (source, "out", "--config", f"{odd}/config.json"), (source, "out", "--lora", odd), ("inspect", f"{odd}-none"),
        (f"{odd}-none", "out"), ("verify", odd, f"{odd}-out"), ("recipes", f"{odd}-none.toml"), (source, "out", "--to", odd),
        (source, "out", "--drop", odd), (Path(odd).absolute().as_uri(), "out"), (f"{odd}-none",), (source, "out", f"--{odd}"),
    ):  # fmt: skip
        assert call(*words) == 2, words
        said = capsys.readouterr().err
        assert "internal error" not in said and "Traceback" not in said, said
    assert not Path("out").exists()
    shown = process("inspect", odd, env={"PYTHONIOENCODING": "ascii"})
    assert shown.returncode == 0, shown.stderr


# ---------------------------------------------------------------------------------------- recipes


def test_recipes_are_listed_and_printed(capsys: Captured) -> None:
    assert call("recipes") == 0
    listed = capsys.readouterr().out
    assert re.search(r"chatglm-llama .* bit-exact +yes", listed)
    assert re.search(r"bf16-fp8 .* lossy +no", listed)
    assert call("recipes", "chatglm-llama") == 0
    printed = capsys.readouterr().out
    assert "q = spread_half_rotary(q, heads, pairs)" in printed
    assert "model.layers.{i}.self_attn.q_proj.weight" in printed
    assert "reads both ways" in printed


def test_recipes_as_json(capsys: Captured) -> None:
    assert call("recipes", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {"name": "chatglm-llama", "source": "chatglm", "target": "llama", "reverse": True}.items() <= {
        **next(each for each in document["recipes"] if each["name"] == "chatglm-llama")
    }.items()
    assert call("recipes", "chatglm-glm", "--json") == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    assert {"source", "target", "program", "equals", "when", "optional", "reason", "exactness"} == set(
        rules[0]
    )


def test_recipes_from_a_file_are_printed_too(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "mine.toml").write_text('[[rule]]\nsource = "a.{i}"\ntarget = "b.{i+1}"\n')
    assert call("recipes", tmp_path / "mine.toml") == 0
    assert "b.{i+1}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- convert


def test_convert_says_what_it_will_do_and_what_it_did(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert call(source, out, "--dtype", "BF16", "--drop", "step") == 0
    printed = capsys.readouterr()
    for said in (
        "(safetensors)",
        "7, 1 dropped",
        "F32 -> BF16 7",
        "rounding 7",
        "step: matches --drop 'step'",
    ):
        assert said in printed.err
    assert "100%" in printed.err
    assert f"{out}: 7 tensors in 1 file" in printed.out
    assert str(out / ".streamconv" / "conversion.json") in printed.out
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.up.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_second_time_there_is_nothing_to_do(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert call(source, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    capsys.readouterr()
    assert call(source, out) == 0
    assert "already converted; not checked again (streamconv verify" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_another_conversion_needs_overwrite(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert call(source, out, "--quiet") == 0
    assert call(source, out, "--dtype", "F16", "--quiet") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call(source, out, "--dtype", "F16", "--quiet", "--overwrite") == 0
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16


def test_options_reach_the_conversion(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--to", "torch", "--max-shard", "500", "--no-side-files", "--checksum", "--engine", "inline")
    assert call("convert", source, out, *words, "--memory", "8MiB", "--workers", 1, "--quiet") == 0
    assert not (out / "config.json").exists()
    shards = sorted(out.glob("pytorch_model-*.bin"))
    assert len(shards) > 2
    merged: dict[str, torch.Tensor] = {}
    for path in shards:
        merged |= torch.load(path, weights_only=True)
    assert all(torch.equal(merged[name], tensor) for name, tensor in state().items())
    record = json.loads((out / ".streamconv" / "conversion.json").read_text())
    assert all("xxh3_128" in entry for entries in record["tensors"].values() for entry in entries.values())


def test_a_recipe_file(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('drop = ["step"]\n[rename]\n"model.*" = "*"\n')
    assert call(source, tmp_path / "out", "--recipe", recipe, "--quiet") == 0
    assert "layers.0.mlp.up.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_quiet_prints_nothing(source: Path, tmp_path: Path, capsys: Captured) -> None:
    assert call(source, tmp_path / "out", "--quiet", "--verify") == 0
    assert call("verify", source, tmp_path / "out", "--quiet") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_losses_are_told(tmp_path: Path, capsys: Captured) -> None:
    lossy = {f"t{i:02}": torch.tensor([1e9, 1e-30, 1.0]) for i in range(12)}
    save_file(lossy, tmp_path / "a.safetensors")
    assert call(tmp_path / "a.safetensors", tmp_path / "out", "--dtype", "F16") == 0
    shown = capsys.readouterr().out
    assert "t00: 1 value overflowed, 1 value became zero" in shown
    assert "t09" in shown and "t10" not in shown
    assert "... and 2 more" in shown


def test_verify_right_after(source: Path, tmp_path: Path, capsys: Captured) -> None:
    assert call(source, tmp_path / "out", "--verify") == 0
    assert "verified" in capsys.readouterr().out


def test_log_json_is_lines_of_json(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert call(source, out, "--log-json", "--verify") == 0
    printed = capsys.readouterr()
    assert not printed.out
    messages = json_lines(printed.err)
    assert [message["message_type"] for message in messages[-1:]] == ["summary"]
    ends = {each["phase"]: each for each in messages if each["message_type"] == "status"}
    total = sum(tensor.nbytes for tensor in state().values())
    for phase in ("convert", "verify"):
        assert (ends[phase]["bytes_done"], ends[phase]["bytes_total"]) == (total, total)
        assert ends[phase]["fraction_done"] == 1
    summary = messages[-1]
    assert summary["bytes_written"] == total
    assert summary["verified"] is True
    assert Path(summary["record"]).is_file()


def test_log_json_tells_errors_as_json(source: Path, tmp_path: Path, capsys: Captured) -> None:
    assert call(source, tmp_path / "out", "--log-json", "--drop", "nothing", "--only", "nobody") == 2
    (message,) = json_lines(capsys.readouterr().err)
    assert (message["message_type"], message["exit_code"]) == ("error", 2)
    assert {problem["message"] for problem in message["problems"]} >= {
        "--drop 'nothing' matches no tensor",
        "--only 'nobody' matches no tensor",
    }


# ----------------------------------------------------------------------------------- interruption


def interrupting(number: str) -> str:
    """A prelude that makes a process signal itself when the first of many batches is done."""
    return f"""
import os, signal
from streamconv.running import items
from streamconv.cli import progress
items._BATCH_ITEMS = 1
update = progress.Lines.__call__
def signalled(self, now):
    update(self, now)
    os.kill(os.getpid(), signal.{number})
progress.Lines.__call__ = signalled
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_goes_on(number: str, source: Path, tmp_path: Path, capsys: Captured) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    done = process(source, out, "--dtype", "BF16", prelude=interrupting(number))
    assert done.returncode == 130
    assert "interrupted; run the same command again to resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "model.safetensors").exists()

    assert call(source, out, "--dtype", "BF16", "--log-json") == 0
    summary = json_lines(capsys.readouterr().err)[-1]
    assert summary["bytes_resumed"] > 0
    assert call(source, undisturbed, "--dtype", "BF16", "--quiet") == 0
    left = files(out), files(undisturbed)
    for each in left:
        each.pop(".streamconv/conversion.json")
    assert left[0] == left[1]


def test_a_resumed_run_says_so(
    source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    def stop(self: object, now: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Lines, "__call__", stop)
        assert call(source, tmp_path / "out") == 130
    capsys.readouterr()
    assert call(source, tmp_path / "out") == 0
    assert "were in place from an earlier run" in capsys.readouterr().out


def test_restart_throws_an_unfinished_run_away(
    source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    def stop(self: object, now: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Lines, "__call__", stop)
        assert call(source, tmp_path / "out") == 130
    assert call(source, tmp_path / "out", "--drop", "step") == 2
    assert "--restart" in capsys.readouterr().err
    assert call(source, tmp_path / "out", "--drop", "step", "--restart") == 0
    assert "step" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_signal_prints_the_state(source: Path, tmp_path: Path) -> None:
    often = "import streamconv.running.progress\nstreamconv.running.progress._REPORT_EVERY = 0\n"
    done = process(source, tmp_path / "out", prelude=often + interrupting("SIGUSR1"))
    assert done.returncode == 0
    # One line at each tenth at most, and one more for each of the eight signals.
    assert len(re.findall(r"^ *\d+%  .* of .*peak memory", done.stderr, re.MULTILINE)) > 10


def test_an_interrupted_inspection_promises_nothing(
    source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "open", stop)
    assert call("inspect", source) == 130
    assert capsys.readouterr().err == "streamconv: interrupted\n"


# ----------------------------------------------------------------------------------------- errors


def failing_with(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_many_problems_are_counted(source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(f"is wrong {i}", tensor="t" * (i + 1)) for i in range(25)]
    monkeypatch.setattr(api, "open", failing_with(PlanError("all is wrong", problems=problems)))
    assert call("inspect", source) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "streamconv: error: all is wrong"
    assert lines[1] == "  - tensor 't': is wrong 0"
    assert lines[20] == f"  - tensor '{'t' * 20}': is wrong 19"
    assert lines[21:] == ["  ... and 5 more"]


def test_an_unexpected_error_is_one_line_without_debug(
    source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "open", failing_with(KeyError("lost")))
    assert call("inspect", source) == 1
    said = capsys.readouterr().err
    assert said == (
        "streamconv: error: internal error: KeyError: 'lost'; run with --debug to see where, and report it\n"
    )
    assert call("inspect", source, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_errors_of_the_system_are_told_plainly(
    source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "open", failing_with(PermissionError(13, "Permission denied", "secret.bin")))
    assert call("inspect", source) == 1
    assert capsys.readouterr().err == "streamconv: error: secret.bin: Permission denied\n"


def test_names_in_errors_cannot_drive_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    name = "evil\x1b]0;owned\x07\nstreamconv: all is well"
    save_file({name: torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    words = ("--dtype", f"{name}=BF16")
    assert call("plan", tmp_path / "a.safetensors", *words) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\x07" not in said
    assert "\nstreamconv: all" not in said


@pytest.mark.parametrize("words", [("inspect", "{source}"), ("plan", "{source}"), ("{source}", "{out}")])
def test_a_reader_that_has_seen_enough_is_no_failure(
    words: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        filled = [word.format(source=source, out=tmp_path / "out") for word in words]
        done = process(*filled, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert "Error" not in done.stderr


def test_a_reader_that_has_seen_enough_does_not_hide_a_difference(source: Path, tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    read, write = os.pipe()
    os.close(read)
    try:
        done = process(
            "diff",
            source,
            tmp_path / "b.safetensors",
            capture_output=False,
            stdout=write,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(write)
    assert done.returncode == 1


def on_a_terminal(width: int, *words: object) -> list[str]:
    """The lines that a command prints on a terminal that has so many columns."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("COLUMNS", None)
        # The size is set on this side, before anything is printed.
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        os.execv(sys.executable, [sys.executable, "-m", "streamconv", *map(str, words)])
    printed = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while data := os.read(terminal, 1 << 16):
            printed += data
    os.close(terminal)
    os.waitpid(child, 0)
    return printed.decode().replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("width", [80, 60])
def test_nothing_is_wider_than_the_terminal(width: int, tmp_path: Path) -> None:
    long = {
        f"base_model.encoder.layers.{i}.self_attention.query_key_value.weight": torch.zeros(8, 2)
        for i in range(3)
    }
    save_file(long | {"x" * 130: torch.zeros(2, 2), "y": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({name: tensor + 1 for name, tensor in long.items()}, tmp_path / "b.safetensors")
    (tmp_path / "a.toml").write_text('[rename]\n"base_model.*" = "a_quite_different_and_longer_name.*"\n')
    for words in (
        (
            "plan",
            tmp_path / "a.safetensors",
            tmp_path / "out",
            "--recipe",
            tmp_path / "a.toml",
            "--dtype",
            "BF16",
        ),
        ("plan", "--full", tmp_path / "a.safetensors"),
        ("inspect", tmp_path / "a.safetensors"),
        ("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors"),
        (tmp_path / "a.safetensors", tmp_path / "out", "--quiet"),
        ("verify", tmp_path / "a.safetensors", tmp_path / "out"),
        ("verify", tmp_path / "a.safetensors", tmp_path / "none"),
        ("recipes",),
        ("recipes", "chatglm-llama"),
        ("--help",),
        ("convert", "--help"),
        ("plan", "--unknown"),
    ):
        lines = [line.split("\r")[-1].replace("\x1b[K", "") for line in on_a_terminal(width, *words)]
        assert lines or "--quiet" in words
        assert max(map(len, lines), default=0) <= width, (words, max(lines, key=len))


def test_json_stays_one_line_on_a_terminal_and_pipes_get_whole_lines(source: Path) -> None:
    (line,) = on_a_terminal(60, "inspect", source, "--json")
    assert json.loads(line)["format"] == "safetensors"
    piped = process("recipes", env={"COLUMNS": "60"}).stdout
    assert max(map(len, piped.splitlines())) > 100


def test_no_part_of_a_name_is_lost_on_a_terminal(tmp_path: Path) -> None:
    name = "base_model.encoder.layers.0.self_attention.query_key_value.weight"
    save_file({name: torch.zeros(8, 2)}, tmp_path / "a.safetensors")
    lines = on_a_terminal(40, "inspect", tmp_path / "a.safetensors")
    assert name in "".join(lines)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--max-shrd", "--max-shard"),
        ("--dtyp=BF16", "--dtype"),
        ("--overwite", "--overwrite"),
        ("--Memory", "--memory"),
    ],
)
def test_a_misspelt_option_is_told_what_was_meant(word: str, meant: str, capsys: Captured) -> None:
    assert call("a", "b", word) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_stream_that_lacks_a_letter_gets_it_escaped(tmp_path: Path) -> None:
    save_file({"模型": torch.zeros(1)}, tmp_path / "a.safetensors")
    done = process("inspect", tmp_path / "a.safetensors", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert r"\u6a21\u578b" in done.stdout


# ------------------------------------------------------------------------------------ plan, inspect


def test_plan_writes_nothing_and_folds_layers(source: Path, tmp_path: Path, capsys: Captured) -> None:
    before = files(source)
    words = ("--rename", "model.layers.{i}.mlp.*=blocks.{i}.*", "--drop", "step", "--dtype", "BF16")
    assert call("plan", source, tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("model.layers.{0..2}.mlp.up.weight"))
    assert row.split() == [
        "model.layers.{0..2}.mlp.up.weight", "blocks.{0..2}.up.weight", "cast(dtype=BF16)",
        "F32", "->", "BF16", "[8,", "6]", "rounding", "3",
    ]  # fmt: skip
    assert re.search(r"^disk +\S+ \S+ needed, ", shown, re.MULTILINE)
    assert re.search(r"^memory +at most ", shown, re.MULTILINE)
    assert "step: matches --drop 'step'" in shown
    assert re.search(r"^model.safetensors .* 7 tensors$", shown, re.MULTILINE)
    assert not (tmp_path / "out").exists()
    assert files(source) == before


def test_plan_in_full_has_a_line_for_every_tensor(source: Path, capsys: Captured) -> None:
    assert call("plan", source, "--full") == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} +=  ", shown, re.MULTILINE) for name in state())


def test_plan_as_json(source: Path, tmp_path: Path, capsys: Captured) -> None:
    (source / "training_args.bin").write_bytes(b"not weights")
    assert call("plan", source, tmp_path / "out", "--json", "--dtype", "BF16", "--max-shard", "300") == 0
    document = json.loads(capsys.readouterr().out)
    compiled = streamconv.plan(source, tmp_path / "out", dtype="BF16", max_shard="300")
    assert document["fingerprint"] == fingerprint(compiled)
    assert document["bytes_to_write"] == compiled.bytes_to_write == document["disk"]["needed"]
    assert document["bytes_to_read"] == sum(tensor.nbytes for tensor in state().values())
    assert document["dtypes"] == {"F32 -> BF16": 7, "I64": 1}
    assert document["exactness"] == {"bit-exact": 1, "rounding": 7}
    assert [output["path"] for output in document["outputs"]] == [output.path for output in compiled.outputs]
    assert sum(output["tensors"] for output in document["outputs"]) == 8
    (row,) = (row for row in document["rows"] if row["target"] == "model.layers.1.mlp.up.weight")
    assert row["sources"] == ["model.layers.1.mlp.up.weight"]
    assert (row["source_dtypes"], row["dtype"], row["shape"]) == (["F32"], "BF16", [8, 6])
    assert (row["bytes"], row["exactness"], row["operations"]) == (96, "rounding", ["cast(dtype=BF16)"])
    assert any("training_args.bin" in file["path"] for file in document["ignored"])
    assert not (tmp_path / "out").exists()


def test_plan_tells_all_problems_at_once(source: Path, capsys: Captured) -> None:
    assert call("plan", source, "--drop", "nothing", "--rename", "nobody=x") == 2
    said = capsys.readouterr().err
    assert "'nothing' matches no tensor" in said
    assert "'nobody' matches no tensor" in said


def test_components_keep_their_directories(tmp_path: Path, capsys: Captured) -> None:
    pipeline = tmp_path / "pipeline"
    for name in ("unet", "vae"):
        (pipeline / name).mkdir(parents=True)
        save_file({"conv.weight": torch.randn(2, 2)}, pipeline / name / "diffusion_pytorch_model.safetensors")
        (pipeline / name / "config.json").write_text(f'{{"_class_name": "{name.title()}"}}')
    index = {"_class_name": "P", **{name: ["diffusers", name.title()] for name in ("unet", "vae")}}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    assert call("plan", pipeline, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sorted(row["target"] for row in rows) == ["unet/conv.weight", "vae/conv.weight"]
    assert call("inspect", pipeline) == 0
    shown = capsys.readouterr().out
    assert "vae/conv.weight" in shown and "unet, diffusion_pytorch_model, Unet: 1 tensor" in shown


def test_inspect_shows_what_is_there(source: Path, capsys: Captured) -> None:
    assert call("inspect", source) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^format +safetensors$", shown, re.MULTILINE)
    assert re.search(r"^model.layers.\{0..2\}.mlp.up.weight +F32 +\[8, 6\] +3 +576 B$", shown, re.MULTILINE)
    assert re.search(r"^dtype +I64: 1 tensor, 1 parameter, 8 B$", shown, re.MULTILINE)
    assert "llama" in shown and "config.json" in shown


def test_inspect_as_json(tmp_path: Path, capsys: Captured) -> None:
    shared = torch.randn(5, 4)
    path = tmp_path / "last.pt"
    torch.save({"model": {"a": shared, "b": shared}, "lr": float("nan"), "step": 3}, path)
    assert call("inspect", path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "torch zip"
    assert (document["tensors"], document["parameters"], document["bytes"]) == (2, 20, 80)
    assert document["dtypes"] == {"F32": {"tensors": 2, "parameters": 40, "bytes": 160}}
    assert document["metadata"] == {"lr": "nan", "step": 3}
    assert document["rows"][0] == {"name": "a", "dtype": "F32", "shape": [5, 4], "bytes": 80}


def test_inspect_takes_a_root(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": {"a": torch.zeros(2)}, "ema": {"b": torch.zeros(3)}}, path)
    assert call("inspect", path, "--root", "ema", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["b"]


def test_what_strangers_wrote_cannot_drive_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\u202e"
    save_file({evil: torch.zeros(1)}, tmp_path / "a.safetensors", metadata={evil: evil})
    for words in (("inspect",), ("inspect", "--json"), ("plan",), ("plan", "--json"), ("plan", "--full")):
        assert call(words[0], tmp_path / "a.safetensors", *words[1:]) == 0
        printed = capsys.readouterr()
        assert all(line.isprintable() for line in (printed.out + printed.err).split("\n"))


# ----------------------------------------------------------------------------------- verify, diff


def damaged(path: Path) -> None:
    """Flip the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def test_verify_uses_the_recorded_options(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert call(source, out, "--dtype", "BF16", "--max-shard", "300", "--quiet") == 0
    assert call("verify", source, out) == 0
    assert "equal to the plan" in capsys.readouterr().out
    assert call("verify", source, out, "--dtype", "F16") == 1
    assert "streamconv: error: the destination is not what the plan says" in capsys.readouterr().err


def test_verify_finds_the_first_difference(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert call(source, out, "--quiet") == 0
    damaged(out / "model.safetensors")
    assert call("verify", source, out) == 1
    last = sorted(name for name in state() if name != "step")[-1]
    assert f"tensor '{last}': element 47 is " in capsys.readouterr().err
    assert call("verify", source, out, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["equal"] is False
    assert [problem["tensor"] for problem in document["problems"]] == [last]


def test_verify_against_another(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert call(source, out, "--quiet") == 0
    assert call(source, other, "--to", "torch", "--quiet") == 0
    assert call("verify", source, out, "--against", other) == 0
    assert "equal: 8 tensors" in capsys.readouterr().out
    save_file(state() | {"step": torch.tensor(8)}, tmp_path / "c.safetensors")
    assert call("verify", source, out, "--against", tmp_path / "c.safetensors", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["problems"], document["comparison"]["equal"]) == ([], False)


def test_convert_with_verify_fails_where_the_output_is_wrong(
    source: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    assert call(source, out, "--quiet") == 0
    damaged(out / "model.safetensors")
    assert call(source, out, "--verify") == 1
    printed = capsys.readouterr()
    assert "already converted" in printed.out
    assert "not what the plan says" in printed.err


def test_diff_of_equal_contents_in_other_formats(source: Path, tmp_path: Path, capsys: Captured) -> None:
    torch.save(state(), tmp_path / "b.pt")
    assert call("diff", source, tmp_path / "b.pt") == 0
    assert capsys.readouterr().out == "equal: 8 tensors\n"


def test_diff_tells_every_kind_of_difference(source: Path, tmp_path: Path, capsys: Captured) -> None:
    other = state()
    for i in range(3):
        other[f"model.layers.{i}.mlp.up.weight"][0, i] += 2 + i
    other["model.layers.0.mlp.down.weight"] = torch.zeros(6, 8)
    other["step"] = torch.tensor(7, dtype=torch.int32)
    other["more"] = torch.zeros(1)
    del other["model.layers.1.mlp.down.weight"]
    save_file(other, tmp_path / "b.safetensors")
    assert call("diff", source, tmp_path / "b.safetensors") == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    changed = lines["model.layers.{0..2}.mlp.up.weight"].split()
    assert changed[7:9] == ["3", "4"]
    assert changed[-1] == "3"
    assert "the shapes differ" in lines["model.layers.0.mlp.down.weight"]
    assert "the dtypes differ" in lines["step"]
    assert "missing" in lines["more"] and "missing" in lines["model.layers.1.mlp.down.weight"]
    assert lines["7"] == "7 of 9 tensors differ"

    assert call("diff", source, tmp_path / "b.safetensors", "--json") == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["more"]["left"] is None
    assert rows["model.layers.2.mlp.up.weight"]["differing"] == 1
    assert rows["model.layers.2.mlp.down.weight"]["equal"] is True


def test_diff_of_headers_alone(source: Path, tmp_path: Path, capsys: Captured) -> None:
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in state().items()}, tmp_path / "b.safetensors"
    )
    assert call("diff", source, tmp_path / "b.safetensors", "--headers") == 0
    assert call("diff", source, tmp_path / "b.safetensors") == 1


def test_infinite_differences_are_json() -> None:
    row = ComparedTensor("a", None, None, equal=False, differing=1, max_abs=math.inf, max_rel=math.nan)
    document = json.loads(json.dumps(diff.document(Comparison((row,))), allow_nan=False))
    assert (document["rows"][0]["max_abs"], document["rows"][0]["max_rel"]) == ("inf", "nan")


# ------------------------------------------------------------------------------------------- demo


def test_the_demo_runs_and_keeps_what_it_is_told_to(tmp_path: Path, capsys: Captured) -> None:
    place = tmp_path / "place"
    assert call("demo", "--size", "2MB", "--keep", place) == 0
    shown = capsys.readouterr().out
    assert "equal to the plan" in shown
    assert re.search(r"re-sharding took .* cp -r .* times as long \(medians of 3", shown)
    assert sorted(path.name for path in place.iterdir()) == ["converted", "sample"]
    sample = torch.load(place / "sample" / "pytorch_model.bin", weights_only=True)
    nbytes = sum(tensor.nbytes for tensor in sample.values())
    assert 1_500_000 < nbytes < 2_500_000
    converted: dict[str, torch.Tensor] = {}
    for path in (place / "converted").glob("*.safetensors"):
        converted |= load_file(path)
    assert converted.keys() == sample.keys()
    assert all(torch.equal(converted[name], tensor.bfloat16()) for name, tensor in sample.items())


def test_the_demo_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert call("demo", "--size", "1MB") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", [1_000_000, 200_000_000, 3_000_000_000, 70_000_000_000])
def test_samples_have_about_the_size_that_was_asked_for(wanted: int) -> None:
    config = demo.fitting(wanted)
    nbytes = 4 * sum(torch.Size(shape).numel() for shape in demo.shapes(config).values())
    assert abs(nbytes / wanted - 1) < 0.15


def test_the_sample_is_a_model_that_transformers_loads(tmp_path: Path) -> None:
    import transformers

    demo.write_sample(tmp_path / "sample", demo.config_of(64, 2))
    model, loading = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "sample", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.arange(4)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "10kB"), "too small for a model"),
        (("--size", "9999999TB"), "are needed on the disk"),
        (("--keep", "."), "exists already"),
        (("--memory", "1kB"), "too small"),
    ],
)
def test_demos_that_cannot_be(words: tuple[str, ...], said: str, capsys: Captured) -> None:
    assert call("demo", *words) == 2
    assert said in capsys.readouterr().err


# --------------------------------------------------------------------------------- progress, words


def moment(done: int, **keywords: Any) -> Progress:
    values = {"bytes_total": 1000, "bytes_resumed": 0, "file": "f", "seconds": 2.0, "peak_memory": 5_000_000}
    return Progress(**{"bytes_done": done, **values, **keywords})


def test_rates_are_of_this_run_alone() -> None:
    now = moment(600, bytes_resumed=400)
    assert progress.rate(now) == 100
    assert progress.remaining(now) == 4
    assert progress.rate(moment(400, bytes_resumed=400)) is None
    assert progress.remaining(moment(400, bytes_resumed=400)) is None


def test_a_run_without_bytes_is_done() -> None:
    assert progress.fraction(moment(0, bytes_total=0)) == 1


def test_logs_get_a_line_for_each_tenth(capsys: Captured) -> None:
    lines = progress.Lines()
    for done in range(0, 1001, 3):
        lines(moment(done))
    lines(moment(1000))
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 10
    assert shown[-1] == "100%  1.00 kB of 1.00 kB, 500 B/s, f, peak memory 5.00 MB"


def test_status_lines_come_once_a_second_and_at_the_end(capsys: Captured) -> None:
    now = [0.0]
    lines = progress.JsonLines("convert", lambda: now[0])
    for step in range(100):
        now[0] = step / 10
        lines(moment(step))
    assert len(json_lines(capsys.readouterr().err)) == 10
    lines(moment(1000))
    (last,) = json_lines(capsys.readouterr().err)
    assert (last["fraction_done"], last["seconds_remaining"], last["bytes_per_second"]) == (1, 0, 500)


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.reporting(cli.parse(["a", "b"]), "convert") as update:
        update(moment(500))
    assert "500 B of 1.00 kB, 250 B/s, 2.00 s left, f, peak memory 5.00 MB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"), (99_960, "100 kB"),
     (999_400, "999 kB"), (999_600, "1.00 MB"), (13_476_839_424, "13.5 GB"), (10**18, "1000 PB")],
)  # fmt: skip
def test_sizes(number: int, shown: str) -> None:
    assert text.size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.421, "0.42 s"),
        (9.999, "10.0 s"),
        (59.9, "59.9 s"),
        (59.97, "1:00"),
        (245, "4:05"),
        (3723, "1:02:03"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


# ------------------------------------------------------------------------------ what newcomers met


def refused(capsys: Captured, *words: object) -> str:
    """What a wrong call is told."""
    capsys.readouterr()
    assert call(*words) == 2, words
    return capsys.readouterr().err


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """What transformers saves of a Llama."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_calls_that_are_told_what_to_do(llama: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    for words, said in (
        (("--pad-vocab", "0"), "--pad-vocab 0 (at least 1)"),
        (("--resize-vocab", "0"), "--resize-vocab 0 (at least 1)"),
        (("--recipe", "auto"), "from here, there are recipes to"),
        (("--recipe", "auto"), "(--to-arch); for files of mindformers, --to mindspore"),
        (("--to-arch", "mindformer"), "did you mean --to-arch mindformers?"),
        (
            ("--recipe", "mindformers-llama"),
            "what recipe mindformers-llama makes: Llama (read it the other way: --reverse)",
        ),
        (("--to", "sat"), "there is no recipe that leads there from this model"),
        (
            ("--only", "model.norm.weight", "--dtype", "lm_head*=BF16"),
            "--only leaves out what it matches",
        ),
        (("--dtype", "lm_hed*=BF16"), "the nearest name is 'lm_head.weight'"),
    ):
        assert said in refused(capsys, llama, out, *words)
    assert not out.exists()
    # Read backwards, it is what the recipe starts from.
    assert call(llama, tmp_path / "ms", "--to", "mindspore", "--to-arch", "mindformers", "--quiet") == 0
    assert "(leave --reverse out)" in refused(
        capsys, tmp_path / "ms", out, "--recipe", "mindformers-llama", "--reverse"
    )
    said = refused(capsys, tmp_path / "ms", out, "--to-arch", "mindformers")
    assert "leave --to-arch or --recipe auto out" in said
    assert "--reverse" not in said


def test_misspelt_destinations_and_options_say_what_was_meant(
    llama: Path, tmp_path: Path, capsys: Captured
) -> None:
    for name, meant in (
        ("m.safetensor", "did you mean m.safetensors?"),
        ("m.sft", "did you mean m.safetensors?"),
        ("m.safetensrs", "did you mean m.safetensors?"),
        ("m.th", "did you mean m.pth?"),
        ("m.cpkt", "did you mean m.ckpt?"),
        ("m.txt", "one file can end in .safetensors,"),
        ("m.zip", "one file can end in .safetensors,"),
    ):
        said = refused(capsys, llama, tmp_path / name)
        assert meant in said and f"A directory of this name is written {name}/" in said
        assert not (tmp_path / name).exists()
        assert call(llama, f"{tmp_path}/{name}/", "--quiet") == 0
        assert (tmp_path / name / "model.safetensors").is_file()
        # It is there now, and so it is a directory without the slash, too.
        assert call("verify", llama, tmp_path / name, "--quiet") == 0
    for name in ("Llama-3.1", "v1.5", "model.base"):
        assert call(llama, tmp_path / name, "--quiet") == 0 and (tmp_path / name / "config.json").is_file()
    assert call(llama, "--output", tmp_path / "x") == 2
    said = capsys.readouterr().err
    assert "--output: the destination follows the source" in said and "--tp" not in said.splitlines()[-1]


def test_sources_that_are_none_say_what_is(
    llama: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hf download meta-llama/Llama-3.1-8B" in refused(capsys, "meta-llama/Llama-3.1-8B", "out")
    assert "hf download" not in refused(capsys, "llama/none", "out")
    assert call(llama, "shards", "--max-shard", "30KB", "--quiet") == 0
    index = tmp_path / "shards" / "model.safetensors.index.json"
    said = refused(capsys, index, "out")
    assert "this is an index of shards" in said and str(tmp_path / "shards") in said
    shard = next((tmp_path / "shards").glob("*00002-of*"))
    shard.unlink()
    assert "the index names 1 file that is not there" in refused(capsys, "shards", "out")
    index.unlink()
    assert "shard 2 of " in refused(capsys, "shards", "out")


def test_remedies_can_be_pasted(tmp_path: Path, capsys: Captured) -> None:
    meta = torch.zeros(1, device="meta")
    names = ("x{i}.w", "x{0}", "-w", "it's", "a b", "$HOME", "plain.w")
    torch.save({"good": torch.zeros(3), **dict.fromkeys(names, meta)}, tmp_path / "m.pt")
    said = refused(capsys, tmp_path / "m.pt", tmp_path / "out")
    words = [
        line.split("leave it out with ")[1].rpartition(", or take")[0]
        for line in said.splitlines()
        if "leave it out with " in line
    ]
    assert len(words) == len(names)
    assert call(tmp_path / "m.pt", tmp_path / "out", "--quiet", *shlex.split(" ".join(words))) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"good"}


def test_a_component_is_taken_by_its_directory(tmp_path: Path, capsys: Captured) -> None:
    for part in ("unet", "vae"):
        (tmp_path / "pipe" / part).mkdir(parents=True)
        save_file({"w": torch.zeros(2)}, tmp_path / "pipe" / part / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text(
        '{"unet": ["diffusers", "X"], "vae": ["diffusers", "Y"]}'
    )
    for wrong in ("unet", "unet*", "*unet*", "unet.*"):
        said = refused(capsys, tmp_path / "pipe", tmp_path / "out", "--only", wrong)
        assert (
            f"--only '{wrong}' matches no tensor (a component is taken by its directory: --only 'unet/*')"
            in said
        )
    said = refused(capsys, tmp_path / "pipe", tmp_path / "out.safetensors")
    assert "a file for each of unet, vae" in said and "take one of them: --only 'unet/*'" in said
    assert call(tmp_path / "pipe", tmp_path / "out.safetensors", "--only", "unet/*", "--quiet") == 0


def test_problems_of_equal_layers_are_one_line(llama: Path, tmp_path: Path, capsys: Captured) -> None:
    said = refused(capsys, llama, tmp_path / "out", "--dtype", "I32")
    assert said.count("q_proj") == 1 and "(and 2 more like it)" in said
    said = refused(
        capsys, llama, tmp_path / "out", "--to", "mindspore", "--to-arch", "mindformers", "--tp", "3"
    )
    assert said.count("w2.weight") == 1
    with pytest.raises(PlanError) as raised:
        streamconv.plan(llama, dtype="I32")
    assert len(raised.value.problems) == 3 * 9 + 3


def test_an_unfinished_conversion_is_told_wherever_it_is_met(
    source: Path, tmp_path: Path, capsys: Captured
) -> None:
    for name in ("out", "out.safetensors"):
        out = tmp_path / name
        with watching(Failing("publish", KeyboardInterrupt(), 1)), pytest.raises(KeyboardInterrupt):
            streamconv.convert(source, out, dtype="BF16", engine="inline")
        told = "an unfinished conversion stands here (give its command again to complete it)"
        assert told in refused(capsys, "inspect", out)
        assert told in refused(capsys, out, tmp_path / "further")
        assert call("verify", source, out) in (1, 2)
        assert told in capsys.readouterr().err
        assert call(source, out, "--dtype", "BF16", "--quiet") == 0
        assert call("inspect", out) == 0
        assert call("verify", source, out) == 0


def test_restart_says_where_there_is_nothing_to_throw_away(
    source: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert call(source, tmp_path / "out", "--restart") == 0
    assert "--restart has nothing to throw away" in capsys.readouterr().err


def test_a_destination_that_cannot_be_written_to_is_refused_first(
    source: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("x")
    assert "nothing can be written there: Not a directory" in refused(
        capsys, source, tmp_path / "file" / "out"
    )
    assert "nothing can be written there" in refused(capsys, source, tmp_path / "file" / "out.bin")
    assert "Not a directory" in refused(capsys, "plan", source, tmp_path / "file" / "out")
    with monkeypatched_access(tmp_path):
        assert "Permission denied" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def monkeypatched_access(closed: Path) -> Iterator[None]:
    """A directory that may not be written in, which for root none is."""
    real = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != closed and real(path, mode))
        yield


def test_a_pipe_is_no_config(source: Path, tmp_path: Path, capsys: Captured) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "the config is not a regular file" in refused(
        capsys, source, tmp_path / "out", "--config", tmp_path / "pipe"
    )
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    assert call(source, tmp_path / "out") == 0
    assert "there is no config.json" in capsys.readouterr().err


def test_python_callers_are_spared_flags_and_floods(source: Path, tmp_path: Path) -> None:
    plan = streamconv.plan(source)
    assert len(repr(plan)) < 300 and "8 tensors" in str(plan)
    with pytest.raises(UsageError) as raised:
        streamconv.convert(source, tmp_path / "out", memory_budget=10)
    assert "--" not in str(raised.value)


# ----------------------------------------------------------------------- streams that take nothing


@pytest.mark.parametrize(
    "streams", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"]
)
@pytest.mark.parametrize("options", ["", "--log-json", "--verify", "--workers 2 --engine local"])
def test_no_stream_stops_a_conversion(source: Path, tmp_path: Path, streams: str, options: str) -> None:
    out = tmp_path / "out"
    command = f"{sys.executable} -m streamconv {source} {out} --dtype BF16 {options} {streams}"
    done = subprocess.run(["sh", "-c", command], check=False, timeout=120)
    assert done.returncode == 0
    assert not streamconv.verify(source, out, dtype="BF16").problems


@pytest.mark.parametrize("words", ["inspect", "plan", "plan --json", "recipes"])
def test_a_result_that_cannot_be_printed_is_no_success(source: Path, words: str) -> None:
    command = f"{sys.executable} -m streamconv {words} {source if words != 'recipes' else ''} >/dev/full"
    done = subprocess.run(["sh", "-c", command], check=False, timeout=120, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("No space left on device") == 1


@pytest.mark.parametrize("where", ["streamconv.execution.evaluate.numpy.empty", "streamconv.api.compiled"])
def test_out_of_memory_names_the_option(
    source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(where, refuse)
    assert call(source, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "--memory" in said and "internal error" not in said


@pytest.mark.parametrize(
    "option", ["--config", "--like", "--lora", "--recipe", "--strategy", "--source-strategy"]
)
@pytest.mark.parametrize("path", ["x" * 300, "/".join(["y" * 200] * 30)], ids=["name", "path"])
def test_paths_that_are_too_long_are_one_clear_error(
    source: Path, tmp_path: Path, capsys: Captured, option: str, path: str
) -> None:
    assert call("plan", source, option, path) == 2
    assert "internal error" not in capsys.readouterr().err
    assert call(path, tmp_path / "out") == 2
    assert call(source, tmp_path / path) == 2
    assert "internal error" not in capsys.readouterr().err


def test_the_heads_of_help_texts_fit_their_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in ([], *([name] for name in cli.COMMANDS)):
        assert cli.main([*words, "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, words


def test_what_is_dropped_is_folded_by_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(
        {f"layers.{i}.{name}": torch.zeros(2) for i in range(40) for name in "ab"}, tmp_path / "m.safetensors"
    )
    assert cli.main(["plan", str(tmp_path / "m.safetensors"), "--drop", "layers.{i}.a"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dropped")]
    assert said == ["dropped  layers.{0..39}.a: matches --drop 'layers.{i}.a' (40)"]
