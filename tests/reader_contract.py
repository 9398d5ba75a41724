"""What holds for every reader, whatever the format: inherit `ReaderContract` and say how a checkpoint is written.

The accessor goes around the code under test: it writes with the library that owns the format, or in its layout
where that library does not run here, and the contract reads tensor bytes back through the extents alone. Of a
format of several files it is each of them that is cut off and damaged.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from remote import BUCKET, Store
from toy_storage import FILES, MEMORY
from watched import Calls, watching

from streamconv import dtypes, readers
from streamconv.api import LazyTensor
from streamconv.errors import CheckpointError, StreamconvError
from streamconv.ops import Expression, leaves
from streamconv.options.records import ReadingOptions
from streamconv.storage.resolve import STORAGES
from streamconv.tensor import Stored

State = dict[str, torch.Tensor]
Shape = tuple[int, ...]

# Several formats' tests inherit one method; each makes its own directories.
INHERITED = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]

# No writer gives packed tensors a second shape to compare with; they have tests of their own.
TORCH_DTYPES = tuple(row.name for row in dtypes.BY_NAME.values() if row.torch_name and not row.packed)
SAFETENSORS = tuple(name for name in TORCH_DTYPES if dtypes.BY_NAME[name].rank is not None)
FLOATS = tuple(name for name in TORCH_DTYPES if dtypes.BY_NAME[name].kind == "float")
NAMES = ("a", "a.b.c", "ключ", "名前.权重", "with space", 'quote"s', "back\\slash", "/x")
BIG = 1 << 20


def stored_bytes(tensor: object) -> bytes:
    """The bytes that a stored tensor's extents name, by plain seeks and reads."""
    assert isinstance(tensor, Stored)
    parts = []
    for extent in tensor.extents:
        with Path(extent.file).open("rb") as file:
            file.seek(extent.offset)
            parts.append(file.read(extent.length))
            assert len(parts[-1]) == extent.length, "an extent reaches beyond its file"
    return b"".join(parts)


def content(tensor: Expression) -> bytes:
    """A tensor's bytes; those of several parts are put together by the engine."""
    return stored_bytes(tensor) if isinstance(tensor, Stored) else LazyTensor(tensor).numpy().tobytes()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: dtypes.DType, shape: Shape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(
        0, 2 if dtype.kind == "bool" else 256, (count,), dtype=torch.uint8, generator=generator
    )
    return data.view(getattr(torch, str(dtype.torch_name))).reshape(shape)


