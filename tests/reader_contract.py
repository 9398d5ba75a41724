"""What holds for every reader, whatever the format: inherit `ReaderContract` and say how files are written.

The accessor goes around the code under test: it writes with the library that owns the format, and the
contract reads tensor bytes back through the extents alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamconv import dtypes, readers
from streamconv.errors import CheckpointError
from streamconv.tensor import Stored

State = dict[str, torch.Tensor]

# Several formats' tests inherit one method; each makes its own directories.
INHERITED = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]

# No writer gives packed tensors a second shape to compare with; they have tests of their own.
TORCH_DTYPES = [row for row in dtypes.BY_NAME.values() if row.torch_name and not row.packed]


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


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: dtypes.DType, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(
        0, 2 if dtype.kind == "bool" else 256, (count,), dtype=torch.uint8, generator=generator
    )
    return data.view(getattr(torch, str(dtype.torch_name))).reshape(shape)


class ReaderContract(ABC):
    """Inherited by the test of each format."""

    format: str
    holds_complex128 = True

    @abstractmethod
    def write(self, state: State, directory: Path) -> Path:
        """Write with the real library; returns what is to be opened."""

    def check(self, state: State, path: Path) -> None:
        checkpoint = readers.open_checkpoint(path)
        assert set(checkpoint) == set(state)
        for name, tensor in state.items():
            found = checkpoint[name]
            assert found.spec.name == name
            assert found.spec.dtype.torch_name == str(tensor.dtype).removeprefix("torch.")
            assert found.spec.shape == tuple(tensor.shape)
            assert stored_bytes(found) == raw(tensor)

    @pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
    def test_every_dtype_and_shape(self, dtype: dtypes.DType, tmp_path: Path) -> None:
        if dtype.rank is None and not self.holds_complex128:
            dtype = dtypes.BY_NAME["C64"]
        shapes: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0, 2)]
        state = {f"t{i}": random_tensor(dtype, shape, i) for i, shape in enumerate(shapes)}
        self.check(state, self.write(state, tmp_path))

    @pytest.mark.parametrize(
        "name", ["a", "a.b.c", "ключ", "名前.权重", "with space", 'quote"s', "back\\slash", "/x"]
    )
    def test_names(self, name: str, tmp_path: Path) -> None:
        state = {name: torch.arange(3.0), "other": torch.arange(2.0)}
        self.check(state, self.write(state, tmp_path))

    def test_many_tensors(self, tmp_path: Path) -> None:
        state = {f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(2000)}
        self.check(state, self.write(state, tmp_path))

    @settings(max_examples=25, deadline=None, suppress_health_check=INHERITED)
    @given(
        shapes=st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=6),
        kinds=st.lists(
            st.sampled_from(["F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3"]), min_size=6, max_size=6
        ),
    )
    def test_random_states(
        self, tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], kinds: list[str]
    ) -> None:
        state = {
            f"t.{i}": random_tensor(dtypes.by_name(kind), shape, i)
            for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
        }
        self.check(state, self.write(state, tmp_path_factory.mktemp("random")))

    def test_only_headers_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = {f"big.{i}": torch.zeros(1 << 20) for i in range(4)}
        path = self.write(state, tmp_path)
        read = 0
        pread = os.pread

        def counting(descriptor: int, count: int, offset: int) -> bytes:
            nonlocal read
            data = pread(descriptor, count, offset)
            read += len(data)
            return data

        monkeypatch.setattr(os, "pread", counting)
        before = _bytes_read()
        readers.open_checkpoint(path)
        assert read < 200_000
        assert _bytes_read() - before < 1 << 20

    def test_cut_off_files_are_refused_by_name(self, tmp_path: Path) -> None:
        state = {"a": torch.arange(1000.0), "b": torch.arange(1000.0)}
        path = self.write(state, tmp_path)
        files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix != ".json"]
        for file in files:
            whole = file.read_bytes()
            for length in (0, 1, 7, 9, 40, len(whole) // 2, len(whole) - 1):
                file.write_bytes(whole[:length])
                with pytest.raises(CheckpointError) as caught:
                    readers.open_checkpoint(path)
                assert file.name in str(caught.value)
            file.write_bytes(whole)

    @settings(max_examples=60, deadline=None, suppress_health_check=INHERITED)
    @given(data=st.data())
    def test_damaged_bytes_end_in_one_clear_error_or_none(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        directory = tmp_path_factory.mktemp("damaged")
        path = self.write({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, directory)
        files = [path] if path.is_file() else sorted(path.iterdir())
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try:
            checkpoint = readers.open_checkpoint(path)
        except CheckpointError:
            return
        for name in checkpoint:
            for extent in getattr(checkpoint[name], "extents", ()):
                assert extent.offset + extent.length <= Path(extent.file).stat().st_size


def _bytes_read() -> int:
    """What this process has read from files so far, by the kernel's account."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar in /proc/self/io")
