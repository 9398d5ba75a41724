"""Every engine keeps the contract; processes also survive, and do not survive, what processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy
import psutil
import pytest
from engine_contract import SETTINGS, EngineContract
from safetensors.numpy import load_file, save_file
from watched import noted

import streamconv
from streamconv import engines
from streamconv.engines import Engine, inline, processes
from streamconv.errors import ConversionError, UsageError
from streamconv.execution.execute import Item, Receipt, Settings, Worker, WorkItem
from streamconv.execution.memory import budget
from streamconv.running.items import computed, work_items
from streamconv.running.run import run


class TestInline(EngineContract):
    engine = staticmethod(inline.run)
    workers = 1


class TestProcesses(EngineContract):
    engine = staticmethod(processes.run)

    def test_a_killed_worker_is_told(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)

        def batches() -> Iterator[list[WorkItem]]:
            yield items[:1]
            for child in psutil.Process().children():
                child.send_signal(signal.SIGKILL)
            yield from ([item] for item in items)

        with pytest.raises(ConversionError) as caught, processes.run(batches(), SETTINGS, 2) as results:
            list(results)
        assert "killed by signal 9" in str(caught.value)
        assert "--memory" in str(caught.value)

    @pytest.mark.slow
    def test_workers_end_with_a_killed_parent(self, tmp_path: Path) -> None:
        program = (
            "import sys, time\n"
            "from streamconv.engines import processes\n"
            "from streamconv.execution.execute import Settings\n"
            "def never():\n"
            "    yield []\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(600)\n"
            "with processes.run(never(), Settings(arena=1 << 20), 2) as results:\n"
            "    list(results)\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        with parent.stdout:
            assert parent.stdout.readline() == b"ready\n"
            workers = psutil.Process(parent.pid).children()
            assert len(workers) == 2
            parent.kill()
            parent.wait()
        gone, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive and len(gone) == 2


class _Stub:
    """An engine without processes, tensors or order: what `run` must be right with."""

    def __init__(self, *, backwards: bool = False, twice: bool = False) -> None:
        self.backwards, self.twice = backwards, twice
        self.batches: list[Sequence[WorkItem]] = []

    @contextmanager
    def __call__(
        self, batches: Iterable[Sequence[WorkItem]], settings: Settings, workers: int
    ) -> Iterator[Iterator[list[Receipt]]]:
        self.batches = list(batches)
        order = self.batches[::-1] if self.backwards else self.batches
        worker = Worker(settings)
        try:
            yield (worker.run(batch) for batch in order for _ in range(1 + self.twice))
        finally:
            worker.close()


@pytest.mark.parametrize("stub", [_Stub(), _Stub(backwards=True), _Stub(backwards=True, twice=True)])
def test_a_run_is_the_same_under_any_engine(
    stub: _Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"t{i:02}": numpy.arange(i * 100, dtype="f4") for i in range(30)}
    save_file(state, tmp_path / "model.safetensors")
    plan = streamconv.plan(tmp_path / "model.safetensors", max_shard="20KB")
    monkeypatch.setitem(engines.ENGINES, "stub", Engine(stub))
    monkeypatch.setattr("streamconv.running.items._BATCH_ITEMS", 3)

    run(plan, tmp_path / "out", budget=budget(8 << 20, 1), engine="stub")

    assert all(1 <= len(batch) <= 3 for batch in stub.batches)
    written: dict[str, numpy.ndarray] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    assert {name: array.tolist() for name, array in written.items()} == {
        name: array.tolist() for name, array in state.items()
    }
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_run_without_an_engine_that_works_leaves_no_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": numpy.ones(1000, "f4")}, tmp_path / "model.safetensors")

    @contextmanager
    def broken(*_: object) -> Iterator[Iterator[list[Receipt]]]:
        def fail() -> Iterator[list[Receipt]]:
            raise ConversionError("no")
            yield []

        yield fail()

    monkeypatch.setitem(engines.ENGINES, "broken", Engine(broken))
    with pytest.raises(ConversionError):
        streamconv.convert(tmp_path / "model.safetensors", tmp_path / "out", engine="broken")
    assert sorted(os.listdir(tmp_path / "out")) == [".streamconv", "model.safetensors.partial"]


class _Elsewhere(_Stub):
    """Its workers are on another node; they sync where they are told to, unless they forget it."""

    def __init__(self, *, forgets: bool = False) -> None:
        super().__init__()
        self.forgets = forgets

    @contextmanager
    def __call__(
        self, batches: Iterable[Sequence[Item]], settings: Settings, workers: int
    ) -> Iterator[Iterator[list[Receipt]]]:
        told = replace(settings, sync=settings.sync and not self.forgets)
        with super().__call__(batches, told, workers) as results:
            yield ([replace(each, node="another") for each in receipts] for receipts in results)


def test_a_receipt_of_another_node_counts_only_where_its_bytes_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": numpy.ones(1000, "f4")}, tmp_path / "model.safetensors")
    for number, engine in enumerate(
        [Engine(_Elsewhere()), Engine(_Elsewhere(forgets=True), shares_page_cache=False)]
    ):
        monkeypatch.setitem(engines.ENGINES, "elsewhere", engine)
        out = tmp_path / f"out{number}"
        with pytest.raises(ConversionError, match="tensor 'a': a worker on another node"):
            streamconv.convert(tmp_path / "model.safetensors", out, engine="elsewhere")
        assert not (out / "model.safetensors").exists()
        assert noted(out / ".streamconv" / "journal") == []

    monkeypatch.setitem(engines.ENGINES, "elsewhere", Engine(_Elsewhere(), shares_page_cache=False))
    streamconv.convert(tmp_path / "model.safetensors", tmp_path / "out", engine="elsewhere")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", list(engines.ENGINES))
def test_the_engine_that_is_named_runs_however_little_there_is_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_file({"a": numpy.ones(1000, "f4")}, tmp_path / "model.safetensors")
    ran = []
    for each, engine in list(engines.ENGINES.items()):

        def noting(*arguments: object, each: str = each, engine: Engine = engine) -> object:
            ran.append(each)
            return engine.run(*arguments)

        monkeypatch.setitem(engines.ENGINES, each, Engine(noting))
    streamconv.convert(tmp_path / "model.safetensors", tmp_path / "out", engine=name, workers=1)
    streamconv.verify(tmp_path / "model.safetensors", tmp_path / "out", engine=name)
    assert ran == [name, name]
    streamconv.convert(tmp_path / "model.safetensors", tmp_path / "other", workers=2)
    assert ran == [name, name, "inline"]


def test_without_a_name_the_work_decides() -> None:
    assert engines.chosen(None, 2, 1 << 30) is engines.ENGINES["local"]
    assert engines.chosen(None, 1, 1 << 30) is engines.ENGINES["inline"]
    assert engines.chosen(None, 8, 1 << 20) is engines.ENGINES["inline"]
    with pytest.raises(UsageError, match="'lokal' is not a known engine"):
        engines.chosen("lokal", 1, 1)


def test_what_only_storage_moves_is_little_work(tmp_path: Path) -> None:
    save_file({"w": numpy.zeros(1 << 10, numpy.float32)}, tmp_path / "model.safetensors")
    moved = streamconv.plan(tmp_path / "model.safetensors")
    cast = streamconv.plan(tmp_path / "model.safetensors", dtype="BF16")
    as_they_are, narrowed = (computed(work_items(plan, ["there"])) for plan in (moved, cast))
    assert (as_they_are, narrowed) == (4096 // 8, 2048)


def test_where_no_boot_is_known_every_writer_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.execution.node._BOOT_ID", tmp_path / "absent")
    save_file({"a": numpy.ones(1000, "f4")}, tmp_path / "model.safetensors")
    for name in engines.ENGINES:
        streamconv.convert(tmp_path / "model.safetensors", tmp_path / name, engine=name)
        assert (tmp_path / name / "model.safetensors").exists()
