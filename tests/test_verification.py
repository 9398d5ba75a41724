"""A destination that is not what its plan says is told: which file, which tensor, which element."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import streamconv
from streamconv.api import LazyTensor, compare
from streamconv.cli import main
from streamconv.errors import DestinationError, UsageError
from streamconv.running import activations
from streamconv.running.state import sealed

STATE = {"a": torch.arange(20.0).reshape(4, 5), "b": torch.arange(6, dtype=torch.int64)}


@pytest.fixture(params=["safetensors", "torch"])
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source").mkdir()
    save_file(STATE, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    streamconv.convert(tmp_path / "source", tmp_path / "out", to=request.param, max_shard="60")
    return tmp_path / "source", tmp_path / "out"


def messages(source: Path, out: Path) -> str:
    return "\n".join(map(str, streamconv.verify(source, out).problems))


def test_what_is_right_is_right(converted: tuple[Path, Path]) -> None:
    source, out = converted
    found = streamconv.verify(source, out)
    assert not found.problems
    assert (found.tensors, found.bytes_compared) == (2, 128)


def flip_data(path: Path) -> None:
    # The third element of `a`, 2.0, wherever the format has it.
    data = bytearray(path.read_bytes())
    at = data.find(torch.arange(5.0).numpy().tobytes()) + 8
    data[at : at + 4] = torch.tensor([7.5]).numpy().tobytes()
    path.write_bytes(data)


def first_shard(out: Path) -> Path:
    return next(path for path in sorted(out.iterdir()) if "00001-of" in path.name)


def test_a_changed_element_is_named(converted: tuple[Path, Path]) -> None:
    source, out = converted
    flip_data(first_shard(out))
    found = messages(source, out)
    assert "tensor 'a': element 2 is 7.5, expected 2.0" in found
    assert str(first_shard(out)) in found


def change_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"\x80\x02") if data[:2] == b"PK" else 9
    data[at + 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: first_shard(out).unlink(), "the file is missing"),
        (lambda out: first_shard(out).write_bytes(b"x"), "1 bytes, expected"),
        (lambda out: change_header(first_shard(out)), "header bytes"),
        (lambda out: (out / "config.json").write_text("[]"), "config.json: it is not equal to"),
        (lambda out: (out / "config.json").unlink(), "config.json: the file is missing"),
        (lambda out: next(out.glob("*.index.json")).write_text("{}"), "not what was planned"),
        (lambda out: (out / "model.safetensors").write_bytes(b"old"), "not part of the conversion"),
    ],
)
def test_damage_is_named(
    converted: tuple[Path, Path], damage: Callable[[Path], object], message: str
) -> None:
    source, out = converted
    damage(out)
    assert message in messages(source, out)


def test_good_shards_are_not_to_be_removed_where_other_options_are_given(
    converted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = converted
    assert main(["verify", str(source), str(out), "--dtype", "BF16"]) == 1
    said = capsys.readouterr().err
    form = json.loads((out / ".streamconv" / "conversion.json").read_text())["target_format"]
    there = "--to torch --max-shard 60" if form == "torch" else "--max-shard 60"
    assert f"made with other options: {there}; here are given: --dtype BF16 (without options" in said
    assert "keep them: they are part of the one that" in said and "remove" not in said
    # What is on no record is not to be kept, and is not to be lost either.
    save_file(STATE, out / "stray.safetensors")
    said = messages(source, out)
    assert (
        "stray.safetensors: weights that are not part of the conversion (a loader may take them for" in said
    )
    assert "move them elsewhere" in said and "other options" not in said


def test_shards_in_a_directory_of_a_conversion_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{}")
    save_file(STATE, tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors")
    streamconv.convert(tmp_path / "pipe", tmp_path / "out", max_shard="60")
    said = messages(tmp_path / "pipe" / "unet", tmp_path / "out" / "unet")
    assert "diffusion_pytorch_model.safetensors: the file is missing" in said
    assert said.count("keep them") == 3 and "elsewhere" not in said


@pytest.mark.parametrize("elements", [1, 3, 1 << 17])
def test_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr("streamconv.running.comparison._ELEMENTS", elements)  # in blocks, and in one
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "b.pt")
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.pt").equal
    other = {
        "a": STATE["a"] + torch.tensor([0, 0, 0, 0.5, 0]),
        "b": STATE["b"].reshape(2, 3),
        "c": torch.ones(1),
    }
    other["a"][0, 3] += 0.25  # the largest difference, of four
    torch.save(other, tmp_path / "c.pt")
    rows = {row.name: row for row in compare(tmp_path / "a.safetensors", tmp_path / "c.pt").rows}
    assert (rows["a"].differing, rows["a"].max_abs) == (4, 0.75)
    assert rows["a"].max_rel == pytest.approx(0.75 / 3.75)
    assert "shapes differ" in rows["b"].note
    assert rows["c"].left is None and "right" in rows["c"].note


def test_zeros_of_two_signs_and_infinities(tmp_path: Path) -> None:
    save_file({"x": torch.tensor([0.0, torch.inf, torch.nan])}, tmp_path / "a.safetensors")
    save_file({"x": torch.tensor([-0.0, torch.inf, torch.nan])}, tmp_path / "b.safetensors")
    (row,) = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").rows
    assert (row.equal, row.differing) == (False, 0)
    assert "sign of a zero" in row.note
    save_file({"x": torch.tensor([0.0, 1.0, torch.nan])}, tmp_path / "b.safetensors")
    (row,) = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").rows
    assert row.max_abs == float("inf")


# ------------------------------------------------------------------------- what a record may choose

RUNS = """
from pathlib import Path
Path({mark!r}).touch()
from streamconv.plans.recipe import Recipe, rename
RECIPE = Recipe(name="evil", title="evil", source=None, target=None, rules=rename({{"a": "c", "b": "d"}}))
"""


def claim(out: Path, **arguments: object) -> None:
    """Have a record say that other options made the conversion."""
    record = out / ".streamconv" / "conversion.json"
    document = json.loads(record.read_text())
    document["arguments"] |= arguments
    record.write_text(json.dumps(sealed(document)))


@pytest.mark.parametrize(
    "name", ["evil.py", "evil.toml", "/away/evil.py", "./evil.py", "file:evil.py", "evil"]
)
def test_a_record_has_no_recipe_run(
    converted: tuple[Path, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = converted
    monkeypatch.chdir(out)
    (out / "evil.py").write_text(RUNS.format(mark=str(tmp_path / "ran")))
    (out / "evil.toml").write_text('[rename]\n"a" = "c"\n')
    claim(out, recipe=name.replace("/away", str(out)).replace("file:", f"file:{out}/"))
    with pytest.raises(UsageError, match="give it yourself") as caught:
        streamconv.verify(source, out)
    assert "conversion.json" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_recipe_on_record_is_run_where_it_is_given(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy that the message names works as it stands."""
    source = converted[0]
    recipe = tmp_path / "my recipe.py"
    recipe.write_text(RUNS.format(mark=str(tmp_path / "ran")))
    out = tmp_path / "made"
    assert main([str(source), str(out), "--recipe", str(recipe), "--dtype", "c=BF16", "--quiet"]) == 0
    (tmp_path / "ran").unlink()
    assert main(["verify", str(source), str(out)]) == 2
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    remedy = said[said.index("--dtype") :].strip().removesuffix(")")
    assert main(["verify", str(source), str(out), *shlex.split(remedy)]) == 0
    assert (tmp_path / "ran").exists()


