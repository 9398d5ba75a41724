"""What a plan takes for granted is work like any other: shared out, recorded, and done before a file has its name."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from watched import Call, noted, watching

import streamconv
from streamconv import engines
from streamconv.engines import Engine
from streamconv.errors import ConversionError
from streamconv.execution.execute import CheckItem, ChecksumItem, Item, Receipt, Settings, Worker, WorkItem
from streamconv.execution.memory import budget
from streamconv.plans import Plan
from streamconv.plans.codec import from_json, to_json
from streamconv.plans.plan import Check
from streamconv.running.progress import Progress
from streamconv.running.run import run
from streamconv.tensor import Checksum, Extent

SHARD = "10KB"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan that takes two tensors to be equal, which they are, over several files."""
    values = numpy.arange(2000, dtype="f4")
    save_file({"a": values, "b": values, "c": values + 1, "d": values}, tmp_path / "model.safetensors")
    made = streamconv.plan(tmp_path / "model.safetensors", max_shard=SHARD)
    assert len(made.outputs) == 4
    return taking(made, "b")


def taking(plan: Plan, name: str) -> Plan:
    """A plan that takes `a` to be equal to another tensor."""
    tensors = {tensor.spec.name: tensor.expression for tensor in plan.tensors}
    return replace(plan, checks=(Check("two ranks must agree", tensors["a"], tensors[name]),))


class Recording:
    """An engine of one worker that keeps what it was given; it does at most so many items."""

    def __init__(self, most: int | None = None, *, backwards: bool = False) -> None:
        self.most, self.backwards = most, backwards
        self.items: list[Item] = []
        self.workers = -1
        self.events: list[str] = []

    @contextmanager
    def __call__(
        self, batches: Iterable[Sequence[Item]], settings: Settings, workers: int
    ) -> Iterator[Iterator[list[Receipt]]]:
        self.items, self.workers = [item for batch in batches for item in batch], workers
        worker = Worker(settings)

        def work() -> Iterator[list[Receipt]]:
            for done, item in enumerate(self.items[::-1] if self.backwards else self.items):
                if self.most is not None and done >= self.most:
                    raise ConversionError("the network is down")
                if isinstance(item, CheckItem):
                    time.sleep(0.2)  # in which the finisher could do what it must not
                    self.events.append("check")
                yield worker.run([item])

        try:
            yield work()
        finally:
            worker.close()

    @property
    def checks(self) -> list[Item]:
        return [item for item in self.items if isinstance(item, CheckItem)]


def convert(
    plan: Plan, out: Path, engine: Recording, monkeypatch: pytest.MonkeyPatch, **options: bool
) -> None:
    monkeypatch.setitem(engines.ENGINES, "recording", Engine(engine))
    run(plan, out, budget=budget(8 << 20, 1), engine="recording", **options)


