"""What holds for every engine: inherit `EngineContract` and name the engine."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy
import psutil
import pytest
import xxhash

from streamconv import dtypes
from streamconv.engines import Run
from streamconv.errors import ConversionError
from streamconv.execution.execute import CheckItem, Settings, WorkItem
from streamconv.ops import Cast, apply
from streamconv.tensor import Extent, Stored, TensorSpec

SETTINGS = Settings(arena=4 << 20)


def stored(path: Path, name: str, count: int, offset: int = 0) -> Stored:
    return Stored(TensorSpec(name, dtypes.by_name("F32"), (count,)), (Extent(str(path), offset, 4 * count),))


class EngineContract:
    """Inherited by the test of each engine."""

    engine: Run
    workers = 2

    def items(self, directory: Path, tensors: int = 12, count: int = 5000) -> list[WorkItem]:
        """Casts of random tensors, each to its place in one file."""
        values = numpy.random.default_rng(0).standard_normal((tensors, count)).astype("f4")
        values.tofile(directory / "source")
        (directory / "target").write_bytes(bytes(2 * values.size))
        items = []
        for index in range(tensors):
            source = stored(directory / "source", f"t{index}", count, 4 * count * index)
            (half,) = apply(Cast("F16"), source)
            place = str(directory / "target")
            items.append(WorkItem(index, f"t{index}", half, 0, 2 * count, place, 2 * count * index))
        self.expected = values.astype("f2").tobytes()
        return items

    def test_the_bytes_are_in_place_and_receipts_tell_them(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)
        batches = [items[:1], items[1:5], items[5:]]
        with type(self).engine(batches, SETTINGS, self.workers) as results:
            receipts = {receipt.index: receipt for batch in results for receipt in batch}
        assert (tmp_path / "target").read_bytes() == self.expected
        assert sorted(receipts) == list(range(len(items)))
        for item in items:
            part = self.expected[item.offset : item.offset + item.stop]
            assert receipts[item.index].digest == xxhash.xxh3_128(part).hexdigest()
            assert receipts[item.index].nbytes == len(part)

    def test_items_may_come_twice_and_in_any_order(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)
        with type(self).engine([items[::-1], items[3:6], items], SETTINGS, self.workers) as results:
            assert sum(len(batch) for batch in results) == 2 * len(items) + 3
        assert (tmp_path / "target").read_bytes() == self.expected

    def test_no_batches(self) -> None:
        with type(self).engine([], SETTINGS, self.workers) as results:
            assert list(results) == []

    def test_a_failure_names_tensor_file_and_byte(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)
        os.truncate(tmp_path / "source", 4 * 5000 * 7 + 100)
        with (
            pytest.raises(ConversionError) as caught,
            type(self).engine([items], SETTINGS, self.workers) as results,
        ):
            list(results)
        message = str(caught.value)
        assert str(tmp_path / "source") in message
        assert f"ends at byte {4 * 5000 * 7 + 100}" in message

    def test_leaving_early_leaves_nobody_behind(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)
        with type(self).engine(([item] for item in items * 50), SETTINGS, self.workers) as results:
            next(results)
        deadline = time.monotonic() + 20
        while [child for child in psutil.Process().children() if "streamconv" in " ".join(child.cmdline())]:
            assert time.monotonic() < deadline, "a worker is still there"
            time.sleep(0.05)

    def test_receipts_say_where_the_bytes_are(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)
        for settings in (SETTINGS, replace(SETTINGS, sync=True)):
            with type(self).engine([items], settings, self.workers) as results:
                receipts = [receipt for batch in results for receipt in batch]
            assert all(receipt.durable is settings.sync for receipt in receipts)
            assert all(receipt.durable or receipt.node for receipt in receipts)

    def test_checks_are_done_beside_other_work(self, tmp_path: Path) -> None:
        items = self.items(tmp_path)
        left, right = items[0].expression, items[1].expression
        checks = [
            CheckItem(index, "they are equal", left, other, 0, left.spec.nbytes)
            for index, other in enumerate((left, right), len(items))
        ]
        with type(self).engine([[items[0], *checks]], SETTINGS, self.workers) as results:
            ((written, same, other),) = list(results)
        assert written.nbytes and written.digest
        assert (same.nbytes, same.difference) == (0, None)
        assert other.difference is not None and other.difference.element == 0
