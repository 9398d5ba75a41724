"""Power cuts: whatever a run had not synced may be lost, and what is claimed as done is done all the same.

Every run here is recorded call by call (`disk`) and cut after each call; what the cut left is looked at, and one time in
three gone on with. With `STREAMCONV_POWER_CUTS=N`, each cut is drawn N times, and always gone on with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy
import orjson
import pytest
from disk import Disk, recorded
from safetensors.numpy import save_file

import streamconv
from streamconv.errors import StreamconvError
from streamconv.plans import fingerprint, from_json
from streamconv.running import journal, state
from streamconv.running.destination import destination_at
from streamconv.running.items import work_items
from streamconv.running.run import Conversion
from streamconv.storage import writing

MANY = int(os.environ.get("STREAMCONV_POWER_CUTS", "0"))

Files = Mapping[str, bytes]


def make_source(directory: Path, seed: int = 0) -> Path:
    numbers = numpy.random.default_rng(seed)
    state = {f"layers.{i}.w": numbers.standard_normal((8, 20 + i)).astype("f4") for i in range(6)}
    state["ids"] = numpy.arange(9)
    directory.mkdir(parents=True)
    files = [f"model-{number}-of-00003.safetensors" for number in ("00001", "00002", "00003")]
    held = {name: files[at // 3] for at, name in enumerate(state)}
    for file in files:
        save_file(
            {name: state[name] for name in held if held[name] == file}, directory / file, {"format": "pt"}
        )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))
    (directory / "config.json").write_text('{"torch_dtype": "float32"}')
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def many_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small batches, a sync after each, and a boot that tests choose."""
    monkeypatch.setattr("streamconv.running.items._BATCH_BYTES", 1500)
    monkeypatch.setattr("streamconv.running.freeing._STEP_BYTES", 1)
    monkeypatch.setattr("streamconv.running.finisher._SYNC_EVERY", 0.0)
    monkeypatch.setattr("streamconv.execution.node._BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text("first")


@dataclass(frozen=True)
class Case:
    """A run that is cut.

    Attributes:
        options: of the run.
        to: where it goes, below the root.
        before: what was there before; options of a conversion that ended, or, with `calls`, did not.
        calls: after how many calls that one ended.
    """

    options: dict[str, object] = field(default_factory=dict)
    to: str = "out"
    before: dict[str, object] | None = None
    calls: int | None = None

    @property
    def freed(self) -> bool:
        """Whether the source is deleted, so that it is part of what a cut leaves."""
        return "delete_source" in self.options


CASES = {
    "re-sharded": Case({"max_shard": 1500}),
    "hashed": Case({"max_shard": 1500, "checksum": True}),
    "cast": Case({"to": "torch", "dtype": "F16", "max_shard": "1KB"}),
    "one file": Case({"dtype": "F16"}, "model.safetensors"),
    "one file replaced": Case({"dtype": "F16", "overwrite": True}, "model.safetensors", {"dtype": "BF16"}),
    "deep": Case({"max_shard": "3KB"}, "a/b/out"),
    "replaced": Case({"dtype": "F16", "max_shard": "1KB", "overwrite": True}, "out", {"dtype": "BF16", "max_shard": "1KB"}),
    "replaced by fewer": Case({"dtype": "F16", "overwrite": True}, "out", {"max_shard": 1500}),
    "restarted": Case({"dtype": "F16", "max_shard": "1KB", "restart": True}, "out", {"dtype": "BF16", "max_shard": "1KB"}, 70),
    "source deleted": Case({"max_shard": 1500, "delete_source": True}),
    "source deleted, cast": Case({"to": "torch", "dtype": "F16", "delete_source": True, "allow_loss": True}),
    "source deleted, one file": Case({"delete_source": True}, "model.safetensors"),
    "resumed": Case({"dtype": "F16", "max_shard": "1KB"}, "out", {"dtype": "F16", "max_shard": "1KB"}, 90),
}  # fmt: skip


def run(source: Path, root: Path, case: Case, options: dict[str, object]) -> Conversion:
    return streamconv.convert(source, root / case.to, workers=1, **options)


@pytest.mark.parametrize("name", CASES)
def test_what_is_claimed_as_done_is_done(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    root = tmp_path / "root"
    root.mkdir()
    source = make_source(root / "source" if case.freed else tmp_path / "source")
    if case.before is not None:
        with recorded(root, float("inf") if case.calls is None else case.calls):
            run(source, root, case, case.before)
    old = contents(root)
    with recorded(root) as recorder:
        run(source, root, case, case.options)
    recorder.check()
    new = contents(root)
    wanted = orjson.loads((destination_at(root / case.to).own / "conversion.json").read(1 << 20))[
        "fingerprint"
    ]
    draw = Random(name)
    seen: set[object] = set()
    for number, disk in enumerate(recorder.cuts()):
        for _ in range(MANY or 1):
            image = disk.image(draw)
            key = frozenset((path, data) for path, (data, _) in image.files.items())
            if key in seen:
                continue
            seen.add(key)
            image.put(root)
            (tmp_path / "boot").write_text(f"{number}")
            where = f"after {number} of {len(recorder.calls)}: {recorder.calls[number - 1 : number]}"
            check_claims(root, case, old, new, wanted, where)
            if number == len(recorder.calls):
                assert new.items() <= contents(root).items(), "it had ended"
            if MANY or draw.random() < 0.3:
                run(source, root, case, case.options)
                assert contents(root) == new, where


@pytest.mark.parametrize("name", ["cast", "deep", "one file replaced", "source deleted"])
def test_what_a_killed_run_had_not_synced_is_synced_by_the_next(tmp_path: Path, name: str) -> None:
    """Killed, gone on with on the same boot, and cut right after the end: nothing is missing, wherever the kill fell."""
    case = CASES[name]
    root = tmp_path / "root"
    root.mkdir()
    source = make_source(root / "source" if case.freed else tmp_path / "source")
    if case.before is not None:
        run(source, root, case, case.before)
    old = Disk(root).image()
    with recorded(root) as recorder:
        run(source, root, case, case.options)
    new = contents(root)
    for calls in range(len(recorder.calls)):
        if not MANY and calls > 9 and calls % 7:
            continue
        old.put(root)
        with recorded(root, calls) as first:
            run(source, root, case, case.options)
        assert first.killed
        with recorded(root, disk=first.disk) as second:
            run(source, root, case, case.options)
        second.check()
        left = {path: data for path, (data, _) in second.disk.image(Random(0), kept=0.0).files.items()}
        assert new.items() <= left.items(), f"killed after {calls}: {recorder.calls[calls - 1 : calls]}"


def test_what_was_synced_is_not_done_again(tmp_path: Path) -> None:
    """Where a cut takes all that was not synced, a later cut leaves no more to do."""
    source, root = make_source(tmp_path / "source"), tmp_path / "root"
    root.mkdir()
    case = CASES["cast"]
    with recorded(root) as recorder:
        run(source, root, case, case.options)
    resumed = []
    for number, disk in enumerate(recorder.cuts()):
        if recorder.calls[number - 1][0] != "sync":
            continue
        disk.image(Random(0), kept=0.0).put(root)
        (tmp_path / "boot").write_text(f"{number}")
        result = run(source, root, case, case.options)
        if result.finished_before:
            break
        resumed.append(result.bytes_resumed)
    total = sum(tensor.spec.nbytes for tensor in result.plan.tensors)
    assert resumed == sorted(resumed)
    assert len({*resumed}) > 3 and resumed[-1] == total


def check_claims(root: Path, case: Case, old: Files, new: Files, wanted: str, where: str) -> None:
    found = contents(root)
    own = destination_at(root / case.to).own
    kept = {path: data for path, data in found.items() if ".streamconv" not in path}
    for path, data in kept.items():
        if not path.endswith(".partial"):
            assert data in (old.get(path), new.get(path)), f"{path} is not whole {where}"
    for path, data in found.items():
        # A source that is deleted goes file by file; what is gone of it is proven by going on.
        held = [] if path.startswith("source/") else [each for each in (old, new) if each.get(path) == data]
        if held and path.endswith((".index.json", "/conversion.json")):
            document = orjson.loads(data)
            above = (
                path[: path.index(".streamconv")] if "files" in document else path.rpartition("/")[0] + "/"
            )
            names = [above + name for name in document.get("files") or document["weight_map"].values()]
            assert any(all(found.get(name) == each[name] for name in names) for each in held), (
                f"not all is there that {path} names {where}"
            )
    if not (own / "plan.json").exists() or (own / "conversion.json").exists():
        return
    plan = state.read(own / "plan.json", from_json)
    assert plan is not None
    if fingerprint(plan) != wanted:
        return
    finals = [destination_at(root / case.to) / output.path for output in plan.outputs]
    items = work_items(plan, [writing.partial(final).place for final in finals])
    by_partial = {writing.partial(final).place: final for final in finals}
    for index in journal.read(own / "journal", items):
        item = items[index]
        for place in (Path(item.path), Path(str(by_partial[item.path]))):
            whole = new[Path(str(by_partial[item.path])).relative_to(root).as_posix()]
            if place.exists() and place.stat().st_size == len(whole):
                part = slice(item.offset + item.start, item.offset + item.stop)
                assert place.read_bytes()[part] == whole[part], f"{item.name} is said to be in place {where}"
                break


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"max_shard": 1500}, {"to": "torch", "max_shard": "3KB"}, {}],
    ids=["shards", "torch", "one shard"],
)
def test_what_is_deleted_is_in_the_destination(
    tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is deleted as it is converted, cut anywhere: the same command completes it."""
    monkeypatch.setattr("streamconv.running.freeing._STEP_BYTES", 1)
    root = tmp_path / "root"
    source, out = root / "source", root / "out"
    source.mkdir(parents=True)
    numbers = numpy.random.default_rng(0)
    names = [f"model-{shard:05}-of-00003.safetensors" for shard in (1, 2, 3)]
    held = {}
    for shard, name in enumerate(names):
        state = {
            f"layers.{2 * shard + i}.w": numbers.standard_normal((8, 20 + i)).astype("f4") for i in range(2)
        }
        save_file(state, source / name, {"format": "pt"})
        held |= dict.fromkeys(state, name)
    (source / "model.safetensors.index.json").write_bytes(orjson.dumps({"weight_map": held}))
    with recorded(root) as recorder:
        streamconv.convert(source, out, workers=1, delete_source=True, **options)
    recorder.check()
    new = contents(root)
    assert not {f"source/{name}" for name in names} & new.keys()
    draw, partly = Random(str(options)), 0
    for number, disk in enumerate(recorder.cuts()):
        for _ in range(MANY or 1):
            disk.image(draw).put(root)
            partly += 0 < len(list(source.glob("*.safetensors"))) < 3
            (tmp_path / "boot").write_text(f"{number}")
            where = f"after {number} of {len(recorder.calls)}: {recorder.calls[number - 1 : number]}"
            try:
                streamconv.convert(source, out, workers=1, delete_source=True, **options)
            except StreamconvError as error:
                raise AssertionError(where) from error
            found = contents(root)
            assert {path: data for path, data in found.items() if not path.endswith("freed.json")} == {
                path: data for path, data in new.items() if not path.endswith("freed.json")
            }, where
    assert partly > 10
