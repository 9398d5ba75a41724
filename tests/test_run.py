"""A whole run: the same bytes however it went, nothing lost, nothing half done under a final name."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import orjson
import pytest
from safetensors.numpy import save_file
from watched import Call, Calls, Failing, noted, watching

import streamconv
from streamconv.errors import ConversionError, DestinationError, PlanError, StreamconvError
from streamconv.plans import fingerprint
from streamconv.running.state import sealed
from streamconv.storage.files import Files
from streamconv.storage.local import LocalSink

SHARD = "150KB"


def make_source(directory: Path, tensors: int = 40) -> Path:
    random_numbers = numpy.random.default_rng(0)
    state = {
        f"layers.{i}.w": random_numbers.standard_normal((50, 60 + i)).astype("f4") for i in range(tensors)
    }
    state |= {"empty": numpy.zeros((0, 4), "f4"), "scalar": numpy.array(2.5, "f4"), "ids": numpy.arange(9)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text('{"torch_dtype": "float32"}')
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def weights(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if not name.startswith(".streamconv")}


@pytest.mark.parametrize("to", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", [[], ["BF16"]], ids=["copied", "cast"])
def test_the_bytes_do_not_depend_on_how_they_were_made(
    tmp_path: Path, to: str, dtype: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    results = []
    for number, (workers, memory, batch) in enumerate(
        [(1, "1GiB", 64 << 20), (2, "8MiB", 20_000), (3, "64MiB", 1), (1, "4MiB", 100_000)]
    ):
        monkeypatch.setattr("streamconv.running.items._BATCH_BYTES", batch)
        out = tmp_path / f"out{number}"
        streamconv.convert(
            source,
            out,
            to=to,
            dtype=dtype,
            max_shard=SHARD,
            workers=workers,
            engine="local" if workers > 1 else "inline",
            memory_budget=memory,
            checksum=True,
        )
        results.append(contents(out))
    assert all(result == results[0] for result in results)
    assert len(results[0]) > 4


def test_parts_and_blocks_of_any_size_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source", 5)
    streamconv.convert(source, tmp_path / "whole", dtype="F16")
    for number, (part, block) in enumerate([(4096, 64), (48, 1 << 20), (1 << 20, 16)]):
        monkeypatch.setattr("streamconv.running.items.PART", part)
        monkeypatch.setattr("streamconv.execution.evaluate._BLOCK", block)
        streamconv.convert(source, tmp_path / f"{number}", dtype="F16", workers=1)
        assert weights(tmp_path / f"{number}") == weights(tmp_path / "whole")


# --------------------------------------------------------------------------------- interruption

DRIVER = """
import sys, time
import streamconv, streamconv.running.items
from watched import watching
streamconv.running.items._BATCH_BYTES = 1 << 14
def slowly(call):
    if call.method in ("copy_from", "write", "publish"):
        time.sleep(0.002)
source, out, dtype, to = sys.argv[1:]
with watching(slowly):
    result = streamconv.convert(source, out, dtype=dtype, to=to, max_shard="150KB", workers=1)
