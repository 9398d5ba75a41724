"""Storages keep the contract, a place is read as with pathlib, and a storage can be added from outside."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from storage_contract import StorageContract
from toy_storage import MEMORY
from watched import Call, Calls, Failing, watching

import streamconv
from streamconv.errors import CheckpointError, DestinationError, UsageError
from streamconv.storage import writing
from streamconv.storage.local import LocalSink, LocalSource
from streamconv.storage.location import locate
from streamconv.storage.resolve import STORAGES, sink_of
from streamconv.storage.roles import Held


class TestLocal(StorageContract):
    def test_links_are_not_written_through(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError):
            LocalSink().open(str(tmp_path / "link"))
        LocalSink().create(str(tmp_path / "link"), 3)
        assert (tmp_path / "victim").read_text() == "mine"
        assert not (tmp_path / "link").is_symlink()

    def test_what_is_no_file_is_not_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for place in (tmp_path / "pipe", tmp_path):
            with pytest.raises(OSError, match="not a regular file"):
                LocalSource().open(str(place))

    def test_what_becomes_no_file_in_between_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "file"
        look = Path.stat

        def replaced(path: Path, **keywords: bool) -> os.stat_result:
            place.touch()
            found = look(path, **keywords)
            place.unlink()
            os.mkfifo(place)
            return found

        for role in (LocalSource(), LocalSink()):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="not a regular file"):
                patch.setattr(Path, "stat", replaced)
                role.open(str(place))
            place.unlink()

    def test_no_call_waits_for_the_other_end_of_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        place = str(tmp_path / "pipe")
        for call in (
            lambda: LocalSink().open(place),
            lambda: LocalSink().sync(place),
            lambda: LocalSink().lock(place, "me"),
        ):
            with pytest.raises(OSError):
                call()
        LocalSink().create(place, 3)
        assert (tmp_path / "pipe").is_file()

    def test_nothing_is_written_under_two_names(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        for kind in (os.link, os.symlink):
            kind(tmp_path / "mine", tmp_path / "lock")
            with pytest.raises(OSError):
                LocalSink().lock(str(tmp_path / "lock"), "somebody else")
            with pytest.raises(OSError):
                LocalSink().open(str(tmp_path / "lock"))
            LocalSink().create(str(tmp_path / "lock"), 3)
            (tmp_path / "lock").unlink()
        assert (tmp_path / "mine").read_text() == "mine"

    def test_a_file_is_one_under_all_its_names(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "other").touch()
        (tmp_path / "link").symlink_to("file")
        os.link(tmp_path / "file", tmp_path / "hard")
        inodes = [LocalSource().inode(str(tmp_path / name)) for name in ("file", "link", "hard", "other")]
        assert inodes[0] == inodes[1] == inodes[2] != inodes[3]
        assert LocalSource().inode(str(tmp_path / "none")) is None

    def test_nothing_is_at_a_path_that_is_too_long(self, tmp_path: Path) -> None:
        for name in ("x" * 300, "/".join(["x" * 100] * 50)):
            place = locate(tmp_path / name)
            assert not place.exists()
            assert not place.is_file()
            assert not place.is_link()

    def test_a_lock_is_one_process_s(self, tmp_path: Path) -> None:
        with (
            LocalSink().lock(str(tmp_path / "lock"), "the first"),
            pytest.raises(Held, match="the first"),
        ):
            LocalSink().lock(str(tmp_path / "lock"), "the second")
        assert not (tmp_path / "lock").exists()
        with LocalSink().lock(str(tmp_path / "lock"), "the second"):
            pass

    @pytest.mark.parametrize(
        "code",
        [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, 0],
        ids=["XDEV", "INVAL", "NOSYS", "OPNOTSUPP", "none"],
    )
    def test_without_the_kernels_copy(
        self, base: str, source: LocalSource, sink: LocalSink, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(*_: object) -> int:
            if code:
                raise OSError(code, os.strerror(code))
            return 0

        monkeypatch.setattr(os, "copy_file_range", refuse)
        self.test_a_copy(base, source, sink)

    def test_short_answers_of_the_kernel(
        self, base: str, source: LocalSource, sink: LocalSink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy, preadv, pwrite = os.copy_file_range, os.preadv, os.pwrite
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: copy(a, b, min(count, 9), *at))
        monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:2]], at))
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:3], at))
        self.test_a_copy(base, source, sink)
        self.test_runs(base, source, sink)


class TestMemory(StorageContract):
    @pytest.fixture(autouse=True)
    def storage(self) -> Iterator[None]:
        STORAGES["memory"] = MEMORY
        yield
        del STORAGES["memory"]

    def room(self, directory: Path) -> str:
        return f"memory:/{directory}"


class TestWatched(StorageContract):
    """A storage under watch is the storage."""

    @pytest.fixture(autouse=True)
    def calls(self) -> Iterator[Calls]:
        calls = Calls()
        with watching(calls):
            yield calls
        assert calls.made


# ------------------------------------------------------------------------------------ locations


def test_a_location_is_read_as_a_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dir").mkdir()
    for name in ("b.pt", "a-1.pt", "a.json", ".hidden.pt"):
        (tmp_path / "dir" / name).write_text(name)
    (tmp_path / "to dir").symlink_to(tmp_path / "dir")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    location = locate(tmp_path)
    for name in (
        "dir",
        "dir/b.pt",
        "to dir",
        "to dir/b.pt",
        "nowhere",
        "none",
        "dir/b.pt/below",
        ".",
        "a\0b",
    ):
        path, here = tmp_path / name, location / name
        assert str(here) == str(path)
        assert (here.name, here.stem, here.suffix, str(here.parent)) == (
            path.name, path.stem, path.suffix, str(path.parent),
        )  # fmt: skip
        assert (here.is_file(), here.is_directory()) == (path.is_file(), path.is_dir())
        if "\0" not in name:
            assert (here.exists(), here.is_link()) == (path.exists(), path.is_symlink())
            assert str(here.canonical()) == str(path.resolve())
        assert here.relative_to(location) == path.relative_to(tmp_path).as_posix()
    for pattern in ("*.pt", "a*", "?.pt", "[ab]*"):
        expected = sorted(map(str, (tmp_path / "dir").glob(pattern)))
        assert list(map(str, (location / "dir").glob(pattern))) == expected
    assert (location / "none").glob("*") == []
    entries = location.entries()
    assert list(map(str, entries)) == list(map(str, sorted(tmp_path.iterdir())))
    for entry, path in zip(entries, sorted(tmp_path.iterdir()), strict=True):
        assert (entry.is_file(), entry.is_directory()) == (path.is_file(), path.is_dir())
        assert (entry.is_link(), entry.exists()) == (path.is_symlink(), path.exists())
    state = (location / "dir" / "b.pt").state()
    assert (state.size, state.identity) == (4, (tmp_path / "dir" / "b.pt").stat().st_mtime_ns)
    monkeypatch.chdir(tmp_path)
    assert locate("dir") == location / "dir"
    assert locate(location) is location


def test_small_files_are_read_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff123")
    location = locate(tmp_path) / "file"
    assert location.read(4) == b"\xff123"
    assert location.head(2) == b"\xff1"
    os.mkfifo(tmp_path / "pipe")
    refused: dict[str, Callable[[], object]] = {
        "it has 4 bytes; at most 3 are expected": lambda: location.read(3),
        "not UTF-8": lambda: location.read_text(10),
        "cannot be read: No such file": lambda: locate(tmp_path / "none").read(3),
        "not a regular file": lambda: locate(tmp_path / "pipe").read(3),
    }
    for message, call in refused.items():
        with pytest.raises(CheckpointError, match=message):
            call()


def test_a_scheme_without_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no storage for gopher://"):
        locate("gopher://host/model")
    with pytest.raises(UsageError, match="there is no storage"):
        sink_of("gopher://host/model")


def test_calls_are_recorded_in_order_and_fail_where_they_should(tmp_path: Path) -> None:
    calls = Calls()
    place = str(tmp_path / "file")
    with watching(calls):
        sink = sink_of(place)
        sink.create(place, 4)
        with sink.open(place) as file:
            file.write(b"abc", 1)
        sink.sync(place, forget=True)
        assert locate(place).read(10) == b"\0abc"
    assert [call for call in calls.made if call.role == "sink"] == [
        Call("sink", "create", place, (4,)),
        Call("sink", "open", place),
        Call("sink", "write", place, (3, 1)),
        Call("sink", "close", place),
        Call("sink", "sync", place, (True,)),
    ]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with watching(Failing("write", full, after=1)), sink_of(place).open(place) as file:
        file.write(b"x", 0)
        with pytest.raises(OSError, match="No space left"):
            file.write(b"x", 1)


def test_a_conversion_goes_into_a_storage_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STORAGES, "memory", MEMORY)
    values = {name: numpy.arange(1000, dtype="f4") + number for number, name in enumerate("abc")}
    (tmp_path / "model").mkdir()
    save_file(values, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    target = f"memory:/{tmp_path}/out"
    for to, dtype in (("safetensors", ()), ("torch", "F16")):
        arguments = {"to": to, "dtype": dtype, "max_shard": "5KB", "workers": 1}
        there = f"{target}/{to}"
        streamconv.convert(tmp_path / "model", there, **arguments)
        streamconv.convert(tmp_path / "model", tmp_path / to, **arguments)
        assert streamconv.convert(tmp_path / "model", there, **arguments).finished_before
        assert not streamconv.verify(tmp_path / "model", there).problems
        for path in (tmp_path / to).rglob("*"):
            if path.is_file() and path.name != "conversion.json":
                assert (locate(there) / path.relative_to(tmp_path / to).as_posix()).read(1 << 30) == (
                    path.read_bytes()
                ), path
        with pytest.raises(DestinationError, match="another finished conversion"):
            streamconv.convert(tmp_path / "model", there, drop="a")
        streamconv.convert(tmp_path / "model", there, drop="a", overwrite=True)


@pytest.mark.parametrize("name", ["x" * 255, "y" * 248, "名" * 85, "é" * 124, "x" * 247, "x"])
def test_a_partial_file_has_a_name_that_fits_and_is_its_own(name: str, tmp_path: Path) -> None:
    final = locate(tmp_path / name)
    growing = writing.partial(final)
    assert growing.name.endswith(".partial")
    assert growing != writing.partial(locate(tmp_path / f"{name[:-1]}z"))
    writing.write_whole(final, b"data")
    assert [path.name for path in tmp_path.iterdir()] == [name]