def part(tensor: torch.Tensor, axis: int, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part, as `torch.chunk` cuts: the last ones are shorter or empty."""
    size = -(-tensor.shape[axis] // ranks)
    start = min(rank * size, tensor.shape[axis])
    return tensor.narrow(axis, start, min(size, tensor.shape[axis] - start)).clone()


class ReaderContract(ABC):
    """Inherited by the test of each format."""

    holds: ClassVar[Sequence[str]] = TORCH_DTYPES
    """Names of the dtypes that its writer takes."""
    names: ClassVar[Sequence[str]] = NAMES
    """What its writer can call a tensor."""
    shapes: ClassVar[Sequence[Shape]] = ((), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0, 2))
    reading: ClassVar[ReadingOptions | None] = None
    hints: ClassVar[Sequence[str]] = ()
    """Names of files that only help to choose; without them, or with half of them, the checkpoint is whole."""

    @abstractmethod
    def write(self, state: State, directory: Path) -> Path:
        """Write with the real library; returns what is to be opened."""

    def called(self, name: str) -> str:
        """What a tensor that is written under a name is called by the reader."""
        return name

    def open(self, path: Path) -> Any:
        return readers.open_checkpoint(path, self.reading)

    def files(self, path: Path) -> list[Path]:
        """Everything that is needed to read it."""
        every = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        return [file for file in every if file.name not in self.hints]

    def check(self, state: State, path: Path) -> None:
        checkpoint = self.open(path)
        assert set(checkpoint) == {self.called(name) for name in state}
        for name, tensor in state.items():
            found = checkpoint[self.called(name)]
            assert found.spec.dtype.torch_name == str(tensor.dtype).removeprefix("torch.")
            assert found.spec.shape == tuple(tensor.shape)
            assert content(found) == raw(tensor)

    def test_every_dtype_and_shape(self, tmp_path: Path) -> None:
        state = {
            f"{name}.t{number}": random_tensor(dtypes.by_name(name), shape, number)
            for name in self.holds
            for number, shape in enumerate(self.shapes)
        }
        self.check(state, self.write(state, tmp_path))

    def test_names(self, tmp_path: Path) -> None:
        state = {name: torch.arange(3.0) + number for number, name in enumerate(self.names)}
        self.check(state, self.write(state, tmp_path))

    def test_many_tensors(self, tmp_path: Path) -> None:
        state = {f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(1000)}
        self.check(state, self.write(state, tmp_path))

    @settings(max_examples=25, deadline=None, suppress_health_check=INHERITED)
    @given(data=st.data())
    def test_random_states(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        smallest = min(min(shape, default=1) for shape in self.shapes)
        shape = st.lists(st.integers(smallest, 5), max_size=4).map(tuple)
        kinds = st.sampled_from(
            [name for name in ("F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3") if name in self.holds]
        )
        drawn = data.draw(st.lists(st.tuples(kinds, shape), min_size=1, max_size=6))
        state = {
            f"t.{number}": random_tensor(dtypes.by_name(kind), shape, number)
            for number, (kind, shape) in enumerate(drawn)
        }
        self.check(state, self.write(state, tmp_path_factory.mktemp("random")))

    def test_only_headers_are_read(self, tmp_path: Path) -> None:
        path = self.write({f"big.{i}": torch.zeros(BIG) for i in range(4)}, tmp_path)
        self.open(path)  # modules that are imported on first use are read too
        calls = Calls()
        before = _bytes_read()
        with watching(calls):
            self.open(path)
        asked = [call.arguments[0] for call in calls.of("read_into")]
        asked += [call.arguments[1] for call in calls.of("read")]
        assert 0 < sum(asked) < BIG // 4
        assert _bytes_read() - before < BIG // 4, "something is read past the storage"

    def test_another_storage_is_read_alike(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}, tmp_path)
        monkeypatch.setitem(STORAGES, "memory", MEMORY)
        for file in sorted(each for each in tmp_path.rglob("*") if each.is_file()):
            monkeypatch.setitem(FILES, f"memory:/{file}", bytearray(file.read_bytes()))
        here = self.open(path)
        there = readers.open_checkpoint(f"memory:/{path}", self.reading)
        assert {name: tensor.spec for name, tensor in there.items()} == {
            name: tensor.spec for name, tensor in here.items()
        }
        assert there.files == tuple(f"memory:/{file}" for file in here.files)
        for name, tensor in here.items():
            theirs = [extent for leaf in leaves(there[name]) for extent in leaf.extents]
            ours = [extent for leaf in leaves(tensor) for extent in leaf.extents]
            assert theirs == [replace(extent, file=f"memory:/{extent.file}") for extent in ours]

    def test_an_object_store_is_read_alike(self, tmp_path: Path, store: Store) -> None:
        path = self.write({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}, tmp_path)
        prefix = f"{type(self).__module__}/{type(self).__name__}"
        place = store.upload(tmp_path, prefix) + str(path).removeprefix(str(tmp_path))
        here, there = self.open(path), readers.open_checkpoint(place, self.reading)
        root = f"s3://{BUCKET}/{prefix}"
        assert {name: tensor.spec for name, tensor in there.items()} == {
            name: tensor.spec for name, tensor in here.items()
        }
        assert there.files == tuple(root + file.removeprefix(str(tmp_path)) for file in here.files)
        assert there.side_files == here.side_files
        for name, tensor in here.items():
            theirs = [extent for leaf in leaves(there[name]) for extent in leaf.extents]
            ours = [extent for leaf in leaves(tensor) for extent in leaf.extents]
            assert theirs == [
                replace(extent, file=root + extent.file.removeprefix(str(tmp_path))) for extent in ours
            ]
            assert LazyTensor(there[name]).numpy().tobytes() == content(tensor)

    def test_cut_off_files_are_refused_by_name(self, tmp_path: Path) -> None:
        path = self.write({"a": torch.arange(1000.0), "b": torch.arange(500.0)}, tmp_path)
        for file in self.files(path):
            whole = file.read_bytes()
            for length in {0, 1, 7, 9, 40, len(whole) // 2, len(whole) - 1} & {*range(len(whole))}:
                file.write_bytes(whole[:length])
                with pytest.raises(CheckpointError) as caught:
                    self.open(path)
                assert str(file) in str(caught.value)
            file.write_bytes(whole)

    @pytest.mark.parametrize(
        "made", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")], ids=["pipe", "device"]
    )
    def test_only_regular_files_are_opened(self, tmp_path: Path, made: Callable[[Path], None]) -> None:
        path = self.write({"a": torch.arange(1000.0), "b": torch.arange(500.0)}, tmp_path)
        for file in self.files(path):
            whole = file.read_bytes()
            file.unlink()
            made(file)
            if file.suffix == ".json":
                self._survives(path)  # an index or a config may be as good as not there
            else:
                with pytest.raises(StreamconvError):
                    self.open(path)
            file.unlink()
            file.write_bytes(whole)

    def test_damaged_bytes_end_in_one_clear_error_or_none(self, tmp_path: Path) -> None:
        path = self.write({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}, tmp_path)
        files = {file: file.read_bytes() for file in self.files(path)}

        @settings(max_examples=60, deadline=None)
        @given(data=st.data())
        def damaged(data: st.DataObject) -> None:
            file = data.draw(st.sampled_from(sorted(files)))
            changed = bytearray(files[file])
            for _ in range(data.draw(st.integers(1, 4))):
                changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
            file.write_bytes(changed)
            try:
                self._survives(path)
            finally:
                file.write_bytes(files[file])

        damaged()

    def _survives(self, path: Path) -> None:
        """Our own error, or tensors within their files."""
        try:
            checkpoint = self.open(path)
        except StreamconvError as error:
            assert str(error)
            return
        for name in checkpoint:
            for leaf in leaves(checkpoint[name]):
                for extent in leaf.extents:
                    assert extent.offset + extent.length <= Path(extent.file).stat().st_size


def _bytes_read() -> int:
    """What this process has read from files so far, by the kernel's account."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar in /proc/self/io")