print(result.bytes_written, result.bytes_resumed)
"""


def start(source: Path, out: Path, to: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source), str(out), "*.1*=F16", to],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_killed_at_random_points_it_goes_on_and_ends_the_same(tmp_path: Path, to: str) -> None:
    source = make_source(tmp_path / "source")
    before = contents(source)
    whole = start(source, tmp_path / "whole", to)
    began = time.monotonic()
    out, _ = whole.communicate()
    length = time.monotonic() - began
    assert whole.returncode == 0
    total = sum(map(int, out.split()))

    randomly = random.Random(0)
    kills, rounds = 0, 0
    while kills < 25:
        rounds += 1
        again = tmp_path / f"again{rounds}"
        before_kill = 0
        while True:
            process = start(source, again, to)
            # Half of the kills fall late, when files get their names one by one.
            point = randomly.uniform(0.1, 0.8) if kills % 2 else randomly.uniform(0.5, 1.0)
            try:
                out, _ = process.communicate(timeout=point * length)
                assert process.returncode == 0
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
            journal = again / ".streamconv" / "journal"
            if journal.exists():
                done = sum(nbytes for _, nbytes, *_ in noted(journal))
                assert done >= before_kill, "finished work was done again"
                before_kill = done
            for path in again.glob("model*-of-*.safetensors"):
                assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
        # Killed between its last file and its last breath, it finds nothing left to do.
        assert sum(map(int, out.split())) in (total, 0)
        assert contents(again) == contents(tmp_path / "whole")
    assert contents(source) == before


def interrupted(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3, **options: object
) -> None:
    """A run that fails in the middle, as a full disk or a broken network makes it fail."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch, watching(Failing("copy_from", full, after)):
        patch.setattr("streamconv.running.items._BATCH_BYTES", 1 << 14)
        with pytest.raises(ConversionError) as caught:
            streamconv.convert(source, out, max_shard=SHARD, workers=1, **options)
    assert "the disk is full" in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_a_full_disk_is_told_and_can_be_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    interrupted(source, tmp_path / "out", monkeypatch, after=9)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert list((tmp_path / "out").glob("*.partial"))

    result = streamconv.convert(source, tmp_path / "out", max_shard=SHARD)

    assert result.bytes_resumed > 0
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert os.listdir(tmp_path / "out" / ".streamconv") == ["conversion.json"]
    streamconv.convert(source, tmp_path / "whole", max_shard=SHARD)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def touch(source: Path) -> None:
    os.utime(source / "model.safetensors", ns=(1, 1))


def rewrite(source: Path) -> None:
    make_source(source, 41)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (touch, {}, "its modification time"),
        (rewrite, {}, "bytes"),
        (None, {"dtype": "BF16"}, "option dtype"),
        (None, {"max_shard": "90KB"}, "option max_shard: 150KB -> 90KB"),
        (None, {"drop": ["ids"]}, "option drop"),
        (None, {"to": "torch"}, "option to"),
    ],
)
def test_another_plan_does_not_go_on_with_this_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None] | None,
    options: dict[str, object],
    message: str,
) -> None:
    source = make_source(tmp_path / "source")
    interrupted(source, tmp_path / "out", monkeypatch)
    if change:
        change(source)
    arguments: dict[str, object] = {"max_shard": SHARD, **options}
    with pytest.raises(DestinationError) as caught:
        streamconv.convert(source, tmp_path / "out", **arguments)
    assert message in str(caught.value)
    assert "--restart" in str(caught.value)
    assert ("repeat the earlier command" in str(caught.value)) == (change is None)

    streamconv.convert(source, tmp_path / "out", restart=True, **arguments)
    assert not streamconv.verify(source, tmp_path / "out").problems
    assert not list((tmp_path / "out").rglob("*.partial"))


# --------------------------------------------------------------------------------- destinations


def test_a_destination_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(DestinationError, match="a link to nothing"):
        streamconv.convert(source, tmp_path / "out")
    (tmp_path / "gone").mkdir()
    streamconv.convert(source, tmp_path / "out")


