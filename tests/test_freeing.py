"""`--delete-source`: when a file of the source may go, and what holds from then on."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import orjson
import pytest
import torch
from safetensors.numpy import save_file
from test_apart import DAMAGE
from test_run import contents, weights
from transformers import LlamaConfig, LlamaForCausalLM
from watched import Call, Calls, Failing, watching

import streamconv
from streamconv import cli
from streamconv.errors import CheckpointError, ConversionError, DestinationError, PlanError, UsageError
from streamconv.plans import fingerprint, to_json
from streamconv.running import deleted, freeing, run
from streamconv.running.destination import destination_at
from streamconv.running.items import work_items
from streamconv.running.state import sealed
from streamconv.storage.local import LocalSource

SHARDS = 6


def make_source(directory: Path, shards: int = SHARDS, rows: int = 64) -> Path:
    """A model in shards, with an index, a config and a tokenizer."""
    numbers = numpy.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    places = {}
    for shard in range(shards):
        state = {
            f"layers.{2 * shard + i}.w": numbers.standard_normal((rows, 64)).astype("f4") for i in range(2)
        }
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(state, directory / name, {"format": "pt"})
        places |= dict.fromkeys(state, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_bytes(orjson.dumps(index))
    (directory / "config.json").write_text('{"torch_dtype": "float32"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def llama(directory: Path) -> Path:
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def files(source: Path) -> list[str]:
    return sorted(path.name for path in source.glob("*.safetensors"))


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.running.freeing._STEP_BYTES", 1)


def expected(source: Path, out: Path, **options: Any) -> dict[str, bytes]:
    streamconv.convert(source, out, checksum=True, **options)
    return weights(out)


def deleting(source: Path, out: Path, **options: Any) -> Any:
    return streamconv.convert(source, out, delete_source=True, **options)


# --------------------------------------------------------------------------------------- what is done


@pytest.mark.parametrize("engine", ["inline", "local"])
@pytest.mark.parametrize("to", ["safetensors", "torch", "mindspore"])
@pytest.mark.parametrize("shard", ["20KB", "70KB", "5GB"])
def test_the_output_is_the_same_and_the_weights_are_gone(
    tmp_path: Path, engine: str, to: str, shard: str
) -> None:
    options: dict[str, Any] = {"to": to, "max_shard": shard} if to != "mindspore" else {"to": to}
    source = make_source(tmp_path / "source")
    wanted = expected(source, tmp_path / "plain", **options)
    deleting(source, tmp_path / "out", engine=engine, workers=2 if engine == "local" else 1, **options)
    assert weights(tmp_path / "out") == wanted
    assert sorted(path.name for path in source.iterdir()) == [
        ".streamconv-deleted", "config.json", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    found = streamconv.verify(tmp_path / "out")
    assert not found.problems and not found.unchecked


def test_a_file_of_its_own_goes_too(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.randn(50, 50) for i in range(4)}, tmp_path / "model.bin")
    (tmp_path / "beside.txt").write_text("stays")
    streamconv.convert(tmp_path / "model.bin", tmp_path / "plain.safetensors")
    wanted = (tmp_path / "plain.safetensors").read_bytes()
    deleting(tmp_path / "model.bin", tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        ".streamconv-deleted-model.bin", "beside.txt", "model.safetensors", "plain.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "model.safetensors").read_bytes() == wanted
    assert deleting(tmp_path / "model.bin", tmp_path / "model.safetensors").finished_before


def test_a_second_run_finds_it_done(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    deleting(source, tmp_path / "out")
    assert deleting(source, tmp_path / "out").finished_before
    assert streamconv.convert(source, tmp_path / "out").finished_before
    assert sorted(os.listdir(tmp_path / "out" / ".streamconv")) == [
        "conversion.json", "freed.json", "plan.json",
    ]  # fmt: skip
    before = contents(tmp_path / "out")
    with pytest.raises(DestinationError, match="only copy"):
        deleting(source, tmp_path / "out", overwrite=True)
    with pytest.raises(DestinationError, match=r"with other options \(--max-shard\)"):
        deleting(source, tmp_path / "out", max_shard="20KB")
    assert contents(tmp_path / "out") == before


def test_another_model_may_replace_a_finished_one(tmp_path: Path) -> None:
    deleting(make_source(tmp_path / "source"), tmp_path / "out")
    other = make_source(tmp_path / "other", 2)
    streamconv.convert(other, tmp_path / "out", overwrite=True)
    assert weights(tmp_path / "out") == expected(other, tmp_path / "plain")
    assert os.listdir(tmp_path / "out" / ".streamconv") == ["conversion.json"]


# --------------------------------------------------------------------------------------- order


def test_write_sync_read_again_note_delete(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    calls = Calls()
    with watching(calls):
        deleting(source, out, max_shard="40KB", engine="inline")
    made = calls.made
    journal, freed = str(out / ".streamconv" / "journal"), str(out / ".streamconv" / "freed.json")
    removed = [
        (at, call.place) for at, call in enumerate(made)
        if call.method == "remove" and call.place.startswith(f"{source}/")
    ]  # fmt: skip
    assert len(removed) == SHARDS
    assert not [call for call in made if call.method == "copy_from" and "model-" in call.place]
    before = 0
    for number, (at, _) in enumerate(removed):
        past = made[before:at]

        def last(method: str, place: str, past: list[Call] = past) -> int:
            return max(i for i, call in enumerate(past) if call.method == method and place in call.place)

        # Each shard holds two tensors of 16 KiB; a shard of the output takes two.
        output = f"{out}/model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        growing = [i for i, call in enumerate(past) if call.method == "write" and output in call.place]
        sync = last("sync", output)
        read = [
            i for i, call in enumerate(past)
            if call.method == "read_into" and call.role == "source" and output in call.place
        ]  # fmt: skip
        forgotten = last("forget", output)
        noted, synced = last("publish", freed), last("sync", journal)
        assert max(growing) < sync < min(read) and sync < forgotten < max(read) < synced < noted
        before = at


def test_no_file_goes_before_all_checks_have_held(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(40, 40) for i in range(3)}
    for rank in range(2):
        shard = {"module": {"mixins.x.weight": torch.randn(8, 8), **state}}
        if rank:
            shard["module"]["w2"] = state["w2"] + 1
        save = tmp_path / "sat" / "100"
        save.mkdir(parents=True, exist_ok=True)
        torch.save(shard, save / f"mp_rank_{rank:02d}_model_states.pt")
    (tmp_path / "sat" / "latest").write_text("100")
    (tmp_path / "sat" / "model_config.json").write_text("{}")
    before = contents(tmp_path / "sat")
    with pytest.raises(ConversionError):
        deleting(tmp_path / "sat", tmp_path / "out", engine="inline")
    (tmp_path / "sat" / ".streamconv-deleted").unlink()  # the mark of a run that may delete
    assert contents(tmp_path / "sat") == before


def test_bytes_that_the_disk_does_not_hold_are_found(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    first = "model-00003-of-00006.safetensors"
    flipped: list[str] = []

    def flip(call: Call) -> None:
        # Between the sync and reading again.
        if call.method == "forget" and first in call.place and not flipped:
            flipped.append(call.place)
            with open(call.place, "r+b") as file:
                file.seek(-5, os.SEEK_END)
                byte = file.read(1)
                file.seek(-5, os.SEEK_END)
                file.write(bytes([byte[0] ^ 1]))

    with watching(flip), pytest.raises(ConversionError, match="is not what the disk holds") as caught:
        deleting(source, out, max_shard="40KB", engine="inline")
    assert caught.value.exit_code == 1 and caught.value.headline.tensor == "layers.5.w"
    assert first in files(source) and not (out / first).exists()
    assert len(deleting(source, out, max_shard="40KB", engine="inline").deleted) == len(files(source)) + 4
    assert weights(out) == wanted and files(source) == []


def test_a_source_that_changes_is_not_deleted(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    last = source / files(source)[-1]

    def touch(call: Call) -> None:
        if call.method == "write" and "model-00006" in call.place:
            os.utime(last)

    with watching(touch), pytest.raises(ConversionError, match="the source changed"):
        deleting(source, out, engine="inline", max_shard="40KB")
    assert last.exists()
    with pytest.raises(CheckpointError, match="put it back as it was"):
        deleting(source, out, engine="inline", max_shard="40KB")


# --------------------------------------------------------------------------------------- refusals


def refused(source: Path, out: Path, said: str, **options: Any) -> None:
    before = contents(source)
    for call in (streamconv.plan, streamconv.convert):
        with pytest.raises((UsageError, PlanError)) as caught:
            call(source, out, delete_source=True, **options)
        assert said in str(caught.value)
    assert contents(source) == before and not list(out.glob("*"))


def test_what_is_rounded_or_dropped_is_not_deleted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    refused(source, tmp_path / "out", "values of 12 tensors are not kept (rounding)", dtype="BF16")
    refused(source, tmp_path / "out", "1 tensor left out: layers.3.w", drop=["layers.3.*"])
    deleting(source, tmp_path / "out", dtype="BF16", drop=["layers.3.*"], allow_loss=True)
    assert files(source) == [] and not streamconv.verify(tmp_path / "out").problems


def test_what_else_a_file_holds_is_not_deleted(tmp_path: Path) -> None:
    held = {
        "model": {"w": torch.randn(9, 9)},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(300, 300)}}},
    }
    torch.save(held, tmp_path / "run.pt")
    with pytest.raises(PlanError, match=r"delete more|bytes that nothing is made of|left out"):
        deleting(tmp_path / "run.pt", tmp_path / "out")
    assert (tmp_path / "run.pt").exists()


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_small_tensor_that_nothing_is_made_of_is_seen(tmp_path: Path, where: str) -> None:
    """Of 40 KB, which is more than headers of some tensors take."""
    state = {f"w{i}": torch.randn(9, 9) for i in range(20)}
    more = {"discriminator": {"w": torch.randn(100, 100)}}
    held = {**more, "model": state} if where == "before" else {"model": state, **more}
    torch.save(held, tmp_path / "run.pt")
    with pytest.raises(PlanError, match="delete more than the output has") as caught:
        deleting(tmp_path / "run.pt", tmp_path / "out", root="model")
    assert "bytes that nothing is made of" in str(caught.value)
    torch.save({"model": state}, tmp_path / "run.pt")
    deleting(tmp_path / "run.pt", tmp_path / "out", root="model")
    assert not (tmp_path / "run.pt").exists()


def test_a_file_that_nothing_is_taken_of_stays(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    torch.save({"step": 3}, source / "optimizer.pt")
    gone = files(source)
    deleting(source, tmp_path / "out", only=["layers.0.*", "layers.1.*"], allow_loss=True)
    assert files(source) == gone[1:] and (source / "optimizer.pt").exists()


def test_names_that_would_not_free_anything_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    first = source / files(source)[0]
    os.link(first, tmp_path / "another")
    refused(source, tmp_path / "out", "hard link")
    (tmp_path / "another").unlink()
    first.rename(source / "blob")
    first.symlink_to("blob")
    refused(source, tmp_path / "out", "it is a link")


def test_rows_that_are_cut_are_not_deleted(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    plan = streamconv.plan(source, resize_vocab=40, delete_source=True, allow_loss=True)
    assert not plan.dropped
    refused(source, tmp_path / "out", "elements of 2 tensors are left out", resize_vocab=40)
    deleting(source, tmp_path / "out", resize_vocab=56, vocab_fill="zero")


HALF = "take(x, 0, [[0, 1, 320]])"


@pytest.mark.parametrize(
    ("program", "kept"),
    [
        (f"a, b = {HALF}, {HALF}", False),
        ("a, b = chunk(x, 0, 2)", True),
        ("a, b = chunk(transpose(x), 0, 2)", True),
        ("a, b = take(x, 0, [[0, 2, 320]]), take(x, 0, [[1, 2, 320]])", True),
        ("a, b = take(x, 0, [[0, 2, 320]]), take(x, 0, [[0, 1, 320]])", False),
        ("a, b = take(x, 1, [[0, 2, 50]]), take(x, 1, [[1, 2, 50]])", True),
        ("a, b = x, x", True),
        (f"a, b = x, {HALF}", True),
        ("a, b = take(x, 0, [[0, 1, 400]]), take(x, 0, [[300, 1, 340]])", True),
        ("a, b = take(x, 0, [[0, 1, 300]]), take(x, 0, [[301, 1, 339]])", False),
        (f"a, b = concat([{HALF}, {HALF}]), filled([1], 0, 'F32')", False),
        (f"a, b = pad({HALF}, 0, 640), filled([1], 0, 'F32')", False),
        (f"a, b = cast({HALF}, 'F64'), cast({HALF}, 'F64')", False),
        ("a, b = chunk(cast(x, 'F64'), 0, 2)", True),
    ],
)
def test_every_element_is_somewhere(tmp_path: Path, program: str, kept: bool) -> None:
    """Not only as many as there are: what is written twice makes up for nothing."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({"x.weight": numpy.arange(64000, dtype="f4").reshape(640, 100)}, source / "model.safetensors")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "toy-parts"\ntitle = "parts"\n[[rule]]\nsource = "x.weight"\n'
        f'target = {{a = "a.weight", b = "b.weight"}}\nprogram = "{program}"\n'
    )
    if kept:
        deleting(source, tmp_path / "out", recipe=recipe)
        assert files(source) == []
    else:
        refused(source, tmp_path / "out", "elements of 1 tensor are left out: x.weight", recipe=recipe)


