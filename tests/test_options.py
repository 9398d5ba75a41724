"""The record of options: what derives from it, and that no option is taken and forgotten."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import mindspore
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

import streamconv
from streamconv import cli
from streamconv.cli import options as parsers
from streamconv.errors import UsageError
from streamconv.options.effect import require_effect
from streamconv.options.fields import fields, filled, from_record, recorded, spelled
from streamconv.options.option import Option
from streamconv.options.records import ConvertOptions, PlanOptions, ReadingOptions, Trait
from streamconv.plans import fingerprint
from streamconv.running.destination import destination_at
from streamconv.running.record import arguments
from streamconv.running.state import sealed
from streamconv.writers.formats import FORMATS, Format


def plain(directory: Path) -> Path:
    directory.mkdir()
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.zeros(4)}, directory / "model.safetensors")
    return directory


def torch_file(directory: Path) -> Path:
    directory.mkdir()
    torch.save({"run": {"module": {"a.weight": torch.ones(4, 4)}}}, directory / "run.pt")
    return directory / "run.pt"


def distributed(directory: Path) -> Path:
    torch.distributed.checkpoint.save({"a.weight": torch.ones(4, 4)}, checkpoint_id=directory)
    return directory


def deepspeed(directory: Path) -> Path:
    save = directory / "global_step1"
    save.mkdir(parents=True)
    (directory / "latest").write_text("global_step1")
    torch.save({"module": {"a.weight": torch.ones(4, 4)}, "dp_world_size": 1, "mp_world_size": 1, "ds_version": "0.19"},
               save / "mp_rank_00_model_states.pt")  # fmt: skip
    return directory


def sat(directory: Path) -> Path:
    save = directory / "100"
    save.mkdir(parents=True)
    (directory / "latest").write_text("100")
    torch.save({"module": {"mixins.x.weight": torch.ones(4, 4)}}, save / "mp_rank_00_model_states.pt")
    (directory / "model_config.json").write_text("{}")
    return directory


def mindspore_file(directory: Path) -> Path:
    directory.mkdir()
    weights = [{"name": "a.weight", "data": mindspore.Tensor([[1.0, 2.0]])}]
    mindspore.save_checkpoint(weights, str(directory / "net.ckpt"))
    return directory / "net.ckpt"


def pipeline(directory: Path) -> Path:
    directory.mkdir()
    (directory / "model_index.json").write_text("{}")
    for name in ("unet", "vae"):
        plain(directory / name)
    return directory


# ------------------------------------------------------------------------------------ derivation


def test_what_help_lists_is_what_there_is() -> None:
    assert fields(ConvertOptions)["to"].default == next(iter(FORMATS))
    assert fields(ConvertOptions)["engine"].default is None  # chosen by the amount of work


def test_options_are_frozen_and_keep_their_types() -> None:
    known = fields(PlanOptions)
    with pytest.raises(dataclasses.FrozenInstanceError):
        known["tp"].default = 2
    assert known["weights"].choices == ("master", "model")
    assert known["dtype"].repeats and known["rename"].repeats and not known["like"].repeats
    assert [known[name].convert for name in ("tp", "lora_scale", "crc", "like")] == [int, float, bool, str]
    assert known["side_files"].flag == "--no-side-files"


def test_options_apply_to_what_there_is() -> None:
    known = fields(ConvertOptions)
    for option in known.values():
        assert set(option.source) <= set(Trait)
        assert set(option.beside) <= set(known)
    assert all(form.options <= set(known) for form in FORMATS.values())


def test_a_misspelt_keyword_is_an_error(tmp_path: Path) -> None:
    source = plain(tmp_path / "a")
    for call in (
        partial(streamconv.plan, source),
        partial(streamconv.convert, source, tmp_path / "out"),
        partial(streamconv.convert, streamconv.plan(source), tmp_path / "out"),
        partial(streamconv.verify, source, tmp_path / "out"),
    ):
        with pytest.raises(TypeError, match="no option 'max_shards'; did you mean 'max_shard'"):
            call(max_shards="1GB")
    assert not (tmp_path / "out").exists()


def test_recorded_options_that_do_not_fit_are_named_as_such(tmp_path: Path) -> None:
    torch.save({"a": {"b": {"w": torch.ones(2, 2)}}, "c": torch.ones(1)}, tmp_path / "run.pt")
    streamconv.convert(tmp_path / "run.pt", tmp_path / "out", root="a.b")
    with pytest.raises(UsageError, match=r"options that the destination records.*--root"):
        streamconv.verify(plain(tmp_path / "plain"), tmp_path / "out")


def test_help_needs_no_numpy() -> None:
    program = "import sys; from streamconv.cli import main; main(['convert', '--help']); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n")


# ------------------------------------------------------------------------- options without effect


WITHOUT_EFFECT: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "root on safetensors": (plain, {"root": "m"}, "--root has no effect on this source (safetensors)"),
    "layers named and counted": (plain, {"try_layers": 1, "layers": "0"}, "--try has no effect with --layers"),
    "root on SAT": (sat, {"root": "m"}, "--root has no effect on this source (SAT)"),
    "root on MindSpore": (mindspore_file, {"root": "m"}, "--root has no effect on this source (MindSpore)"),
    "ema on DeepSpeed": (deepspeed, {"ema": True}, "--ema has no effect on this source (DeepSpeed)"),
    "ema where none was saved": (sat, {"ema": True}, "--ema has no effect on this source (SAT)"),
    "ema on a plain model": (plain, {"ema": True}, "--ema has no effect on this source"),
    "weights of a plain model": (plain, {"weights": "model"}, "--weights has no effect on this source"),
    "weights without an optimizer's": (deepspeed, {"weights": "model"}, "--weights has no effect on this source (Dee"),
    "weights of DCP": (distributed, {"weights": "master"}, "--weights has no effect on this source (DCP)"),
    "optimizer beside a plain model": (plain, {"optimizer": True}, "--optimizer has no effect on this source"),
    "optimizer that DCP has not": (distributed, {"optimizer": True}, "--optimizer has no effect on this source (DCP)"),
    "strategy of a plain model": (plain, {"source_strategy": "s"}, "--source-strategy has no effect on this source"),
    "strategy of a file": (mindspore_file, {"source_strategy": "s"}, "--source-strategy has no effect on this"),
    "scale without a LoRA": (plain, {"lora_scale": 2.0}, "--lora-scale has no effect on this source (safetensors)"),
    "scale on DeepSpeed": (deepspeed, {"lora_scale": 2.0}, "--lora-scale has no effect on this source (DeepSpeed)"),
    "keeping a LoRA where there is none": (plain, {"keep_lora": True}, "--keep-lora has no effect on this source"),
    "config of a pipeline": (pipeline, {"config": "CONFIG"}, "--config has no effect on this source (diffusers"),
    "shards in one file": (plain, {"to": "mindspore", "max_shard": "1GB"}, "--max-shard has no effect with --to mind"),
    "tp": (plain, {"tp": 2}, "--tp has no effect with --to safetensors (it is for --to mindspore, "),
    "pp": (plain, {"pp": 2, "to": "sat"}, "--pp has no effect with --to sat"),
    "strategy": (plain, {"strategy": "s"}, "--strategy has no effect with --to safetensors"),
    "tp beside a strategy": (plain, {"tp": 2, "strategy": "s", "to": "mindspore"}, "--tp has no effect with --strategy"),
    "pp beside a strategy": (plain, {"pp": 2, "strategy": "s", "to": "mindspore"}, "--pp has no effect with --strategy"),
    "architecture beside a recipe": (plain, {"recipe": "yi-llama", "to_arch": "llama"}, "--to-arch has no effect with "),
    "crc": (plain, {"crc": True, "to": "mindspore-safetensors"}, "--crc has no effect with --to mindspore-safet"),
    "ignore": (plain, {"ignore": ["a"]}, "--ignore has no effect without --recipe"),
    "reverse": (plain, {"reverse": True}, "--reverse needs a recipe by name"),
    "unmatched": (plain, {"allow_unmatched": True}, "--allow-unmatched has no effect without --recipe or --to-arch"),
    "loss": (plain, {"allow_loss": True}, "--allow-loss has no effect without --delete-source"),
    "mismatch": (plain, {"allow_mismatch": True}, "--allow-mismatch has no effect without --like or --config"),
    "fill": (plain, {"vocab_fill": "zero"}, "--vocab-fill has no effect without --pad-vocab or --resize-vocab"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(case: str, tmp_path: Path) -> None:
    make, given, said = WITHOUT_EFFECT[case]
    source = make(tmp_path / "source")
    if "config" in given:
        given = {"config": tmp_path / "config.json"}
        given["config"].write_text("{}")
    with pytest.raises(UsageError) as caught:
        streamconv.plan(source, **given)
    assert said in str(caught.value)
    if set(given) <= set(fields(ReadingOptions)):
        with pytest.raises(UsageError):
            streamconv.open(source, **given)


def test_types_of_options_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fields(ConvertOptions)
    monkeypatch.setattr("streamconv.options.fields.get_type_hints", lambda *_, **__: 1 / 0)
    assert fields(ConvertOptions) == before


def test_every_option_that_does_not_always_apply_is_refused_somewhere() -> None:
    refused = {name for _, given, _ in WITHOUT_EFFECT.values() for name in given}
    conditional = {name for name, option in fields(ConvertOptions).items() if option.source or option.beside}
    conditional |= {name for name, option in fields(ConvertOptions).items() if option.against}
    assert conditional.union(*(form.options for form in FORMATS.values())) <= refused


def test_shards_have_no_size_where_each_rank_is_a_file(tmp_path: Path) -> None:
    source, ranks = plain(tmp_path / "a"), {"to": "mindspore-safetensors", "tp": 2}
    assert streamconv.plan(source, **ranks).outputs
    said = (
        r"--max-shard has no effect with --tp \(it is for use without --tp, --pp or --strategy; leave it out"
    )
    for size in ("1GB", "5GB"):  # the default, spelled out, is a size like any other
        with pytest.raises(UsageError, match=said):
            streamconv.plan(source, max_shard=size, **ranks)


@pytest.mark.parametrize("command", ["convert", "plan", "verify"])
def test_workers_of_an_engine_without_workers_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = plain(tmp_path / "a"), tmp_path / "out"
    streamconv.convert(source, out, engine="inline", workers=1)
    for workers, code in ("1", 0), ("2", 2):
        assert cli.main([command, str(source), str(out), "--engine", "inline", "--workers", workers]) == code
    said = "--workers has no effect with --engine inline (it is for --engine local; leave it out)"
    assert said in capsys.readouterr().err


def test_all_of_them_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        streamconv.plan(plain(tmp_path / "a"), root="m", ema=True)
    assert [problem.message.split()[0] for problem in caught.value.problems] == ["--root", "--ema"]


def test_defaults_and_wishes_that_are_met_are_harmless(tmp_path: Path) -> None:
    source = plain(tmp_path / "a")
    plan = streamconv.plan(
        source, tp=1, pp=1, crc=False, vocab_fill="mean", ema=False, tied="drop", dtype="F32"
    )
    assert fingerprint(plan) == fingerprint(streamconv.plan(source, dtype="F32"))
    assert streamconv.plan(torch_file(tmp_path / "b"), root="run.module").tensors


def test_an_open_checkpoint_cannot_be_read_otherwise(tmp_path: Path) -> None:
    opened = streamconv.open(torch_file(tmp_path / "a"), root="run.module")
    assert streamconv.plan(opened).arguments["root"] == "run.module"
    assert streamconv.plan(opened, root="run.module").arguments["root"] == "run.module"
    with pytest.raises(UsageError, match="open already, without root"):
        streamconv.plan(opened, root="run")


# ---------------------------------------------------------------------------------------- repeats


@pytest.mark.parametrize(
    "words",
    [
        ["--root", "a", "--root", "b"],
        ["--to", "torch", "--to", "sat"],
        ["--to", "safetensors", "--to", "safetensors"],
        ["--lora-scale", "1", "--lora", "a", "--lora-scale", "2"],
        ["--lora", "a", "--lora-scale", "1", "--lora-scale", "2"],
        ["--tp", "1", "--tp", "1"],
        ["--checksum", "--no-checksum"],
        ["--overwrite", "--overwrite"],
        ["--memory", "1GB", "--memory", "2GB"],
    ],
)
def test_an_option_that_does_not_add_is_given_once(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["a", "b", *words]) == 2
    assert "given twice" in capsys.readouterr().err


def test_an_option_that_adds_keeps_the_order() -> None:
    parsed = cli.parse(["a", "--drop", "x", "b", "--drop", "y", "--dtype", "BF16"])
    assert (parsed.drop, parsed.dtype) == (["x", "y"], ["BF16"])
    assert cli.parse(["a", "b"]).drop == ()


def test_each_adapter_has_the_scale_that_follows_it() -> None:
    given = ("--lora x", "--lora y", "--lora-scale 2", "--lora z", "--lora-scale 0.5", "--lora w")
    words = ["a", "b", *" ".join(given).split()]
    parsed = cli.parse(words)
    assert (parsed.lora, parsed.lora_scale) == (["x", "y", "z", "w"], [None, 2.0, 0.5])
    again = spelled(PlanOptions, filled(PlanOptions, {"lora": parsed.lora, "lora_scale": parsed.lora_scale}))
    assert [word.split()[0] for word in again] == [word for word in words if word.startswith("--")]
    assert cli.parse(["a", "b", *" ".join(again).split()]).lora_scale == [None, 2.0, 0.5]
    assert cli.parse(["a", "b", "--lora-scale", "2"]).lora_scale == [2.0]


# --------------------------------------------------------------------------------------- recorded


def test_recorded_options_make_the_same_plan_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain(Path("a"))
    plain(Path("like"))
    Path("like/config.json").write_text("{}")
    options: dict[str, Any] = {"like": "like", "dtype": "BF16", "drop": ["b.*"], "side_files": False}
    made = streamconv.convert("a", "out", engine="inline", **options).plan
    document = json.loads(Path("out/.streamconv/conversion.json").read_text())["arguments"]
    assert list(document) == list(fields(PlanOptions))
    assert document["like"] == "./../like"
    assert document["dtype"] == ["BF16"]
    monkeypatch.chdir("/")
    again = arguments(destination_at(tmp_path / "out"))
    assert fingerprint(streamconv.plan(tmp_path / "a", **again)) == fingerprint(made)
    assert recorded(PlanOptions, filled(PlanOptions, again)) == {**document, "like": str(tmp_path / "like")}
    assert not streamconv.verify(tmp_path / "a", tmp_path / "out").problems


def test_a_whole_number_on_record_is_a_number() -> None:
    document = json.loads(json.dumps(recorded(PlanOptions, filled(PlanOptions, {"lora_scale": 2}))))
    assert from_record(PlanOptions, document)["lora_scale"] == 2


@pytest.mark.parametrize(
    "change", [{"tp": "2"}, {"tp": True}, {"drop": "a"}, {"ema": 1}, {"weights": "all"}, {"new": 1}, {"to": None}]
)  # fmt: skip
def test_options_on_record_are_checked_like_any_outside_data(change: dict[str, Any], tmp_path: Path) -> None:
    source, out = plain(tmp_path / "a"), tmp_path / "out"
    streamconv.convert(source, out, engine="inline")
    path = out / ".streamconv" / "conversion.json"
    document = json.loads(path.read_text())
    document["arguments"] |= change
    path.write_text(json.dumps(sealed(document)))
    with pytest.raises(UsageError, match=f"on record cannot be used: {next(iter(change))}"):
        streamconv.verify(source, out)


# ----------------------------------------------------------------------------- one from elsewhere


class Toy(PlanOptions, total=False):
    """An option that this package does not have."""

    colour: Annotated[
        str | None,
        Option(None, "what colour", otherwise="none", metavar="NAME"),
    ]


def test_a_record_of_ones_own_derives_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    parser = parsers.Command("", "A toy.", {"toys": Toy}, run=lambda _: 0).parser("toy")
    found = parsers.given(Toy, parser.parse_args(["--colour", "red", "--tp", "1"]))
    assert found == {"colour": "red", "tp": 1}
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--colour NAME" in (shown := capsys.readouterr().out) and "what colour (default: none)" in shown
    options = filled(Toy, found)
    assert recorded(Toy, options)["colour"] == "red"
    painted = Format("painted", "streamconv.writers.torch_zip", ".bin", options=frozenset({"colour"}))
    require_effect(Toy, {**options, "to": "painted"}, "to", {**FORMATS, "painted": painted})
    with pytest.raises(
        UsageError, match=r"--colour has no effect with --to safetensors .it is for --to painted;"
    ):
        require_effect(Toy, options, "to", {**FORMATS, "painted": painted})