def test_a_finished_conversion_is_recognised_and_only_replaced_when_told(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    streamconv.convert(source, tmp_path / "out", max_shard=SHARD)
    before = contents(tmp_path / "out")
    assert streamconv.convert(source, tmp_path / "out", max_shard=SHARD).finished_before
    with pytest.raises(DestinationError, match="--overwrite"):
        streamconv.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before

    streamconv.convert(source, tmp_path / "out", overwrite=True)

    assert sorted(weights(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_a_foreign_model_is_replaced_only_when_told_and_other_files_stay(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    out = make_source(tmp_path / "out", 3)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DestinationError, match="not empty"):
        streamconv.convert(source, out)
    streamconv.convert(source, out, overwrite=True)
    assert sorted(weights(out)) == ["config.json", "model.safetensors", "thesis.tex"]
    assert not streamconv.verify(source, out).problems


@pytest.mark.parametrize("where", [".", "inside/out", "model.safetensors", ".."])
def test_the_source_is_never_a_destination(tmp_path: Path, where: str) -> None:
    source = make_source(tmp_path / "outer" / "source")
    before = contents(tmp_path)
    for given in (source, source / "model.safetensors"):
        if given.is_file() and where in ("inside/out", ".."):
            continue
        with pytest.raises(
            DestinationError, match=r"one of the destination and the source .* contains the other"
        ):
            streamconv.convert(given, source / where)
    assert contents(tmp_path) == before


def test_two_runs_do_not_share_a_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamconv.running.destination import destination_at, locked

    monkeypatch.setattr("streamconv.running.destination._LOCK_PATIENCE", 0.2)
    source = make_source(tmp_path / "source")
    with (
        locked(destination_at(tmp_path / "out")),
        pytest.raises(DestinationError, match="another run is writing here"),
    ):
        streamconv.convert(source, tmp_path / "out")


def test_too_little_room_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    monkeypatch.setattr("streamconv.running.destination.free_space", lambda _: 1000)
    with pytest.raises(PlanError, match="1,000 are free"):
        streamconv.convert(source, tmp_path / "out")
    assert weights(tmp_path / "out") == {}


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    old = os.umask(0o027)
    try:
        streamconv.convert(source, tmp_path / "out")
    finally:
        os.umask(old)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o640


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.partial").symlink_to(victim)
    with pytest.raises(StreamconvError):
        streamconv.convert(source, tmp_path / "out")
    streamconv.convert(source, tmp_path / "out", overwrite=True)
    assert victim.read_text() == "mine"


def test_the_record_tells_what_was_done(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    result = streamconv.convert(source, tmp_path / "out", dtype="F8_E4M3", checksum=True)
    record = orjson.loads((tmp_path / "out" / ".streamconv" / "conversion.json").read_bytes())
    assert record["fingerprint"] == fingerprint(result.plan)
    assert record["arguments"]["dtype"] == ["F8_E4M3"]
    tensors = record["tensors"]["model.safetensors"]
    assert tensors["layers.0.w"]["from"] == ["layers.0.w"]
    assert len(tensors["ids"]["xxh3_128"][0]) == 32
    assert {loss["tensor"] for loss in record["losses"]} == {loss.name for loss in result.losses}
    assert any(loss.flushed for loss in result.losses)


STEPS = [
    ("open", "journal"),
    ("write", ".partial"),
    ("write", "journal"),
    ("publish", "model"),
    ("publish", "conversion.json"),
    ("remove", "plan.json"),
    ("remove", "journal"),
]
"""Calls to storage, by method and a part of their place, between which a run may end."""


@pytest.mark.parametrize(("method", "place"), STEPS)
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_run_that_ends_between_any_two_steps_goes_on(
    tmp_path: Path, method: str, place: str, skipped: int
) -> None:
    """Like the kills above, but at each step on purpose: before its call, everything ends."""
    source = make_source(tmp_path / "source")
    arguments = {"to": "torch", "max_shard": SHARD, "dtype": "F16", "workers": 1}
    streamconv.convert(source, tmp_path / "whole", **arguments)
    with (
        watching(Failing(method, KeyboardInterrupt(), skipped, place)),
        contextlib.suppress(KeyboardInterrupt),
    ):
        streamconv.convert(source, tmp_path / "out", **arguments)
    streamconv.convert(source, tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_gets_its_name_after_its_bytes_are_on_the_disk(tmp_path: Path) -> None:
    calls = Calls()
    with watching(calls):
        streamconv.convert(make_source(tmp_path / "source"), tmp_path / "out", to="torch", max_shard=SHARD)
    published = calls.of("publish")
    names = [Path(call.arguments[0]).name for call in published]
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert names == [
        "plan.json", *shards, "config.json", "pytorch_model.bin.index.json", "conversion.json",
    ]  # fmt: skip
    for call in published:
        (partial, final), at = (call.place, call.arguments[0]), calls.made.index(call)
        before = calls.made[:at]
        written = max(i for i, each in enumerate(before) if each.place == partial and each.method in WRITES)
        synced = max(i for i, each in enumerate(before) if (each.place, each.method) == (partial, "sync"))
        assert written < synced < at
        if Path(final).name in shards:
            last = before[synced + 1 :]
            assert [each.method for each in last if each.place.endswith("/journal")] == ["write", "sync"]


WRITES = ("write", "copy_from")


def test_what_tells_that_all_is_there_comes_last(tmp_path: Path) -> None:
    """Loaders take a pipeline, or a model in shards, for whole by these two."""
    source = make_source(tmp_path / "source" / "unet").parent
    (source / "model_index.json").write_text('{"_class_name": "Pipe", "unet": ["diffusers", "UNet2DModel"]}')
    calls = Calls()
    with watching(calls):
        streamconv.convert(source, tmp_path / "out", max_shard=SHARD, dtype="F16")
    names = [Path(call.arguments[0]).name for call in calls.of("publish")]
    (index,) = (tmp_path / "out" / "unet").glob("*.index.json")
    assert names[-3:] == [index.name, "model_index.json", "conversion.json"]
    assert "config.json" in names and len(names) > 6


def test_a_record_goes_before_the_files_that_it_describes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    streamconv.convert(source, tmp_path / "out", max_shard=SHARD)
    calls = Calls()
    with watching(calls):
        streamconv.convert(source, tmp_path / "out", overwrite=True)
    steps = [(call.method, Path(call.place).name) for call in calls.of("remove", "sync")]
    gone = [at for at, (method, name) in enumerate(steps) if method == "remove" and name.endswith("tensors")]
    assert len(gone) > 2
    assert steps.index(("remove", "conversion.json")) < steps.index(("sync", ".streamconv")) < gone[0]


# ------------------------------------------------------------------------ what must never be lost


@pytest.mark.parametrize(("method", "place"), [("write", "journal"), ("copy_from", ".partial")])
def test_a_journal_without_its_plan_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, place: str
) -> None:
    """Neither where the next run is killed as it begins, nor where that has made the files of which the journal speaks."""
    source = make_source(tmp_path / "source")
    interrupted(source, tmp_path / "out", monkeypatch, after=9)
    (tmp_path / "out" / ".streamconv" / "plan.json").unlink()
    arguments = {"max_shard": SHARD, "rename": ["ids=zz"], "workers": 1}
    with watching(Failing(method, KeyboardInterrupt(), place=place)), pytest.raises(KeyboardInterrupt):
        streamconv.convert(source, tmp_path / "out", overwrite=True, **arguments)
    result = streamconv.convert(source, tmp_path / "out", **arguments)
    assert result.bytes_resumed == 0
    assert not streamconv.verify(source, tmp_path / "out").problems


def test_no_link_leads_back_to_the_source(tmp_path: Path) -> None:
    real = make_source(tmp_path / "real")
    before = contents(real)
    farm = tmp_path / "farm"
    farm.mkdir()
    for name in ("model.safetensors", "config.json"):
        (farm / name).symlink_to(real / name)
    pipeline = tmp_path / "pipeline"
    make_source(pipeline / "unet")
    (pipeline / "model_index.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "unet").symlink_to(pipeline / "unet")
    for source, destination in (
        (farm, real),
        (real / "model.safetensors", tmp_path),
        (pipeline, out),
    ):
        for overwrite in (False, True):
            with pytest.raises(DestinationError):
                streamconv.convert(source, destination, overwrite=overwrite)
    assert contents(real) == before
    assert contents(pipeline / "unet") == before


def test_overwriting_stays_where_the_plan_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "source")
    other = make_source(tmp_path / "zoo" / "other", 2)
    (tmp_path / "zoo" / "download.partial").write_bytes(b"half")
    make_source(tmp_path / "zoo", 3)
    with monkeypatch.context() as patch:
        patch.setattr("streamconv.running.destination.free_space", lambda _: 0)
        with pytest.raises(PlanError):
            streamconv.convert(source, tmp_path / "zoo", overwrite=True)
    assert (tmp_path / "zoo" / "model.safetensors").is_file()
    streamconv.convert(source, tmp_path / "zoo", overwrite=True)
    assert (other / "model.safetensors").is_file()
    assert (tmp_path / "zoo" / "download.partial").is_file()


@pytest.mark.parametrize("lacking", ["all", "a weight file", "another file", "a tensor", "a size"])
def test_a_record_of_other_files_is_of_no_finished_conversion(tmp_path: Path, lacking: str) -> None:
    """One that is sealed, and has the fingerprint of the plan."""
    source = make_source(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    streamconv.convert(source, tmp_path / "out", max_shard=SHARD)
    place = tmp_path / "out" / ".streamconv" / "conversion.json"
    document = orjson.loads(place.read_bytes())
    path = next(iter(document["tensors"]))
    match lacking:
        case "all":
            document |= {"files": {}, "tensors": {}}
        case "a weight file":
            del document["files"][path], document["tensors"][path]
            (tmp_path / "out" / path).unlink()
        case "another file":
            del document["files"]["tokenizer.json"]
        case "a tensor":
            document["tensors"][path].popitem()
        case _:
            document["files"][path]["size"] += 1
            with (tmp_path / "out" / path).open("ab") as file:
                file.write(b"\0")
    place.write_bytes(orjson.dumps(sealed(document)))
    with pytest.raises(
        DestinationError, match=r"(?s)another finished conversion.*other (files|tensors) than"
    ):
        streamconv.convert(source, tmp_path / "out", max_shard=SHARD)
    streamconv.convert(source, tmp_path / "out", max_shard=SHARD, overwrite=True)
    assert streamconv.convert(source, tmp_path / "out", max_shard=SHARD).finished_before


def test_finished_means_that_nothing_changed_since(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    streamconv.convert(source, tmp_path / "out")
    assert streamconv.convert(source, tmp_path / "out").finished_before
    with pytest.raises(DestinationError, match="no checksums"):
        streamconv.convert(source, tmp_path / "out", checksum=True)
    touch(source)
    with pytest.raises(DestinationError, match="the source was written to since"):
        streamconv.convert(source, tmp_path / "out")
    streamconv.convert(source, tmp_path / "out", overwrite=True)
    for name in ("model.safetensors", "config.json"):
        written = (tmp_path / "out" / name).read_bytes()
        for other in (written[:-1], written + b" "):
            (tmp_path / "out" / name).write_bytes(other)
            with pytest.raises(DestinationError, match="another size"):
                streamconv.convert(source, tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        with pytest.raises(DestinationError, match="is missing"):
            streamconv.convert(source, tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(written)
    assert streamconv.convert(source, tmp_path / "out").finished_before


def test_a_source_that_changes_is_noticed_before_and_during_a_run(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    plan = streamconv.plan(source)
    touch(source)
    with pytest.raises(StreamconvError, match="it was written to since the plan was made"):
        streamconv.convert(plan, tmp_path / "out")

    plan = streamconv.plan(source)

    def meddling(call: Call) -> None:
        if call.method == "copy_from":
            (source / "model.safetensors").touch()

    with (
        watching(meddling),
        pytest.raises(ConversionError, match="the source changed while it was read"),
    ):
        streamconv.convert(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("deleted", [False, True])
def test_what_was_read_while_the_source_was_another_is_read_again(tmp_path: Path, deleted: bool) -> None:
    """Put back as it was, time and all, it is the source of the plan again; what was read meanwhile is not."""
    source = make_source(tmp_path / "source")
    streamconv.convert(source, tmp_path / "whole", max_shard=SHARD)
    path = source / "model.safetensors"
    was, state = path.read_bytes(), path.stat()
    other = was[:4000] + bytes(len(was) - 4000)

    def meddling(call: Call) -> None:
        if call.method in WRITES and call.place.endswith(".partial"):
            path.write_bytes(other)

    with watching(meddling), pytest.raises(ConversionError, match="the source changed while it was read"):
        streamconv.convert(source, tmp_path / "out", max_shard=SHARD, delete_source=deleted)
    path.write_bytes(was)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    streamconv.convert(source, tmp_path / "out", max_shard=SHARD, delete_source=deleted)
    assert path.exists() != deleted
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_side_file_that_grows_is_not_cut(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    plan = streamconv.plan(source)

    def growing(call: Call) -> None:
        if call.method == "copy_from":
            (source / "config.json").write_text('{"much": "longer", "than": "before"}')

    with watching(growing), pytest.raises(ConversionError):
        streamconv.convert(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_refused_destination_is_left_as_it_was(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DestinationError):
        streamconv.convert(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_engines_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(StreamconvError, match="'lokal' is not a known engine"):
        streamconv.convert(make_source(tmp_path / "source"), tmp_path / "out", engine="lokal")


def test_writing_back_early_is_advice_only(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"abc")
    with Files() as files:
        files.begin_sync(str(tmp_path / "there"), 0, 3)
        files.begin_sync(str(tmp_path / "gone"), 0, 3)
    assert (tmp_path / "there").read_bytes() == b"abc"


def test_a_source_whose_path_no_plan_can_hold_is_refused(tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    source.mkdir()
    save_file({"a": numpy.ones(3, "f4")}, source / "model.safetensors")
    with pytest.raises(PlanError, match="not UTF-8"):
        streamconv.plan(source)
    (tmp_path / "link").symlink_to(source)
    streamconv.convert(tmp_path / "link", tmp_path / "out")
    assert not streamconv.verify(tmp_path / "link", tmp_path / "out").problems


@pytest.mark.parametrize("length", [240, 247, 248, 255])
def test_names_as_long_as_they_can_be(tmp_path: Path, length: int) -> None:
    source = make_source(tmp_path / "source", 2)
    side = source / ("t" * (length - 4) + ".txt")
    side.write_text("terms")
    streamconv.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / side.name).read_text() == "terms"
    file = tmp_path / ("m" * (length - 12) + ".safetensors")
    streamconv.convert(source, file, dtype="F16")
    streamconv.convert(source, file, dtype="BF16", overwrite=True)
    assert not streamconv.verify(source, file).problems
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [".streamconv", file.name, "out", "source"]
    )


def test_a_run_does_not_write_into_what_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup by hard links of an unfinished destination is none of this run's."""
    source = make_source(tmp_path / "source", 8)
    interrupted(source, tmp_path / "out", monkeypatch)
    (growing,) = (tmp_path / "out").glob("*.partial")
    os.link(growing, tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    with contextlib.suppress(StreamconvError):
        streamconv.convert(source, tmp_path / "out")
    assert (tmp_path / "backup").read_bytes() == before
    streamconv.convert(source, tmp_path / "out", restart=True)
    assert (tmp_path / "backup").read_bytes() == before
    assert not streamconv.verify(source, tmp_path / "out").problems


# ---------------------------------------------------------------------------- syncs that fail

EIO = OSError(errno.EIO, os.strerror(errno.EIO))


class Disk:
    """Has a sync fail after so many, and knows what the disk holds of each file."""

    def __init__(self, after: int, place: str) -> None:
        self._failing = Failing("sync", EIO, after, place)
        self._synced: dict[str, bytes] = {}

    def __call__(self, call: Call) -> None:
        self._failing(call)
        if call.method == "sync" and Path(call.place).is_file():
            self._synced[call.place] = Path(call.place).read_bytes()

    def drop_pages(self, out: Path) -> None:
        """What could not be written is not there after all."""
        for path in out.rglob("*.partial"):
            path.write_bytes(self._synced.get(str(path), bytes(path.stat().st_size)))


@pytest.mark.parametrize("every", [0.0, 1000.0], ids=["in between", "at the end"])
@pytest.mark.parametrize("dtype", ["F32", "F16"], ids=["copied", "cast"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_a_failed_sync_did_not_write_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, dtype: str, after: int
) -> None:
    source = make_source(tmp_path / "source")
    arguments = {"max_shard": SHARD, "dtype": dtype, "workers": 1}
    streamconv.convert(source, tmp_path / "whole", **arguments)
    monkeypatch.setattr("streamconv.running.items._BATCH_BYTES", 1 << 14)
    monkeypatch.setattr("streamconv.running.finisher._SYNC_EVERY", every)
    disk = Disk(after, ".safetensors.partial")
    with watching(disk), pytest.raises(ConversionError, match="cannot sync"):
        streamconv.convert(source, tmp_path / "out", **arguments)
    disk.drop_pages(tmp_path / "out")
    streamconv.convert(source, tmp_path / "out", **arguments)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("killed", [(), ("copy_from", "write")], ids=["at once", "after kills"])
def test_a_file_that_vanished_is_not_believed_to_be_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: tuple[str, ...]
) -> None:
    """Removed between two runs, made again by others, which may be killed: what the first said is not of this file."""
    source = make_source(tmp_path / "source")
    streamconv.convert(source, tmp_path / "whole", max_shard=SHARD)
    interrupted(source, tmp_path / "out", monkeypatch, after=9)
    for path in (tmp_path / "out").glob("*.partial"):
        path.unlink()
    for method in killed:
        with watching(Failing(method, KeyboardInterrupt(), 0, "partial")), pytest.raises(KeyboardInterrupt):
            streamconv.convert(source, tmp_path / "out", max_shard=SHARD, workers=1)
    streamconv.convert(source, tmp_path / "out", max_shard=SHARD)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("how", ["longer", "shorter", "no receipts"])
def test_a_finished_file_is_believed_by_its_receipts_and_its_size(tmp_path: Path, how: str) -> None:
    """A file that has its final name, in a run that did not end."""
    source = make_source(tmp_path / "source")
    arguments = {"max_shard": SHARD, "dtype": "F16", "workers": 1}
    streamconv.convert(source, tmp_path / "whole", **arguments)
    with watching(Failing("publish", KeyboardInterrupt(), 1, "model")), pytest.raises(KeyboardInterrupt):
        streamconv.convert(source, tmp_path / "out", **arguments)
    (final,) = (tmp_path / "out").glob("*.safetensors")
    data = final.read_bytes()
    if how == "no receipts":
        (tmp_path / "out" / ".streamconv" / "journal").unlink()
        final.write_bytes(bytes(len(data)))
    else:
        final.write_bytes(data + b"x" if how == "longer" else data[:-1])
    streamconv.convert(source, tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def unsynced(source: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails when a file has its name, at the sync of the directory."""
    published = LocalSink.publish

    def fails(sink: LocalSink, partial: str, final: str) -> None:
        published(sink, partial, final)
        raise EIO

    with monkeypatch.context() as patch, pytest.raises(ConversionError, match="rename into place"):
        patch.setattr(LocalSink, "publish", lambda *at: (fails if name in at[2] else published)(*at))
        streamconv.convert(source, out)


def test_a_name_that_was_not_synced_is_synced_before_anything_is_called_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    unsynced(source, tmp_path / "out", "model", monkeypatch)
    calls = Calls()
    with watching(calls):
        streamconv.convert(source, tmp_path / "out")
    synced = [call.place for call in calls.of("sync")]
    assert str(tmp_path / "out") in synced
    assert (
        calls.of("sync")[synced.index(str(tmp_path / "out"))]
        in calls.made[: calls.made.index(calls.of("publish")[0])]
    )


def test_a_record_whose_name_was_not_synced_is_synced_before_a_conversion_is_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    unsynced(source, tmp_path / "out", "conversion.json", monkeypatch)
    calls = Calls()
    with watching(calls):
        assert streamconv.convert(source, tmp_path / "out").finished_before
    assert str(tmp_path / "out" / ".streamconv") in [call.place for call in calls.of("sync")]
