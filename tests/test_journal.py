"""Which receipts of an earlier run count, after the death of a process and of a machine."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from streamconv.dtypes import by_name
from streamconv.execution import node
from streamconv.execution.execute import CheckItem, Item, Receipt, WorkItem
from streamconv.running import journal
from streamconv.running.journal import Journal
from streamconv.storage.location import Location, locate
from streamconv.tensor import Extent, Stored, TensorSpec


def piece(index: int, size: int = 10) -> WorkItem:
    spec = TensorSpec(f"t{index}", by_name("U8"), (size,))
    return WorkItem(
        index, spec.name, Stored(spec, (Extent("/source", 0, size),)), 0, size, "/out", size * index
    )


ITEMS = [piece(index) for index in range(10)]


def read(place: Location, items: Sequence[Item] = ITEMS) -> dict[int, Receipt]:
    return journal.read(place, items)


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
        log.whole((7, 9))
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
        log.done([Receipt(0, 10, copied=True), Receipt(1, 10, copied=True, durable=True)])
    boots.append("second")
    assert read(place) == {1: Receipt(1, 10, copied=True, durable=True)}


def test_threads_do_not_write_over_each_other(tmp_path: Path) -> None:
    place = locate(tmp_path / "journal")

    def note(first: int) -> None:
        for index in range(first, first + 500):
            log.done([Receipt(index, 1, copied=True)])

    with Journal(place) as log:
        threads = [threading.Thread(target=note, args=(first,)) for first in (0, 500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = place.read(1 << 20).splitlines()
    assert len([orjson.loads(line[9:]) for line in lines]) == 1001
    assert sorted(read(place, [piece(index, 1) for index in range(1000)])) == list(range(1000))


# --------------------------------------------------------------------------- a journal is outside data


def line(entry: object) -> bytes:
    text = orjson.dumps(entry)
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("seed", range(3))
def test_no_changed_byte_makes_anything_done(tmp_path: Path, boots: list[str], seed: int) -> None:
    """Any byte, changed to any of a few others: what counts after it counted before, as it was."""
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done(receipts(0, 3))
        log.syncing([(0, 3)])
        log.synced(3)
        log.done(receipts(5, 7))
        log.whole((5, 7))
        log.done(receipts(8, 9))
    data = (tmp_path / "journal").read_bytes()
    before = read(place)
    assert sorted(before) == [0, 1, 2, 5, 6, 8]
    for at in range(seed, len(data), 3):
        for new in (data[at] ^ 1, ord("1"), ord("9"), ord("\n"), 0):
            (tmp_path / "journal").write_bytes(data[:at] + bytes([new]) + data[at + 1 :])
            assert read(place).items() <= before.items()


def test_a_line_that_cannot_be_read_does_not_move_what_was_synced(tmp_path: Path, boots: list[str]) -> None:
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done(receipts(0, 2))
        log.synced(2)
        log.done(receipts(2, 4))
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    # The first receipt is damaged: the second of those that are synced must not become the third.
    lines[1] = lines[1].replace(b"[0,10", b"[3,10")
    (tmp_path / "journal").write_bytes(b"".join(lines))
    boots.append("second")
    assert read(place) == {}


@pytest.mark.parametrize(
    "entry",
    [
        [0, 9, None, True, 0, 0], [0, 10, None, False, 0, 0], [0, 10, "xyz", False, 0, 0], [10, 10, None, True, 0, 0],
        [-1, 10, None, True, 0, 0], [1 << 62, 10, None, True, 0, 0], [0, 10, None, True, 11, 0],
        [0, 10, None, True, 0, -1], [0, 10, None, True, 0], [0, 10.0, None, True, 0, 0], ["0", 10, None, True, 0, 0],
        [0, 10, None, "yes", 0, 0], [], [None] * 6, 5, None, "text", {}, {"whole": None}, {"whole": [0, 1 << 60]},
        {"whole": [0]}, {"synced": "all"}, {"synced": -1}, {"syncing": 3}, {"syncing": [[0, 1 << 60]]}, {"lost": {}},
        {"lost": [[-5, 3]]}, {"boot": {}, "part": None}, {"other": 1},
    ],
)  # fmt: skip
def test_an_entry_that_fits_no_item_counts_for_nothing(
    tmp_path: Path, boots: list[str], entry: object
) -> None:
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done(receipts(4, 5))
        log.whole((4, 5))
    with (tmp_path / "journal").open("ab") as file:
        file.write(line(entry))
    assert read(place) == {4: receipts(4, 5)[0]}


def test_a_check_has_put_no_bytes_in_place(tmp_path: Path, boots: list[str]) -> None:
    place = locate(tmp_path / "journal")
    expression = ITEMS[0].expression
    items = [CheckItem(0, "equal", expression, expression, 0, 10)]
    with Journal(place) as log:
        log.done([Receipt(0, 10, copied=True, durable=True)])
    assert read(place, items) == {}
    with Journal(place) as log:
        log.done([Receipt(0, 0, durable=True)])
    assert sorted(read(place, items)) == [0]


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 5000, b"\xff\xfe", b"{}", b"[[[[", b"\n\n\n", b"garbage " * 1000]
)
def test_any_bytes_are_a_journal_that_says_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "journal").write_bytes(data)
    assert read(locate(tmp_path / "journal")) == {}
    with Journal(locate(tmp_path / "journal")) as log:
        log.done(receipts(0, 1))
    assert sorted(read(locate(tmp_path / "journal"))) == [0]


def test_entries_of_another_part_size_mean_something_else(
    tmp_path: Path, boots: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = locate(tmp_path / "journal")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "PART", 4096)
        with Journal(place) as log:
            log.done(receipts(0, 3))
            log.whole((0, 3))
    with Journal(place) as log:
        log.done(receipts(3, 4))
    assert sorted(read(place)) == [3]


# -------------------------------------------------------------------------------- a sync that failed


def test_what_a_sync_did_not_end_for_is_not_believed(tmp_path: Path, boots: list[str]) -> None:
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done(receipts(0, 6))
        log.whole((0, 2))
        log.syncing([(2, 4)])  # and it fails
        log.done(receipts(7, 8))
    assert sorted(read(place)) == [0, 1, 4, 5, 7]
    with Journal(place) as log:  # nor by the run after the next
        log.done(receipts(2, 3))
    assert sorted(read(place)) == [0, 1, 2, 4, 5, 7]
    with Journal(place) as log:
        log.done(receipts(3, 4))
        log.syncing([(0, 4), (7, 8)])
        log.synced(1)
    assert sorted(read(place)) == [0, 1, 2, 3, 4, 5, 7]


def test_after_a_failed_sync_only_the_disk_is_believed(tmp_path: Path, boots: list[str]) -> None:
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done(receipts(0, 6))
        log.whole((0, 2))
    with Journal(place) as log:
        log.done(receipts(6, 7))
        log.syncing([(6, 7)])
        log.failed()
        log.done(receipts(8, 9))  # another thread's, before it has heard
    assert sorted(read(place)) == [0, 1]


def test_a_file_that_is_made_again_takes_back_what_was_said_of_it(tmp_path: Path, boots: list[str]) -> None:
    place = locate(tmp_path / "journal")
    with Journal(place) as log:
        log.done(receipts(0, 6))
        log.whole((0, 4))
    with Journal(place) as log:
        log.lost([(2, 5)])
        log.done(receipts(3, 4))
    assert sorted(read(place)) == [0, 1, 3, 5]
    with Journal(place) as log:
        log.whole((0, 6))
    assert sorted(read(place)) == [0, 1, 3, 5]