def in_the_cache(base: Path) -> tuple[Path, Path]:
    """A snapshot in a cache as huggingface_hub keeps it, and the directory of what its links lead to."""
    plain = make_source(base / "plain")
    snapshot, blobs = base / "models--a--b" / "snapshots" / "0123", base / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot, blobs


def test_the_files_of_a_snapshot_go_with_their_links(tmp_path: Path) -> None:
    snapshot, blobs = in_the_cache(tmp_path)
    wanted = expected(snapshot, tmp_path / "plain-out")
    deleting(snapshot, tmp_path / "out")
    assert weights(tmp_path / "out") == wanted
    left = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert sorted(os.listdir(snapshot)) == [".streamconv-deleted", *left] and len(
        list(blobs.iterdir())
    ) == len(left)
    assert all(path.exists() for path in snapshot.iterdir())


def test_what_another_revision_has_stays(tmp_path: Path) -> None:
    snapshot, _ = in_the_cache(tmp_path)
    shutil.copytree(snapshot, snapshot.parent / "4567", symlinks=True)
    refused(snapshot, tmp_path / "out", "it is a link, and what it leads to may be in use elsewhere")


def test_a_destination_of_a_stranger_deletes_nothing(tmp_path: Path) -> None:
    """One that says of the source what the source does not."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    theirs = make_source(tmp_path / "theirs")
    interrupted(theirs, tmp_path / "theirs-out")
    shutil.copytree(tmp_path / "theirs-out", out)
    own = out / ".streamconv"
    made = streamconv.plan(source, max_shard="40KB")
    (own / "plan.json").write_bytes(orjson.dumps(sealed(to_json(made))))
    (own / "freed.json").write_bytes(
        orjson.dumps(sealed({"files": [f"{source}/model-00009-of-00006.safetensors"]}))
    )
    before = contents(source)
    for given in source, made:
        with pytest.raises(DestinationError, match=r"no mark of that|only copy"):
            streamconv.convert(
                given, out, delete_source=True, **({} if given is made else {"max_shard": "40KB"})
            )
    assert contents(source) == before


def test_a_journal_of_a_stranger_is_not_believed(tmp_path: Path) -> None:
    """Bytes that fit their digests, and are not the source's."""
    source, theirs = make_source(tmp_path / "source"), make_source(tmp_path / "theirs")
    for path in theirs.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    out = tmp_path / "out"
    fault = Failing("publish", OSError(errno.EIO, "Input/output error"), after=4, place="/out/model")
    with watching(fault), pytest.raises(ConversionError):
        streamconv.convert(theirs, out, max_shard="40KB", checksum=True, engine="inline")
    made = streamconv.plan(source, max_shard="40KB")
    (out / ".streamconv" / "plan.json").write_bytes(orjson.dumps(sealed(to_json(made))))
    journal = out / ".streamconv" / "journal"
    lines = [
        line.partition(b" ")[2].replace(b",true,0,0", b",false,0,0")
        for line in journal.read_bytes().splitlines()
    ]
    journal.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines))
    fault = Failing("write", OSError(errno.EIO, "Input/output error"), after=3, place="/out/model")
    with watching(fault), pytest.raises(ConversionError):  # it ends when there is a mark
        deleting(source, out, max_shard="40KB", engine="inline")
    deleting(source, out, max_shard="40KB")
    assert weights(out) == wanted and files(source) == []


