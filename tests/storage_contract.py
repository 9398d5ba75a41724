"""What holds for every storage: inherit `StorageContract`, and say where there is room to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.storage.location import locate
from streamconv.storage.resolve import sink_of, source_of
from streamconv.storage.roles import Sink, Source


class StorageContract:
    """Inherited by the test of each storage."""

    def room(self, directory: Path) -> str:
        """A place in the storage under which nothing is."""
        return str(directory)

    @pytest.fixture
    def base(self, tmp_path: Path) -> str:
        return self.room(tmp_path)

    @pytest.fixture
    def source(self, base: str) -> Source:
        return source_of(base)

    @pytest.fixture
    def sink(self, base: str) -> Sink:
        return sink_of(base)

    def made(self, sink: Sink, place: str, data: bytes) -> str:
        sink.make_directory(place.rpartition("/")[0])
        sink.create(place, len(data))
        with sink.open(place) as file:
            file.write(data, 0)
        return place

    def test_what_is_written_is_read(self, base: str, source: Source, sink: Sink) -> None:
        place = f"{base}/new/directory/file.partial"
        sink.make_directory(f"{base}/new/directory")
        sink.create(place, 100)
        with sink.open(place) as file:
            file.write(b"later", 60)
            file.write(memoryview(b"soon"), 10)
            buffer = memoryview(bytearray(5))
            assert file.read_into(buffer, 60) == 5
            assert bytes(buffer) == b"later"
            file.begin_sync(10, 4)
            file.forget(10, 4)
        sink.sync(place, forget=True)
        with source.open(place) as file:
            assert file.size == 100
            assert file.read(10, 4) == b"soon"
            assert file.read(60, 5) == b"later"

    def test_the_end_of_a_file_is_told_by_a_short_count(self, base: str, source: Source, sink: Sink) -> None:
        place = self.made(sink, f"{base}/file", bytes(range(100)))
        with source.open(place) as file:
            buffer = memoryview(bytearray(50))
            assert file.read_into(buffer, 70) == 30
            assert bytes(buffer[:30]) == bytes(range(70, 100))
            assert file.read_into(buffer, 200) == 0
            assert file.read(90, 50) == bytes(range(90, 100))
            assert file.read(150, 50) == b""

    def test_runs(self, base: str, source: Source, sink: Sink) -> None:
        place = self.made(sink, f"{base}/file", bytes(range(100)))
        with source.open(place) as file:
            buffer = memoryview(bytearray(40))
            assert file.read_runs(buffer, 8, 3, 5, 20, 5) == 5
            for index in range(5):
                start = 5 + 20 * index
                assert bytes(buffer[8 * index : 8 * index + 3]) == bytes(range(start, start + 3))
            assert file.read_runs(buffer, 8, 3, 38, 20, 5) == 3  # the last begins at byte 98

    def test_a_copy(self, base: str, source: Source, sink: Sink) -> None:
        place = self.made(sink, f"{base}/file", bytes(range(100)))
        sink.create(f"{base}/copy", 60)
        buffer = memoryview(bytearray(7))
        with source.open(place) as file, sink.open(f"{base}/copy") as copy:
            assert copy.copy_from(file, 20, 10, 50, buffer) == 50
            assert copy.copy_from(file, 95, 0, 10, buffer) == 5
            assert copy.read(0, 60) == bytes((*range(95, 100), *bytes(5), *range(20, 70)))

    def test_mapped(self, base: str, source: Source, sink: Sink) -> None:
        place = self.made(sink, f"{base}/file", b"0123456789")
        with source.open(place) as file, file.mapped(4) as data:
            assert data[:] == b"0123"

    def test_listings_and_states(self, base: str, source: Source, sink: Sink) -> None:
        self.made(sink, f"{base}/dir/b", b"bb")
        self.made(sink, f"{base}/dir/a/inner", b"")
        assert [(entry.name, entry.kind) for entry in source.entries(f"{base}/dir")] == [
            ("a", "directory"), ("b", "file"),
        ]  # fmt: skip
        state = source.state(f"{base}/dir/b")
        assert state is not None and (state.kind, state.size) == ("file", 2)
        directory = source.state(f"{base}/dir")
        assert directory is not None and directory.kind == "directory"
        assert source.state(f"{base}/none") is None
        assert source.state(f"{base}/dir/b/below") is None
        for call in (source.entries, source.open):
            with pytest.raises(OSError):
                call(f"{base}/none")

    def test_a_name_is_given_and_taken(self, base: str, source: Source, sink: Sink) -> None:
        partial = self.made(sink, f"{base}/file.partial", b"new")
        self.made(sink, f"{base}/file", b"old one")
        sink.publish(partial, f"{base}/file")
        assert locate(f"{base}/file").read(100) == b"new"
        assert source.state(partial) is None
        sink.remove(f"{base}/file")
        sink.remove(f"{base}/file")
        assert source.state(f"{base}/file") is None

    def test_what_stood_there_is_gone(self, base: str, sink: Sink) -> None:
        place = self.made(sink, f"{base}/file", b"old")
        sink.create(place, 2)
        assert locate(place).read(100) in (b"\0\0", b"")

    def test_only_an_empty_directory_goes(self, base: str, source: Source, sink: Sink) -> None:
        self.made(sink, f"{base}/dir/file", b"")
        with pytest.raises(OSError):
            sink.remove_directory(f"{base}/dir")
        sink.remove(f"{base}/dir/file")
        sink.remove_directory(f"{base}/dir")
        assert source.state(f"{base}/dir") is None

    def test_a_file_grows_beyond_the_size_it_was_made_with(self, base: str, sink: Sink) -> None:
        sink.create(f"{base}/log", 4)
        with sink.open(f"{base}/log") as log:
            log.write(b"one\ntwo\n", 0)
            log.write(memoryview(b"OK\nthree\n"), 5)
            assert log.read_into(memoryview(bytearray(20)), 0) == 14
        sink.sync(f"{base}/log")
        assert locate(f"{base}/log").read(100) == b"one\ntOK\nthree\n"

    def test_a_file_grows_at_its_end(self, base: str, sink: Sink) -> None:
        sink.create(f"{base}/log", 0)
        for line in (b"one\n", b"two\n"):
            with sink.open(f"{base}/log") as log:
                log.write(line, log.size)
            sink.sync(f"{base}/log")
        assert locate(f"{base}/log").read(100) == b"one\ntwo\n"

    def test_room(self, base: str, sink: Sink) -> None:
        free = sink.free(f"{base}/not/there/yet")
        assert free is None or free > 0
        place = self.made(sink, f"{base}/file", b"x" * 10_000)
        assert sink.allocated(place) >= 10_000
        assert sink.allocated(f"{base}/none") == 0
