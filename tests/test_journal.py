"""Which receipts of an earlier run count, after the death of a process and of a machine."""

from __future__ import annotations

import threading
from pathlib import Path

import orjson
import pytest

from streamconv.execution import node
from streamconv.execution.execute import Receipt
from streamconv.running import journal
from streamconv.running.journal import Journal, read
from streamconv.storage.location import locate


def receipts(first: int, stop: int) -> list[Receipt]:
    return [Receipt(index, 10, f"{index:032x}") for index in range(first, stop)]


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The boots to come; the last one lasts."""
    names = ["first"]
    monkeypatch.setattr(journal, "node", lambda: names[-1])
    return names


def test_all_counts_while_the_machine_runs(tmp_path: Path, boots: list[str]) -> None:
    with Journal(locate(tmp_path / "journal")) as log:
        assert log.done(receipts(0, 3)) == 3
    with Journal(locate(tmp_path / "journal")) as log:
        assert log.done(receipts(3, 5)) == 2
    assert list(read(locate(tmp_path / "journal")).values()) == receipts(0, 5)


def test_only_what_was_synced_counts_after_a_reboot(tmp_path: Path, boots: list[str]) -> None:
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(0, 4))
        log.synced(2)
        log.done(receipts(7, 9))
        log.whole(7, 9)
    boots.append("second")
    assert sorted(read(locate(tmp_path / "journal"))) == [0, 1, 7, 8]
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(2, 3))
        log.synced(1)
        log.done(receipts(3, 4))
    assert sorted(read(locate(tmp_path / "journal"))) == [0, 1, 2, 3, 7, 8]
    boots.append("third")
    assert sorted(read(locate(tmp_path / "journal"))) == [0, 1, 2, 7, 8]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_counts_for_nothing(tmp_path: Path, boots: list[str], cut: int) -> None:
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(0, 3))
    data = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(data[:-cut])
    before = sorted(read(locate(tmp_path / "journal")))
    assert before == [0, 1, 2][: len(before)]
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(5, 6))
    assert sorted(read(locate(tmp_path / "journal"))) == [*before, 5]


def test_an_empty_journal_is_gone_on_with(tmp_path: Path, boots: list[str]) -> None:
    (tmp_path / "journal").touch()
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(0, 1))
    assert sorted(read(locate(tmp_path / "journal"))) == [0]


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read(locate(tmp_path / "absent")) == {}


def test_where_the_boot_is_not_known_only_synced_work_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_BOOT_ID", tmp_path / "absent")
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(0, 2))
        log.synced(1)
    assert sorted(read(locate(tmp_path / "journal"))) == [0]


def test_what_its_writer_synced_counts_after_any_reboot(tmp_path: Path, boots: list[str]) -> None:
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done([Receipt(0, 10), Receipt(1, 10, durable=True)])
    boots.append("second")
    assert read(place) == {1: Receipt(1, 10, durable=True)}


def test_threads_do_not_write_over_each_other(tmp_path: Path) -> None:
    place = locate(tmp_path / "journal")

    def note(first: int) -> None:
        for index in range(first, first + 500):
            journal.done([Receipt(index, 1)])

    with Journal(place) as journal:
        threads = [threading.Thread(target=note, args=(first,)) for first in (0, 500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = place.read(1 << 20).splitlines()
    assert len([orjson.loads(line) for line in lines]) == 1001
    assert sorted(read(place)) == list(range(1000))
