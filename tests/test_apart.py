"""The source stays as it is, by whatever name or mount it is reached, and whatever a destination's own files say."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy
import orjson
import pytest
from safetensors.numpy import save_file
from test_run import contents, interrupted, make_source, weights

import streamconv
from streamconv.cli import main
from streamconv.errors import DestinationError, StreamconvError
from streamconv.plans import to_json
from streamconv.running.state import sealed
from streamconv.storage.local import LocalSource


def pipeline(directory: Path) -> Path:
    for name in ("unet", "vae"):
        (directory / name).mkdir(parents=True)
        weight = directory / name / "diffusion_pytorch_model.safetensors"
        save_file({"w": numpy.arange(12.0, dtype="f4").reshape(3, 4)}, weight)
    (directory / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return directory


@pytest.fixture(scope="module")
def mounts() -> None:
    """What gives a process mounts of its own."""
    try:
        subprocess.run(["unshare", "-rm", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mounts of one's own here")


def convert_with_mounts(bound: dict[Path, Path], *words: object) -> subprocess.CompletedProcess[str]:
    """A conversion in a process that sees directories, or files, in second places."""
    steps = [f"mount --bind '{what}' '{where}'" for where, what in bound.items()]
    command = " ".join(f"'{word}'" for word in (sys.executable, "-m", "streamconv", *words))
    return subprocess.run(
        ["unshare", "-rm", "sh", "-ec", "; ".join([*steps, command])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
        check=False,
    )


CASES: dict[str, tuple[dict[str, str], str, str]] = {
    "the source": ({"m": "home/src"}, "home/src", "m"),
    "below it": ({"m": "home/src"}, "home/src", "m/out"),
    "deep below it": ({"m": "home/src"}, "home/src", "m/unet/a/b"),
    "a directory of it": ({"m": "home/src/unet"}, "home/src", "m"),
    "below a directory of it": ({"m": "home/src/unet"}, "home/src", "m/out"),
    "what contains it": ({"m": "home"}, "home/src", "m"),
    "its name in what contains it": ({"m": "home"}, "home/src", "m/src"),
    "the source by the second name": ({"m": "home"}, "m/src", "home/src"),
    "a directory that is written to": ({"out/unet": "home/src/unet"}, "home/src", "out"),
    "the directory of a run": ({"out/.streamconv": "home/src"}, "home/src", "out"),
    "a file": ({"out/unet/file": "home/src/unet/file"}, "home/src", "out"),
    "one file": ({"m": "home/one"}, "home/one/a.safetensors", "m/a.safetensors"),
    "one file that is mounted": (
        {"out/b.bin": "home/one/a.safetensors"},
        "home/one/a.safetensors",
        "out/b.bin",
    ),
}


@pytest.mark.parametrize("option", ["--overwrite", "--restart"])
@pytest.mark.parametrize("case", CASES)
def test_no_mount_leads_to_the_source(tmp_path: Path, mounts: None, case: str, option: str) -> None:
    bound, source, destination = CASES[case]
    pipeline(tmp_path / "home" / "src")
    (tmp_path / "home" / "one").mkdir()
    save_file({"w": numpy.arange(12.0, dtype="f4")}, tmp_path / "home" / "one" / "a.safetensors")
    (tmp_path / "m").mkdir()
    name = "diffusion_pytorch_model.safetensors"
    named = {
        tmp_path / where.replace("file", name): tmp_path / what.replace("file", name)
        for where, what in bound.items()
    }
    for where, what in named.items():
        where.parent.mkdir(parents=True, exist_ok=True)
        where.mkdir(exist_ok=True) if what.is_dir() else where.touch()
    before = contents(tmp_path / "home")
    options = (
        [option, "--max-shard", "20", "--no-side-files"] if case != "one file that is mounted" else [option]
    )
    done = convert_with_mounts(named, tmp_path / source, tmp_path / destination, "--dtype", "F16", *options)
    assert contents(tmp_path / "home") == before
    assert done.returncode == 2, done.stderr
    assert "source" in done.stderr or (option == "--restart" and "overwrite" in done.stderr)


def test_a_mount_beside_the_source_is_no_matter(tmp_path: Path, mounts: None) -> None:
    pipeline(tmp_path / "home" / "src")
    (tmp_path / "m").mkdir()
    done = convert_with_mounts(
        {tmp_path / "m": tmp_path / "home"}, tmp_path / "home" / "src", tmp_path / "m" / "out"
    )
    assert done.returncode == 0, done.stderr
    assert not streamconv.verify(tmp_path / "home" / "src", tmp_path / "home" / "out").problems


@pytest.mark.parametrize("below", ["", "new"])
def test_directories_are_told_apart_by_what_the_storage_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """As with mounts, where there can be none: the storage says that two names lead to one directory."""
    source = make_source(tmp_path / "source", 3)
    (tmp_path / "second").mkdir()
    look = LocalSource.inode

    def inode(storage: LocalSource, place: str) -> Hashable | None:
        return look(storage, place.replace(str(tmp_path / "second"), str(source)))

    monkeypatch.setattr(LocalSource, "inode", inode)
    with pytest.raises(DestinationError, match="contains the other"):
        streamconv.convert(source, tmp_path / "second" / below, overwrite=True)
    assert not list((tmp_path / "second").iterdir())


# ------------------------------------------------------------------------------------- second names


@pytest.mark.parametrize("kind", [os.symlink, os.link])
@pytest.mark.parametrize("name", [".streamconv", ".streamconv/lock", ".streamconv/plan.json", ".streamconv/journal",
                                  "model.safetensors", "model.safetensors.partial", ".streamconv/plan.json.partial",
                                  "config.json", "config.json.partial", ".streamconv/conversion.json"])  # fmt: skip
@pytest.mark.parametrize("option", ["overwrite", "restart", None])
def test_no_second_name_leads_to_the_source(
    tmp_path: Path, kind: Callable[[Path, Path], None], name: str, option: str | None
) -> None:
    source = make_source(tmp_path / "source", 3)
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    if name == ".streamconv":
        os.symlink(source, out / name)  # directories have no hard links
    else:
        kind(source / ("config.json" if "config" in name else "model.safetensors"), out / name)
    before = contents(source)
    for _ in range(2):
        with contextlib.suppress(StreamconvError):
            streamconv.convert(source, out, dtype="F16", **({option: True} if option else {}))
        assert contents(source) == before


# ---------------------------------------------------------------- what stands in a run's own files


def claim(out: Path, **changes: object) -> None:
    """Have the plan of an unfinished run say something else."""
    plan = out / ".streamconv" / "plan.json"
    plan.write_bytes(orjson.dumps(sealed(orjson.loads(plan.read_bytes()) | changes)))


ESCAPES = ["../victim", "a/../../victim", "/ABSOLUTE", "link/victim", "link/../../victim", "./../victim"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("member", ["texts", "side_files", "outputs"])
@pytest.mark.parametrize("option", ["--restart", "--overwrite"])
def test_nothing_outside_is_removed_because_a_plan_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, member: str, option: str
) -> None:
    source = make_source(tmp_path / "source", 8)
    (tmp_path / "elsewhere").mkdir()
    victims = [tmp_path / "victim", tmp_path / "elsewhere" / "victim"]
    for victim in victims:
        victim.write_text("mine")
    interrupted(source, tmp_path / "out", monkeypatch)
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    name = name.replace("/ABSOLUTE", str(tmp_path / "victim"))
    document = orjson.loads((tmp_path / "out" / ".streamconv" / "plan.json").read_bytes())
    row = {
        "texts": [name, ""], "side_files": [str(source / "config.json"), name, 4, 4],
        "outputs": document["outputs"][0] | {"path": name},
    }[member]  # fmt: skip
    claim(tmp_path / "out", **{member: [row]})
    assert main([str(source), str(tmp_path / "out"), "--max-shard", "150KB", "--quiet"]) == 2
    code = main([str(source), str(tmp_path / "out"), "--max-shard", "150KB", "--quiet", option])
    # One of these names may be a plan's, and nothing but --restart discards another plan.
    assert code == (2 if option == "--overwrite" and name == "link/victim" else 0)
    assert [victim.read_text() for victim in victims] == ["mine", "mine"]


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_is_removed_because_a_record_names_it(tmp_path: Path, name: str) -> None:
    source = make_source(tmp_path / "source", 3)
    out = tmp_path / "out"
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "victim").write_text("mine")
    streamconv.convert(source, out)
    (out / "link").symlink_to(tmp_path / "elsewhere")
    record = out / ".streamconv" / "conversion.json"
    document = orjson.loads(record.read_bytes())
    document["files"] |= {name.replace("/ABSOLUTE", str(tmp_path / "victim")): 4}
    record.write_bytes(orjson.dumps(sealed(document)))
    streamconv.convert(source, out, dtype="F16", overwrite=True)
    assert (tmp_path / "victim").read_text() == (tmp_path / "elsewhere" / "victim").read_text() == "mine"
    assert not streamconv.verify(source, out).problems


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\x00garbage" * 50),
    "{}": lambda path: path.write_bytes(b"{}"),
    "[]": lambda path: path.write_bytes(b"[]"),
    "null": lambda path: path.write_bytes(b"null"),
    "a number": lambda path: path.write_bytes(b"5"),
    "deep": lambda path: path.write_bytes(b"[" * 900 + b"]" * 900),
    "deep below a name": lambda path: path.write_bytes(b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a directory": lambda path: (path.unlink(), path.mkdir(), (path / "file").touch()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["plan.json", "journal", "conversion.json"])
@pytest.mark.parametrize("option", ["--restart", "--overwrite"])
def test_files_of_a_run_that_cannot_be_read_are_told_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    damage: str, name: str, option: str,
) -> None:  # fmt: skip
    source = make_source(tmp_path / "source", 12)
    out = tmp_path / "out"
    words = [str(source), str(out), "--max-shard", "150KB", "--quiet"]
    if name == "conversion.json":
        assert main(words) == 0
    else:
        interrupted(source, out, monkeypatch)
    (out / "notes.txt").write_text("mine")
    DAMAGE[damage](out / ".streamconv" / name)
    before = {**contents(source), **contents(out)}
    capsys.readouterr()
    code, said = main(words), capsys.readouterr().err
    if code:
        assert (code, "internal error" in said) == (2, False), said
        assert option in said or (name == "journal" and "--restart" in said)
        assert str(out / ".streamconv" / name) in said
        assert {**contents(source), **contents(out)} == before
    assert main([*words, option]) == 0
    (out / "notes.txt").unlink()
    assert main([*words[:1], str(tmp_path / "whole"), *words[2:]]) == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert [path.name for path in (out / ".streamconv").iterdir()] == ["conversion.json"]


@pytest.mark.parametrize("name", ["plan.json", "conversion.json"])
def test_every_value_of_a_run_s_files_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Each value is replaced by ones of other types, and by huge numbers: one clear error, or it does not matter."""
    source = make_source(tmp_path / "source", 2)
    out = tmp_path / "out"
    words = [str(source), str(out), "--dtype", "layers.0.w=F16", "--quiet"]
    assert main(words) == 0
    if name == "plan.json":
        plan = streamconv.plan(source, dtype="layers.0.w=F16")
        (out / ".streamconv" / "conversion.json").unlink()
        (out / ".streamconv" / name).write_bytes(orjson.dumps(sealed(to_json(plan))))
    place = out / ".streamconv" / name
    whole = place.read_bytes()
    kept = shutil.copytree(out, tmp_path / "kept")
    count = 0
    for path in paths(orjson.loads(whole)):
        for value in ({}, [], None, -1, 1 << 62, "x", 0.5, True, "../x", [[]]):
            document = orjson.loads(whole)
            held = document
            for key in path[:-1]:
                held = held[key]
            held[path[-1]] = value
            place.write_bytes(orjson.dumps(sealed(document)))
            capsys.readouterr()
            code, said = main(words), capsys.readouterr().err
            assert code in (0, 2) and "internal error" not in said, (path, value, said)
            count += 1
            shutil.rmtree(out)
            shutil.copytree(kept, out)
    assert count > 100


def paths(value: object) -> list[list[object]]:
    """Where every value of a document stands; of a list, the first and the last."""
    found: list[list[object]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = [(at, value[at]) for at in sorted({0, len(value) - 1}) if value]
    else:
        return found
    for key, each in inner:
        found += [[key], *([key, *rest] for rest in paths(each))]
    return found