def published(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*") if path.suffix in (".safetensors", ".json"))


@pytest.mark.parametrize("backwards", [False, True])
def test_no_file_has_its_name_before_the_checks_are_done(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    engine = Recording(backwards=backwards)

    def note(call: Call) -> None:
        if call.method == "publish" and call.arguments[0].endswith(".safetensors"):
            engine.events.append("publish")

    monkeypatch.setattr("streamconv.running.items.PART", 4000)
    with watching(note):
        convert(plan, tmp_path / "out", engine, monkeypatch)
    assert engine.events == ["check"] * 2 + ["publish"] * 4
    assert not streamconv.verify(plan, tmp_path / "out").problems


def test_a_check_that_fails_says_what_where_and_leaves_no_file(plan: Plan, tmp_path: Path) -> None:
    for engine in ("inline", "local"):
        out = tmp_path / engine
        with pytest.raises(ConversionError) as caught:
            run(taking(plan, "c"), out, budget=budget(16 << 20, 2), engine=engine)
        assert "tensor 'a': two ranks must agree: element 0 is 0.0, not 1.0" in str(caught.value)
        assert "nothing was finished" in str(caught.value)
        assert published(out) == []


@pytest.mark.parametrize("checksum", [False, True])
def test_a_run_that_resumes_does_not_check_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: bool
) -> None:
    out, first, second = tmp_path / "out", Recording(most=2), Recording()
    with pytest.raises(ConversionError, match="network"):
        convert(plan, out, first, monkeypatch, checksum=checksum)
    assert len(first.checks) == 1
    assert first.checks[0].index in [index for index, *_ in noted(out / ".streamconv" / "journal")]
    convert(plan, out, second, monkeypatch, checksum=checksum)
    assert second.checks == []
    assert len(second.items) == 3


def test_a_check_that_was_made_survives_a_reboot(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first, second = tmp_path / "out", Recording(most=2), Recording()
    with pytest.raises(ConversionError, match="network"):
        convert(plan, out, first, monkeypatch)
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr("streamconv.execution.node._BOOT_ID", tmp_path / "boot")
    convert(plan, out, second, monkeypatch)
    assert second.checks == []


def test_a_check_that_failed_is_not_recorded(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, out = taking(plan, "c"), tmp_path / "out"
    for _ in range(2):
        engine = Recording()
        with pytest.raises(ConversionError, match="two ranks must agree"):
            convert(wrong, out, engine, monkeypatch)
        assert len(engine.checks) == 1
    assert published(out) == []


def test_a_file_is_held_against_its_own_checksum_once(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = plan.files
    data = Path(source.path).read_bytes()
    extents = Extent(source.path, 0, 5), Extent(source.path, 10, len(data) - 10)
    crc = f"{zlib.crc32(data[:5] + data[10:]):08x}"
    plan = replace(plan, checksums=(Checksum(extents, crc, "it was damaged"),))
    assert from_json(to_json(plan)) == plan
    out, unasked, first, second = tmp_path / "out", Recording(most=2), Recording(most=2), Recording()
    with pytest.raises(ConversionError, match="network"):
        convert(plan, out, unasked, monkeypatch)
    assert len(unasked.checks) == 1
    with pytest.raises(ConversionError, match="network"):
        convert(plan, out, first, monkeypatch, checksum=True)
    assert [type(item) for item in first.items[:2]] == [ChecksumItem, WorkItem]
    convert(plan, out, second, monkeypatch, checksum=True)
    assert not any(isinstance(item, ChecksumItem) for item in second.items)
    with pytest.raises(ConversionError, match=r"CRC-32 .*, not 00000000 \(it was damaged"):
        wrong = replace(plan, checksums=(Checksum(extents, "0" * 8, "it was damaged"),))
        convert(wrong, tmp_path / "wrong", Recording(), monkeypatch, checksum=True)
    # An interrupted run with checksums goes on without them.
    with pytest.raises(ConversionError, match="network"):
        convert(plan, tmp_path / "without", Recording(most=2), monkeypatch, checksum=True)
    convert(plan, tmp_path / "without", Recording(), monkeypatch)


def test_progress_counts_checks_and_what_was_finished_is_told(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamconv.running.progress._REPORT_EVERY", 0)
    told: list[Progress] = []
    made = run(plan, tmp_path / "out", budget=budget(8 << 20, 1), progress=told.append)
    assert (told[0].bytes_done, told[0].bytes_total) == (8000, 40000)
    assert (told[-1].bytes_done, made.bytes_written) == (40000, 32000)
    verified: list[Progress] = []
    streamconv.verify(plan, tmp_path / "out", progress=verified.append)
    assert (verified[-1].bytes_done, verified[-1].bytes_total) == (40000, 40000)
    # A file of an earlier run has its name where a check was asked for later only.
    out, (source,) = tmp_path / "again", plan.files
    wrong = Checksum((Extent(source.path, 0, 8),), "0" * 8, "it was damaged")
    plan = replace(streamconv.plan(source.path, max_shard="5KB", dtype="F16"), checksums=(wrong,))
    with pytest.raises(ConversionError, match="network"):
        convert(plan, out, Recording(most=3), monkeypatch)
    assert published(out)
    with pytest.raises(ConversionError, match=f"an earlier run had finished {published(out)[0]}"):
        convert(plan, out, Recording(), monkeypatch, checksum=True)


def test_an_engine_is_given_a_worker_also_where_nothing_is_left(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, engine = tmp_path / "out", Recording()
    monkeypatch.setattr("streamconv.running.run.record.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(plan, out, Recording(), monkeypatch)
    monkeypatch.undo()
    convert(plan, out, engine, monkeypatch)
    assert (engine.items, engine.workers) == ([], 1)


@pytest.mark.parametrize("engine", ["inline", "local"])
def test_verification_checks_too(plan: Plan, tmp_path: Path, engine: str) -> None:
    streamconv.convert(plan, tmp_path / "out")
    assert not streamconv.verify(plan, tmp_path / "out", engine=engine).problems
    (problem,) = streamconv.verify(taking(plan, "c"), tmp_path / "out", engine=engine).problems
    assert str(problem) == (
        "tensor 'a': two ranks must agree: element 0 is 0.0, not 1.0 (the plan relies on their being equal)"
    )


def test_a_failed_check_of_ranks_says_which_files_differ(tmp_path: Path) -> None:
    for rank in range(2):
        save_file({"a": numpy.full(3, rank, "f4")}, tmp_path / f"rank_{rank}.safetensors")
    plans = [streamconv.plan(tmp_path / f"rank_{rank}.safetensors") for rank in range(2)]
    left, right = (plan.tensors[0].expression for plan in plans)
    wrong = replace(
        plans[0],
        files=tuple(file for plan in plans for file in plan.files),
        checks=(Check("two ranks must agree", left, right),),
    )
    with pytest.raises(ConversionError) as failed:
        streamconv.convert(wrong, tmp_path / "out")
    assert str(failed.value) == (
        f"tensor 'a': two ranks must agree: element 0 is 0.0 in {tmp_path}/rank_0.safetensors, "
        f"not 1.0 in {tmp_path}/rank_1.safetensors "
        "(the plan relies on their being equal; nothing was finished)"
    )