def test_a_trial_deletes_nothing(tmp_path: Path) -> None:
    refused(llama(tmp_path / "source"), tmp_path / "out", "a trial of a few layers", layers="0-1")


def test_two_runs_do_not_delete_one_source(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    plan = streamconv.plan(source)
    with deleted.locked(plan), pytest.raises(UsageError, match="another run is deleting this source"):
        deleting(source, tmp_path / "out")
    (source / ".streamconv-deleting").touch()  # a run that was killed leaves it
    assert fingerprint(streamconv.plan(source)) == fingerprint(plan)
    deleting(source, tmp_path / "out")
    assert not (source / ".streamconv-deleting").exists()


def test_where_nothing_can_be_deleted_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    fault = Failing("check_writable", PermissionError(errno.EACCES, "Permission denied"), place="source")
    with watching(fault), pytest.raises(UsageError, match="nothing can be deleted there: Permission denied"):
        deleting(source, tmp_path / "out")


def test_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    command = [str(source), str(out), "--delete-source"]
    assert cli.main(command) == 2
    assert "--delete-source was not agreed to" in capsys.readouterr().err
    assert cli.main([str(source), str(out), "--yes"]) == 2
    assert "--yes has no effect without --delete-source" in capsys.readouterr().err
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "", raising=False)  # Ctrl-D
    assert cli.main(command) == 2
    assert "[y/N] \nstreamconv: error: --delete-source was not agreed to" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n", raising=False)
    assert cli.main(command) == 2 and len(files(source)) == SHARDS
    monkeypatch.setattr(sys.stdin, "readline", lambda: "y\n", raising=False)
    assert cli.main([*command, "--verify"]) == 0 and files(source) == []
    shown = capsys.readouterr()
    assert "[y/N]" in shown.err and "deletes  6 files" in shown.err