def test_what_a_record_chose_is_said_with_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    save_file(STATE, tmp_path / "source" / "model.safetensors")
    source, out = str(tmp_path / "source"), tmp_path / "out"
    assert main([source, str(out), "--only", "a", "--dtype", "BF16", "--no-side-files", "--quiet"]) == 0
    chose = "--dtype BF16 --only a --no-side-files"
    assert main(["verify", source, str(out)]) == 0
    assert chose in capsys.readouterr().out
    assert main(["verify", source, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recorded"] == ["--dtype BF16", "--only a", "--no-side-files"]
    flip = bytearray((out / "model.safetensors").read_bytes())
    flip[-1] ^= 1
    (out / "model.safetensors").write_bytes(flip)
    assert main(["verify", source, str(out)]) == 1
    assert chose in capsys.readouterr().err
    # The same by command line: nobody else chose.
    assert main(["verify", source, str(out), "--only", "b"]) == 1
    said = capsys.readouterr().err
    assert "options on record: " not in said
    assert "made with other options: --dtype BF16 --only a --no-side-files; here are given: --only b" in said


# ------------------------------------------------------------------------------ with the record alone

CAST = {"dtype": "F16"}
"""What makes Python see every tensor, so that the record has a digest of each."""

PLAIN = {
    "layers.0.w": torch.arange(64.0).reshape(8, 8),
    "layers.1.w": torch.arange(64.0).reshape(8, 8) + 64,
    "norm.w": torch.arange(1000.0, 1008.0),
    "empty": torch.zeros(0, 3),
}


def plain(directory: Path) -> Path:
    directory.mkdir()
    save_file(PLAIN, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "toy"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def pipeline(directory: Path) -> Path:
    directory.mkdir()
    (directory / "model_index.json").write_text(
        '{"_class_name": "Toy", "unet": ["diffusers", "A"], "vae": ["diffusers", "B"]}'
    )
    for value, name in enumerate(("unet", "vae")):
        (directory / name).mkdir()
        save_file(
            {"w": torch.full((4, 4), float(value))}, directory / name / "diffusion_pytorch_model.safetensors"
        )
        (directory / name / "config.json").write_text("{}")
    return directory


TARGETS: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "safetensors": (plain, "out", {**CAST, "max_shard": "200"}),
    "torch": (plain, "out", {**CAST, "to": "torch", "max_shard": "200"}),
    "torch, copied": (plain, "out", {"to": "torch"}),
    "mindspore": (plain, "out", {**CAST, "to": "mindspore"}),
    "mindspore, copied": (plain, "out", {"to": "mindspore", "crc": True}),
    "mindspore's ranks": (plain, "out", {**CAST, "to": "mindspore", "tp": 2}),
    "mindspore-safetensors": (plain, "out", {**CAST, "to": "mindspore-safetensors", "max_shard": "200"}),
    "one safetensors file": (plain, "out.safetensors", CAST),
    "one torch file": (plain, "out.pt", CAST),
    "a pipeline": (pipeline, "out", CAST),
    "with all checksums": (plain, "out", {"checksum": True, "max_shard": "400"}),
}


@pytest.fixture(params=TARGETS)
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A destination whose source is gone."""
    make, name, options = TARGETS[request.param]
    source = make(tmp_path / "source")
    streamconv.convert(source, tmp_path / "place" / name, engine="inline", **options)
    shutil.rmtree(source)
    return tmp_path / "place" / name


def files_of(out: Path) -> list[Path]:
    """Every file of a conversion."""
    if out.is_file():
        return [out]
    return sorted(path for path in out.rglob("*") if path.is_file() and ".streamconv" not in path.parts)


def found_in(out: Path, **options: Any) -> str:
    return "\n".join(map(str, streamconv.verify(out, **options).problems))


def test_a_destination_is_verified_without_its_source(alone: Path) -> None:
    found = streamconv.verify(alone)
    assert (found.against, found.problems, found.unchecked, found.unlisted) == ("record", (), (), ())
    assert found.whole and found.tensors and found.bytes_compared
    parallel = streamconv.verify(alone, engine="local", workers=2, memory_budget="16MiB")
    assert replace(parallel, seconds=0.0) == replace(found, seconds=0.0)
    headers = streamconv.verify(alone, headers=True)
    assert headers.whole and (headers.tensors, headers.bytes_compared) == (found.tensors, 0)


def test_every_byte_of_every_file_counts(alone: Path) -> None:
    for path in files_of(alone):
        data = path.read_bytes()
        for at in {
            0,
            len(data) // 3,
            len(data) // 2,
            len(data) - 1,
            *range(0, len(data), len(data) // 16 + 1),
        }:
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            assert str(path) in found_in(alone), at
        path.write_bytes(data)
    assert not found_in(alone)


@pytest.mark.parametrize("headers", [False, True])
def test_every_file_that_is_cut_or_gone_or_renamed_is_named(alone: Path, headers: bool) -> None:
    for path in files_of(alone):
        data = path.read_bytes()
        for content in (data[:-1], data + b"\0", b""):
            path.write_bytes(content)
            assert f"{path}: {len(content):,} bytes, expected {len(data):,}" in found_in(
                alone, headers=headers
            )
        path.write_bytes(data)
        if path == alone:  # and there is nothing to verify where it is gone
            continue
        other = path.with_name("model-of-mine.safetensors")
        path.rename(other)
        found = found_in(alone, headers=headers)
        assert f"{path}: the file is missing" in found
        assert f"{other}: weights that are not part of the conversion" in found
        other.unlink()
        path.mkdir()
        assert f"{path}: the file is missing" in found_in(alone, headers=headers)
        path.rmdir()
        path.write_bytes(data)
    assert not found_in(alone, headers=headers)


def test_shards_that_changed_places_are_named(alone: Path) -> None:
    shards = [path for path in files_of(alone) if path.suffix not in (".json", ".ckpt")]
    if len(shards) < 2:
        return  # of one file, there is nothing to change places with
    one, two = shards[:2]
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)
    # Components whose tensors have the same names and shapes differ in nothing but their bytes.
    for headers in (False, True) if one.parent == two.parent else (False,):
        found = found_in(alone, headers=headers)
        assert str(one) in found and str(two) in found


def test_what_is_there_besides_is_told(alone: Path) -> None:
    if alone.is_file():
        (alone.parent / "model.safetensors").write_bytes(b"another's")
        assert not found_in(alone)
        return
    (alone / "README.md").write_text("mine")
    (alone / "elsewhere").mkdir()
    torch.save(PLAIN, alone / "mine.pt")
    torch.save({}, alone / "training_args.bin")
    (alone / "elsewhere" / "notes.txt").write_text("mine")
    for headers in (False, True):
        found = streamconv.verify(alone, headers=headers)
        assert [problem.file for problem in found.problems] == [str(alone / "mine.pt")]
        assert found.unlisted == ("README.md", "elsewhere/notes.txt", "training_args.bin")


def test_another_rank_or_component_is_a_stray_and_a_model_below_is_not(tmp_path: Path) -> None:
    for make, name, options in (TARGETS["mindspore's ranks"], TARGETS["a pipeline"], TARGETS["safetensors"]):
        source = (
            make(tmp_path / make.__name__)
            if not (tmp_path / make.__name__).exists()
            else tmp_path / make.__name__
        )
        out = tmp_path / f"{make.__name__}{options.get('to')}" / name
        streamconv.convert(source, out, engine="inline", **options)
        first = next(path for path in files_of(out) if path.suffix in (".ckpt", ".safetensors"))
        (out / "other").mkdir()
        shutil.copy(first, out / "other" / first.name)
        strays = [problem.file for problem in streamconv.verify(out).problems]
        assert strays == ([] if first.parent == out else [str(out / "other" / first.name)])


def test_what_only_the_kernel_saw_is_not_verified_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    streamconv.convert(source, out, engine="inline", dtype="layers.0.w=F16")
    found = streamconv.verify(out)
    assert not found.problems and not found.whole
    assert {tensor.tensor for tensor in found.unchecked} == {"layers.1.w", "norm.w"}
    assert (found.tensors, found.bytes_compared) == (2, 128)
    assert main(["verify", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("only part verified")
    assert "2 tensors, 288 B, NOT checked" in printed.err and "streamconv verify SRC DST" in printed.err
    assert main(["verify", str(out), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["equal"], document["whole"], document["against"]) == (True, False, "record")
    assert {row["tensor"]: row["nbytes"] for row in document["unchecked"]} == {
        "layers.1.w": 256,
        "norm.w": 32,
    }
    assert main(["verify", str(out), "--headers"]) == 0
    assert "no tensor read" in capsys.readouterr().out
    # Both remedies work.
    assert main(["verify", str(source), str(out)]) == 0
    words = [str(source), str(out), "--quiet", "--dtype", "layers.0.w=F16", "--checksum", "--overwrite"]
    assert main(words) == 0
    assert main(["verify", str(out)]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith(f"verified {out}: 4 tensors, 416 B and 2 other files")
    )


def test_headers_of_a_destination_with_its_source(tmp_path: Path) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    streamconv.convert(source, out, engine="inline", to="torch")
    (out / "config.json").write_text("{}")
    path = out / "pytorch_model.bin"
    data = path.read_bytes()
    at = data.find(torch.arange(1000.0, 1008.0).numpy().tobytes()) + 1
    path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    (problem,) = streamconv.verify(source, out, headers=True).problems
    assert problem.file == str(out / "config.json")
    assert {problem.tensor for problem in streamconv.verify(source, out).problems} == {None, "norm.w"}
    change_header(path)
    assert "header bytes" in "\n".join(map(str, streamconv.verify(source, out, headers=True).problems))


def test_finished_is_not_the_same_as_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    for words, advice in (((), f"streamconv verify {source} {out}"), (("--checksum", "--overwrite"), f"streamconv verify {out}")):  # fmt: skip
        assert main([str(source), str(out), "--quiet", *words]) == 0
        capsys.readouterr()
        assert main([str(source), str(out)]) == 0
        assert f"already converted; not checked again ({advice})" in capsys.readouterr().out
        assert main(shlex.split(advice)[1:]) == 0


# --------------------------------------------------------------------------------- a record that lies


def record_of(out: Path) -> Path:
    return out / ".streamconv" / "conversion.json"


Lie = Callable[[dict[str, Any]], object]
_SHARD = "model-00001-of-00002.safetensors"

IMPOSSIBLE: dict[str, Lie] = {
    "no files": lambda record: record.pop("files"),
    "no tensors": lambda record: record.pop("tensors"),
    "a list": lambda record: record.update(files=[]),
    "tensors in no file": lambda record: record["files"].pop(_SHARD),
    "a path out of it": lambda record: record["files"].update({"../x": record["files"]["config.json"]}),
    "an absolute path": lambda record: record["files"].update({"/etc/passwd": record["files"]["config.json"]}),
    "a negative size": lambda record: record["files"][_SHARD].update(size=-1),
    "a huge size": lambda record: record["files"][_SHARD].update(size=1 << 63),
    "a size in words": lambda record: record["files"][_SHARD].update(size="9"),
    "no digest": lambda record: record["files"][_SHARD].pop("xxh3_128"),
    "half a digest": lambda record: record["files"][_SHARD].update(xxh3_128="ab"),
    "parts of nothing": lambda record: record.update(checksum_part_bytes=0),
    "tiny parts": lambda record: record.update(checksum_part_bytes=1),
    "a digest too many": lambda record: tensor(record)["xxh3_128"].append("0" * 32),
    "bytes beyond the end": lambda record: tensor(record).update(at=[[1 << 60, 128]]),
    "other bytes than the shape": lambda record: tensor(record).update(shape=[9, 9]),
    "a shape beyond all": lambda record: tensor(record).update(shape=[1 << 62, 1 << 62]),
    "no shape": lambda record: tensor(record).update(shape=None),
    "no dtype": lambda record: tensor(record).update(dtype=["F16"]),
    "no such dtype": lambda record: tensor(record).update(dtype="F17"),
}  # fmt: skip


def tensor(record: dict[str, Any], name: str = "layers.0.w") -> dict[str, Any]:
    found: dict[str, Any] = next(rows[name] for rows in record["tensors"].values() if name in rows)
    return found


@pytest.fixture
def lying(tmp_path: Path) -> Callable[[Lie], Path]:
    out = tmp_path / "out"
    streamconv.convert(plain(tmp_path / "source"), out, engine="inline", **TARGETS["safetensors"][2])

    def tell(lie: Lie) -> Path:
        document = json.loads(record_of(out).read_text())
        lie(document)
        record_of(out).write_text(json.dumps(sealed(document)))
        return out

    return tell


@pytest.mark.parametrize("lie", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_record_that_cannot_be_is_refused(lying: Callable[[Lie], Path], lie: Lie) -> None:
    with pytest.raises(DestinationError, match="the record of the conversion cannot be used") as caught:
        streamconv.verify(lying(lie))
    assert caught.value.exit_code == 2


LIES: dict[str, tuple[Lie, str]] = {
    "another digest": (lambda record: tensor(record).update(xxh3_128=["0" * 32]), "'layers.0.w': its bytes have the xxh3-128"),
    "another digest of a file": (lambda record: record["files"]["config.json"].update(xxh3_128="0" * 32), "config.json: its bytes"),
    "another size": (lambda record: record["files"]["config.json"].update(size=1), "21 bytes, expected 1"),
    "another dtype": (lambda record: tensor(record).update(dtype="BF16"), "it is F16 [8, 8], on record BF16 [8, 8]"),
    "another shape": (lambda record: tensor(record).update(shape=[4, 16]), "it is F16 [8, 8], on record F16 [4, 16]"),
    "a tensor left out": (lambda record: [rows.pop("norm.w", 0) for rows in record["tensors"].values()], "'norm.w': it is in the file, and not on record"),
    "all tensors of a file left out": (lambda record: record["tensors"].pop(_SHARD), f"{_SHARD}: its bytes"),
    "a tensor of its own": (lambda record: record["tensors"][_SHARD].update(more=tensor(record)), "'more': it is on record, and not in the file"),
    "a weight file left out": (lambda record: [record[key].pop(_SHARD) for key in ("files", "tensors")], f"{_SHARD}: weights that are not part"),
    "a file of its own": (lambda record: record["files"].update({"more.json": record["files"]["config.json"]}), "more.json: the file is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_a_record_that_lies_is_found_out(lying: Callable[[Lie], Path], lie: Lie, message: str) -> None:
    assert message in found_in(lying(lie))


def test_no_bit_of_a_record_changes_unnoticed(lying: Callable[[Lie], Path]) -> None:
    out = lying(lambda record: None)
    data = record_of(out).read_bytes()
    for at in range(0, len(data), 7):
        for bit in (1, 16):
            record_of(out).write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            with pytest.raises(DestinationError, match="it cannot be used"):
                streamconv.verify(out)


def test_a_small_file_left_out_of_the_record_is_not_called_checked(
    lying: Callable[[Lie], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = lying(lambda record: record["files"].pop("config.json"))
    assert streamconv.verify(out).unlisted == ("config.json",)
    assert main(["verify", str(out)]) == 0
    assert "not checked, as no part of the conversion: config.json" in capsys.readouterr().out


def test_without_a_record_nothing_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    streamconv.convert(source, out, engine="inline")
    record_of(out).unlink()
    assert main(["verify", str(out)]) == 2
    assert "no record of a conversion" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert main(["verify", str(out), "--dtype", "BF16"]) == 2
    assert "--dtype cannot be used without the source" in capsys.readouterr().err


# ----------------------------------------------------------------------------- what a model computes


def language_model(directory: Path, **sizes: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            **sizes,
        )
    ).save_pretrained(directory)
    return directory


def test_a_model_computes_the_same_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = language_model(tmp_path / "source", num_key_value_heads=2)
    for words, differs in (((), False), (("--dtype", "BF16"), True), (("--to", "torch"), False)):
        out = tmp_path / f"out{len(words)}{differs}"
        assert main([str(source), str(out), "--quiet", *words]) == 0
        capsys.readouterr()
        assert main(["verify", str(source), str(out), "--headers", "--logits", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["activations"]
        assert [row["name"] for row in found["layers"]] == [
            "embedding",
            "layer 0",
            "layer 1",
            "layer 2",
            "logits",
        ]
        assert all((row["difference"] > 0) == differs for row in found["layers"])
        assert found["close"] and found["same_choice"] > 0.8


def test_the_streamed_model_is_that_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for number, config in enumerate(
        (
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),  # with tied embeddings
        )
    ):
        place = tmp_path / str(number)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        theirs = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
        ours = activations._model(streamconv.open(place).contents, lambda tensor: LazyTensor(tensor).torch())
        assert all(parameter.is_meta for parameter in ours.parameters())
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-6)
        assert all(parameter.is_meta for parameter in ours.parameters())  # nothing is kept


def test_only_what_this_thread_makes_has_no_weights() -> None:
    made: list[torch.nn.Module] = []
    with activations._without_weights():
        made.append(torch.nn.Linear(2, 2))
        other = Thread(target=lambda: made.append(torch.nn.Linear(2, 2)))
        other.start()
        other.join()
    made.append(torch.nn.Linear(2, 2))
    assert [{each.is_meta for each in module.parameters()} for module in made] == [{True}, {False}, {False}]


def test_a_wrong_config_or_tensor_shows_in_what_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = language_model(tmp_path / "source"), tmp_path / "out"
    assert main([str(source), str(out), "--quiet"]) == 0
    config = out / "config.json"
    right = config.read_text()
    config.write_text(json.dumps(json.loads(right) | {"hidden_act": "relu"}))
    found = streamconv.api.compare_activations(source, out)
    assert found.layers[0].difference == 0 < found.layers[1].difference and not found.close
    config.write_text(right)
    state = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    state[name], state["model.layers.1.self_attn.k_proj.weight"] = state["model.layers.1.self_attn.k_proj.weight"] * 9, state[name]  # fmt: skip
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    found = streamconv.api.compare_activations(source, out)
    assert [layer.difference > 0 for layer in found.layers] == [False, False, True, True, True]
    assert main(["verify", str(source), str(out), "--headers", "--logits"]) == 1
    assert "do not compute the same" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_a_config_chooses_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """transformers fetches a kernel that a config names, and runs it where `kernels` is installed."""
    source, out = language_model(tmp_path / "source"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: "a-stranger/kernel"}))
    assert main([str(source), str(out), "--quiet"]) == 0
    asked = []
    checks = [f"_check_and_adjust_{what}_implementation" for what in ("attn", "experts")]
    for check in checks:
        monkeypatch.setattr(
            PreTrainedModel, check, lambda _self, named, *_, **__: asked.append(named) or "eager"
        )
    assert streamconv.api.compare_activations(source, out).close
    assert set(asked) == {"eager"}


def test_logits_are_refused_where_they_cannot_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    assert main([str(source), str(out), "--quiet", "--checksum"]) == 0
    assert main(["verify", str(out), "--logits"]) == 2
    assert "name the source" in capsys.readouterr().err
    assert main(["verify", str(source), str(out), "--logits"]) == 2
    shown = capsys.readouterr().err
    assert "transformers has no language model for it (toy)" in shown
    assert "100%" not in shown  # before anything is read for hours
    model = language_model(tmp_path / "model")
    (tmp_path / "less").mkdir()
    state = load_file(model / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    shutil.copy(model / "config.json", tmp_path / "less")
    with pytest.raises(UsageError, match=r"tensor 'model\.norm\.weight': it is not in the checkpoint"):
        streamconv.api.compare_activations(model, tmp_path / "less")
    right = json.loads((model / "config.json").read_text())
    for change in ({"num_hidden_layers": 10**9}, {"hidden_size": 1 << 40}, {"hidden_size": "wide"}, {"vocab_size": -4},
                   {"num_attention_heads": 0}, {"hidden_act": "none of them"}, {"rope_parameters": 3}):  # fmt: skip
        shutil.copytree(model, tmp_path / "odd")
        (tmp_path / "odd" / "config.json").write_text(json.dumps(right | change))
        with pytest.raises(UsageError):
            streamconv.api.compare_activations(model, tmp_path / "odd")
        shutil.rmtree(tmp_path / "odd")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'streamconv\[torch\]'"):
        streamconv.api.compare_activations(model, model)


def test_where_the_record_is_gone_or_damaged_it_is_said_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    command = ["verify", str(source), str(out)]
    assert main([str(source), str(out), "--quiet", "--dtype", "BF16"]) == 0
    record = out / ".streamconv" / "conversion.json"
    record.write_bytes(record.read_bytes().replace(b"BF16", b"BF61", 1))
    assert main(command) == 2
    assert "streamconv verify SRC DST OPTIONS" in capsys.readouterr().err
    assert main([*command, "--dtype", "BF16"]) == 0  # which works
    shutil.rmtree(record.parent)
    assert main(command) == 1
    assert "there is no record of its conversion here" in capsys.readouterr().err
    assert main([*command, "--dtype", "BF16"]) == 0


def test_the_first_byte_of_a_header_that_differs_is_named(tmp_path: Path) -> None:
    source, out = plain(tmp_path / "source"), tmp_path / "out"
    assert main([str(source), str(out), "--quiet"]) == 0
    data = bytearray((out / "model.safetensors").read_bytes())
    data[40] ^= 1
    (out / "model.safetensors").write_bytes(data)
    found = streamconv.verify(source, out).problems
    assert "header bytes differ from the plan, from byte 40 on" in [problem.message for problem in found]
