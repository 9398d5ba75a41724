"""Each kind of thing that can be added, added from outside the package as CONTRIBUTING says, and used as users would.

What is added is in `toy_writer`, `toy_reader` (with an option), `toy_family`, `toy_storage` and `toy_engine`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import orjson
import pytest
import toy_engine
import toy_family
import toy_reader
import toy_storage
from engine_contract import EngineContract
from recipe_contract import RecipeContract
from safetensors.numpy import load_file, save_file

import streamconv
from streamconv import cli, readers
from streamconv.engines import ENGINES, Engine
from streamconv.errors import CheckpointError, UsageError
from streamconv.options.fields import ADDED
from streamconv.options.records import ReadingOptions
from streamconv.plans import registry
from streamconv.storage.resolve import STORAGES, Storage
from streamconv.writers.formats import FORMATS, Format


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    """Every table is as it was when a test is done; other tests know nothing of toys."""
    tables: list[dict[Any, Any]] = [FORMATS, ADDED, registry.RECIPES, STORAGES, ENGINES, toy_storage.FILES]
    held, forms = [dict(table) for table in tables], list(readers.FORMATS)
    yield
    for table, had in zip(tables, held, strict=True):
        table.clear()
        table.update(had)
    readers.FORMATS[:] = forms


def done(*words: object) -> None:
    """Run a command line that must end well."""
    assert cli.main([*map(str, words), "--quiet"]) == 0


# ----------------------------------------------------------------------------------------- a writer


def test_a_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {name: numpy.full((4,), number, numpy.float32) for number, name in enumerate("abc")}
    save_file(arrays, tmp_path / "model.safetensors")
    words = (tmp_path / "model.safetensors", tmp_path / "out", "--to", "toy", "--quiet")
    assert cli.main(list(map(str, words))) == 2
    assert "'toy' is not a known format" in capsys.readouterr().err

    FORMATS["toy"] = Format(
        "toy", "toy_writer", ".toy", ranks="toy_writer", options=frozenset({"max_shard", "tp"})
    )

    def converted(name: str, *words: str) -> dict[str, bytes]:
        out = tmp_path / name
        done(tmp_path / "model.safetensors", out, "--to", "toy", *words)
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("**/*.toy")}

    def file(name: str, names: str) -> bytes:
        return f"{name}: {' '.join(names)}\n".encode() + b"".join(arrays[each].tobytes() for each in names)

    assert converted("one") == {"model.toy": file("model.toy", "abc")}
    first, second = (f"model-0000{number}-of-00002.toy" for number in (1, 2))
    assert converted("shards", "--max-shard", "32") == {first: file(first, "ab"), second: file(second, "c")}
    index = orjson.loads((tmp_path / "shards" / "model.toy.index.json").read_bytes())
    assert index["weight_map"] == {"a": first, "b": first, "c": second}
    assert converted("ranks", "--tp", "2") == {
        "0/toy.toy": file("toy.toy", "ac"),
        "1/toy.toy": file("toy.toy", "b"),
    }
    assert cli.main([*map(str, words), "--dtype", "BF16"]) == 2
    assert "toys are made of F32" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--pp has no effect with --to toy"):
        streamconv.plan(tmp_path / "model.safetensors", to="toy", pp=2)


# ----------------------------------------------------------------------- a reader, and an option of it


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    source = tmp_path / "runs" / "one"
    source.mkdir(parents=True)
    (source / "toy.txt").write_text("w 3 w.bin\n")
    (source / "few.txt").write_text("v 2 w.bin\n")
    (source / "w.bin").write_bytes(numpy.arange(3, dtype="f4").tobytes())
    return source


def test_a_reader(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights are in this directory"):
        streamconv.open(toys)
    readers.FORMATS.insert(0, toy_reader.FORMAT)
    with pytest.raises(CheckpointError, match="give one of them: one"):
        streamconv.open(toys.parent)
    done(toys, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0, 1, 2]
    (toys / "toy.txt").write_text("w 3 ../w.bin\n")
    with pytest.raises(CheckpointError, match="a line is not understood"):
        streamconv.open(toys)


def test_an_option(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readers.FORMATS.insert(0, toy_reader.FORMAT)
    few: Any = {"toy_list": "few.txt"}
    with pytest.raises(TypeError, match="no option 'toy_list'"):
        streamconv.plan(toys, **few)

    ADDED[ReadingOptions] = {"toy_list": toy_reader.OPTION}

    assert list(streamconv.open(toys, **few)) == ["v"]
    done(toys, tmp_path / "out", "--toy-list", "few.txt")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["v"]
    recorded = orjson.loads((tmp_path / "out" / ".streamconv" / "conversion.json").read_bytes())["arguments"]
    assert recorded["toy_list"] == "few.txt"
    assert not streamconv.verify(toys, tmp_path / "out").problems  # with the option on record
    assert cli.main(["a", "b", "--toy-list", "x", "--toy-list", "y"]) == 2
    assert "given twice" in capsys.readouterr().err
    assert cli.main(["convert", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--toy-list NAME which list of toys to take (default: toy.txt)" in shown
    with pytest.raises(UsageError, match=r"--toy-list has no effect on this source \(safetensors\)"):
        streamconv.plan(tmp_path / "out" / "model.safetensors", **few)


# ----------------------------------------------------------------------------------------- a family


class TestFamily(RecipeContract):
    recipe = "toy-llama"
    not_restored = frozenset({"h.0.attn.inv_freq", "h.1.attn.inv_freq"})

    @pytest.fixture(autouse=True)
    def registered(self) -> None:
        registry.register(toy_family.RECIPE)

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        config = {
            "model_type": "toy",
            "n_embd": 16,
            "n_inner": 24,
            "n_head": 2,
            "n_layer": 2,
            "vocab_size": 32,
        }
        shapes = {
            name: declared.shape
            for name, declared in toy_family.TOY.tensors(toy_family.TOY.sizes_of(config)).items()
        }
        random = numpy.random.default_rng(0)
        (tmp_path / "source").mkdir()
        save_file(
            {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()},
            tmp_path / "source" / "model.safetensors",
        )
        (tmp_path / "source" / "config.json").write_bytes(orjson.dumps(config))
        return tmp_path / "source"

    def test_it_is_found_and_listed(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert streamconv.plan(source, recipe="auto").arguments["recipe"] == "auto"
        done(source, tmp_path / "llama", "--to-arch", "llama")
        done(tmp_path / "llama", tmp_path / "again", "--to-arch", "toy")
        had = load_file(source / "model.safetensors")
        for name, array in load_file(tmp_path / "again" / "model.safetensors").items():
            assert numpy.array_equal(had[name], array)
        assert orjson.loads((tmp_path / "again" / "config.json").read_bytes()) == orjson.loads(
            (source / "config.json").read_bytes()
        )
        assert cli.main(["recipes"]) == 0
        assert "toy-llama" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- a storage


def test_a_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = numpy.arange(1000, dtype="f4").reshape(10, 100)
    save_file({"a": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 100}')
    for name in ("model.safetensors", "config.json"):
        toy_storage.FILES[f"memory://models/one/{name}"] = bytearray((tmp_path / name).read_bytes())
    assert cli.main(["inspect", "memory://models/one"]) == 2
    assert "there is no storage for memory://" in capsys.readouterr().err

    STORAGES["memory"] = toy_storage.MEMORY

    # From it, to it, and within it; what options name may be there as well.
    done("memory://models/one", tmp_path / "out", "--dtype", "F16", "--like", "memory://models/one")
    assert numpy.array_equal(load_file(tmp_path / "out" / "model.safetensors")["a"], values.astype("f2"))
    assert (tmp_path / "out" / "config.json").read_text() == '{"hidden_size": 100}'
    # What the record names elsewhere is not asked for: the options are given again.
    done("verify", "memory://models/one", tmp_path / "out", "--dtype", "F16", "--like", "memory://models/one")
    done("memory://models/one", "memory://models/two", "--to", "torch")
    done("memory://models/two", tmp_path / "back")
    assert numpy.array_equal(load_file(tmp_path / "back" / "model.safetensors")["a"], values)
    assert streamconv.open("memory://models/two")["a"][2:3].tolist() == values[2:3].tolist()
    assert cli.main(["memory://models/one", str(tmp_path / "local"), "--engine", "local"]) == 2
    assert (
        "--engine local cannot be used with memory://, which only this process has" in capsys.readouterr().err
    )
    left = [name for name in toy_storage.FILES if name.startswith("memory://models/")]
    assert not [name for name in left if name.endswith((".partial", "journal", "lock"))]


def test_a_storage_that_other_processes_have_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside" / "mirrors").mkdir(parents=True)
    (tmp_path / "outside" / "mirrors" / "__init__.py").write_text(
        "from streamconv.storage.local import LocalSink, LocalSource\n"
        "from streamconv.storage.resolve import Storage\n"
        "def path(place): return place.removeprefix('mirror:/')\n"
        "class Source(LocalSource):\n"
        "    def state(self, place): return super().state(path(place))\n"
        "    def entries(self, place): return super().entries(path(place))\n"
        "    def open(self, place): return super().open(path(place))\n"
        "MIRROR = Storage(Source)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "outside"))
    mirrors = importlib.import_module("mirrors")
    values = numpy.arange(1000, dtype="f4").reshape(10, 100)
    save_file({"a": values}, tmp_path / "model.safetensors")
    words = (f"mirror:/{tmp_path}/model.safetensors", "--dtype", "F16", "--engine", "local")

    STORAGES["mirror"] = mirrors.MIRROR

    done(*words, tmp_path / "out")
    assert numpy.array_equal(load_file(tmp_path / "out" / "model.safetensors")["a"], values.astype("f2"))

    STORAGES["mirror"] = Storage(lambda: mirrors.Source())  # which no other process can import

    with pytest.raises(UsageError, match="--engine local cannot be used with mirror://"):
        streamconv.convert(words[0], tmp_path / "again", engine="local")
    assert not (tmp_path / "again").exists()


# ----------------------------------------------------------------------------------------- an engine


class TestEngine(EngineContract):
    engine = staticmethod(toy_engine.run)


def test_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {f"t{number}": numpy.full((1000,), number, numpy.float32) for number in range(10)}
    save_file(arrays, tmp_path / "model.safetensors")
    assert cli.main([str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--engine", "toy"]) == 2
    assert "'toy' is not a known engine; known are local, inline" in capsys.readouterr().err

    ENGINES["toy"] = Engine(toy_engine.run)
    toy_engine.ran.clear()

    done(tmp_path / "model.safetensors", tmp_path / "out", "--dtype", "F16", "--engine", "toy")
    done("verify", tmp_path / "model.safetensors", tmp_path / "out", "--engine", "toy")
    streamconv.convert(
        tmp_path / "model.safetensors", tmp_path / "again", dtype="F16", engine="toy", workers=2
    )
    assert len(toy_engine.ran) == 3 and all(toy_engine.ran)
    written = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")}
    assert written["out"] == written["again"]
    assert load_file(tmp_path / "out" / "model.safetensors")["t3"].tolist() == [3] * 1000