# --------------------------------------------------------------------------------------- room


def test_the_plan_says_how_much_the_disk_holds_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "source")
    one = (source / files(source)[0]).stat().st_size
    made = streamconv.plan(source, max_shard="5GB")
    most = freeing.peak(made, destination_at(tmp_path / "out"))
    assert one - 1000 < most < 2 * one
    capsys.readouterr()
    assert cli.main(["plan", str(source), str(tmp_path / "out"), "--delete-source", "--json"]) == 0
    assert orjson.loads(capsys.readouterr().out)["disk"]["needed"] == most
    assert cli.main(["plan", str(source), str(tmp_path / "out"), "--delete-source"]) == 0
    assert "more than now at most" in capsys.readouterr().out


def test_steps_free_the_source_early(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    plan = streamconv.plan(source)
    items = work_items(plan, [""] * len(plan.outputs))
    found = freeing.steps(plan, items, (), ())
    assert sorted(index for step in found for index in step.items) == list(range(len(items)))
    assert [len(step.files) for step in found] == [1] * SHARDS
    left = {file.path: file.size for file in plan.files}
    for step in found:
        for path in step.files:
            del left[path]
        later = {at for step_ in found[found.index(step) + 1 :] for at in step_.items}
        read = {extent.file for at in later for extent in items[at].expression.extents}  # type: ignore[union-attr]
        assert read.isdisjoint(step.files)
    assert [Path(path).name for path in left] == ["model.safetensors.index.json"]


def test_another_disk_is_not_freed_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = streamconv.plan(make_source(tmp_path / "source"))
    monkeypatch.setattr(LocalSource, "disk", lambda _, place: "source" in place)
    assert freeing.peak(plan, destination_at(tmp_path / "out")) == plan.bytes_to_write


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("engine", ["inline", "local"])
@pytest.mark.parametrize("to", ["safetensors", "torch"])
@pytest.mark.parametrize("shard", ["400KB", "5GB"])
def test_a_disk_that_holds_the_model_little_more_than_once(
    tmp_path: Path, engine: str, to: str, shard: str
) -> None:
    with small_disk(tmp_path / "disk", 6 << 20) as disk:
        source = make_source(disk / "source", 8, rows=1024)  # 4 MiB
        wanted = expected(source, tmp_path / "plain", to=to, max_shard=shard)
        with pytest.raises(PlanError, match="bytes are needed on the disk"):
            streamconv.convert(source, disk / "out", to=to, max_shard=shard)
        workers = 2 if engine == "local" else 1
        deleting(source, disk / "out", to=to, max_shard=shard, engine=engine, workers=workers)
        assert weights(disk / "out") == wanted and files(source) == []


def sharded_torch(directory: Path) -> None:
    directory.mkdir()
    places = {}
    for shard in range(1, 9):
        state = {f"layers.{2 * shard + i}.w": torch.randn(256, 256) for i in range(2)}
        torch.save(state, directory / f"pytorch_model-{shard:05}-of-00008.bin")
        places |= dict.fromkeys(state, f"pytorch_model-{shard:05}-of-00008.bin")
    (directory / "pytorch_model.bin.index.json").write_bytes(orjson.dumps({"weight_map": places}))


@pytest.mark.parametrize("engine", ["inline", "local"])
def test_what_is_deleted_is_held_by_nobody(tmp_path: Path, engine: str) -> None:
    """Torch files, whose directories are read as archives, on a disk that has no room for one that stays open."""
    with small_disk(tmp_path / "disk", 6 << 20) as disk:
        sharded_torch(disk / "source")  # 4 MiB
        wanted = expected(disk / "source", tmp_path / "plain")
        deleting(disk / "source", disk / "out", engine=engine, workers=2 if engine == "local" else 1)
        assert weights(disk / "out") == wanted and not list((disk / "source").glob("*.bin"))


def test_too_little_room_even_so(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    needed = freeing.peak(streamconv.plan(source), destination_at(tmp_path / "out"))
    free: list[int] = []
    real = shutil.disk_usage

    class Usage:
        def __init__(self) -> None:
            self.free = free[0]

    shutil.disk_usage = lambda _: Usage()  # type: ignore[assignment,return-value]
    try:
        free[:] = [needed - 1]
        refused(source, tmp_path / "out", "bytes are needed on the disk")
        free[:] = [needed]
        deleting(source, tmp_path / "out")
    finally:
        shutil.disk_usage = real


# --------------------------------------------------------------------------------------- interruption


def interrupted(source: Path, out: Path, after: int = 3, **options: Any) -> None:
    """A run that ended after so many files of the source were gone."""
    fault = Failing("remove", OSError(errno.EIO, "Input/output error"), after=after, place=f"{source}/")
    with watching(fault), pytest.raises(ConversionError):
        deleting(source, out, engine="inline", max_shard="40KB", **options)
    assert len(files(source)) == SHARDS - after


def test_a_version_that_has_other_options_goes_on(tmp_path: Path) -> None:
    """The plan that is kept lacks an option that has come since, which is as if it was not given."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    interrupted(source, out)
    place = out / ".streamconv" / "plan.json"
    plan = orjson.loads(place.read_bytes())
    for name in ("optimizer", "dtype", "lora"):
        del plan["arguments"][name]
    place.write_bytes(orjson.dumps(sealed(plan)))
    with pytest.raises(DestinationError, match=r"with other options \(--optimizer\).*--max-shard 40KB"):
        deleting(source, out, max_shard="40KB", optimizer=True)
    deleting(source, out, max_shard="40KB")
    assert weights(out) == wanted


def test_it_goes_on_with_part_of_the_source_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    interrupted(source, out)
    command = [str(source), str(out), "--max-shard", "40KB", "--delete-source"]
    assert cli.main(["plan", *command]) == 0
    assert "gone     3 files that an earlier run has deleted" in capsys.readouterr().out
    assert cli.main([*command, "--yes"]) == 0
    assert weights(out) == wanted and files(source) == []
    assert not streamconv.verify(out).problems


def test_it_goes_on_without_deleting_more(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    interrupted(source, out)
    left = files(source)
    streamconv.convert(source, out, max_shard="40KB")
    assert weights(out) == wanted and files(source) == left
    found = streamconv.verify(out)  # nothing else can tell that it is right
    assert not found.problems and not found.unchecked


def test_a_source_that_is_deleted_says_where_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    torch.save({"w": torch.randn(50, 50)}, tmp_path / "model.bin")
    deleting(source, out)
    deleting(tmp_path / "model.bin", tmp_path / "model.safetensors")
    said = "what a run with --delete-source deleted here, it wrote to"
    for command in (["inspect", source], [source, tmp_path / "other"], ["verify", source, out]):
        assert cli.main([str(word) for word in command]) == 2
        assert f"{said} {out})" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "model.bin")]) == 2
    assert f"{said} {tmp_path / 'model.safetensors'})" in capsys.readouterr().err
    for text in (b"", b"[]", b'{"destination": 3}', b'{"destination": "a\\nstreamconv: done"}'):
        (source / ".streamconv-deleted").write_bytes(text)
        assert cli.main(["inspect", str(source)]) == 2
        shown = capsys.readouterr().err
        assert "streamconv: done" not in shown.splitlines() and (said in shown) == (b"done" in text)


def test_what_an_earlier_run_wrote_is_on_the_disk_before_a_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were in the page cache when their run ended, and were resumed from, survive a crash of the machine."""
    monkeypatch.setattr("streamconv.execution.node._BOOT_ID", tmp_path / "boot")
    monkeypatch.setattr("streamconv.running.items._BATCH_BYTES", 1)
    (tmp_path / "boot").write_text("first")
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain")
    fault = Failing("write", OSError(errno.EIO, "Input/output error"), after=2, place="/out/model")
    with watching(fault), pytest.raises(ConversionError):
        deleting(source, out, engine="inline")
    fault = Failing("remove", OSError(errno.EIO, "Input/output error"), after=2, place=f"{source}/model")
    with watching(fault), pytest.raises(ConversionError):
        deleting(source, out, engine="inline")
    assert len(files(source)) == SHARDS - 2
    (tmp_path / "boot").write_text("second")
    deleting(source, out)
    assert weights(out) == wanted


def test_a_run_that_began_without_deleting_goes_on_with_it(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    fault = Failing("publish", OSError(errno.EIO, "Input/output error"), after=4, place="/out/")
    with watching(fault), pytest.raises(ConversionError):
        streamconv.convert(source, out, max_shard="40KB", engine="inline")
    # What only the kernel saw is not believed.
    assert deleting(source, out, max_shard="40KB").bytes_resumed == 0
    assert weights(out) == wanted and files(source) == []


@pytest.mark.parametrize(
    "options",
    [{"restart": True}, {"overwrite": True}, {"restart": True, "overwrite": True}, {"dtype": "F16"}, {"to": "torch"}],
    ids=str,
)  # fmt: skip
def test_the_only_copy_gives_way_to_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    other = make_source(tmp_path / "other", 3)
    before = contents(out)
    for place, delete in (source, True), (source, False), (other, True), (other, False):
        if place is source and options == {"overwrite": True}:
            continue  # it has nothing to replace, and the run goes on
        with pytest.raises(DestinationError, match=r"only copy") as caught:
            given = {"max_shard": "40KB", "delete_source": delete, "allow_loss": delete} | options
            streamconv.convert(place, out, **given)
        assert "--restart" not in str(caught.value)
    assert contents(out) == before
    deleting(source, out, max_shard="40KB")


@pytest.mark.parametrize("name", ["plan.json", "freed.json", "journal"])
@pytest.mark.parametrize("damage", [*DAMAGE, "a digit", "gone"])
def test_damaged_state_destroys_no_only_copy(tmp_path: Path, name: str, damage: str) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    place = out / ".streamconv" / name
    if damage == "gone":
        place.unlink()
    elif damage == "a digit":
        place.write_bytes(place.read_bytes().replace(b"0", b"1", 1))
    else:
        DAMAGE[damage](place)
    before = weights(out)
    for options in {}, {"restart": True}, {"overwrite": True}, {"overwrite": True, "restart": True}:
        if name == "freed.json" and damage == "gone":
            break  # then nothing tells that anything was deleted but the source
        with pytest.raises((DestinationError, CheckpointError)):
            deleting(source, out, max_shard="40KB", **options)
        assert weights(out) == before and len(files(source)) == 3


def test_no_server_is_asked_because_a_file_of_ours_names_it(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    note = out / ".streamconv" / "freed.json"
    note.write_bytes(orjson.dumps(sealed({"files": ["http://127.0.0.1:9/x", "s3://bucket/x"]})))
    calls = Calls()
    with watching(calls), pytest.raises(DestinationError, match="it has no list of files"):
        deleting(source, out, max_shard="40KB")
    assert "://" not in str(calls.made)


@pytest.mark.parametrize("harm", ["partial gone", "final gone", "partial shorter"])
def test_what_cannot_be_made_again_is_told(tmp_path: Path, harm: str) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    harmed = min(path for path in out.iterdir() if path.name.startswith("model-00001"))
    if harm == "partial shorter":
        os.truncate(harmed, 100)
    else:
        harmed.unlink()
    before = weights(out)
    with pytest.raises(DestinationError, match="cannot be made again"):
        deleting(source, out, max_shard="40KB")
    assert weights(out) == before


def test_a_file_that_came_back_is_no_loss(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copy2)
    interrupted(source, out)
    shutil.copytree(tmp_path / "copy", source, dirs_exist_ok=True, copy_function=shutil.copy2)
    streamconv.convert(source, out, restart=True)
    assert weights(out) == expected(source, tmp_path / "plain")
    assert len(files(source)) == SHARDS


def test_a_file_that_is_gone_and_was_not_deleted_is_missed(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out)
    (source / files(source)[-1]).unlink()
    with pytest.raises(CheckpointError, match="put it back as it was"):
        deleting(source, out, max_shard="40KB")


STEPS = [("remove", "source/"), ("publish", "freed.json"), ("sync", "freed.json"), ("sync", ".safetensors"),
         ("publish", ".safetensors"), ("write", "journal"), ("sync", "journal"), ("read_into", "out/model")]  # fmt: skip


@pytest.mark.parametrize(("method", "place"), STEPS)
@pytest.mark.parametrize("skipped", [0, 1, 3, 5])
def test_a_run_that_ends_between_any_two_steps_goes_on(
    tmp_path: Path, method: str, place: str, skipped: int
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="70KB")
    for _ in range(3):
        with watching(Failing(method, OSError(errno.EIO, "Input/output error"), skipped, place)), \
                contextlib.suppress(ConversionError):  # fmt: skip
            deleting(source, out, engine="inline", max_shard="70KB")
    deleting(source, out, max_shard="70KB")
    assert weights(out) == wanted and files(source) == []


DRIVER = """
import os, signal, sys
import streamconv, streamconv.running.items, streamconv.running.freeing
from watched import watching
streamconv.running.items._BATCH_BYTES = 1 << 14
streamconv.running.freeing._STEP_BYTES = 1
source, out, to, engine, left = *sys.argv[1:5], int(sys.argv[5])
def kill(call):
    global left
    left -= call.method in ("write", "publish", "sync", "remove")
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
with watching(kill):
    streamconv.convert(source, out, to=to, max_shard="70KB", workers=2 if engine == "local" else 1, engine=engine,
                       delete_source=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inline", "local"])
@pytest.mark.parametrize("to", ["safetensors", "torch", "mindspore-safetensors"])
def test_killed_at_random_points_nothing_is_lost(tmp_path: Path, to: str, engine: str) -> None:
    """At a call of the storage that is drawn, so that it depends on no clock where a run is killed."""
    rolls = random.Random(to + engine)
    source, out = make_source(tmp_path / "source", 12), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", to=to, max_shard="70KB")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills = partly = 0
    for most in itertools.count(30, 15):
        command = [
            sys.executable,
            "-c",
            DRIVER,
            str(source),
            str(out),
            to,
            engine,
            str(rolls.randrange(most)),
        ]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
        if ran.returncode == 0:
            break
        kills += 1
        partly += 0 < len(files(source)) < 12
    assert weights(out) == wanted and files(source) == []
    assert not streamconv.verify(out).problems
    assert kills >= 2 and partly >= 1


# --------------------------------------------------------------------------------------- forms of sources


def test_a_file_that_many_ranks_share_goes_last(tmp_path: Path) -> None:
    """Rank files, each tensor of which is spread over all of them: none can go before the end, and the plan says so."""
    save = tmp_path / "sat" / "100"
    save.mkdir(parents=True)
    torch.manual_seed(0)
    for rank in range(4):
        held = {f"transformer.layers.{i}.mlp.dense_h_to_4h.weight": torch.randn(32, 16) for i in range(6)}
        torch.save({"module": held}, save / f"mp_rank_{rank:02d}_model_states.pt")
    (tmp_path / "sat" / "latest").write_text("100")
    (tmp_path / "sat" / "model_config.json").write_text("{}")
    wanted = expected(tmp_path / "sat", tmp_path / "plain")
    plan = streamconv.plan(tmp_path / "sat", delete_source=True)
    weights_written = sum(output.layout.size for output in plan.outputs)
    assert weights_written <= freeing.peak(plan, destination_at(tmp_path / "out")) <= plan.bytes_to_write
    deleting(tmp_path / "sat", tmp_path / "out")
    assert weights(tmp_path / "out") == wanted and not list(save.iterdir())


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("one_file", [False, True])
def test_an_adapter_stays(tmp_path: Path, where: str, one_file: bool) -> None:
    """What is read besides the source is not the source, wherever it lies."""
    source = llama(tmp_path / "source")
    adapter = (source if where == "inside" else tmp_path) / "adapter"
    adapter.mkdir()
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight": numpy.ones(shape, "f4")
        for name, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_bytes(orjson.dumps(config))
    base = source / "model.safetensors" if one_file else source
    deleting(base, tmp_path / "out", lora=adapter, allow_loss=True)
    assert not (source / "model.safetensors").exists()
    assert (adapter / "adapter_model.safetensors").is_file()


def test_a_source_that_is_deleted_in_part_passes_for_no_other(tmp_path: Path) -> None:
    """As a pipeline does whose transformer is gone, where nothing else names what it had."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    interrupted(source, out, after=SHARDS - 1)
    (source / "model.safetensors.index.json").rename(tmp_path / "index")
    (left,) = files(source)
    (source / left).rename(source / "model.safetensors")
    for place in source, source / "model.safetensors":
        for options in {}, {"delete_source": True}:
            with pytest.raises(UsageError, match=r"a part of it was deleted as it was converted into .*/out"):
                streamconv.convert(place, tmp_path / "other", **options)
    (source / "model.safetensors").rename(source / left)
    (tmp_path / "index").rename(source / "model.safetensors.index.json")
    deleting(source, out, max_shard="40KB")
    assert weights(out) == wanted


def test_a_destination_of_any_name(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / os.fsdecode(b"out-\xff")
    deleting(source, out)
    assert files(source) == [] and deleting(source, out).finished_before


def pipeline(base: Path) -> Path:
    """A source whose rest looks whole when one of its models is gone."""
    base.mkdir()
    (base / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
    for number, name in enumerate(("transformer", "vae")):
        (base / name).mkdir()
        save_file(
            {"w": numpy.full((64, 64), number, "f4")}, base / name / "diffusion_pytorch_model.safetensors"
        )
    return base


@pytest.mark.parametrize("where", ["there", "moved"])
def test_what_is_left_of_a_source_is_not_taken_for_it(tmp_path: Path, where: str) -> None:
    """Its first destination may have been moved, or be on a disk that is not mounted."""
    source, out, moved = pipeline(tmp_path / "source"), tmp_path / "out", tmp_path / "moved"
    wanted = expected(source, tmp_path / "plain")
    fault = Failing("remove", OSError(errno.EIO, "Input/output error"), after=1, place=f"{source}/")
    with watching(fault), pytest.raises(ConversionError):
        deleting(source, out, engine="inline")
    (left,) = source.rglob("*.safetensors")
    if where == "moved":
        out.rename(moved)
    mark = source / ".streamconv-deleted"
    before = mark.read_bytes()
    for target in {tmp_path / "other", *([out] if where == "moved" else [])}:
        for options in {}, {"delete_source": True}:
            for call in streamconv.convert, streamconv.plan:
                with pytest.raises(UsageError, match=rf"converted into {out}\b.*remove {mark}") as caught:
                    call(source, target, **options)  # type: ignore[operator]
                assert "transformer" in str(caught.value) or "vae" in str(caught.value)
        assert not target.exists()
    assert mark.read_bytes() == before and left.exists()
    if where == "moved":
        moved.rename(out)
    deleting(source, out)
    assert weights(out) == wanted and not list(source.rglob("*.safetensors"))


def test_what_is_left_is_converted_where_the_mark_is_removed(tmp_path: Path) -> None:
    source, out = pipeline(tmp_path / "source"), tmp_path / "out"
    fault = Failing("remove", OSError(errno.EIO, "Input/output error"), after=1, place=f"{source}/")
    with watching(fault), pytest.raises(ConversionError):
        deleting(source, out, engine="inline")
    (source / ".streamconv-deleted").unlink()
    streamconv.convert(source, tmp_path / "other")
    assert len(list((tmp_path / "other").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("part", ["transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_source_of_which_a_part_was_deleted_is_not_whole(tmp_path: Path, part: str) -> None:
    """The mark is of the part, and the source around it looks whole without it."""
    source = pipeline(tmp_path / "source")
    torch.save({"w": torch.ones(4)}, source / "model.bin")
    deleting(source / part, tmp_path / ("out" if part == "transformer" else "out.safetensors"))
    given = source if part == "transformer" else source / "transformer"
    save_file({"w": numpy.ones(4, "f4")}, source / "transformer" / "model.safetensors")
    with pytest.raises(UsageError, match="a part of it was deleted"):
        streamconv.convert(given, tmp_path / "other")


@pytest.mark.parametrize(
    "names", [3, ["/etc/nothing"], ["../nothing"], [3], ["a\0b"], ["config.json"]], ids=repr
)
def test_a_mark_of_a_stranger_names_nothing_outside(tmp_path: Path, names: Any) -> None:
    source = make_source(tmp_path / "source")
    mark = {"plan": "x", "destination": str(tmp_path / "theirs"), "files": names}
    (source / ".streamconv-deleted").write_bytes(orjson.dumps(mark))
    streamconv.convert(source, tmp_path / "out")


def test_what_another_run_has_deleted_meanwhile_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gone was read before the run had the lock."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    wanted = expected(source, tmp_path / "plain", max_shard="40KB")
    made = streamconv.plan(source, max_shard="40KB")
    locked = run.destination.locked

    @contextlib.contextmanager
    def late(place: Any) -> Iterator[None]:
        monkeypatch.undo()
        small = pytest.MonkeyPatch()
        small.setattr(freeing, "_STEP_BYTES", 1)
        interrupted(source, out)
        small.undo()
        with locked(place):
            yield

    monkeypatch.setattr(run.destination, "locked", late)
    with pytest.raises(DestinationError, match="another run has deleted files of the source meanwhile"):
        streamconv.convert(made, out, overwrite=True)
    deleting(source, out, max_shard="40KB")
    assert weights(out) == wanted


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_conversion_that_was_complete_before_deletes_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: list[str]
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    streamconv.convert(source, out, checksum=True)
    assert cli.main([str(source), str(out), "--delete-source", "--yes", *quiet]) == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert len(files(source)) == SHARDS
